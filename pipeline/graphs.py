"""Every path from a model to an ONNX file, with its parity checks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..core import progress
from ..core.errors import UserError
from ..core.files import scratch_beside
from ..core.plan import TokenPlan
from .inputs import noise_images
from .learned import remark_untuned, rule_of

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from ..core.content_plan import ContentPlan
    from ..export.deploy import Deployment
    from ..export.parity import ParityCheck
    from ..prune.loaded import LoadedModel
    from ..prune.methods.rule import TokenRule


def model_bytes(path: Path) -> int:
    """Size of an ONNX file and, where its weights lie outside, of the file beside it."""
    return sum(part.stat().st_size for part in path.parent.glob(f"{path.name}*"))


def write_dense(loaded: LoadedModel, path: Path, *, opset: int, dynamic_batch: bool, batch_size: int) -> None:
    """Export an opened model with everything the file should know about itself.

    One that came as an ONNX file is that file again, in its own opset and batch.
    """
    if loaded.graph is not None:
        from ..export.rebuild.graph import write_graph

        write_graph(loaded, path)
        return
    from ..export.dense import export_dense

    export_dense(
        loaded.adapter.model,
        path,
        name=loaded.name,
        geometry=loaded.adapter.geometry,
        preprocessing=loaded.preprocessing,
        classes=loaded.classes,
        weights_sha256=loaded.sha256,
        opset=opset,
        dynamic_batch=dynamic_batch,
        batch_size=batch_size,
    )


def export_checked(
    loaded: LoadedModel,
    output: Path,
    *,
    plan: TokenPlan | ContentPlan | None,
    opset: int | None = None,
    deploy_for: str | None = None,
    dynamic_batch: bool = False,
    batch_size: int = 1,
    tokens: bool = False,
    plan_path: str | Path | None = None,
) -> tuple[list[ParityCheck], Deployment | None]:
    """Export a model, whole or pruned; the file appears only when its parity holds.

    Args:
        plan: Static or by content; None: whole.
        plan_path: Where the plan was read from, for remarks.
        deploy_for: Write it in the form that this deployment target takes; None: in the plain form.
        tokens: Of a model that ends in the mean of its tokens: return these instead.

    Raises:
        PlanError: The plan is for another model.
        ParityError: The graph does not compute what the model does.
    """
    import torch

    from ..export.deploy import plain_opset
    from ..export.fold import fold_file
    from ..export.parity import check_dense, check_pruned

    exported = plain_opset(deploy_for, opset)
    geometry = loaded.adapter.geometry
    if tokens:
        from ..export.tokens import check_pools_by_mean, check_tokens, write_tokens

        check_pools_by_mean(loaded.adapter)
    if plan is not None:
        plan.check_fits(loaded.name, geometry, loaded.sha256)
        remark_untuned(plan, loaded.sha256, plan_path=plan_path)
    if (rule := None if plan is None else rule_of(plan)) is not None:
        if tokens:
            raise UserError("--tokens goes with a plan of static positions", "leave it out")
        tuned = loaded.sha256 == plan.provenance.get("tuned_weights_sha256")
        return export_rule_checked(
            loaded,
            output,
            rule=rule,
            images=torch.from_numpy(noise_images(geometry)),
            opset=opset,
            deploy_for=deploy_for,
            dynamic_batch=dynamic_batch,
            batch_size=batch_size,
            trained_sha256=plan.provenance.get("weights_sha256") if tuned else None,
        )
    with scratch_beside(output) as scratch:
        dense, pruned = scratch / "dense.onnx", scratch / "pruned.onnx"
        with progress.stage(f"Exporting {loaded.name}"):
            write_dense(loaded, dense, opset=exported, dynamic_batch=dynamic_batch, batch_size=batch_size)
        if plan is not None:
            with progress.stage("Folding the plan"):
                fold_file(dense, plan, pruned)
        with progress.stage("Checking parity"):
            images = torch.from_numpy(noise_images(geometry))
            if plan is None:
                checks = check_dense(loaded.adapter, dense, images)
            else:
                checks = check_pruned(loaded.adapter, plan, dense, pruned, images)
        written, deployed = pruned if plan is not None else dense, None
        if tokens:
            written = write_tokens(written, scratch / output.name)
            checks.append(check_tokens(loaded.adapter, plan, written, images))
        if deploy_for is not None:
            with progress.stage(f"Writing it for {deploy_for}"):
                top1 = geometry.output == "logits"
                deployed, check = deploy_checked(written, deploy_for, written, images.numpy(), top1=top1, opset=opset)
            checks.append(check)
        move_model(written, output)
    return checks, deployed


def export_rule_checked(
    loaded: LoadedModel,
    output: Path,
    *,
    rule: TokenRule,
    images: Tensor,
    opset: int | None = None,
    deploy_for: str | None = None,
    dynamic_batch: bool = False,
    batch_size: int = 1,
    trained_sha256: str | None = None,
) -> tuple[list[ParityCheck], Deployment | None]:
    """Export a model that chooses the tokens of each image; the file appears only when its parity holds.

    Args:
        images: Float32 [image, channel, height, width], preprocessed: what the graph is compared with PyTorch on.
        trained_sha256: As for :func:`~vpruner.export.rules.export_rule`.

    Raises:
        UserError: The rule leaves the number of tokens to each image, or the target does not take the graph.
        ParityError: The graph does not compute what the rule does.
    """
    from ..export.deploy import deploy_file, plain_opset
    from ..export.rules import check_rule, compare_rule, export_rule

    exported, adapter, deployed = plain_opset(deploy_for, opset), loaded.adapter, None
    with scratch_beside(output) as scratch:
        written, decisions_path = scratch / output.name, scratch / "decisions.onnx"
        with progress.stage(f"Exporting {loaded.name} with {rule.name}"):
            options = dict(opset=exported, dynamic_batch=dynamic_batch, batch_size=batch_size)
            export_rule(loaded, rule, written, decisions_path=decisions_path, trained_sha256=trained_sha256, **options)
        with progress.stage("Checking parity"):
            checks = check_rule(adapter, rule, written, decisions_path, images)
        if deploy_for is not None:
            with progress.stage(f"Writing it for {deploy_for}"):
                deployed = deploy_file(written, deploy_for, written, opset=opset)
                deploy_file(decisions_path, deploy_for, decisions_path, opset=opset)
                # Unoptimized, as in deploy_checked. With PyTorch and not with the plain graph: who decided otherwise
                # where scores are equal within rounding can then be told.
                what = f" for {deploy_for}"
                checks.append(compare_rule(adapter, rule, written, decisions_path, images, optimized=False, what=what))
        move_model(written, output)
    for check in checks:
        if check.near_ties:
            keep = "keeps" if check.near_ties == 1 else "keep"
            progress.remark(
                f"{check.near_ties} of {len(images)} images {keep} other tokens in onnxruntime than in PyTorch: scores "
                "that are equal within rounding can fall either way in any two programs"
            )
            break
    return checks, deployed


def deploy_checked(
    plain: Path,
    target: str,
    output: Path,
    images: np.ndarray,
    *,
    top1: bool,
    opset: int | None = None,
    tolerance: float = 1e-4,
) -> tuple[Deployment, ParityCheck]:
    """Write a plain graph in the form that a deployment target takes, and compare the two in onnxruntime.

    Args:
        output: May be ``plain``.
        images: float32 [image, channel, height, width], preprocessed.
        top1: Whether the output is logits, whose largest has to stay.
        opset, tolerance: As in :func:`~vpruner.export.deploy.prepare_for` and :func:`~vpruner.export.parity.compare`.

    Raises:
        UserError: The target does not take the opset, or something in the graph.
        ParityError: The two disagree.
    """
    from ..export.deploy import deploy_file
    from ..export.parity import compare, run_onnx

    reference = run_onnx(plain, images)
    deployed = deploy_file(plain, target, output, opset=opset)
    name = f"{output.name} for {target} equals the plain graph"
    # Unoptimized: onnxruntime would fuse again what was taken apart, and run the graph that it is compared with.
    found = run_onnx(output, images, optimized=False)
    return deployed, compare(name, reference, found, tolerance, top1=top1)


def move_model(source: Path, target: Path) -> None:
    """Rename an ONNX file into place. With weights in a second file it is rewritten there, since it names that file."""
    if len(list(source.parent.glob(f"{source.name}*"))) == 1:
        source.replace(target)
        return
    from ..export.files import load_model, save_model

    save_model(load_model(source), target)
