"""Where a file goes wrong in a runtime and a precision, compared with the float32 reference on images.

The candidate is cut at its residual stream, and each section is run on what the reference has there
(:mod:`vpruner.export.sections`); :mod:`vpruner.pipeline.bench` looks into those that are wrong.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..core import progress
from ..core.choices import DIAGNOSE_IMAGES, HALF_PRECISIONS
from ..core.errors import UserError
from ..core.files import scratch_beside
from ..core.finite import check_finite
from ..core.metadata import ModelMetadata
from ..core.preprocess import resolve_preprocessing
from ..core.text import command, counted, option
from ..export.faults import TOLERANCES, Deviation, deviation, makers
from ..export.files import move_model
from ..export.graph import OpenedGraph, open_graph
from ..export.graph_costs import is_channels_last
from ..export.precision import convert
from ..export.sections import Traced, pair_points, trace
from ..runtime.opening import open as open_session
from ..runtime.opening import runtime_of
from ..runtime.session import ENGINE_SUFFIXES
from .bench import WIDE, Bench, Fault, Section, precision_of, programs, run_images

#: Times a mended file is looked at again: what is kept in float32 may bring the next node to light.
_ROUNDS = 6


@dataclass(frozen=True)
class Diagnosis:
    """What :func:`diagnose` found.

    Attributes:
        computed: How the candidate was computed, in words.
        images: Number of them.
        output: How far its outputs are off, run as a whole.
        tolerance: Of ``output``.
        sections: In order; none where the residual stream is not known.
        faults: In the order of the graph; none: it is right.
        remarks: What limits this.
        fixed: What was found of the file that was written to mend it; None where none was asked for, or none helps.
    """

    candidate: str
    reference: str
    runtime: str
    precision: str
    computed: str
    images: int
    output: Deviation
    tolerance: float
    sections: tuple[Section, ...] = ()
    faults: tuple[Fault, ...] = ()
    remarks: tuple[str, ...] = ()
    fixed: Diagnosis | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            **{name: getattr(self, name) for name in ("candidate", "reference", "runtime", "precision", "computed")},
            "images": self.images, "output": self.output.to_json(), "tolerance": self.tolerance,
            "faults": [asdict(fault) for fault in self.faults], "remarks": list(self.remarks),
            "sections": [section.to_json() for section in self.sections],
            "fixed": None if self.fixed is None else self.fixed.to_json(),
        }  # fmt: skip


def diagnose(
    candidate: str | os.PathLike,
    against: str | os.PathLike,
    *,
    data: Any,
    runtime: str = "auto",
    precision: str | None = None,
    images: int = DIAGNOSE_IMAGES,
    fix: str | os.PathLike | None = None,
    seed: int = 0,
    preprocessing: Mapping[str, Any] | None = None,
    trust: bool = False,
) -> Diagnosis:
    """Compare a file in a runtime with the float32 graph that it should compute, and say where it goes wrong.

    Args:
        candidate: An ONNX file of any precision, or a TensorRT engine, of which only the outputs can be compared.
        against: A float32 ONNX file, the reference.
        data: Images, as :func:`~vpruner.core.specs.DataSpec` takes them.
        runtime: One of :data:`~vpruner.core.choices.RUNTIMES`; ``"auto"``: onnxruntime, or TensorRT for an engine. A
            CPU computes FP16 in float32, so for ``"ort"`` every result is rounded as a GPU would leave it.
        precision: ``"fp16"`` or ``"bf16"``: what a float32 file is to be computed in. None: the file's own.
        images: How many are used at most.
        fix: Where to write the reference in half precision with float32 where it helps, which is then looked at too.
        seed: Of the choice of images.
        preprocessing: How images become the input, over what the files say.
        trust: As in :class:`~vpruner.runtime.trt.TrtSession`.

    Raises:
        UserError: A file cannot be read or run; the two are not of one model; the reference is not float32; ``fix`` is
            asked for where nothing is in half precision.
    """
    engine = Path(candidate).suffix.lower() in ENGINE_SUFFIXES
    if engine and fix is not None:
        raise UserError(f"{candidate} is an engine, which nothing mends", "give the ONNX file that it is built from")
    opened, graph = open_graph(against), None if engine else open_graph(candidate)
    if precision_of(opened.model) != "fp32":
        raise UserError(f"{against} is {precision_of(opened.model)}", "expected the float32 file as the reference")
    if runtime != "trt" or engine:  # Of an ONNX file, an engine is built.
        runtime = runtime_of(candidate, runtime)
    if fix is not None and precision is None and precision_of(graph.model) not in HALF_PRECISIONS:
        raise UserError(
            f"{candidate} is {precision_of(graph.model)}, and {option('fix')} writes FP16 or BF16 files",
            f"add {option('precision', 'fp16')} or {option('precision', 'bf16')}",
        )
    traced = trace(opened)
    read = _read_images(opened, traced, data, images, seed, preprocessing or {})
    if graph is None:
        return _diagnose_engine(Path(candidate), opened, traced, read, trust)
    done = _diagnose(graph, opened, traced, read, runtime, precision)
    return done if fix is None else _fix(done, opened, traced, read, Path(fix))


def _diagnose(
    opened: OpenedGraph,
    reference: OpenedGraph,
    traced: Traced,
    images: np.ndarray,
    runtime: str,
    precision: str | None,
) -> Diagnosis:
    with progress.stage("Following the graphs"):
        candidate = trace(opened)
    _check_pair(opened, reference, candidate, traced)
    stored = precision_of(opened.model)
    if precision is not None and stored not in ("fp32", "int8", precision):
        raise UserError(f"{opened.source} is {stored}, {precision} was asked for", f"leave out {option('precision')}")
    real, emulated, computes, computed = programs(runtime, stored, precision)
    bench = Bench(traced, candidate, images, stored, computes, real, emulated)
    check_finite(bench.right[traced.outputs[0]], reference.source, file=reference.path)
    sections, remarks = bench.sections(), []
    for name, one in ((opened.source, candidate), (reference.source, traced)):
        if one.problem is not None:
            remarks.append(f"the residual stream of {name} cannot be followed: {one.problem}")
        elif one.lacking:
            places = "; ".join(f"block {block}, {part}" for block, part in one.lacking)
            remarks.append(f"in {name} this is no section of its own, but part of a later one: {places}")
    if not bench.pairs:
        remarks.append("no tensor inside was compared, only the outputs")
    elif len(bench.pairs) < len(traced.points):
        remarks.append(f"{len(bench.pairs)} of {len(traced.points)} tensors of the residual stream are in both files")
    with progress.stage("Looking into what is wrong"):
        faults = list(bench.faults(sections))
    whole = bench.run(real, whole=True)
    own, theirs = candidate.outputs[0], traced.outputs[0]
    output = deviation(bench.right[theirs], whole[own], computes)
    tolerance = max(TOLERANCES[stored], TOLERANCES[computes])
    if not faults and output.error > tolerance:
        faults.append(bench.gradual(sections, output))
    return Diagnosis(
        opened.source, reference.source, runtime, computes, computed, len(images), output, tolerance,
        tuple(sections), tuple(faults), tuple(remarks),
    )  # fmt: skip


def _diagnose_engine(path: Path, reference: OpenedGraph, traced: Traced, images: np.ndarray, trust: bool) -> Diagnosis:
    """An engine returns only its outputs."""
    right = WIDE.run(traced, traced.model, images, {})[traced.outputs[0]]
    with open_session(path, trust=trust) as session:
        precision = session.precision if session.precision in TOLERANCES else "fp32"
        found = run_images(session, images)
    output, tolerance = deviation(right, found, precision), TOLERANCES[precision]
    remark = "an engine returns only its outputs: to see inside, give the ONNX file that it is built from"
    faults = () if output.error <= tolerance else (
        Fault(None, "head", None, None, "unknown", "the outputs of the engine are wrong", remark),
    )  # fmt: skip
    return Diagnosis(str(path), reference.source, "trt", precision, "TensorRT", len(images), output, tolerance, (),
                     faults, (remark,))  # fmt: skip


def _check_pair(opened: OpenedGraph, reference: OpenedGraph, candidate: Traced, traced: Traced) -> None:
    """Refuse two files that are not of one model."""
    said = [ModelMetadata.from_props(one.model.metadata_props, one.source) for one in (opened, reference)]
    # A plan that drops nothing leaves out tokens that nothing reads.
    whole = [one.token_plan is not None and one.token_plan.is_identity for one in said]
    plans = [None if nothing else one.plan for one, nothing in zip(said, whole, strict=True)]
    shapes = [list(one.image.shape[1:]) for one in (candidate, traced)]
    if shapes[0] != shapes[1]:
        raise UserError(
            f"{opened.source} takes images {shapes[0]}, {reference.source} {shapes[1]}", "give two of one model"
        )
    widths = [one.model.graph.outputs[0].shape for one in (candidate, traced)]
    if None not in widths and list(widths[0][1:]) != list(widths[1][1:]):
        raise UserError(f"{opened.source} gives {list(widths[0])}, {reference.source} {list(widths[1])}",
                        "give two files of one model")  # fmt: skip
    sizes = {point.numbers / traced.batch for point in traced.points}
    other = next((one for one in candidate.points if sizes and one.numbers / candidate.batch not in sizes), None)
    unlike = plans[0] != plans[1] and len(candidate.points) > len(pair_points(traced, candidate))
    if unlike or (other is not None and not any(whole)):
        where = "" if other is None else f", first at {other.name!r} in block {other.block}"
        raise UserError(
            f"{opened.source} holds other tokens than {reference.source}{where}: one of the two is pruned, or by "
            "another plan",
            f"compare a pruned file with the float32 file of its plan: {command('fold', 'DENSE', plan='PLAN')}",
        )


def _fix(done: Diagnosis, reference: OpenedGraph, traced: Traced, images: np.ndarray, output: Path) -> Diagnosis:
    """Write the reference in the candidate's precision with float32 where the faults need it; look at it again.

    Returns:
        What was found, with what was found of the new file, or without where float32 does not help.
    """
    names, keep, found = {node.name for node in traced.model.graph}, [], done
    with scratch_beside(output) as folder:
        path = folder / output.name
        for attempt in range(_ROUNDS):
            more = [name for fault in found.faults for name in fault.keep if name in names and name not in keep]
            if attempt and not more:
                more = _around(traced, keep, found.faults)
                if not more:
                    break
            keep += dict.fromkeys(more)
            in_float32 = f"{counted(len(keep), 'node')} in float32"
            try:
                with progress.stage(f"Writing {done.precision}, {in_float32}"):
                    convert(reference, path, done.precision, keep_nodes=keep)
            except UserError as error:  # A weight is beyond the range.
                return replace(done, remarks=(*done.remarks, progress.words(f"nothing was written: {error.marked}")))
            found = _diagnose(open_graph(path), reference, traced, images, done.runtime, None)
            if not found.faults:
                break
        if found.faults and found.output.error > done.tolerance:
            others = "" if done.precision == "bf16" else f"{option('precision', 'bf16')}, or "
            said = f"nothing was written: the outputs are still wrong with {in_float32}; use {others}the float32 file"
            return replace(done, remarks=(*done.remarks, progress.words(said)))
        move_model(path, output)
    remarks = [remark.replace(str(path), str(output)) for remark in found.remarks]
    remarks += [in_float32] if keep else []
    return replace(done, fixed=replace(found, candidate=str(output), remarks=tuple(remarks)))


def _around(traced: Traced, keep: Sequence[str], faults: Sequence[Fault]) -> list[str]:
    """Of the sections that are still wrong: what the nodes that are kept are computed by, or else all of it."""
    points, found = [point.name for point in traced.points], {}
    for fault in faults:
        place = fault.block, fault.part
        ends = [point.name for point in traced.points if (point.block, point.part) == place] or traced.outputs[:1]
        for end in ends:
            nodes = traced.section(end, points)
            made = [node for node in nodes if node.name in keep]
            for node in made:
                made += [one for one in makers(node) if one in nodes and one not in made]
            new = [node.name for node in made if node.name not in keep]
            found.update(dict.fromkeys(new or [node.name for node in nodes if node.name not in keep]))
    return list(found)


def _read_images(
    reference: OpenedGraph, traced: Traced, data: Any, count: int, seed: int, preprocessing: Mapping[str, Any]
) -> np.ndarray:
    """float32 [image, channel, height, width]."""
    from ..prune.choose_images import choose_indices
    from ..prune.data import ImageSet
    from ..prune.memory import open_source

    sizes = list(map(int, traced.image.shape[1:]))
    size = (sizes[0], sizes[1]) if is_channels_last(sizes) else (sizes[1], sizes[2])
    stated = ModelMetadata.from_props(reference.model.metadata_props, reference.source).preprocessing
    prepared = resolve_preprocessing(stated, preprocessing, size=size, source=reference.source)
    source = open_source(data, split="validation")
    images = ImageSet(source, choose_indices(source, count, seed))
    found = [image for image, _ in images.prepared(prepared)]
    images.require_any()
    progress.remark(images.remark("comparison"))
    return np.stack(found)
