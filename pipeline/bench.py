"""A candidate beside its reference on the same images: which section goes wrong, and at which node.

Two differences are kept apart: of the candidate's graph, computed in float32, from the reference, which no runtime
mends; and of what the runtime makes of the candidate's graph.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from ..core import progress
from ..core.choices import HALF_PRECISIONS
from ..core.errors import UserError
from ..core.metadata import PRECISION
from ..core.scratch import temporary_folder
from ..export.emulate import emulate
from ..export.faults import (
    LARGEST,
    TOLERANCES,
    Deviation,
    Evidence,
    deviation,
    explain,
    first_wrong,
    makers,
    norm_around,
)
from ..export.files import save_model
from ..export.graph_costs import is_channels_last
from ..export.nodes import copy_model
from ..export.sections import GIVEN, SEEN, Traced, cut, pair_points, show
from ..export.twins import compare_nodes, twin_of, unrounded
from ..runtime.opening import open as open_session
from ..runtime.session import Session

#: An emulation that shows this share of an error explains it.
_EXPLAINS = 0.3


@dataclass(frozen=True)
class Section:
    """A part of the candidate, from one Add of the residual stream to the next, computed from right inputs.

    Attributes:
        block: Of the reference; None ahead of the first and behind the last.
        part: ``"stem"``, ``"attention"``, ``"mlp"`` or ``"head"``.
        value: The tensor in which it ends, by its name in the candidate.
        graph: How far the candidate's graph, computed in float32, is from the reference.
        computed: How far what the runtime computes is from that.
        wrong: ``"graph"`` or ``"runtime"``, where one of them is beyond its tolerance.
    """

    block: int | None
    part: str
    value: str
    graph: Deviation
    computed: Deviation
    wrong: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {"block": self.block, "part": self.part, "value": self.value, "graph": self.graph.to_json(),
                "computed": self.computed.to_json(), "wrong": self.wrong}  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """Where an error starts, and why.

    Attributes:
        block, part: As of the section.
        node, op_type: In the candidate; None where that could not be told.
        kind: One of those in :data:`~vpruner.export.faults.CAUSES`.
        found: What shows it.
        cure: What helps.
        keep: Names of nodes that are to compute in float32 then.
    """

    block: int | None
    part: str
    node: str | None
    op_type: str | None
    kind: str
    found: str
    cure: str
    keep: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Program:
    """A way to compute graphs.

    Attributes:
        rewrite: What is done to a copy of a graph first.
        open: A file of it -> the session that runs it.
        costly: Whether that takes an engine.
    """

    rewrite: Callable[[ir.Model], ir.Model]
    open: Callable[[Path], Session]
    costly: bool = False

    def run(self, traced: Traced, model: ir.Model, images: np.ndarray, given: Mapping[str, np.ndarray]
            ) -> dict[str, np.ndarray]:  # fmt: skip
        """The outputs of a model that was made of ``traced``, by name: [image, number].

        Args:
            images: float32 [image, channel, height, width].
            given: What inputs besides the images hold: name -> [image, number].
        """
        with temporary_folder() as folder:
            path = save_model(model, Path(folder) / "graph.onnx")
            try:
                with self.open(path) as session:
                    found = _run(session, traced.image.name, images, traced.batch, given)
            except UserError as error:
                error.rename(re.escape(str(path.with_suffix(""))) + r"\.\w+", traced.source)
                raise
        return {name.removesuffix(SEEN): array for name, array in found.items()}


def _run(
    session: Session, image: str, images: np.ndarray, batch: int, given: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """All outputs [image, number] for images in batches, the last of them filled with the last image."""
    found: dict[str, list[np.ndarray]] = {}
    for start in range(0, len(images), batch):
        rows, feeds = np.minimum(np.arange(start, start + batch), len(images) - 1), {}
        for spec in session.inputs:
            sizes = [size if isinstance(size, int) else batch for size in spec.shape]
            if spec.name == image:
                array = np.moveaxis(images[rows], 1, -1) if is_channels_last(sizes[1:]) else images[rows]
            else:
                array = given[spec.name][rows].reshape(sizes) if spec.name in given else np.ones(sizes)
            feeds[spec.name] = array.astype(spec.dtype, copy=False)
        for name, array in session.run(feeds).items():
            if array.size % batch == 0:
                row = array.reshape(batch, -1)[: len(images) - start].astype(np.float32, copy=False)
                found.setdefault(name, []).append(row)
    return {name: np.concatenate(parts) for name, parts in found.items()}


def run_images(session: Session, images: np.ndarray) -> np.ndarray:
    """The first output [image, number] of a session that takes images alone."""
    return _run(session, session.inputs[0].name, images, session.batch_size, {})[session.outputs[0].name]


def _ort(path: Path) -> Session:
    from ..runtime.ort import OrtSession

    return OrtSession(path, optimized=False)


def _same(model: ir.Model) -> ir.Model:
    return model


#: float32, node by node: what the others are judged by.
WIDE = Program(lambda model: emulate(model, rounded=False), _ort)


def programs(runtime: str, stored: str, precision: str | None) -> tuple[Program, Program | None, str, str]:
    """How the candidate is computed, the same with rounding emulated, its precision, and the first in words.

    Args:
        stored: Precision of the file.
        precision: That was asked for.
    """
    computes = precision or stored
    half = computes in HALF_PRECISIONS
    emulated = Program(lambda model: emulate(model, precision), _ort) if half else None
    if runtime == "ort" and emulated is not None:
        return emulated, emulated, computes, f"onnxruntime, {computes.upper()} by rounding every result"
    if runtime == "trt":
        real = Program(_same, lambda path: _engine(path, precision), costly=True)
    else:
        options = {"precision": precision} if precision is not None and runtime == "openvino" else {}
        real = Program(_same, lambda path: open_session(path, runtime=runtime, **options))
    name = {"ort": "onnxruntime", "openvino": "OpenVINO", "trt": "TensorRT"}[runtime]
    return real, emulated, computes, name if precision is None else f"{name}, {precision.upper()}"


def _engine(path: Path, precision: str | None) -> Session:
    from ..runtime.build import BuildOptions
    from .engines import build_engine

    engine = path.with_suffix(".engine")
    build_engine(path, engine, BuildOptions(precision=precision, check=False))
    return open_session(engine)


def precision_of(model: ir.Model) -> str:
    """What a graph says, or what its nodes and weights show."""
    said = model.metadata_props.get(PRECISION)
    if said in TOLERANCES:
        return said
    if any(node.op_type in ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear") for node in model.graph):
        return "int8"
    kinds = {value.dtype for value in model.graph.initializers.values()}
    return "fp16" if ir.DataType.FLOAT16 in kinds else "bf16" if ir.DataType.BFLOAT16 in kinds else "fp32"


@dataclass(eq=False)
class Bench:
    """A candidate beside its reference, on the same images.

    Attributes:
        images: float32 [image, channel, height, width].
        stored, computes: Precision of the candidate's file, and the one that it is computed in.
        real: What computes it.
        emulated: Rounding of that precision on the CPU; None in float32 and INT8.
    """

    reference: Traced
    candidate: Traced
    images: np.ndarray
    stored: str
    computes: str
    real: Program
    emulated: Program | None

    def __post_init__(self) -> None:
        self.pairs = pair_points(self.reference, self.candidate)
        names = [one.name for one, _ in self.pairs]
        #: End of a section -> the value of the reference that its Add adds to.
        self.before = {one.name: one.before for one, _ in self.pairs if one.before is not None}
        names = list(dict.fromkeys([*names, *self.before.values()]))
        self.right = WIDE.run(self.reference, show(self.reference.model, names), self.images, {})
        #: Points of the candidate -> what the reference has there.
        self.given = {other.name: self.right[one.name] for one, other in self.pairs}
        self.ends = [(other.name, one.name, one.block, one.part) for one, other in self.pairs]
        #: Weights of the candidate -> those of the reference that they are but for rounding, which is no fault of the
        #: graph.
        self.exact = unrounded(self.candidate.model, self.reference.model)
        outputs = zip(self.candidate.outputs, self.reference.outputs, strict=False)
        self.outputs = [(own, theirs, None, "head") for own, theirs in outputs if theirs in self.right]

    def run(self, program: Program, inner: Sequence[str] = (), images: slice = slice(None), *, whole: bool = False
            ) -> dict[str, np.ndarray]:  # fmt: skip
        """The candidate's values: at the ends of its sections, or those called ``inner``, from right inputs.

        Args:
            whole: Run it as it is, and give its outputs.
        """
        model = program.rewrite(copy_model(self.candidate.model))
        for name, array in self.exact.items() if program is WIDE else ():
            model.graph.initializers[name].const_value = ir.tensor(array, name=name)
        if not whole:
            model = cut(model, list(self.given), inner)
        given = {f"{name}{GIVEN}": array[images] for name, array in self.given.items()}
        return program.run(self.candidate, model, self.images[images], {} if whole else given)

    def sections(self) -> list[Section]:
        with progress.stage("Computing in float32"):
            wide = self.run(WIDE)
        with progress.stage("Computing the candidate"):
            real = self.run(self.real)
        found = []
        for own, theirs, block, part in (*self.ends, *self.outputs):
            right = self.right[theirs]
            # A stem and a head add nothing to the stream: they are judged by all that they give.
            ahead = self.right.get(self.before.get(theirs))
            graph = deviation(right, wide[own], self.stored, ahead)
            computed = deviation(wide[own], real[own], self.computes, ahead)
            wrong = "graph" if graph.error > TOLERANCES[self.stored] else None
            if wrong is None and computed.error > TOLERANCES[self.computes]:
                wrong = "runtime"
            found.append(Section(block, part, own, graph, computed, wrong))
        return found

    def faults(self, sections: Sequence[Section]) -> Iterator[Fault]:
        """One for each section that is wrong. Of engines only the first is looked into: each look builds another."""
        looked = False
        for section in sections:
            if section.wrong == "graph":
                yield self._graph_fault(section)
            elif section.wrong == "runtime":
                program = self._explaining(section)
                if program.costly and looked:
                    yield Fault(section.block, section.part, None, None, "unknown",
                                "the section is wrong too, and only the first was looked into",
                                "mend the first, then look again")  # fmt: skip
                    continue
                looked |= program.costly
                yield self._fault_of(section, program)

    def gradual(self, sections: Sequence[Section], output: Deviation) -> Fault:
        """Of outputs that are wrong though each section is right from right inputs: rounding that adds up, or what a
        runtime does only where it is not looked at."""
        if self.emulated is not None:
            rounded = self.run(self.emulated, whole=True)
            own, theirs = self.outputs[0][:2]
            if deviation(self.right[theirs], rounded[own], self.computes).error >= _EXPLAINS * min(output.error, 1):
                worst = max(sections, key=lambda section: section.computed.error)
                return Fault(worst.block, worst.part, None, None, "lost precision",
                             "each section is right within its rounding, together they are not: this costs most",
                             "keep more of the graph in float32, or use the float32 file")  # fmt: skip
        worst = max(sections, key=lambda section: section.graph.error + section.computed.error)
        return _unseen(worst)

    def _explaining(self, section: Section) -> Program:
        """The emulation where it shows what the runtime shows, since its inner values can all be seen."""
        if self.emulated is None or self.emulated is self.real:
            return self.real
        images, value = _only(section.computed.image), section.value
        wide, rounded, real = (
            self.run(one, inner, images)[value]
            for one, inner in ((WIDE, [value]), (self.emulated, [value]), (self.real, []))
        )
        shown, error = (deviation(wide, one, self.computes).error for one in (rounded, real))
        return self.emulated if shown >= _EXPLAINS * min(error, 1) else self.real

    def _fault_of(self, section: Section, program: Program) -> Fault:
        """Compare the values of a section, of one graph computed in two ways."""
        images = _only(section.computed.image)
        nodes = self.candidate.section(section.value, self.given)
        names = _names(nodes)
        wide, found = (self.run(one, names, images) for one in (WIDE, program))
        wide.update({name: self.given[name][images] for name in self.given if name not in names})
        deviations = {name: deviation(wide[name], found[name], self.computes) for name in names if name in found}
        largest = LARGEST.get(self.computes, np.inf)
        beyond = {name for name in names if name in deviations and deviations[name].largest > largest}
        node = first_wrong(nodes, deviations, TOLERANCES[self.computes])
        made = [deviations[value.name].error for value in node.outputs if value.name in deviations] if node else []
        if not any(made):
            return _unseen(section)

        def evidence_of(node: ir.Node) -> Evidence:
            inside = [value for value in node.outputs if value.name in deviations]
            output = max(inside, key=lambda value: deviations[value.name].error)
            inputs = tuple(wide[value.name] for value in node.inputs if value is not None and value.name in wide)
            return Evidence(
                node, self.computes, output.shape, wide[output.name], found[output.name], inputs,
                rounded=program is self.emulated, graph=False, norm=norm_around(node), beyond=beyond,
            )  # fmt: skip

        evidence = evidence_of(node)
        cause, _ = explain(evidence)
        while cause.back:  # The error shows here; what it comes from may be there ahead, among larger numbers.
            ahead = [one for one in makers(evidence.node) if one in nodes and one.outputs[0].name in deviations]
            shown = [one for one in map(evidence_of, ahead) if one.node.op_type != "Cast" and cause.found(one)]
            if not shown:
                break
            evidence = shown[0]
        return _fault(section, evidence)

    def _graph_fault(self, section: Section) -> Fault:
        """Compare the values of a section of two graphs: what has no equal in the reference, and reads what has."""
        images = _only(section.graph.image)
        end = next(theirs for own, theirs, *_ in (*self.ends, *self.outputs) if own == section.value)
        starts = {one.name for one, _ in self.pairs}
        nodes, theirs = self.candidate.section(section.value, self.given), self.reference.section(end, starts)
        names, others = _names(nodes), _names(theirs)
        found = self.run(WIDE, names, images)
        found.update({name: array[images] for name, array in self.given.items() if name not in names})
        right = WIDE.run(self.reference, show(self.reference.model, others), self.images[images], {})
        right.update({one.name: self.right[one.name][images] for one, _ in self.pairs if one.name not in others})
        equals, named = _equals(found, right, self.stored, {other.name: one.name for one, other in self.pairs})
        equals.pop(section.value, None)
        node = _suspect(nodes, section.value, equals, named)
        values = [value.name for value in node.outputs if value.name in found]
        other = twin_of(node, nodes, theirs)
        weights = {name: value.const_value.numpy() for name, value in self.reference.model.graph.initializers.items()
                   if value.const_value is not None and value.const_value.size > 1}  # fmt: skip
        twin = compare_nodes(node, other, equals, weights)
        made = found[values[0]] if values else np.zeros((1, 1), np.float32)
        expected = made if other is None else right.get(other.outputs[0].name, made)
        evidence = Evidence(
            node, self.stored, node.outputs[0].shape, expected if expected.shape == made.shape else made, made, (),
            rounded=False, graph=True, norm=norm_around(node), twin=twin,
        )  # fmt: skip
        return _fault(section, evidence, self._block_of(other))

    def _block_of(self, node: ir.Node | None) -> tuple[int | None, str] | None:
        """The block of the reference that a node is in, or whose Add it reads while the candidate has none."""
        paired = {one.name for one, _ in self.pairs}
        for value in node.inputs if node is not None else ():
            for point in self.reference.points:
                if value is not None and value.name == point.name and point.name not in paired:
                    return point.block, point.part
        before: list[str] = []
        for point in self.reference.points:
            if node is not None and node in self.reference.section(point.name, before):
                return point.block, point.part
            before.append(point.name)
        return None


def _names(nodes: Sequence[ir.Node]) -> list[str]:
    """Values that nodes make, and something reads."""
    made = (value for node in nodes for value in node.outputs)
    return [value.name for value in made if value.name and (value.uses() or value.is_graph_output())]


def _only(image: int) -> slice:
    return slice(image, image + 1)


def _equals(
    found: Mapping[str, np.ndarray], right: Mapping[str, np.ndarray], precision: str, known: Mapping[str, str]
) -> tuple[dict[str, str], Collection[str]]:
    """Value of the candidate -> value of the reference that holds the same; and names that mean the same in both.

    Names do where most values of one name are equal: then what has one is compared with nothing else.
    """
    tolerance = TOLERANCES[precision]

    def same(name: str, other: str) -> bool:
        return deviation(right[other], found[name], precision).error <= tolerance

    shared = {name: same(name, name) for name in found if name in right and right[name].size == found[name].size}
    named = set(shared) if sum(shared.values()) * 2 >= len(shared) else set()
    by_size: dict[int, list[str]] = {}
    for name, array in right.items():
        by_size.setdefault(array.size, []).append(name)
    equal = dict(known)
    for name, array in found.items():
        if shared.get(name):
            equal[name] = name
        elif name not in equal and name not in named:
            other = next((one for one in by_size.get(array.size, ()) if same(name, one)), None)
            equal.update({name: other} if other is not None else {})
    return equal, named


def _suspect(nodes: Sequence[ir.Node], end: str, equals: Mapping[str, str], named: Collection[str]) -> ir.Node:
    """Back from the end through values that have no equal, the first node whose inputs all have one.

    Args:
        named: Values of both graphs: a node that makes one of them goes before others that only the candidate has, but
            for those that quantize.
    """
    makers = {value.name: node for node in nodes for value in node.outputs}
    seen, waiting = set(), [makers[end]]
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            waiting += [makers[value.name] for value in node.inputs
                        if value is not None and value.name in makers and value.name not in equals]  # fmt: skip
    suspects = [node for node in nodes if node in seen]
    if suspects[0].op_type.endswith("QuantizeLinear"):
        return suspects[0]
    found = next((node for node in suspects if any(value.name in named for value in node.outputs)), suspects[0])
    # A converter gives the name of a value to the Cast behind it.
    return makers[found.inputs[0].name] if found.op_type == "Cast" and found.inputs[0].name in makers else found


def _fault(section: Section, evidence: Evidence, place: tuple[int | None, str] | None = None) -> Fault:
    cause, found = explain(evidence)
    node = cause.start(evidence) or evidence.node
    block, part = place or (section.block, section.part)
    kept = set(cause.keep(evidence))
    keep = tuple(one.name for one in node.graph if one in kept)
    return Fault(block, part, node.name, node.op_type, cause.kind, found, cause.cure, keep)


def _unseen(section: Section) -> Fault:
    return Fault(
        section.block, section.part, None, None, "wrong kernel",
        "the section is wrong, and no value inside it is when its values are outputs too",
        "a fusion is at fault: keep these outputs, or try another release of the runtime",
    )  # fmt: skip
