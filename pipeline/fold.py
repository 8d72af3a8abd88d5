"""Fold a plan into a dense ONNX file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..core import progress
from ..core.files import scratch_beside
from ..core.plan import TokenPlan
from .graphs import deploy_checked, file_yardstick
from .inputs import noise_like
from .learned import remark_untuned

if TYPE_CHECKING:
    from ..export.deploy import Deployment
    from ..export.fold import FoldRecord
    from ..export.graph import Graph, OpenedGraph
    from ..export.parity import ParityCheck


def fold_checked(
    dense: Graph,
    plan: TokenPlan | None,
    output: Path,
    *,
    deploy_for: str | None = None,
    plan_path: str | Path | None = None,
) -> tuple[FoldRecord, list[ParityCheck], Deployment | None]:
    """Fold a plan (None: the identity plan) into a dense graph and check the result in onnxruntime, without PyTorch.

    The graph may come from any exporter whose graphs are understood; only files of ours name their weights.

    Args:
        dense: A file, a model in memory, or an opened graph.
        plan_path: Where the plan was read from, for remarks.
        deploy_for: Write it in the form that this deployment target takes; None: in the plain form.

    Raises:
        PlanError: The plan is for another model.
        UserError: The graph cannot be read, is not understood, or is pruned already; the target does not take it.
        ParityError: The pruned graph does not compute what the dense one does with the other tokens masked.
    """
    from ..export.files import move_model
    from ..export.fold import fold_file
    from ..export.graph import open_graph
    from ..export.parity import check_fold

    opened = open_graph(dense)
    about = opened.metadata
    if plan is None:
        plan = _identity(opened)
    with scratch_beside(output) as scratch:
        written, deployed = scratch / "pruned.onnx", None
        with progress.stage(f"Folding the plan into {output.name}"):
            record = fold_file(opened, plan, written)
        if about is not None:
            remark_untuned(plan, about.weights_sha256, plan_path=plan_path)
        elif _learned_from(plan, opened):
            remark_untuned(plan, "", plan_path=plan_path)
        elif not plan.is_identity:
            progress.remark(
                f"{opened.name} does not name its weights; whether they are those the plan was learned on "
                f"({plan.model}) could not be checked"
            )
        images, top1 = noise_like(opened.image_sizes()), plan.geometry.output == "logits"
        yardstick = file_yardstick(opened, images)
        with progress.stage("Checking parity"):
            checks = check_fold(plan, opened, written, images, yardstick=yardstick, name=output.name)
        if deploy_for is not None:
            with progress.stage(f"Writing it for {deploy_for}"):
                options = dict(top1=top1, yardstick=yardstick, name=output.name)
                deployed, found = deploy_checked(record.graph, deploy_for, written, images, **options)
            checks += found
        move_model(written, output)
    return record, checks, deployed


def _identity(graph: OpenedGraph) -> TokenPlan:
    """The plan that drops nothing; names the model and its weights where the graph does."""
    about = graph.metadata
    if about is None:
        return TokenPlan.identity(graph.stem, graph.shape())
    return TokenPlan.identity(about.model, about.geometry, weights_sha256=about.weights_sha256)


def _learned_from(plan: TokenPlan, opened: OpenedGraph) -> bool:
    """Whether the graph is, byte for byte, the ONNX file that the plan was learned from."""
    graph = plan.provenance.get("graph")
    return isinstance(graph, Mapping) and opened.sha256 is not None and graph.get("sha256") == opened.sha256
