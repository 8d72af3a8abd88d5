"""How much a rearrangement plays, and what it hands back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ...core.choices import EPISODES, EPISODES_UNTUNED
from ...core.plan import TokenPlan
from ..calibration import Judgement


@dataclass(frozen=True)
class RearrangeSettings:
    """How much is played.

    Attributes:
        episodes: Plans that are run on images, at most.
        time_limit: Seconds: no batch of episodes begins that would not end within them if it took as long as the last
            one. The first is always played. None: no limit.
        batch: Episodes per update of the policy: all are judged on the same images.
        images: Images that a batch of episodes is judged on, drawn anew each time.
        worth: The stage ends once what more episodes can gain is below this fraction of the distance.
        patience: Batches in a row that must say so.
    """

    episodes: int = EPISODES
    time_limit: float | None = None
    batch: int = 16
    images: int = 96
    worth: float = 0.03
    patience: int = 2

    @classmethod
    def for_tuning(cls, tuning: str, **given: float | None) -> RearrangeSettings:
        """The defaults for one of :data:`~vpruner.core.choices.TUNINGS`, but for what is ``given`` and not None."""
        defaults = {"episodes": EPISODES if tuning == "weights" else EPISODES_UNTUNED}
        return cls(**{**defaults, **{name: value for name, value in given.items() if value is not None}})


@dataclass(frozen=True)
class Rearranged:
    """What the stage found.

    Attributes:
        plan: The best plan on held-out images; the one it started from when none was better.
        judgement: Divergence of start and result on the held-out images.
        kept: Whether ``plan`` is another than the start.
        note: One sentence when it is not, or when the stage was cut short; else empty.
        details: JSON values: episodes played, incumbents, settings.
        history: One entry for each batch of episodes.
    """

    plan: TokenPlan
    judgement: Judgement
    kept: bool
    note: str
    details: dict[str, Any]
    history: list[dict[str, float]] = field(default_factory=list, repr=False)
