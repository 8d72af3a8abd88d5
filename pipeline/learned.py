"""Plans and tuned weights: written, replaced, described."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..core import progress
from ..core.errors import UserError
from ..core.files import is_onnx
from ..core.plan import TokenPlan, updated_prefix
from ..core.specs import LearnSpec, ModelSpec
from ..core.text import command, option

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.content_plan import ContentPlan
    from ..prune.learned import Learned
    from ..prune.loaded import LoadedModel
    from ..prune.methods.rule import TokenRule
    from ..prune.saved import SavedState


def check_learn(spec: LearnSpec, model: ModelSpec) -> None:
    """Refuse, before any work, what cannot be learned by these options or not of this model.

    Raises:
        UserError: Says what to give instead.
    """
    if model.is_onnx and spec.tune.startswith("gates"):
        raise UserError(
            f"{model.what} is an ONNX file, and {option('tune', spec.tune)} needs a PyTorch model",
            f"use {option('tune', 'weights')}, or name the model instead of the file",
        )
    if spec.select == "static":
        return
    if model.is_onnx:
        selected = option("select", "content")
        raise UserError(
            f"{model.what} is an ONNX file, and {selected} writes a graph of its own from a PyTorch model",
            f"leave out {option('select')}, or name the model instead of the file",
        )
    from ..prune.learn import check_selection

    check_selection(spec.select, spec.tune)


def saved_beside(output: Path, spec: LearnSpec) -> SavedState:
    """Where a job that writes ``output`` keeps its state until it has finished.

    Raises:
        UserError: Something else lies there.
    """
    from ..prune.saved import SavedState

    # "." has no name of its own, and is refused as an output elsewhere.
    return SavedState(output.parent / f"{output.name or 'run'}.state", spec.resume)


def rule_of(plan: TokenPlan | ContentPlan) -> TokenRule | None:
    """The rule of a plan by content; None for a static one."""
    if isinstance(plan, TokenPlan):
        return None
    from ..prune.methods.content import ContentRule

    return ContentRule.of(plan)


def chosen_plans(rule: TokenRule, loaded: LoadedModel, images: Tensor) -> list[TokenPlan]:
    """What a rule that keeps tokens makes of each image: the plan that reads and updates the same patches.

    Args:
        images: [image, channel, height, width], preprocessed.
    """
    import torch

    geometry, adapter = rule.geometry, loaded.adapter
    prefix, depth = geometry.prefix_tokens, geometry.depth
    patches = torch.arange(geometry.patches) if rule.entry is None else torch.tensor(rule.entry)
    patches, sets = patches.expand(len(images), -1), []
    with torch.inference_mode(), rule.applied(adapter) as run:
        run(images.to(next(adapter.model.parameters())))
        for block in range(depth):
            entering, work = patches, rule.work(block)
            if (rows := run.decisions.get(block)) is not None:
                patches = patches.gather(1, rows[:, prefix:].cpu() - prefix)
            if work is None:
                sets.append((entering, patches, patches))
            else:
                updated = updated_prefix(geometry, block)
                counts = work.keys - prefix, work.queries - updated, work.mlps - updated
                sets.append([part[:, :count] for part, count in zip((entering, patches, patches), counts, strict=True)])

    def listed(part: Tensor, image: int) -> tuple[int, ...]:
        return tuple(sorted(part[image].tolist()))

    return [
        TokenPlan(
            loaded.name,
            geometry,
            *(tuple(listed(part, image) for part in kind) for kind in zip(*sets, strict=True)),
            listed(patches, image),
        )
        for image in range(len(images))
    ]


def check_tuned_output(path: Path) -> None:
    """Refuse a file for tuned weights whose place is taken by something else: weights are not had again for nothing."""
    if path.is_dir() or (path.exists() and _tuned_for(path) is None):
        raise UserError(
            f"the tuned weights would go to {path}, which holds something else",
            f"choose another name with {option('output')}",
        )


def _tuned_for(path: Path) -> str | None:
    """The digest of the plan that a file's weights were tuned for; None for a file that does not say so."""
    from ..core.metadata import TUNED_FOR

    if is_onnx(path):
        from ..export.files import read_model

        try:
            return read_model(path).metadata_props.get(TUNED_FOR)
        except UserError:
            return None
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get(TUNED_FOR)
    except (SafetensorError, OSError):
        return None


def tuned_beside(plan_path: Path, model: str | Path | None) -> Path:
    """Where the weights go that are tuned for a plan: an ONNX file's into the same graph, a PyTorch model's alone."""
    return plan_path.with_suffix(".tuned.onnx" if is_onnx(model) else ".safetensors")


def replace_learned(
    loaded: LoadedModel,
    learned: Learned,
    plan_path: Path,
    weights_path: Path,
    inputs: Sequence[str | Path | None],
) -> TokenPlan | ContentPlan:
    """:func:`save_learned` where an earlier plan may stand: weights tuned for that one do not stay beside the new one.

    Under the name of the new plan they would be taken for its own. They go once the new plan stands, and only those
    that say they are of the plan it replaced; anything else of that name is the user's, and is remarked on.

    Args:
        inputs: Files that the command reads, which stay; None for those not given.
    """
    from ..core.content_plan import load_plan

    read = [Path(path) for path in inputs if path is not None and Path(path).exists()]
    places = (tuned_beside(plan_path, None), tuned_beside(plan_path, "graph.onnx"))
    beside = [
        path
        for path in places
        if path.is_file()
        and not (learned.weights and path == weights_path)
        and not any(path.samefile(other) for other in read)
    ]
    replaced = None
    if beside and plan_path.exists():
        with suppress(UserError):
            replaced = load_plan(plan_path)
    # A card may name them as the weights that were just pruned.
    if replaced is not None and replaced.provenance.get("tuned_weights_sha256") == loaded.sha256:
        beside = []
    stale = [path for path in beside if replaced is not None and _tuned_for(path) == replaced.digest]
    plan = save_learned(loaded, learned, plan_path, weights_path)
    for path in beside:
        if path in stale:
            remove_tuned(path)
            progress.remark(f"removed {path}: its weights were tuned for the plan that {plan_path.name} held before")
        else:
            progress.remark(f"{path} was left as it is; its weights do not belong to the new {plan_path.name}")
    return plan


def remove_tuned(path: Path) -> None:
    if not is_onnx(path):
        path.unlink(missing_ok=True)
        return
    from ..export.files import remove_model

    remove_model(path)


def described(loaded: LoadedModel, learned: Learned) -> TokenPlan | ContentPlan:
    """The plan to ship, which names the ONNX file that it was learned from and the tuned weights that go with it."""
    from ..prune.backbones.vit import weights_sha256
    from ..prune.tune.weights import with_weights

    plan = learned.content or learned.plan
    if loaded.graph is not None and loaded.graph.sha256 is not None:
        # What tells folding that this graph is the one, where its metadata does not.
        plan = plan.with_provenance(graph={"name": loaded.graph.name, "sha256": loaded.graph.sha256})
    if learned.weights:
        with with_weights(loaded.adapter.model, learned.weights) as model:
            plan = plan.with_provenance(tuned_weights_sha256=weights_sha256(model))
    return plan


def save_learned(loaded: LoadedModel, learned: Learned, plan_path: Path, weights_path: Path) -> TokenPlan | ContentPlan:
    """Write the plan, and beside it the whole model with tuned weights where there are any; returns the plan written.

    The plan is that by content where there is one.
    A model that came as an ONNX file is written as one, with the weights in the user's own graph. The plan comes last:
    where it stands, what it speaks of does.

    Raises:
        ParityError: That graph does not compute what the tuned model does.
    """
    from ..core.metadata import TUNED_FOR, WEIGHTS_SHA256
    from ..prune.tune.weights import with_weights

    plan, model = described(loaded, learned), loaded.adapter.model
    if learned.weights:
        plan = plan.with_provenance(tuned_weights_file=weights_path.name)
        with with_weights(model, learned.weights):
            if loaded.graph is not None:
                from ..export.graph_model import write_graph

                tuned = replace(loaded, sha256=plan.provenance["tuned_weights_sha256"])
                write_graph(tuned, weights_path, {TUNED_FOR: plan.digest})
            else:
                metadata = {TUNED_FOR: plan.digest, WEIGHTS_SHA256: loaded.sha256}
                save_weights(model.state_dict(), weights_path, metadata)
    plan.save(plan_path)
    return plan


def tuned_for_plan(
    loaded: LoadedModel, plan: TokenPlan | ContentPlan, plan_path: Path | None, weights_path: Path | None
) -> dict[str, Tensor] | None:
    """The weights that were tuned for a plan, where they are not the model's own already.

    Args:
        plan_path: Where the plan was read from; None: not known.
        weights_path: The file of the tuned model; None: the one next to the plan's, where it is there.

    Returns:
        State-dict name -> tensor of what tuning changed; None where it changed nothing, or its file is not known.

    Raises:
        UserError: The file does not fit the model, or holds other weights than those tuned for the plan.
    """
    import torch

    from ..prune.backbones.vit import weights_sha256
    from ..prune.weights_file import check_weights_file, load_weights

    tuned = plan.provenance.get("tuned_weights_sha256")
    if weights_path is None:
        name = plan.provenance.get("tuned_weights_file")
        if not tuned or loaded.sha256 == tuned or plan_path is None or not isinstance(name, str):
            return None
        weights_path = plan_path.with_name(Path(name).name)
        if not weights_path.is_file():
            return None
    check_weights_file(weights_path)
    if is_onnx(weights_path):
        from ..export.graph_model import open_graph_model

        stated = {key: value for key, value in loaded.preprocessing.to_json().items() if key != "size"}
        found = open_graph_model(weights_path, preprocessing=stated)
        model, sha256 = found.adapter.model, found.sha256
    else:
        model = copy.deepcopy(loaded.adapter.model)
        load_weights(model, weights_path, loaded.name)
        sha256 = weights_sha256(model)
    if sha256 != tuned:
        raise UserError(
            f"{weights_path} has weights {sha256[:12]}, the plan goes with {str(tuned)[:12] if tuned else 'no others'}",
            "give the file that was written with the plan",
        )
    own = dict(loaded.adapter.model.named_parameters())
    found = {name: value.detach().to(own[name].device) for name, value in model.named_parameters()}
    found = {name: value for name, value in found.items() if not torch.equal(value, own[name])}
    return found or None


def save_weights(state: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    from safetensors.torch import save_file

    from ..core.files import atomic_path

    with atomic_path(path) as temporary:
        # The format marker is what loaders other than timm look for.
        save_file(
            {name: value.cpu().contiguous() for name, value in state.items()}, temporary, {"format": "pt", **metadata}
        )


def remark_untuned(
    plan: TokenPlan | ContentPlan,
    sha256: str,
    *,
    plan_path: str | Path | None = None,
    verb: str = "export",
) -> None:
    """Say that a plan goes with tuned weights, where the model has those it was learned on.

    Args:
        plan_path: Where the plan was read from; None: not known here.
        verb: The command to give again with those weights, of a PyTorch model; of an ONNX file it is fold.
    """
    tuned = plan.provenance.get("tuned_weights_sha256")
    if tuned and sha256 != tuned:
        name = str(plan.provenance.get("tuned_weights_file") or "model.safetensors")
        weights, where = name, "PLAN"
        if plan_path is not None:
            where, beside = str(plan_path), Path(plan_path).with_name(Path(name).name)
            weights = str(beside) if beside.is_file() else name
        again = (
            command("fold", weights, plan=where)
            if is_onnx(name)
            else command(verb, "MODEL", weights=weights, plan=where)
        )
        progress.remark(
            f"the model has its weights from before tuning; {name} next to the plan holds the tuned ones; use them "
            f"with: {again}"
        )
