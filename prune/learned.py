"""What learning hands back: the plan, and a record of every stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..core.content_plan import ContentPlan
from ..core.plan import TokenPlan
from .calibration import Judgement


@dataclass(frozen=True)
class Stage:
    """One stage as it went.

    Attributes:
        name: ``"search"``, ``"rearrange"``, ``"tune"`` or ``"select"``.
        method: Such as ``"fisher"``, ``"ppo"``, ``"weights"``.
        plan: The plan after it.
        weights: State-dict name -> tensor, where weights differ from the model's; else None.
        kept: Whether the stage changed anything; it is undone where it does not help on held-out images.
        seconds: Wall-clock time.
        judgement: Divergence from the dense model on held-out images, before and after; None without such images.
        note: One sentence for the report, or empty.
        details: JSON values.
        content: The plan by content, after a selection that was kept.
    """

    name: str
    method: str
    plan: TokenPlan
    weights: Mapping[str, Tensor] | None
    kept: bool
    seconds: float
    judgement: Judgement | None
    note: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)
    content: ContentPlan | None = None

    def to_json(self) -> dict[str, Any]:
        """What provenance and result rows say of it."""
        return {
            "stage": self.name,
            "method": self.method,
            "kept": self.kept,
            "seconds": round(self.seconds, 2),
            "held_out": None if self.judgement is None else self.judgement.to_json(),
            "note": self.note,
            **self.details,
        }


@dataclass(frozen=True)
class Learned:
    """What :func:`~vpruner.prune.learn.learn` hands back.

    Attributes:
        plan: The plan to ship, with provenance.
        weights: State-dict name -> tensor for the weights that tuning changed; None when none did.
        stages: What each stage did, in order.
        content: The plan by content to ship instead, with provenance and on the counts of ``plan``; the weights are
            those for it. None where none was asked for, or where it did not help.
    """

    plan: TokenPlan
    weights: Mapping[str, Tensor] | None
    stages: tuple[Stage, ...]
    content: ContentPlan | None = None
