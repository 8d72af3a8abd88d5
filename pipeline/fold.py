"""Fold a plan into a dense ONNX file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..core import progress
from ..core.files import scratch_beside
from ..core.plan import TokenPlan
from .graphs import deploy_checked
from .inputs import noise_images
from .learned import remark_untuned

if TYPE_CHECKING:
    from ..export.deploy import Deployment
    from ..export.fold import FoldRecord
    from ..export.parity import ParityCheck


def fold_checked(
    dense: Path,
    plan: TokenPlan | None,
    output: Path,
    *,
    deploy_for: str | None = None,
    plan_path: str | Path | None = None,
) -> tuple[FoldRecord, list[ParityCheck], Deployment | None]:
    """Fold a plan (None: the identity plan) into a dense file and check the result in onnxruntime, without PyTorch.

    The file may come from any exporter whose graphs are understood; only those of ours name their weights.
    """
    from ..export.files import load_model, move_model, naming
    from ..export.fold import fold_file, read_metadata
    from ..export.parity import check_fold
    from ..export.recognise.normalise import prepare

    graph = load_model(dense)
    about = read_metadata(graph, str(dense))
    if plan is None:
        if about is None:
            with naming(dense):
                plan = TokenPlan.identity(dense.stem, prepare(graph).geometry)
        else:
            plan = TokenPlan.identity(about.model, about.geometry, weights_sha256=about.weights_sha256)
    del graph
    with scratch_beside(output) as scratch:
        with progress.stage(f"Folding the plan into {output.name}"):
            record = fold_file(dense, plan, scratch / "pruned.onnx")
        if about is not None:
            remark_untuned(plan, about.weights_sha256, plan_path=plan_path)
        elif _learned_from(plan, dense):
            remark_untuned(plan, "", plan_path=plan_path)
        elif not plan.is_identity:
            progress.remark(
                f"{dense.name} does not name its weights; whether they are those the plan was learned on "
                f"({plan.model}) could not be checked"
            )
        with progress.stage("Checking parity"):
            checks = check_fold(plan, dense, scratch / "pruned.onnx", noise_images(plan.geometry))
        written, deployed = scratch / "pruned.onnx", None
        if deploy_for is not None:
            with progress.stage(f"Writing it for {deploy_for}"):
                images, top1 = noise_images(plan.geometry), plan.geometry.output == "logits"
                deployed, check = deploy_checked(written, deploy_for, written, images, top1=top1)
            checks.append(check)
        move_model(written, output)
    return record, checks, deployed


def _learned_from(plan: TokenPlan, path: Path) -> bool:
    """Whether ``path`` is, byte for byte, the ONNX file that the plan was learned from."""
    from ..core.files import file_sha256

    graph = plan.provenance.get("graph")
    return isinstance(graph, Mapping) and graph.get("sha256") == file_sha256(path)
