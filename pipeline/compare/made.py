"""What takes part in a comparison, and what it makes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...core.plan import TokenPlan
from ..learned import rule_of

if TYPE_CHECKING:
    from torch import Tensor

    from ...core.content_plan import ContentPlan
    from ...prune.calibration import Calibration
    from ...prune.data import ImageSet
    from ...prune.loaded import LoadedModel
    from ...prune.methods.rule import TokenRule

SCHEMA = 1


@dataclass(frozen=True)
class Made:
    """What a method makes of a model and a budget.

    Attributes:
        reduction: One plan for every image, or a rule that looks at each.
        weights: State-dict name -> tensor where tuning changed weights.
        seconds: Wall-clock time, without decoding the images.
        cpu_seconds: Processor time of all threads, which a busy machine does not stretch; None where not known.
        note: What the method has to say, or empty.
        instead: A smaller model that takes the place of the one that is reduced; ``reduction`` is its identity plan.
    """

    reduction: TokenPlan | TokenRule
    weights: Mapping[str, Tensor] | None
    seconds: float
    note: str = ""
    cpu_seconds: float | None = None
    content: ContentPlan | None = None
    instead: LoadedModel | None = None

    @property
    def static(self) -> bool:
        return isinstance(self.reduction, TokenPlan)

    @property
    def counts_fixed(self) -> bool:
        """Whether each block works on as many tokens of every image."""
        return isinstance(self.reduction, TokenPlan) or self.reduction.static_counts() is not None


#: A smaller model meets a budget that it is over by so much: no number of blocks comes to one exactly.
NEARLY = 1.01


@dataclass(frozen=True)
class Contender:
    """A method as it takes part.

    Attributes:
        name: What the user calls it.
        settings: JSON values that, with model, budget, seed and images, determine what it makes.
        needs_images: Whether it looks at calibration images.
        seeded: Whether another seed gives another result.
        make: (model, calibration images, the same decoded, target, seed) -> what it makes; images are None where it
            needs none.
        needs_blocks: Whether it works inside of timm blocks, which an ONNX graph has none of.
        macs_ratio: Of a smaller model: its MACs over those of the model. None of a method, which meets any budget.
    """

    name: str
    settings: Mapping[str, Any]
    needs_images: bool
    seeded: bool
    make: Callable[[LoadedModel, ImageSet | None, Calibration | None, float, int], Made]
    macs_ratio: float | None = None
    needs_blocks: bool = False

    def within(self, targets: Sequence[float]) -> Sequence[float]:
        """The budgets that it takes part at; a smaller model at the smallest that it meets."""
        if self.macs_ratio is None:
            return targets
        return sorted(target for target in targets if self.macs_ratio <= target * NEARLY)[:1]


@dataclass(frozen=True)
class Point:
    """One contender at one budget with one seed.

    Attributes:
        key: What its rows are filed under: on the first evaluation set, and all about its graph and its time.
        further: The same for the rows on each further evaluation set.
    """

    contender: Contender
    target: float
    seed: int
    key: str
    further: tuple[str, ...] = ()

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.key, *self.further)

    @property
    def name(self) -> str:
        """What its files are called; the name of a smaller model is any text."""
        method = re.sub(r"[^\w.-]+", "-", self.contender.name)
        return f"{method}-{self.target:g}-{self.key[:8]}"

    def row(self, kind: str) -> dict[str, Any]:
        """What every row about it starts with."""
        return {
            "schema": SCHEMA,
            "kind": kind,
            "key": self.key,
            "method": self.contender.name,
            "target": self.target,
            "seed": self.seed if self.contender.seeded else None,
        }


def followed(plan: TokenPlan | ContentPlan) -> dict[str, Any]:
    """What :class:`Made` says of a plan of either kind."""
    rule = rule_of(plan)
    return {"reduction": plan, "content": None} if rule is None else {"reduction": rule, "content": plan}
