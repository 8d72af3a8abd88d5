"""Rules that choose tokens image by image -> ONNX, where each block keeps a fixed number of them.

The graph is what PyTorch's exporter makes of the model while it follows the rule: scores, one ``TopK`` per block with a
constant K, and ``Gather`` along one axis. All shapes but the batch are static, and nothing is scattered. Tokens that a
:class:`~vpruner.prune.methods.rule.Keep` drops are dead in that block already, and those that the head does not read in
the last one, as in the rule's PyTorch form. Where a rule freezes tokens, those that are updated stand in front: a
``Slice`` takes them, and a ``Concat`` puts the others behind them again.

Of equal scores the lower place wins: ONNX defines it so for ``TopK``, onnxruntime does it, and the PyTorch form sorts
stably. TensorRT's documentation promises no order of equal values. Scores that are equal up to rounding can fall either
way in any two programs; :func:`check_rule` recognises such images, proves them and counts them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx_ir.passes import common as passes

from ..core.errors import ParityError, UserError
from ..core.extras import require
from ..core.finite import check_finite
from ..core.json_file import json_sha256
from ..core.metadata import ModelMetadata
from ..core.plan import Geometry, TokenPlan
from ..core.rounding import allowed
from ..core.text import option
from ..prune.float64 import in_float64
from .dense import evaluating, finish, trace
from .files import save_model
from .parity import (
    ParityCheck,
    compare_exactly,
    compare_float32,
    dense_yardstick,
    run_all_outputs,
    run_in_chunks,
    run_onnx,
)
from .yardstick import FEW, Yardstick

if TYPE_CHECKING:
    import torch

    from ..prune.backbones.vit import ViTAdapter
    from ..prune.loaded import LoadedModel
    from ..prune.methods.rule import RuleRun, TokenRule

#: What no graph of a rule may hold: shapes that depend on data, scatters, and an index written out for each channel.
REFUSED = (
    "NonZero", "Compress", "Unique", "ScatterND", "ScatterElements", "Scatter", "GatherElements", "GatherND", "If",
    "Loop", "Scan",
)  # fmt: skip
#: Noise on the input that tells a near-tie from a fault: ten times float32's rounding of a ViT's activations (about
#: 1e-6 between PyTorch and onnxruntime on logits), so a tie within rounding falls the other way in about every other
#: draw.
_NOISE = 1e-5
_DRAWS = 16
_ANY_SIZE = 1 << 62
#: Arrays in a rule's settings up to this size are written out in the metadata, larger ones by their hash.
_WRITTEN_OUT = 64


def export_rule(
    loaded: LoadedModel,
    rule: TokenRule,
    path: str | os.PathLike,
    *,
    opset: int = 20,
    dynamic_batch: bool = False,
    batch_size: int = 1,
    trained_sha256: str | None = None,
    decisions_path: str | os.PathLike | None = None,
) -> Path:
    """Write the model that follows ``rule`` as an ONNX file: ``image`` [batch, 3, height, width] -> logits or features.

    Args:
        loaded: The model, float32; left as it was.
        rule: Its counts must be static.
        opset, dynamic_batch, batch_size: As for :func:`~vpruner.export.dense.export_dense`.
        trained_sha256: Where the weights of ``loaded`` were refitted to the rule: hash of those before.
        decisions_path: Also write the same graph with one more output per block that decides, ``decision.BLOCK``, int64
            [batch, any], as :attr:`~vpruner.prune.methods.rule.RuleRun.decisions`; :func:`check_rule` reads it.

    Raises:
        UserError: The rule leaves the number of tokens to the image, opset or batch are out of range, or the model or
            the rule cannot be exported.
    """
    about = _describe(loaded, rule, trained_sha256)
    torch, model = require("torch"), loaded.adapter.model
    fold_constants = require("onnxscript.optimizer").fold_constants
    with evaluating(model), torch.no_grad(), rule.applied(loaded.adapter) as run:
        parameter = next(model.parameters())
        geometry = loaded.adapter.geometry
        run(parameter.new_zeros(1, geometry.in_chans, *geometry.image_size))
        outputs = [f"decision.{block}" for block in run.decisions]
        with _returning_decisions(run):
            options = dict(opset=opset, dynamic_batch=dynamic_batch, batch_size=batch_size)
            graph = trace(model, about, more_outputs=outputs, **options)
    # Queries, keys and values are projected apart, by slices of one weight: cut now, and not whenever a runtime loads.
    fold_constants(graph, onnx_shape_inference=False, input_size_limit=_ANY_SIZE, output_size_limit=_ANY_SIZE)
    finish(graph, about, opset)
    refused = next((node for node in graph.graph if node.op_type in REFUSED), None)
    if refused is not None:
        raise UserError(
            f"the rule {rule.name} cannot be exported: its graph holds {refused.op_type} (node {refused.name!r}), "
            "which runtimes do not all take",
            f"choose another {option('method')}",
        )
    if decisions_path is not None:
        save_model(graph, decisions_path)
    del graph.graph.outputs[1:]
    passes.RemoveUnusedNodesPass()(graph)
    return save_model(graph, path)


def static_counts(rule: TokenRule) -> tuple[int, ...]:
    """Tokens that enter each block and leave the last.

    Raises:
        UserError: The images decide them.
    """
    counts = rule.static_counts()
    if counts is None:
        raise counts_depend(rule.name)
    return tuple(int(count) for count in counts)


def counts_depend(method: str) -> UserError:
    return UserError(
        f"{method} leaves the number of tokens to each image, and the shapes of an exported graph are fixed",
        f"export a method with fixed counts, such as {option('method', 'saint-frozen')}",
    )


def describe_rule(rule: TokenRule) -> dict[str, Any]:
    """What a file says of the rule in it; JSON values only.

    Returns:
        ``method``; ``merges``: whether tokens that leave live on in others; ``counts``: tokens (prefix included) that
        enter each block, and that the head reads; ``work``, where tokens are frozen: those of each block that are read,
        that attend and that pass the MLP; ``settings``.
    """
    fields = dataclasses.fields(rule) if dataclasses.is_dataclass(rule) else ()
    settings = {field.name: _as_json(getattr(rule, field.name)) for field in fields if field.name != "geometry"}
    counts, geometry = list(static_counts(rule)), rule.geometry
    if not geometry.head_patches:
        counts[-1] = geometry.head_prefix
    about = {"method": rule.name, "merges": bool(rule.merges), "counts": counts}
    work = [rule.work(block) for block in range(geometry.depth)]
    if any(work):
        rows = [own or (counts[block], *counts[block + 1 :][:1] * 2) for block, own in enumerate(work)]
        about["work"] = [[int(row[kind]) for row in rows] for kind in range(3)]
    return {**about, "settings": settings}


def _as_json(value: Any) -> Any:
    if isinstance(value, TokenPlan):
        return {"plan": value.digest}
    if dataclasses.is_dataclass(value):
        named = {"name": value.name} if hasattr(value, "name") else {}
        return {**named, **{field.name: _as_json(getattr(value, field.name)) for field in dataclasses.fields(value)}}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {str(key): _as_json(item) for key, item in value.items()}
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    if isinstance(value, np.ndarray):
        if value.size > _WRITTEN_OUT:
            return {"shape": list(value.shape), "sha256": hashlib.sha256(np.ascontiguousarray(value)).hexdigest()}
        return value.tolist()
    if isinstance(value, (list, tuple)):
        return [_as_json(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)


def _describe(loaded: LoadedModel, rule: TokenRule, trained_sha256: str | None) -> ModelMetadata:
    described = describe_rule(rule)
    return ModelMetadata(
        loaded.name,
        loaded.sha256 if trained_sha256 is None else trained_sha256,
        loaded.adapter.geometry,
        loaded.preprocessing,
        loaded.classes,
        plan=json_sha256(described),
        rule=described,
        tuned_sha256=None if trained_sha256 in (None, loaded.sha256) else loaded.sha256,
    )


@contextmanager
def _returning_decisions(run: RuleRun) -> Iterator[None]:
    """The model returns its decisions after its output, until the context is left."""
    model, forward = run.model, run.model.forward

    def with_decisions(image):
        return forward(image), *run.decisions.values()

    model.forward = with_decisions
    try:
        yield
    finally:
        del model.forward
        run.decisions.clear()  # The exporter's tensors hold no numbers.


# -- parity checks ----------------------------------------------------------------------------------------------------


def check_rule(
    adapter: ViTAdapter,
    rule: TokenRule,
    path: str | os.PathLike,
    decisions_path: str | os.PathLike,
    images: torch.Tensor,
    *,
    yardstick: Yardstick | None = None,
) -> list[ParityCheck]:
    """All parity checks of a rule, on preprocessed ``images`` [image, channel, height, width], float32.

    References are the timm model as it came, alone or with timm's own attention masks, and the rule's PyTorch form.
    Where onnxruntime decides otherwise for an image than PyTorch, the rule must do so too when its input moves by
    :data:`_NOISE`: then scores were equal within rounding, and the image is counted in
    :attr:`~vpruner.export.parity.ParityCheck.near_ties`. If the rule drops tokens, such an image is compared with the
    PyTorch form that is made to keep what onnxruntime kept; if it merges them, it is left out of the comparison, and
    with no image left the last check passes with none compared.

    Args:
        path, decisions_path: The two files of :func:`export_rule`.
        yardstick: Of the model without the rule, on the same images; None: made here.

    Returns:
        The checks, all of them passed.

    Raises:
        UserError: The model's own outputs are not finite.
        ParityError: The first check that fails, with its numbers. The model is as it was, in that case too.
    """
    torch, model = require("torch"), adapter.model
    checks, yardstick = [], yardstick or dense_yardstick(adapter, images)
    own_error = yardstick.few  # Measured in float32 too, so before the model is widened.
    with evaluating(model), torch.no_grad():
        few = images[:FEW]
        with in_float64(model):
            untouched = run_in_chunks(model, few.double())
            check_finite(untouched, adapter.name)
            idle, _ = _follow(adapter, _idle(adapter.geometry), few.double())
            checks.append(compare_exactly("a rule that does nothing changes nothing", untouched, idle, own_error))
            if not rule.merges:
                gathered, decisions = _follow(adapter, rule, few.double())
                masked = _masked(adapter, rule, decisions, few.double())
                checks.append(compare_exactly("masked equals gathered", masked, gathered, own_error))
    return [*checks, compare_rule(adapter, rule, path, decisions_path, images, yardstick=yardstick)]


def compare_rule(
    adapter: ViTAdapter,
    rule: TokenRule,
    path: str | os.PathLike,
    decisions_path: str | os.PathLike,
    images: torch.Tensor,
    *,
    yardstick: Yardstick | None = None,
    optimized: bool = True,
    what: str = "",
) -> ParityCheck:
    """The last check of :func:`check_rule`: the file computes what the rule does in PyTorch.

    Args:
        optimized: Let onnxruntime fuse nodes.
        what: What to say of the file in the check's name, after the file's.
    """
    torch, model = require("torch"), adapter.model
    yardstick = yardstick or dense_yardstick(adapter, images)
    tolerance = allowed(yardstick.few)
    with evaluating(model), torch.no_grad():
        reference, decided = _follow(adapter, rule, images)
        check_finite(reference, f"{adapter.name} with {rule.name}")
        found = run_onnx(path, images.cpu().numpy(), optimized=optimized)
        _, *rows = run_all_outputs(decisions_path, images.cpu().numpy(), optimized=optimized)
        decided_there = dict(zip(decided, rows, strict=True))
        name = f"{Path(path).name}{what} equals {rule.name} in PyTorch"
        classifies = adapter.geometry.output == "logits"
        if rule.merges:
            # The order of what is merged may differ without any effect: only images whose outputs part are looked at.
            scale = np.abs(reference).max(1)
            parted = np.abs(found - reference).max(1) > tolerance * np.where(scale == 0, 1, scale)
            others = parted & _differ(*(_chosen_tokens(rule, what) for what in (decided, decided_there)))
            alike = ~others
        else:
            others = _differ(*(_chosen_tokens(rule, what) for what in (decided, decided_there)))
            alike = np.ones(len(images), bool)
            which = np.flatnonzero(others)
            if len(which):
                forced = {block: torch.from_numpy(rows[which]) for block, rows in decided_there.items()}
                reference[which] = _replay(adapter, rule, forced, images[torch.from_numpy(which)])
        for index in np.flatnonzero(others):
            _prove_near_tie(adapter, rule, images[index], name, int(index))
    near_ties = int(others.sum())
    if not alike.any():  # Every image is a proven near-tie of a rule that merges: no outputs are left to compare.
        return ParityCheck(name, 0.0, tolerance, 0, True, 0 if classifies else None, yardstick.few, near_ties)
    check = compare_float32(name, reference[alike], found[alike], yardstick, top1=classifies)
    return dataclasses.replace(check, near_ties=near_ties)


def _follow(adapter: ViTAdapter, rule: TokenRule, images: torch.Tensor) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """Outputs [image, output] of the model that follows ``rule``, and its decisions by block, int64 [image, any]."""
    decisions: dict[int, list[np.ndarray]] = {}
    with rule.applied(adapter) as run:

        def model(chunk):
            outputs = run(chunk)
            for block, rows in run.decisions.items():
                decisions.setdefault(block, []).append(rows.cpu().numpy())
            return outputs

        outputs = run_in_chunks(model, images, next(adapter.model.parameters()).device)
    return outputs, {block: np.concatenate(rows) for block, rows in decisions.items()}


def _masked(
    adapter: ViTAdapter, rule: TokenRule, decisions: Mapping[int, np.ndarray], images: torch.Tensor
) -> np.ndarray:
    """The unpatched model's own blocks on all tokens: what is not read is masked as a key, and an update of what is
    frozen is multiplied by 0: [image, output]."""
    import torch

    from ..prune.backbones.forms import embed_images

    model, geometry = adapter.model, adapter.geometry
    device = next(model.parameters()).device
    stream = embed_images(model, images.to(device))
    left = torch.from_numpy(_entering(rule)).to(device).expand(len(images), -1)
    for index, block in enumerate(model.blocks):
        work, mask = rule.work(index), partial(_mask_of, stream.new_zeros(len(images), geometry.tokens))
        visible = mask(left if work is None else left[:, : work.keys]).log()[:, None, None]
        if index in decisions:
            left = left.gather(1, torch.from_numpy(decisions[index]).to(device))
        if work is None:
            stream = block(stream, attn_mask=visible)
            continue
        if work.queries:
            update = block.ls1(block.attn(block.norm1(stream), attn_mask=visible))
            stream = stream + mask(left[:, : work.queries])[..., None] * update
        stream = stream + mask(left[:, : work.mlps])[..., None] * block.ls2(block.mlp(block.norm2(stream)))
    if geometry.head_patches:
        stream = stream.gather(1, left[..., None].expand(-1, -1, stream.shape[-1]))
    return model.forward_head(model.norm(stream)).cpu().numpy()


def _mask_of(closed: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """``closed`` [image, token], which are zeros, with ones at ``tokens`` [image, any]."""
    return closed.scatter(1, tokens, 1.0)


def _entering(rule: TokenRule) -> np.ndarray:
    """int64 [token]: the tokens, prefix included, that enter block 0."""
    tokens = np.arange(rule.geometry.tokens)
    if rule.entry is None:
        return tokens
    prefix = rule.geometry.prefix_tokens
    return np.concatenate([tokens[:prefix], prefix + np.asarray(rule.entry, np.int64)])


def _chosen_tokens(rule: TokenRule, decisions: Mapping[int, np.ndarray]) -> dict[int, np.ndarray]:
    """Decisions by block, int64 [image, any], so that they are equal where they have the same effect.

    Of a rule that merges the choices, sorted. Of others the tokens of the image that go on, prefix included: those that
    pass the MLP, then those that attend, then the others, for the order among those that fare alike does nothing.
    """
    if rule.merges:
        return {block: np.sort(choice, 1) for block, choice in decisions.items()}
    left, kept = _entering(rule)[None], {}
    for block, rows in sorted(decisions.items()):
        left = np.take_along_axis(left.repeat(len(rows) // len(left), 0), rows, 1)
        ends = [] if (work := rule.work(block)) is None else [work.mlps, work.queries]
        later = rule.work(block + 1) if block + 1 < rule.geometry.depth else None
        ends += [] if later is None else [later.keys]
        kept[block] = np.concatenate([np.sort(part, 1) for part in np.split(left, sorted(ends), 1)], 1)
    return kept


def _differ(one: Mapping[int, np.ndarray], other: Mapping[int, np.ndarray]) -> np.ndarray:
    """bool [image]: whether what :func:`_chosen_tokens` gives differs in any block; False where there are none."""
    return np.any([(one[block] != other[block]).any(1) for block in one] or [[False]], axis=0)


def _prove_near_tie(adapter: ViTAdapter, rule: TokenRule, image: torch.Tensor, name: str, index: int) -> None:
    """Raise :class:`ParityError` unless the rule itself decides otherwise for ``image`` within rounding of it."""
    import torch

    generator = torch.Generator().manual_seed(index)
    moved = image + _NOISE * torch.randn(_DRAWS, *image.shape, generator=generator)
    _, decided = _follow(adapter, rule, torch.cat([image[None], moved]))
    decided = _chosen_tokens(rule, decided)
    first = {block: rows[:1].repeat(len(rows), 0) for block, rows in decided.items()}
    if not _differ(decided, first).any():
        raise ParityError(
            f"not so: {name}: image {index} keeps other tokens in onnxruntime, though no scores of it are nearly equal"
        )


def _replay(
    adapter: ViTAdapter, rule: TokenRule, decisions: Mapping[int, torch.Tensor], images: torch.Tensor
) -> np.ndarray:
    """Outputs of the model that keeps exactly the rows of ``decisions``, int64 [image, token] by block."""
    outputs = []
    for index in range(len(images)):
        one = {block: rows[index : index + 1] for block, rows in decisions.items()}
        outputs.append(_follow(adapter, _replaying(rule, one), images[index : index + 1])[0])
    return np.concatenate(outputs)


def _replaying(rule: TokenRule, decisions: Mapping[int, torch.Tensor]) -> TokenRule:
    """``rule``, but it keeps given rows, for block -> int64 [batch, token]."""
    from ..prune.methods.rule import Keep, TokenRule

    class Replay(TokenRule):
        name, geometry, entry = "replay", rule.geometry, rule.entry

        def step(self, block: int):
            return partial(self._keep, block) if block in decisions else None

        def work(self, block: int):
            return rule.work(block)

        def _keep(self, block: int, view) -> Keep:
            return Keep(decisions[block].to(view.normed.device))

    return Replay()


def _idle(geometry: Geometry) -> TokenRule:
    """A rule that does nothing."""
    from ..prune.methods.rule import TokenRule

    class Idle(TokenRule):
        name = "idle"

        def step(self, block: int) -> None:
            return None

    rule = Idle()
    rule.geometry = geometry
    return rule
