"""Other ways to choose visual tokens, as selectors of the same frame, and one name for each way there is.

* ``random``: as many, drawn, of the features between tower and projector. What any method has to beat.
* ``fastv``: after an early layer of the language model, the tokens that the last token of the prompt attends to least
  leave (Chen et al. 2024, arXiv 2403.06764). One row of attention is computed, not the matrix.
* ``vispruner``: of the features, those that the class token attends to most, and of the rest those most unlike one
  another (Zhang et al. 2025, arXiv 2412.01818).
* ``static``: a token plan of the tower, the same for every image.

SAINT's own modes (``vit``, ``llm``, ``hybrid``) are opened through here too, so that commands and benchmarks need one
name and one call: :class:`Pruning`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...core import progress
from ...core.choices import SAINT_MODES
from ...core.choices import VLM_MODES as MODES
from ...core.cost import cost_ratio
from ...core.errors import UserError
from ...core.plan import TokenPlan
from ...core.text import command, first_line, option
from ..backbones.vit import weights_sha256
from ..methods.rule import rank_descending
from ..tune.weights import with_weights
from .frame import VLMRun, pruned
from .modes import saint_stages
from .parts import find_parts
from .tower import timm_from_tower, tower_of_llava, tuned_in_tower
from .tower_plan import tower_plan
from .tower_pruning import OUTPUT
from .views import EncoderView, SpanView

#: Share that is kept where nothing is said of it.
KEEP = 0.25
#: FastV's K: language layers that see every token.
FASTV_LAYERS = 2
#: Share of VisPruner's tokens that are chosen by attention; the others by diversity.
IMPORTANT = 0.5
#: Pairs of alike tokens of which VisPruner drops one, in one round.
ROUND = 8


@dataclass
class RandomPatches:
    """Patches drawn anew for each crop.

    Attributes:
        share: Of the grid's patches, how many are left.
        seed: Of the draws; the same calls in the same order draw the same.
    """

    share: float
    seed: int = 0
    _generator: torch.Generator = field(init=False, repr=False)

    def __post_init__(self):
        # On the CPU, so that a GPU draws the same.
        self._generator = torch.Generator().manual_seed(self.seed)

    def __call__(self, view: EncoderView) -> Tensor:
        crops, there = view.positions.shape
        draws = torch.rand(crops, there, generator=self._generator)
        return draws.argsort(1)[:, : _kept(self.share, view)].to(view.positions.device)


@dataclass(frozen=True)
class LastQueryAttention:
    """FastV: the tokens that the last token of the prompt attends to least, mean over heads, leave.

    Attributes:
        share: Of the prompt's visual tokens, how many are left.
    """

    share: float

    def __call__(self, view: SpanView) -> Tensor:
        attention = view.last_query_attention()
        if view.valid is not None:
            attention = attention.masked_fill(~view.valid, torch.inf)
        return view.without_first(view.drop_to(self.share), rank_descending(-attention))


@dataclass(frozen=True)
class AttentionAndDiversity:
    """VisPruner: some patches by the class token's attention, the others by how unlike the rest they are.

    The rest, in order of attention, is dealt into two sides in turns; in each round the patches of one side that are
    most alike to one of the other leave, at most :data:`ROUND`, until as many are left as are wanted.

    Attributes:
        share: Of the grid's patches, how many are left.
        important: Of those, the share that attention chooses.

    Raises:
        UserError: The tower has no class token.
    """

    share: float
    important: float = IMPORTANT

    def __call__(self, view: EncoderView) -> Tensor:
        if not view.prefix:
            raise UserError(
                "vispruner ranks by what the class token attends to, and this vision tower has none",
                f"use {option('mode')} vit, llm, hybrid, random or fastv",
            )
        kept = min(_kept(self.share, view), view.positions.shape[1])
        first = round(kept * self.important)
        order = rank_descending(view.class_attention())
        rest = order[:, first:]
        features = nn.functional.normalize(
            view.hidden if view.hidden.dtype == torch.float64 else view.hidden.float(), dim=-1
        )
        while rest.shape[1] > kept - first:
            drop = min(ROUND, rest.shape[1] - (kept - first), (rest.shape[1] + 1) // 2)
            even, odd = rest[:, ::2], rest[:, 1::2]
            if not odd.shape[1]:
                rest = even[:, :0]
                break
            similarity = _take(features, even) @ _take(features, odd).transpose(1, 2)
            ranked = rank_descending(similarity.amax(2))
            # What stays of the even side stays in order, so that the sides of the next round are mixed anew.
            stays = ranked[:, drop:].sort(1).values
            rest = torch.cat([even.gather(1, stays), odd], 1)
        return torch.cat([order[:, :first], rest], 1)


def _check_learned_on(plan: TokenPlan, model: nn.Module) -> None:
    """Refuse a plan of other weights, where that can be told: in float32, weights are what it was learned on.

    Raises:
        UserError: Names both hashes.
    """
    learned = plan.provenance.get("weights_sha256")
    if learned is None or model.dtype != torch.float32:
        return
    found = weights_sha256(timm_from_tower(tower_of_llava(model, "the model"), "the model"))
    if found != learned:
        raise UserError(
            f"the plan was learned on weights {str(learned)[:12]}, the tower's are {found[:12]}",
            f"learn one for it: {command('prune', 'MODEL_FOLDER', data='DIR', output='plan.json')}",
        )


@dataclass(frozen=True)
class Pruning:
    """One way to prune, as a user asks for it.

    Attributes:
        mode: One of :data:`MODES`.
        keep: Share of the visual tokens that is left for the last language layer; None only with ``threshold`` or
            ``plan``.
        threshold: Of SAINT in the language model: as many leave as there are votes.
        layers: Language layers, counted from 0, that SAINT drops in; of FastV, how many layers see every token.
        encoder_keep: Of a hybrid, share that the tower keeps; None: SAINT's own.
        seed: Of ``random``.
        plan: Of ``static``.
        weights: State dict with the weights that were tuned for the plan, under timm's names; None: the tower's own.

    Raises:
        UserError: The parts do not go together.
    """

    mode: str
    keep: float | None = None
    threshold: float | None = None
    layers: tuple[int, ...] | None = None
    encoder_keep: float | None = None
    seed: int = 0
    plan: TokenPlan | None = None
    weights: Mapping[str, Tensor] | None = field(default=None, repr=False)

    def __post_init__(self):
        if self.mode not in MODES:
            raise UserError(f"mode is {self.mode!r}", f"expected one of {', '.join(MODES)}")
        for name in ("keep", "encoder_keep"):
            share = getattr(self, name)
            if share is not None and not 0 < share <= 1:
                raise UserError(
                    f"{option(name)} is {share:g}, expected a share of the visual tokens above 0 and up to 1",
                    f"as in {option(name, 0.25)}",
                )
        if self.mode == "static":
            if self.plan is None:
                raise UserError("mode static keeps what a plan says", f"give it with {option('plan', 'PLAN')}")
            if self.keep is not None:
                raise UserError("mode static keeps what its plan says", f"leave out {option('keep')}")
        elif self.plan is not None:
            raise UserError(f"a plan goes with mode static, not with {self.mode}", f"leave out {option('plan')}")
        elif (self.keep is None) == (self.threshold is None):
            found = "neither a share to keep nor" if self.keep is None else "both a share to keep and"
            raise UserError(
                f"mode {self.mode} was given {found} a threshold",
                f"give one of {option('keep')} and {option('threshold')}",
            )
        if self.threshold is not None and self.mode not in ("llm", "hybrid"):
            raise UserError(
                f"a threshold goes with mode llm or hybrid, not with {self.mode}", f"leave out {option('threshold')}"
            )
        if self.layers is not None and self.mode not in ("llm", "hybrid", "fastv"):
            raise UserError(
                f"layers go with mode llm, hybrid or fastv, not with {self.mode}", f"leave out {option('layers')}"
            )
        if self.encoder_keep is not None and self.mode != "hybrid":
            raise UserError(f"{option('encoder_keep')} goes with mode hybrid, not with {self.mode}", "leave it out")
        if self.layers is not None and self.mode == "fastv" and len(self.layers) != 1:
            raise UserError(
                f"fastv takes one number of layers, found {len(self.layers)}", f"as in {option('layers', 2)}"
            )

    @property
    def label(self) -> str:
        """A short name, such as "hybrid 0.25"; of a plan, with the share of its own model's multiply-adds."""
        parts = [self.mode]
        if self.plan is not None:
            parts.append(f"{cost_ratio(self.plan):.2f} of MACs")
        if self.weights is not None:
            parts.append("tuned")
        if self.keep is not None:
            parts.append(f"{self.keep:g}")
        if self.threshold is not None:
            parts.append(f"threshold {self.threshold:g}")
        if self.encoder_keep is not None:
            parts.append(f"tower {self.encoder_keep:g}")
        return " ".join(parts)

    def to_json(self) -> dict[str, Any]:
        return {
            "mode": self.mode,
            "keep": self.keep,
            "threshold": self.threshold,
            "layers": None if self.layers is None else list(self.layers),
            "encoder_keep": self.encoder_keep,
            "seed": self.seed if self.mode == "random" else None,
            "plan_sha256": None if self.plan is None else self.plan.digest,
            "tuned": self.weights is not None,
        }

    def prepare(self, model: nn.Module) -> Callable[[], AbstractContextManager[VLMRun]]:
        """What opens the pruned model, as often as wanted; a random choice goes on where it was.

        Raises:
            UserError: The model is not supported, or has no place for what is asked.
        """
        if self.mode in SAINT_MODES:
            encoder, language = saint_stages(
                find_parts(model),
                self.mode,
                self.keep,
                threshold=self.threshold,
                encoder_keep=self.encoder_keep,
                layers=self.layers,
            )
            return partial(pruned, model, encoder, language)
        if self.mode == "fastv":
            parts = find_parts(model)
            seeing = FASTV_LAYERS if self.layers is None else self.layers[0]
            if not 1 <= seeing < len(parts.layers):
                raise UserError(
                    f"fastv lets {seeing} layers see every token, the language model has {len(parts.layers)}",
                    f"give {option('layers')} 1 to {len(parts.layers) - 1}",
                )
            return partial(pruned, model, language={seeing - 1: LastQueryAttention(self.keep)})
        if self.mode == "static":
            _check_learned_on(self.plan, model)
            parts = find_parts(model)
            opened = partial(pruned, model, encoder=tower_plan(self.plan, parts))
            if self.weights is None:
                return opened
            return partial(_with_tower_weights, opened, parts.tower, tuned_in_tower(parts.tower, self.weights))
        selector = RandomPatches(self.keep, self.seed) if self.mode == "random" else AttentionAndDiversity(self.keep)
        return partial(pruned, model, encoder={OUTPUT: selector})


def prunings_from(
    modes: Sequence[str],
    keeps: Sequence[float],
    *,
    threshold: float | None = None,
    layers: tuple[int, ...] | None = None,
    encoder_keep: float | None = None,
    seed: int = 0,
    plan: TokenPlan | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> list[Pruning]:
    """Each mode with each share; what goes with some modes only is given to those.

    Args:
        keeps: Shares; empty: :data:`KEEP`, or with a threshold none.

    Raises:
        UserError: An option that no mode takes, or as :class:`Pruning` has it.
    """
    shares = tuple(keeps) or ((None,) if threshold is not None else (KEEP,))
    options = {"threshold": (threshold, ("llm", "hybrid")), "encoder_keep": (encoder_keep, ("hybrid",))}
    options |= {"layers": (layers, ("llm", "hybrid", "fastv")), "plan": (plan, ("static",))}
    for name, (value, takers) in options.items():
        if value is not None and not set(modes) & set(takers):
            raise UserError(
                f"{option(name)} goes with {option('mode')} {' or '.join(takers)}", f"leave out {option(name)}"
            )
    prunings = []
    for mode in modes:
        given = {name: value for name, (value, takers) in options.items() if mode in takers}
        if mode == "static":
            given["weights"] = weights
        some = (None,) if mode == "static" else shares
        prunings += [Pruning(mode, share, seed=seed, **given) for share in some]
    return prunings


#: Opens a model, dense (yields None) or pruned, as often as wanted.
Opened = Callable[[], AbstractContextManager[VLMRun | None]]


def candidates_of(model: nn.Module, prunings: Sequence[Pruning]) -> dict[str, Opened]:
    """label -> what opens the model so, the dense model first; its context yields None.

    Raises:
        UserError: Two are the same, or as :meth:`Pruning.prepare` has it.
    """
    candidates: dict[str, Opened] = {"dense": nullcontext}
    for pruning in prunings:
        if pruning.label in candidates:
            raise UserError(f"{pruning.label!r} is asked for twice", "leave one out")
        candidates[pruning.label] = pruning.prepare(model)
    return candidates


def open_plan(path: str | Path) -> tuple[TokenPlan, dict[str, Tensor] | None]:
    """A plan, and the weights that were tuned for it where they lie beside it; says so where they do not.

    Raises:
        UserError: The plan, or the weights, cannot be read.
    """
    plan = TokenPlan.load(path)
    name = plan.provenance.get("tuned_weights_file")
    if not isinstance(name, str):
        return plan, None
    weights = Path(path).parent / Path(name).name
    if not weights.is_file():
        progress.remark(f"{weights}, with the weights tuned for the plan, is not there: the tower's own are used")
        return plan, None
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return plan, load_file(weights)
    except SafetensorError as error:
        raise UserError(f"{weights} cannot be read: {first_line(error)}", "learn the plan again") from None


@contextmanager
def _with_tower_weights(opened: Opened, tower: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[VLMRun]:
    with with_weights(tower, weights), opened() as run:
        yield run


def _kept(share: float, view: EncoderView) -> int:
    return max(1, round(share * view.patches))


def _take(x: Tensor, rows: Tensor) -> Tensor:
    """[crop, patch, channel] and int64 [crop, row] -> [crop, row, channel]."""
    return x.gather(1, rows[..., None].expand(-1, -1, x.shape[-1]))
