"""Plans by content: the counts of a static plan, and how each image chooses its patches.

The file is a ``plan.json`` too, of a schema of its own: where it stands in for a static plan it would be wrong, so only
what knows it reads it. As :mod:`vpruner.core.plan`, this module needs the standard library and numpy only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

from .errors import PlanError
from .geometry import Geometry, shown
from .json_file import json_sha256
from .plan import CONTENT_SCHEMA, DROPPING_SCHEMA, KINDS, TokenPlan, read_plan_json, write_plan_json
from .text import command

#: The one score there is, see :class:`vpruner.prune.methods.content.AnchoredScore`.
SCORE = "anchored"
#: Beyond this the prior would outweigh what holds anchors.
MOST_WEIGHT = 4.0


@dataclass(frozen=True)
class ContentPlan:
    """How many patches enter each block, and which, as each image has it.

    Attributes:
        plan: A static plan that drops patches whole. Its counts hold, and what it drops before the first block leaves
            in every image; after that it is the prior of the choice. Without gates.
        prior_weight: How much it counts.

    Raises:
        PlanError: The weight is no number from 0 on, the plan has gates, or it freezes patches.
    """

    plan: TokenPlan
    prior_weight: float

    def __post_init__(self):
        if self.plan.gates is not None:
            raise PlanError("a plan by content has gates, which belong to places")
        if self.plan.kept is None:
            raise PlanError("a plan by content freezes patches, expected one that drops them whole")
        weight = self.prior_weight
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight <= MOST_WEIGHT:
            raise PlanError(f"the prior's weight is {shown(weight)}, expected a number from 0 to {MOST_WEIGHT:g}")
        object.__setattr__(self, "prior_weight", float(weight))

    @property
    def provenance(self) -> Mapping[str, Any]:
        return self.plan.provenance

    def check_fits(self, model: str, geometry: Geometry, weights_sha256: str | None = None) -> None:
        """As :meth:`TokenPlan.check_fits`."""
        self.plan.check_fits(model, geometry, weights_sha256)

    def with_provenance(self, **provenance: Any) -> ContentPlan:
        return replace(self, plan=self.plan.with_provenance(**provenance))

    def __str__(self) -> str:
        return f"{self.plan}\neach image chooses its own patches; weight of the plan's: {self.prior_weight:g}"

    def _repr_html_(self) -> str:
        chosen = f"each image chooses its own patches; weight of the plan's: {self.prior_weight:g}"
        return f"{self.plan._repr_html_()}<p>{chosen}</p>"

    @property
    def digest(self) -> str:
        """SHA-256 of what the plan does, not of how it came about."""
        return json_sha256({"plan": self.plan.digest, "score": self._score_to_json()})

    def _score_to_json(self) -> dict[str, Any]:
        return {"kind": SCORE, "prior_weight": self.prior_weight}

    def to_json(self) -> dict[str, Any]:
        plan = {name: value for name, value in self.plan.to_json().items() if name not in (*KINDS, "reads")}
        kept = [list(patches) for patches in self.plan.kept or ()]
        return {**plan, "kept": kept, "schema": CONTENT_SCHEMA, "score": self._score_to_json()}

    @classmethod
    def from_json(cls, value: Any) -> ContentPlan:
        """Inverse of :meth:`to_json`."""
        hint = f"make one with: {command('prune', 'MODEL', select='content')}"
        if not isinstance(value, Mapping) or value.get("schema") != CONTENT_SCHEMA:
            raise PlanError("this is not a plan by content", hint)
        score = value.get("score")
        if not isinstance(score, Mapping) or set(score) != {"kind", "prior_weight"} or score["kind"] != SCORE:
            raise PlanError(f"the score is {shown(score)}, expected kind {SCORE!r} and a prior_weight", hint)
        plan = {name: part for name, part in value.items() if name != "score"}
        return cls(TokenPlan.from_json({**plan, "schema": DROPPING_SCHEMA}), score["prior_weight"])

    def save(self, path: str | PathLike) -> None:
        write_plan_json(path, self.to_json())


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
