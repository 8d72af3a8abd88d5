"""What an ONNX file of ours says about itself, in its ``metadata_props``: the one place that reads and writes the keys.

They are a file format: add keys, never rename one. onnx is not needed here, since runtimes and engine records hand over
the same key/value strings.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from .. import __version__
from .errors import UserError
from .geometry import OUTPUTS
from .json_file import canonical_json, json_text, parse_json
from .plan import KINDS, Geometry, TokenPlan
from .preprocess import Preprocessing
from .text import command

PREFIX = "vpruner."
VERSION = "vpruner.version"
MODEL = "vpruner.model"
WEIGHTS_SHA256 = "vpruner.weights_sha256"
TUNED_SHA256 = "vpruner.tuned_sha256"
GEOMETRY = "vpruner.geometry"
PLAN = "vpruner.plan"
#: The sets of a plan that is folded in, as JSON: keys, queries, MLPs and reads. Gates are in the graph alone.
SETS = "vpruner.sets"
#: What files of plans that drop tokens whole had in its place: the patches that enter each block.
KEPT = "vpruner.kept"
#: Of a file whose tokens are chosen image by image (:mod:`vpruner.export.rules`): method, counts and settings. There
#: :data:`PLAN` is the digest of that, and :data:`SETS` is absent.
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
#: What every file has that was exported from a model whose weights are known, dense or pruned.
REQUIRED = (VERSION, MODEL, WEIGHTS_SHA256, GEOMETRY, PREPROCESSING, OUTPUT)


@dataclass(frozen=True)
class ModelMetadata:
    """The metadata of one ONNX file. Attributes are None where the file does not say.

    Attributes:
        model: Name of the model.
        weights_sha256: Hash of the trained weights: those in the graph, or those that tuning started from.
        geometry: Shape of the *unpruned* model, in pruned files too.
        preprocessing: How images become the input.
        classes: Names of the outputs.
        plan: Digest of the token plan in the graph, or of the rule; None in a dense file.
        token_plan: The plan in the graph, without gates and provenance; None in a dense file, and where images decide.
        rule: What chooses the tokens of each image, as :func:`vpruner.export.rules.describe_rule` has it; None in every
            other file.
        tuned_sha256: Hash of the tuned weights in the graph; None where they are the trained ones.
        output: One of :data:`~vpruner.core.geometry.OUTPUTS`. Where it is not given, the geometry's, and ``"logits"``
            without one.
        precision: What the weights are stored in, where the file says it.
        version: The vpruner that wrote the file.
    """

    model: str | None = None
    weights_sha256: str | None = None
    geometry: Geometry | None = None
    preprocessing: Preprocessing | None = None
    classes: tuple[str, ...] | None = None
    plan: str | None = None
    token_plan: TokenPlan | None = None
    rule: Mapping[str, Any] | None = None
    tuned_sha256: str | None = None
    output: str | None = None
    precision: str | None = None
    version: str | None = __version__

    def __post_init__(self):
        if self.output is None:
            object.__setattr__(self, "output", "logits" if self.geometry is None else self.geometry.output)

    @property
    def token_counts(self) -> tuple[tuple[int, ...], ...] | None:
        """Tokens, prefix included, that each block reads, that attend, and that pass its MLP; None without geometry."""
        if self.geometry is None:
            return None
        if self.rule is not None:
            if self.rule.get("work") is not None:
                return tuple(map(tuple, self.rule["work"]))
            # What leaves a block has attended and passed its MLP. Tokens that are merged attended too, but where the
            # head reads none of them.
            entering, leaving = tuple(self.rule["counts"][:-1]), tuple(self.rule["counts"][1:])
            attending = (*entering[:-1], max(entering[-1] * self.geometry.head_patches, leaving[-1]))
            return entering, attending if self.rule.get("merges") else leaving, leaving
        if self.token_plan is None:
            return ((self.geometry.tokens,) * self.geometry.depth,) * 3
        return self.token_plan.counts

    def to_props(self) -> dict[str, str]:
        """The key/value strings to write; keys of unknown things are absent."""
        classes, sets = self.classes, None
        if self.token_plan is not None:
            sets = canonical_json({name: getattr(self.token_plan, name) for name in (*KINDS, "reads")})
        props = {
            VERSION: self.version,
            MODEL: self.model,
            WEIGHTS_SHA256: self.weights_sha256,
            GEOMETRY: None if self.geometry is None else canonical_json(self.geometry.to_json()),
            PREPROCESSING: None if self.preprocessing is None else canonical_json(self.preprocessing.to_json()),
            OUTPUT: self.output,
            CLASSES: None if classes is None else json_text(list(classes), ascii_only=False),
            TUNED_SHA256: self.tuned_sha256,
            PLAN: self.plan,
            RULE: None if self.rule is None else canonical_json(dict(self.rule)),
            SETS: sets,
            PRECISION: self.precision,
        }
        return {key: value for key, value in props.items() if value is not None}

    @classmethod
    def from_props(cls, props: Mapping[str, str], source: str, *, require: Iterable[str] = ()) -> ModelMetadata:
        """Inverse of :meth:`to_props`.

        Args:
            props: All ``metadata_props`` of the file; keys of others are ignored.
            source: What to call the file in messages.
            require: Keys that have to be there, such as :data:`REQUIRED`.

        Raises:
            UserError: A required key is missing, or one of ours is malformed.
        """
        missing = [key for key in require if key not in props]
        if missing:
            what = "incomplete" if any(key in props for key in REQUIRED) else "not a graph that vpruner wrote"
            hint = f"write the file with: {command('export', 'MODEL')}"
            raise UserError(f"{source} is {what}: its metadata has no {missing[0]}", hint)
        try:
            return cls._read(props)
        except UserError as error:
            problem, hint = error.marked_problem, error.marked_hint
        except (ValueError, TypeError, AttributeError) as error:
            problem, hint = str(error), None
        raise UserError(f"{source} has malformed metadata: {problem}", hint or "export the file again")

    @classmethod
    def _read(cls, props: Mapping[str, str]) -> ModelMetadata:
        def parsed(key: str) -> Any:
            return parse_json(props[key], key) if key in props else None

        geometry, preprocessing, classes, rule = map(parsed, (GEOMETRY, PREPROCESSING, CLASSES, RULE))
        geometry = None if geometry is None else Geometry.from_json(geometry)
        output = props.get(OUTPUT, "logits")
        if output not in OUTPUTS:
            raise ValueError(f"output is {output!r}, expected {', '.join(map(repr, OUTPUTS))}")
        if classes is not None and not (isinstance(classes, list) and all(isinstance(c, str) for c in classes)):
            raise ValueError("classes is not a list of names")
        if rule is not None and not _is_rule(rule, geometry):
            raise ValueError("rule does not name a method and the tokens of each block")
        return cls(
            model=props.get(MODEL),
            weights_sha256=props.get(WEIGHTS_SHA256),
            geometry=geometry,
            preprocessing=None if preprocessing is None else Preprocessing.from_json(preprocessing),
            classes=None if classes is None else tuple(classes),
            plan=props.get(PLAN),
            token_plan=_token_plan(props.get(MODEL) or "model", geometry, parsed(SETS), parsed(KEPT)),
            rule=rule,
            tuned_sha256=props.get(TUNED_SHA256),
            output=output,
            precision=props.get(PRECISION),
            version=props.get(VERSION),
        )

    @classmethod
    def of_plan(cls, plan: TokenPlan) -> ModelMetadata:
        """Of a pruned file whose dense one came from elsewhere: what the plan says, and no more.

        How images become its input, its class names and the identity of its weights are not known.
        """
        return cls(plan.model, geometry=plan.geometry, plan=plan.digest, token_plan=_bare(plan))

    def with_plan(self, plan: TokenPlan) -> ModelMetadata:
        """The metadata of the pruned file that folding ``plan`` into this one gives.

        A file with the weights that were tuned for ``plan`` is filed under the weights that they were tuned from, so
        that the pruned file is still known as a form of that model.
        """
        weights, tuned = self.weights_sha256, self.tuned_sha256
        if weights == plan.provenance.get("tuned_weights_sha256"):
            weights, tuned = plan.provenance.get("weights_sha256") or weights, weights
        folded = {"plan": plan.digest, "token_plan": _bare(plan), "version": __version__}
        return replace(self, weights_sha256=weights, tuned_sha256=tuned, **folded)


def _bare(plan: TokenPlan) -> TokenPlan:
    return replace(plan, gates=None, provenance={})


def _token_plan(model: str, geometry: Geometry | None, sets: Any, kept: Any) -> TokenPlan | None:
    if sets is None and kept is None:
        return None
    if geometry is None:
        raise ValueError(f"it names the patches of a plan, and has no {GEOMETRY}")
    if sets is None:
        return TokenPlan.dropping(model, geometry, kept)
    if not isinstance(sets, dict) or set(sets) != {*KINDS, "reads"}:
        raise ValueError(f"{SETS} does not hold {', '.join(KINDS)} and reads")
    return TokenPlan(model, geometry, **sets)


def _is_rule(rule: Any, geometry: Geometry | None) -> bool:
    if not isinstance(rule, dict) or not isinstance(rule.get("method"), str):
        return False
    depth, work = None if geometry is None else geometry.depth, rule.get("work")
    return _are_counts(rule.get("counts"), depth and depth + 1) and (
        work is None
        or (isinstance(work, list) and len(work) == len(KINDS) and all(_are_counts(w, depth) for w in work))
    )


def _are_counts(counts: Any, length: int | None) -> bool:
    """Whether it is a list of whole numbers, so many where that is known."""
    whole = isinstance(counts, list) and all(isinstance(count, int) for count in counts)
    return whole and (length is None or len(counts) == length)
