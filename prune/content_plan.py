"""Plans by content: the counts of a static plan, and the score by which each image chooses its patches.

The file is a ``plan.json`` too, of a schema of its own: where it stands in for a static plan it would be wrong, so only
what knows it reads it. As :mod:`vpruner.prune.plan`, this module needs the standard library and numpy only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from ..artifacts import json_sha256
from ..errors import PlanError
from .plan import CONTENT_SCHEMA, SCHEMA, Geometry, TokenPlan, read_plan_json, shown, write_plan_json

#: Digits that tell every float32 from its neighbours.
_DIGITS = 9


@dataclass(frozen=True, eq=False)
class ContentPlan:
    """How many patches enter each block, and which, as each image has it.

    Attributes:
        plan: A static plan. Its counts hold, and what it drops before the first block leaves in every image; which
            patches it keeps after that is only where the choice comes from. Without gates.
        token: float32 [block L - 1, channel]: weights of the score on what each block's attention reads.
        prior: float32 [block L - 1, patch N]: of each place, added to the score.

    Raises:
        PlanError: Shapes that do not go together, numbers that are not finite, or gates.
    """

    plan: TokenPlan
    token: np.ndarray
    prior: np.ndarray

    def __post_init__(self):
        geometry = self.plan.geometry
        if self.plan.gates is not None:
            raise PlanError("a plan by content has gates, which belong to places")
        for name, columns in (("token", geometry.embed_dim), ("prior", geometry.patches)):
            object.__setattr__(self, name, _checked(name, getattr(self, name), (geometry.depth - 1, columns)))

    @property
    def provenance(self) -> Mapping[str, Any]:
        return self.plan.provenance

    def check_fits(self, model: str, geometry: Geometry, weights_sha256: str | None = None) -> None:
        """As :meth:`TokenPlan.check_fits`."""
        self.plan.check_fits(model, geometry, weights_sha256)

    def with_provenance(self, **provenance: Any) -> ContentPlan:
        return replace(self, plan=self.plan.with_provenance(**provenance))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what the plan does, not of how it came about."""
        return json_sha256({"plan": self.plan.digest, "score": "probe", **self._score_to_json()})

    def _score_to_json(self) -> dict[str, Any]:
        return {
            name: [[float(f"{value:.{_DIGITS}g}") for value in row] for row in getattr(self, name).tolist()]
            for name in ("token", "prior")
        }

    def to_json(self) -> dict[str, Any]:
        return {**self.plan.to_json(), "schema": CONTENT_SCHEMA, "score": "probe", **self._score_to_json()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ContentPlan:
        """Inverse of :meth:`to_json`."""
        if not isinstance(value, Mapping) or value.get("schema") != CONTENT_SCHEMA:
            raise PlanError("this is not a plan by content", "make one with: vpruner prune MODEL --select content")
        if value.get("score") != "probe":
            raise PlanError(
                f"the score is {shown(value.get('score'))}, this vpruner knows 'probe'",
                "make a plan with: vpruner prune MODEL --select content",
            )
        if missing := {"token", "prior"} - set(value):
            raise PlanError(f"the plan by content has no key {min(missing)!r}")
        plan = {name: part for name, part in value.items() if name not in ("score", "token", "prior")}
        return cls(TokenPlan.from_json({**plan, "schema": SCHEMA}), value["token"], value["prior"])

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
        raise PlanError(f"{path}: {error.problem}", error.hint) from None


def _checked(name: str, values: Any, shape: tuple[int, int]) -> np.ndarray:
    try:
        with np.errstate(over="ignore"):  # Not finite then, which is told below.
            array = np.array(values, np.float32)
    except (TypeError, ValueError, OverflowError):
        raise PlanError(f"{name} of the score is not a table of numbers") from None
    if array.shape != shape and not (array.size == 0 == shape[0]):
        raise PlanError(
            f"{name} of the score is {list(array.shape)}, expected {list(shape)}: one row per block but the last"
        )
    if not np.isfinite(array).all():
        raise PlanError(f"{name} of the score holds numbers that are not finite")
    return array.reshape(shape)
