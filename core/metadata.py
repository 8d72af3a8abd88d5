"""What an ONNX file of ours says about itself, in its ``metadata_props``.

The runtime reads the same keys without this module (it must work where onnx is not installed), so the names below are
a file format: add keys, never rename one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .. import __version__
from .errors import PlanError, UserError
from .files import canonical_json
from .plan import Geometry, TokenPlan
from .preprocess import Preprocessing
from .text import command

VERSION = "vpruner.version"
MODEL = "vpruner.model"
WEIGHTS_SHA256 = "vpruner.weights_sha256"
TUNED_SHA256 = "vpruner.tuned_sha256"
GEOMETRY = "vpruner.geometry"
PLAN = "vpruner.plan"
KEPT = "vpruner.kept"
#: Of a file whose tokens are chosen image by image (:mod:`vpruner.export.rules`): method, counts and settings. There
#: :data:`PLAN` is the digest of that, and :data:`KEPT` is absent.
RULE = "vpruner.rule"
PREPROCESSING = "vpruner.preprocessing"
CLASSES = "vpruner.classes"
OUTPUT = "vpruner.output"
#: Of a converted file (:mod:`vpruner.export.precision`); absent in a float32 one.
PRECISION = "vpruner.precision"
#: Of a file that was written for one deployment target (:mod:`vpruner.export.deploy`).
TARGET = "vpruner.target"
#: Of a file with the weights that were tuned for a plan, a safetensors file too; the value is the plan's digest.
TUNED_FOR = "vpruner.tuned_for_plan"
#: Every dense and every pruned file has these.
REQUIRED = (VERSION, MODEL, WEIGHTS_SHA256, GEOMETRY, PREPROCESSING, OUTPUT)


@dataclass(frozen=True)
class GraphMetadata:
    """The metadata of one ONNX file.

    Attributes:
        model: Name of the model.
        weights_sha256: Hash of the trained weights: those in the graph, or those that tuning started from.
        geometry: Shape of the *unpruned* model, in pruned files too.
        preprocessing: ``mean``, ``std``, ``size`` [height, width], ``interpolation``, ``crop_pct``, ``crop_mode``.
        classes: Names of the outputs, or None when they are unknown.
        plan: Digest of the plan that was folded in, or of the rule; None in a dense file.
        kept: The patches that enter each block; None in a dense file, and where images decide.
        version: The vpruner that wrote the file.
        tuned_sha256: Hash of the tuned weights that a pruned graph holds; None where they are the trained ones.
        rule: What chooses the tokens of each image, as :func:`vpruner.export.rules.describe_rule` has it; None in every
            other file.
    """

    model: str
    weights_sha256: str
    geometry: Geometry
    preprocessing: Mapping[str, Any]
    classes: tuple[str, ...] | None = None
    plan: str | None = None
    kept: tuple[tuple[int, ...], ...] | None = None
    version: str = __version__
    tuned_sha256: str | None = None
    rule: Mapping[str, Any] | None = None

    @property
    def output(self) -> str:
        """``"logits"`` or ``"features"``."""
        return self.geometry.output

    def to_props(self) -> dict[str, str]:
        """The key/value strings to write; keys of unknown things are absent."""
        props = {
            VERSION: self.version,
            MODEL: self.model,
            WEIGHTS_SHA256: self.weights_sha256,
            GEOMETRY: canonical_json(self.geometry.to_json()),
            PREPROCESSING: canonical_json(dict(self.preprocessing)),
            OUTPUT: self.output,
        }
        if self.classes is not None:
            props[CLASSES] = json.dumps(list(self.classes), ensure_ascii=False)
        if self.tuned_sha256 is not None:
            props[TUNED_SHA256] = self.tuned_sha256
        if self.plan is not None:
            props[PLAN] = self.plan
        if self.rule is not None:
            props[RULE] = canonical_json(dict(self.rule))
        elif self.plan is not None:
            props[KEPT] = canonical_json([list(indices) for indices in self.kept or ()])
        return props

    @classmethod
    def from_props(cls, props: Mapping[str, str], source: str) -> GraphMetadata:
        """Inverse of :meth:`to_props`.

        Args:
            props: All ``metadata_props`` of the file; keys of others are ignored.
            source: What to call the file in messages.

        Raises:
            UserError: A required key is missing or malformed.
        """
        hint = f"write the file with: {command('export', 'MODEL')}"
        missing = [key for key in REQUIRED if key not in props]
        if missing:
            what = "not a graph that vpruner wrote" if len(missing) == len(REQUIRED) else "incomplete"
            raise UserError(f"{source} is {what}: its metadata has no {missing[0]}", hint)
        try:
            return cls(
                model=props[MODEL],
                weights_sha256=props[WEIGHTS_SHA256],
                geometry=Geometry.from_json(json.loads(props[GEOMETRY])),
                preprocessing=json.loads(props[PREPROCESSING]),
                classes=tuple(json.loads(props[CLASSES])) if CLASSES in props else None,
                plan=props.get(PLAN),
                kept=tuple(tuple(row) for row in json.loads(props[KEPT])) if KEPT in props else None,
                version=props[VERSION],
                tuned_sha256=props.get(TUNED_SHA256),
                rule=json.loads(props[RULE]) if RULE in props else None,
            )
        except PlanError as error:
            raise UserError(f"{source} has malformed metadata: {error.marked_problem}", hint) from None
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{source} has malformed metadata: {error}", hint) from None

    def with_plan(self, plan: TokenPlan) -> dict[str, str]:
        """The key/value strings of the pruned file that folding ``plan`` into this one gives.

        A file with the weights that were tuned for ``plan`` is filed under the weights that they were tuned from, so
        that the pruned file is still known as a form of that model.
        """
        kept: Sequence[Sequence[int]] = plan.kept
        weights, tuned = self.weights_sha256, self.tuned_sha256
        if weights == plan.provenance.get("tuned_weights_sha256"):
            weights, tuned = plan.provenance.get("weights_sha256") or weights, weights
        pruned = GraphMetadata(
            self.model,
            weights,
            self.geometry,
            self.preprocessing,
            self.classes,
            plan.digest,
            tuple(tuple(indices) for indices in kept),
            tuned_sha256=tuned,
        )
        return pruned.to_props()


def props_without_weights(plan: TokenPlan) -> dict[str, str]:
    """The key/value strings of a pruned file whose dense one came from elsewhere: what the plan says, and no more.

    How images become its input, its class names and the identity of its weights are not known.
    """
    return {
        VERSION: __version__,
        MODEL: plan.model,
        GEOMETRY: canonical_json(plan.geometry.to_json()),
        OUTPUT: plan.geometry.output,
        PLAN: plan.digest,
        KEPT: canonical_json([list(indices) for indices in plan.kept]),
    }


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
            problem = error.marked_problem
            problem = problem if problem.startswith(source) else f"{source}: {problem}"
            raise UserError(problem, error.marked_hint or "export the file again") from None
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
