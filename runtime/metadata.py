"""What a model file says about itself, read without the onnx package.

The keys are the file format that :mod:`vpruner.export` writes into ``metadata_props``. Here every one of them may be
absent: a graph from elsewhere still runs, it only cannot be given images.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import UserError
from ..prune.plan import Geometry
from .preprocess import Preprocessing

PREFIX = "vpruner."


@dataclass(frozen=True)
class ModelMetadata:
    """Attributes are None where the file does not say.

    Attributes:
        version: The vpruner that wrote the file.
        model: Name of the model.
        weights_sha256: Hash of the trained weights.
        tuned_sha256: Hash of the weights in the graph, where tuning has changed them.
        geometry: Shape of the model *before* pruning.
        plan: Digest of the token plan in the graph, or of the rule; None in a dense file.
        kept: Patch indices that enter each block; None in a dense file, and where images decide.
        rule: What chooses the tokens of each image, as :func:`vpruner.export.rules.describe_rule` has it; None in every
            other file.
        preprocessing: How images become the input.
        classes: Names of the outputs.
        output: ``"logits"`` or ``"features"``; ``"logits"`` where the file does not say.
        precision: What the weights are stored in, where the file says it.
    """

    version: str | None = None
    model: str | None = None
    weights_sha256: str | None = None
    geometry: Geometry | None = None
    plan: str | None = None
    kept: tuple[tuple[int, ...], ...] | None = None
    preprocessing: Preprocessing | None = None
    classes: tuple[str, ...] | None = None
    output: str = "logits"
    precision: str | None = None
    tuned_sha256: str | None = None
    rule: Mapping[str, Any] | None = None

    @classmethod
    def from_props(cls, props: Mapping[str, str], source: str) -> ModelMetadata:
        """Read key/value strings; keys of other tools are ignored.

        Args:
            props: The file's metadata.
            source: What to call the file in messages.

        Raises:
            UserError: A key of ours is there and malformed.
        """

        def parsed(key: str) -> Any:
            text = props.get(PREFIX + key)
            if text is None:
                return None
            try:
                return json.loads(text)
            except ValueError as error:
                raise UserError(f"{source}: {PREFIX}{key} is not JSON: {error}", "export the file again") from None

        try:
            geometry, preprocessing, classes, kept, rule = map(
                parsed, ("geometry", "preprocessing", "classes", "kept", "rule")
            )
            output = props.get(PREFIX + "output", "logits")
            if output not in ("logits", "features"):
                raise UserError(f"output is {output!r}, expected 'logits' or 'features'")
            if classes is not None and not (isinstance(classes, list) and all(isinstance(c, str) for c in classes)):
                raise UserError("classes is not a list of names")
            if rule is not None and not _is_rule(rule, geometry):
                raise UserError("rule does not name a method and the tokens of each block")
            return cls(
                version=props.get(PREFIX + "version"),
                model=props.get(PREFIX + "model"),
                weights_sha256=props.get(PREFIX + "weights_sha256"),
                geometry=None if geometry is None else Geometry.from_json(geometry),
                plan=props.get(PREFIX + "plan"),
                kept=None if kept is None else tuple(tuple(row) for row in kept),
                preprocessing=None if preprocessing is None else Preprocessing.from_json(preprocessing),
                classes=None if classes is None else tuple(classes),
                output=output,
                precision=props.get(PREFIX + "precision"),
                tuned_sha256=props.get(PREFIX + "tuned_sha256"),
                rule=rule,
            )
        except UserError as error:
            problem = error.problem if error.problem.startswith(source) else f"{source}: {error.problem}"
            raise UserError(problem, error.hint or "export the file again") from None
        except (TypeError, AttributeError) as error:
            raise UserError(f"{source}: malformed metadata: {error}", "export the file again") from None


def _is_rule(rule: Any, geometry: Any) -> bool:
    counts = rule.get("counts") if isinstance(rule, dict) else None
    return (
        isinstance(counts, list)
        and all(isinstance(count, int) for count in counts)
        and isinstance(rule.get("method"), str)
        and (not isinstance(geometry, dict) or len(counts) == geometry.get("depth", 0) + 1)
    )
