"""The one path from a model to ONNX files, with their parity checks: runs, exports and comparisons all take it.

A static plan and a rule that looks at each image are two ways to reduce a model. The plan is folded into the dense
graph; the rule is exported as the graph that decides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..core import progress
from ..core.plan import TokenPlan
from ..core.specs import ExportSpec
from .options import PARITY_IMAGES

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from ..export.deploy import Deployment
    from ..export.graph import Graph, OpenedGraph
    from ..export.parity import ParityCheck
    from ..export.yardstick import Yardstick
    from ..prune.loaded import LoadedModel
    from ..prune.methods.rule import TokenRule


@dataclass(frozen=True)
class Reduced:
    """A model, and what is taken away from it.

    Attributes:
        loaded: The model; its own weights are those of the dense graph.
        reduction: A plan, a rule, or None for the whole model.
        weights: State-dict name -> tensor, where tuning changed weights of the reduced model.
        tuned_sha256: Hash of the model with those.
        trained_sha256: Where ``loaded`` holds tuned weights itself: hash of those that tuning started from.
    """

    loaded: LoadedModel
    reduction: TokenPlan | TokenRule | None = None
    weights: Mapping[str, Tensor] | None = None
    tuned_sha256: str | None = None
    trained_sha256: str | None = None

    @property
    def plan(self) -> TokenPlan | None:
        return self.reduction if isinstance(self.reduction, TokenPlan) else None

    @property
    def rule(self) -> TokenRule | None:
        return None if self.reduction is None or isinstance(self.reduction, TokenPlan) else self.reduction

    @property
    def tuned(self) -> LoadedModel:
        """The model under the hash of its tuned weights; they must be in it, as by ``with_weights``."""
        return replace(self.loaded, sha256=self.tuned_sha256 or self.loaded.sha256)


@dataclass(frozen=True)
class Written:
    """Graphs of a model.

    Attributes:
        files: ``"dense"`` and ``"pruned"``, as far as they were asked for, in the form that was asked for.
        plain: ``"dense"``, ``"tuned"`` (with the tuned weights) and ``"pruned"`` in the plain form, as far as they were
            made, opened; plans fold into these. What is written for a target may not take a plan any more.
        checks: Every parity check, passed.
        deployment: How the files were written for their target; None for the plain form.
    """

    files: Mapping[str, Path]
    plain: Mapping[str, OpenedGraph]
    checks: tuple[ParityCheck, ...]
    deployment: Deployment | None = None

    @property
    def last(self) -> Path:
        """The pruned file, or the dense one where nothing was pruned."""
        return self.files.get("pruned") or self.files["dense"]


@dataclass
class _Writing:
    """What :func:`write_graphs` has so far."""

    plain: dict[str, OpenedGraph] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)
    checks: list[ParityCheck] = field(default_factory=list)
    yardsticks: dict[str, Yardstick] = field(default_factory=dict)
    deployment: Deployment | None = None


def write_graphs(
    reduced: Reduced,
    spec: ExportSpec,
    folder: Path,
    scratch: Path,
    images: Tensor,
    *,
    with_dense: bool = False,
    plain_dense: Graph | None = None,
    tokens: bool = False,
    name: str = "pruned.onnx",
) -> Written:
    """Write the graphs of a model and check each against the form that it comes from.

    Args:
        folder: Where the files go, as ``dense.onnx`` and ``pruned.onnx``.
        scratch: Where graphs go that are needed on the way; they may be used as long as it stands.
        images: Float32 [image, channel, height, width], preprocessed: what graphs are compared on.
        with_dense: Also leave the dense graph in ``folder``.
        plain_dense: The plain dense graph, where it has been written before.
        tokens: Of a model that ends in the mean of its tokens: return these instead.
        name: Of the file of a rule, as its parity check calls it.

    Raises:
        UserError: The target does not take the graph, or a rule leaves the number of tokens to each image.
        ParityError: A graph does not compute what the model does.
    """
    from ..export.graph import open_graph
    from ..prune.device import on_cpu

    plain = plain_form(spec)
    done = _Writing()
    wanted = ["dense"] if with_dense or reduced.reduction is None else []
    with on_cpu(reduced.loaded.adapter):  # Graphs are compared with PyTorch where onnxruntime runs them.
        if reduced.rule is None or wanted:
            place = folder if wanted and spec.deploy_for is None else scratch
            if plain_dense is None:
                plain_dense = place / "dense.onnx"
                with progress.stage(f"Exporting {reduced.loaded.name}"):
                    write_dense(reduced.loaded, plain_dense, plain)
            done.plain["dense"] = open_graph(plain_dense)
        if reduced.plan is not None:
            _fold(reduced, plain, folder if spec.deploy_for is None else scratch, scratch, done)
            wanted.append("pruned")
        _check(reduced, images, done)
        if tokens:
            _return_tokens(reduced, images, wanted[-1], scratch, done)
        _finish(reduced, spec, folder, wanted, images, done)
        if reduced.rule is not None:
            _write_rule(reduced, spec, plain, folder / name, scratch, images, done)
    return Written(done.files, done.plain, tuple(done.checks), done.deployment)


def plain_form(spec: ExportSpec) -> ExportSpec:
    """The form that plans fold into: for no target, in the opset that the target's form is then written from.

    Raises:
        UserError: The target does not take the opset.
    """
    from ..export.deploy import plain_opset

    return ExportSpec(plain_opset(spec.deploy_for, spec.opset), spec.dynamic_batch, spec.batch_size)


def write_dense(loaded: LoadedModel, path: Path, spec: ExportSpec) -> None:
    """Export an opened model with everything the file should know about itself.

    One that came as an ONNX file is that file again, in its own opset and batch.
    """
    if loaded.graph is not None:
        from ..export.graph_model import write_graph

        write_graph(loaded, path)
        return
    from ..export.dense import export_dense
    from ..export.deploy import plain_opset
    from ..prune.device import on_cpu

    with on_cpu(loaded.adapter):
        export_dense(
            loaded.adapter.model,
            path,
            name=loaded.name,
            geometry=loaded.adapter.geometry,
            preprocessing=loaded.preprocessing,
            classes=loaded.classes,
            weights_sha256=loaded.sha256,
            opset=plain_opset(None, spec.opset),
            dynamic_batch=spec.dynamic_batch,
            batch_size=spec.batch_size,
        )


def _fold(reduced: Reduced, plain: ExportSpec, place: Path, scratch: Path, done: _Writing) -> None:
    from ..export.fold import fold_file
    from ..export.graph import open_graph
    from ..prune.tune.weights import with_weights

    source = done.plain["dense"]
    if reduced.weights:
        path, model = scratch / "tuned.onnx", reduced.loaded.adapter.model
        with progress.stage("Exporting the tuned model"), with_weights(model, reduced.weights):
            write_dense(reduced.tuned, path, plain)
        source = done.plain["tuned"] = open_graph(path)
    with progress.stage("Folding the plan"):
        done.plain["pruned"] = fold_file(source, reduced.plan, place / "pruned.onnx").graph


def _check(reduced: Reduced, images: Tensor, done: _Writing) -> None:
    from ..export.parity import check_dense, check_pruned, dense_yardstick, pruned_yardstick

    adapter, plan = reduced.loaded.adapter, reduced.plan
    if "dense" not in done.plain:
        return
    if plan is None:
        images = images[:PARITY_IMAGES]
    if adapter.geometry.output == "values":
        _check_values(reduced, images.numpy(), done)
        return
    own = done.yardsticks["dense"] = dense_yardstick(adapter, images)
    with progress.stage("Checking parity"):
        if plan is None:
            done.checks += check_dense(adapter, done.plain["dense"].path, images, yardstick=own)
        else:
            own_pruned = done.yardsticks["pruned"] = pruned_yardstick(adapter, plan, images, reduced.weights)
            files = done.plain["dense"].path, done.plain["pruned"].path
            options = dict(weights=reduced.weights, yardsticks=(own, own_pruned))
            done.checks += check_pruned(adapter, plan, *files, images, **options)


def _check_values(reduced: Reduced, images: np.ndarray, done: _Writing) -> None:
    """The checks of a graph of several outputs, or of others than one vector: each output is compared by itself."""
    from ..export.parity import check_fold, compare_outputs, run_graph

    dense, source = done.plain["dense"], done.plain.get("tuned", done.plain["dense"])
    done.yardsticks.update({name: file_yardstick(graph, images) for name, graph in done.plain.items()})
    with progress.stage("Checking parity"):
        names = [value.name for value in dense.model.graph.outputs]
        found, own = run_graph(dense, images), done.yardsticks["dense"]
        what = f"dense.onnx equals {reduced.loaded.graph.name}"
        done.checks += compare_outputs(what, names, run_graph(reduced.loaded.graph, images), found, own, top1=False)
        if reduced.plan is not None:
            done.checks += check_fold(reduced.plan, source, done.plain["pruned"].path, images, yardstick=own)


def _return_tokens(reduced: Reduced, images: Tensor, name: str, scratch: Path, done: _Writing) -> None:
    from ..export.tokens import check_tokens, write_tokens

    written = write_tokens(done.plain[name], reduced.plan, scratch / f"{name}.tokens.onnx")
    done.checks.append(check_tokens(reduced.loaded.adapter, reduced.plan, written.path, images))
    done.plain[name] = written


def _finish(
    reduced: Reduced, spec: ExportSpec, folder: Path, wanted: Sequence[str], images: Tensor, done: _Writing
) -> None:
    """Put the plain graphs that were asked for into the folder, in the form of the target where there is one."""
    if spec.deploy_for is None:
        done.files.update({name: done.plain[name].path for name in wanted})
        return
    if not wanted:
        return
    top1 = reduced.loaded.adapter.geometry.output == "logits"
    with progress.stage(f"Writing for {spec.deploy_for}"):
        for name in wanted:
            done.files[name] = folder / f"{name}.onnx"
            options = dict(top1=top1, opset=spec.opset, yardstick=done.yardsticks[name])
            done.deployment, checks = deploy_checked(
                done.plain[name], spec.deploy_for, done.files[name], images.numpy(), **options
            )
            done.checks += checks


def _write_rule(
    reduced: Reduced, spec: ExportSpec, plain: ExportSpec, path: Path, scratch: Path, images: Tensor, done: _Writing
) -> None:
    """Export the graph that chooses the tokens of each image, and compare it with the rule in PyTorch."""
    from ..export.deploy import deploy_file
    from ..export.rules import check_rule, compare_rule, export_rule
    from ..prune.tune.weights import with_weights

    adapter, rule, decisions = reduced.loaded.adapter, reduced.rule, scratch / "decisions.onnx"
    trained = reduced.loaded.sha256 if reduced.weights else reduced.trained_sha256
    options = dict(opset=plain.opset, dynamic_batch=spec.dynamic_batch, batch_size=spec.batch_size)
    with with_weights(adapter.model, reduced.weights):
        with progress.stage(f"Exporting {reduced.loaded.name} with {rule.name}"):
            export_rule(reduced.tuned, rule, path, decisions_path=decisions, trained_sha256=trained, **options)
        with progress.stage("Checking parity"):
            checks = check_rule(adapter, rule, path, decisions, images)
        if spec.deploy_for is not None:
            with progress.stage(f"Writing for {spec.deploy_for}"):
                done.deployment = deploy_file(path, spec.deploy_for, path, opset=spec.opset)
                deploy_file(decisions, spec.deploy_for, decisions, opset=spec.opset)
                # Unoptimized, as in deploy_checked. With PyTorch and not with the plain graph: which of the two decided
                # otherwise where scores are equal within rounding can then be proved.
                what = f" for {spec.deploy_for}"
                checks.append(compare_rule(adapter, rule, path, decisions, images, optimized=False, what=what))
    done.files["pruned"] = path
    done.checks += checks
    if near := next((check.near_ties for check in checks if check.near_ties), 0):
        keep = "keeps" if near == 1 else "keep"
        progress.remark(
            f"{near} of {len(images)} images {keep} other tokens in onnxruntime than in PyTorch: scores that are equal "
            "within rounding can fall either way in any two programs"
        )


def deploy_checked(
    plain: Graph,
    target: str,
    output: Path,
    images: np.ndarray,
    *,
    top1: bool,
    opset: int | None = None,
    yardstick: Yardstick | None = None,
    name: str = "",
) -> tuple[Deployment, list[ParityCheck]]:
    """Write a plain graph in the form that a deployment target takes, and compare the two in onnxruntime.

    Args:
        output: May be the file of ``plain``.
        images: float32 [image, channel, height, width], preprocessed.
        top1: Whether the output is logits, whose largest has to stay.
        opset: As in :func:`~vpruner.export.deploy.prepare_for`.
        yardstick: Of the model that the graph holds; None: of the graph in PyTorch.
        name: What checks call the file; empty: as ``output``.

    Raises:
        UserError: The target does not take the opset, or something in the graph.
        ParityError: The two disagree.
    """
    from ..export.deploy import deploy_file
    from ..export.graph import open_graph
    from ..export.parity import compare_outputs, run_all_outputs, run_graph

    plain = open_graph(plain)
    reference = run_graph(plain, images)
    deployed = deploy_file(plain, target, output, opset=opset)
    what = f"{name or output.name} for {target} equals the plain graph"
    # Unoptimized: onnxruntime would fuse again what was taken apart, and run the graph that it is compared with.
    found = run_all_outputs(output, images, optimized=False)
    names = [value.name for value in plain.model.graph.outputs]
    checks = compare_outputs(what, names, reference, found, yardstick or file_yardstick(plain, images), top1=top1)
    return deployed, checks


def file_yardstick(graph: OpenedGraph, images: np.ndarray) -> Yardstick:
    """The own float32 error of the model in a file: PyTorch is loaded, and runs the graph, if it is asked for."""
    from ..export.yardstick import FileYardstick

    def read():
        from ..export.graph_model import read_module

        return read_module(graph)

    return FileYardstick(images, read)


def model_bytes(path: Path) -> int:
    """Size of an ONNX file and, where its weights lie outside, of the file beside it."""
    return sum(part.stat().st_size for part in path.parent.glob(f"{path.name}*"))
