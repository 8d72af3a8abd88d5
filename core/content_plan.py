"""Plans by content: the counts of a static plan, and how each image chooses its patches.

The file is a ``plan.json`` too, of a schema of its own: where it stands in for a static plan it would be wrong, so only
what knows it reads it. As :mod:`vpruner.core.plan`, this module needs the standard library and numpy only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from .errors import PlanError
from .geometry import Geometry, shown
from .json_file import json_sha256
from .plan import CONTENT_SCHEMA, SCHEMA, TokenPlan, read_plan_json, write_plan_json
from .text import command

#: The one score there is, see :class:`vpruner.prune.methods.content.LinearScore`.
SCORE = "linear"
#: Beyond this nothing is left of what the image says.
MOST_WEIGHT = 1e3


class Ranking(NamedTuple):
    """One choice that each image makes. The patches of a block stand in a row, and what goes on does so from the front.

    Attributes:
        block: Where.
        kind: What the chosen go on with: ``"keys"``: being read in later blocks; ``"queries"``: attending, from this
            block on; ``"mlps"``: passing the MLP, from this block on.
        start, stop: Places of the patches that are ranked, in the row as it stands then.
        chosen: How many of them go on; they come to stand in front of the others.
    """

    block: int
    kind: str
    start: int
    stop: int
    chosen: int


def rankings(plan: TokenPlan) -> tuple[Ranking, ...]:
    """The choices by which each image has sets of its own of the plan's sizes, in the order they are made in.

    The sets of one image form a chain: what passes the MLP attends, and what attends is read. So each block ranks only
    within what was alike in the block before: passed the MLP, attended only, or was read only.
    """
    geometry, found, before = plan.geometry, [], set()
    for block in range(geometry.depth - (not geometry.head_patches)):
        keys, later = len(plan.keys[block]), block + 1
        cuts = [
            (len(plan.carried[later]), "keys"),
            (len(plan.queries[block]), "queries"),
            (len(plan.mlps[block]), "mlps"),
        ]
        if later < geometry.depth:
            cuts.append((len(plan.keys[later]), "keys"))
        bounds = {0, *before, keys, len(plan.carried[block])}
        for cut, kind in sorted(cuts, key=lambda pair: -pair[0]):
            # What is not read has no key or query to be ranked by, and keeps its place.
            if cut not in bounds and cut < keys:
                start, stop = (
                    max(bound for bound in bounds if bound < cut),
                    min(bound for bound in bounds if bound > cut),
                )
                found.append(Ranking(block, kind, start, stop, cut - start))
            bounds.add(cut)
        before = {cut for cut, _ in cuts}
    return tuple(found)


@dataclass(frozen=True)
class ContentPlan:
    """How many patches each block reads and updates, and which, as each image has it.

    Attributes:
        plan: A static plan in which each patch first skips the MLP, then the attention, and then is no longer read. Its
            counts hold, what it never reads leaves in every image, and its exits are the prior of the choice. Without
            gates.
        channels: For each of :func:`rankings` one number per channel of what the block's attention reads: how much it
            speaks for a patch.
        prior_weight: How much the plan's exits count.

    Raises:
        PlanError: What one of them is, and what was expected.
    """

    plan: TokenPlan
    channels: tuple[tuple[float, ...], ...]
    prior_weight: float

    def __post_init__(self):
        if self.plan.gates is not None:
            raise PlanError("a plan by content has gates, which belong to places")
        if not is_chain(self.plan):
            raise PlanError(
                "a plan by content has patches that do not skip the MLP first, then the attention, and then are left "
                "unread, for good each time"
            )
        weight = self.prior_weight
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight <= MOST_WEIGHT:
            raise PlanError(f"the prior's weight is {shown(weight)}, expected a number from 0 to {MOST_WEIGHT:g}")
        object.__setattr__(self, "prior_weight", float(weight))
        count, width = len(rankings(self.plan)), self.plan.geometry.embed_dim
        if not isinstance(self.channels, (list, tuple)) or len(self.channels) != count:
            raise PlanError(f"channels is {shown(self.channels)}, expected {count} lists, one for each choice")
        for number, row in enumerate(self.channels):
            if not isinstance(row, (list, tuple)) or len(row) != width or not all(map(_is_number, row)):
                raise PlanError(f"channels: list {number} does not hold {width} numbers")
        object.__setattr__(self, "channels", tuple(tuple(map(float, row)) for row in self.channels))

    @property
    def provenance(self) -> Mapping[str, Any]:
        return self.plan.provenance

    def check_fits(self, model: str, geometry: Geometry, weights_sha256: str | None = None) -> None:
        """As :meth:`TokenPlan.check_fits`."""
        self.plan.check_fits(model, geometry, weights_sha256)

    def with_provenance(self, **provenance: Any) -> ContentPlan:
        return replace(self, plan=self.plan.with_provenance(**provenance))

    def __str__(self) -> str:
        return f"{self.plan}\n{self._chosen()}"

    def _repr_html_(self) -> str:
        return f"{self.plan._repr_html_()}<p>{self._chosen()}</p>"

    def _chosen(self) -> str:
        return f"each image chooses its own patches; weight of the plan's: {self.prior_weight:g}"

    @property
    def digest(self) -> str:
        """SHA-256 of what the plan does, not of how it came about."""
        return json_sha256({"plan": self.plan.digest, **self._score_to_json()})

    def _score_to_json(self) -> dict[str, Any]:
        score = {"kind": SCORE, "prior_weight": self.prior_weight}
        return {"score": score, "channels": [list(row) for row in self.channels]}

    def to_json(self) -> dict[str, Any]:
        return {**self.plan.to_json(), "schema": CONTENT_SCHEMA, **self._score_to_json()}

    @classmethod
    def from_json(cls, value: Any) -> ContentPlan:
        """Inverse of :meth:`to_json`."""
        hint = f"make one with: {command('prune', 'MODEL', select='content')}"
        if not isinstance(value, Mapping) or value.get("schema") != CONTENT_SCHEMA:
            raise PlanError("this is not a plan by content", hint)
        score = value.get("score")
        if not isinstance(score, Mapping) or set(score) != {"kind", "prior_weight"} or score["kind"] != SCORE:
            raise PlanError(f"the score is {shown(score)}, expected kind {SCORE!r} and a prior_weight", hint)
        plan = {name: part for name, part in value.items() if name not in ("score", "channels")}
        plan = TokenPlan.from_json({**plan, "schema": SCHEMA})
        return cls(plan, value.get("channels"), score["prior_weight"])

    def save(self, path: str | PathLike) -> None:
        write_plan_json(path, self.to_json())


def is_chain(plan: TokenPlan) -> bool:
    """Whether each patch skips the MLP first, then the attention, and then is left unread, for good each time."""
    keys, queries, mlps = plan.masks
    return plan.is_nested and not (mlps & ~queries).any() and not (queries & ~keys).any()


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def load_plan(path: str | PathLike) -> TokenPlan | ContentPlan:
    """Read a plan of either kind.

    Raises:
        PlanError: The file cannot be read, or holds neither.
    """
    path = Path(path)
    value = read_plan_json(path)
    try:
        if isinstance(value, Mapping) and value.get("schema") == CONTENT_SCHEMA:
            return ContentPlan.from_json(value)
        return TokenPlan.from_json(value)
    except PlanError as error:
        raise PlanError(f"{path}: {error.marked_problem}", error.marked_hint) from None
