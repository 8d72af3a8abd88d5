"""Planted faults are found in their block and at their operator, and nothing is found in what is right."""

from dataclasses import replace
from tempfile import TemporaryDirectory

import numpy as np
import onnx_ir as ir
import pytest
from export_tools import exported, random_plan
from planted_faults import FAULTS, Planted, both, put, renamed, to_int8, weights
from products import sampled

from vpruner.core.errors import UserError
from vpruner.core.plan import TokenPlan
from vpruner.export.faults import TOLERANCES, deviation
from vpruner.export.files import into_memory, load_model, save_model
from vpruner.export.fold import fold_file
from vpruner.export.graph import OpenedGraph, open_graph
from vpruner.export.passes.lower_opset import LowerOpset
from vpruner.export.precision import convert
from vpruner.export.sections import trace
from vpruner.pipeline import diagnose as module
from vpruner.pipeline.bench import WIDE, Bench, Program, programs
from vpruner.pipeline.diagnose import diagnose

IMAGES = np.random.default_rng(0).standard_normal((2, 3, 32, 48)).astype(np.float32)


def base() -> ir.Model:
    return into_memory(load_model(exported("layer scale", depth=2).path))


def compared(candidate, reference, precision=None, runtime="ort"):
    candidate, reference = OpenedGraph(candidate), OpenedGraph(reference)
    return module._diagnose(candidate, reference, trace(reference), IMAGES, runtime, precision)


def named(*names: str) -> list[Planted]:
    return [one for one in FAULTS if one.name in names]


#: Found in other tests here, or as some other fault is.
LIKE_OTHERS = named("overflow_in_one_channel", "weights_of_another_block", "zeroed_bias", "logits_beyond_the_range",
                    "overflow_ahead_of_the_bias", "logits_with_too_few_digits")  # fmt: skip


@pytest.mark.parametrize(
    "planted",
    sampled(FAULTS, [one for one in FAULTS if one not in LIKE_OTHERS]),
    ids=lambda planted: planted.name,
)
def test_a_planted_fault_is_found(planted):
    reference, candidate = base(), base()
    candidate = planted.plant(reference, candidate)
    done = compared(candidate, reference, planted.precision)
    first = done.faults[0]
    assert (first.block, first.part, first.kind) == (planted.block, planted.part, planted.kind)
    assert planted.node is None or first.node == planted.node
    assert first.found and first.cure
    if planted.precision is None:
        # Other sections are right, from right inputs: it is not handed on.
        assert len(done.faults) == 1


def with_plan(model: ir.Model, plan: TokenPlan) -> ir.Model:
    with TemporaryDirectory() as folder:
        fold_file(model, plan, f"{folder}/folded.onnx")
        return into_memory(load_model(f"{folder}/folded.onnx"))


def frozen_plan() -> TokenPlan:
    """Of each block other patches are read, and attend, and pass the MLP: all are put together again and again."""
    geometry = exported("layer scale", depth=2).geometry
    ranks = np.random.default_rng(0).permuted(np.tile(np.arange(geometry.patches), (3, 2, 1)), axis=2)
    return TokenPlan.from_masks("tiny", geometry, ranks < np.array([[22, 20], [16, 10], [12, 5]])[..., None])


def permuted_tokens(reference: ir.Model, candidate: ir.Model) -> ir.Model:
    put(candidate, PERMUTED.node, np.roll(weights(candidate, PERMUTED.node), 1))
    return candidate


#: A Gather that folding adds, in the place of the one that has one token left to gather.
PERMUTED = Planted(permuted_tokens, 0, "mlp", "vpruner.vpruner.add_1.joined.rows.15", "wrong graph")
IN_PRUNED = [*(one for one in FAULTS if one.name != "wrong_gather"), PERMUTED]
#: No plan is folded into what they make of a dense graph: they are planted in the folded one.
AFTER_FOLDING = [PERMUTED, *named("softmax_over_the_wrong_axis", "dropped_residual", "saturated_scale",
                                  "missing_scale_of_attention")]  # fmt: skip


def pruned(planted: Planted) -> tuple[ir.Model, ir.Model]:
    """A candidate with a plan in it, and its reference."""
    reference, candidate, plan = base(), base(), frozen_plan()
    if planted in AFTER_FOLDING:
        for model in (reference, candidate):
            planted.prepare(model)
        reference, candidate = (with_plan(model, plan) for model in (reference, candidate))
        return planted.change(reference, candidate), reference
    candidate = planted.plant(reference, candidate)
    return with_plan(candidate, plan), with_plan(reference, plan)


@pytest.mark.parametrize(
    "planted",
    sampled(
        IN_PRUNED,
        [PERMUTED, *named("weights_of_another_block", "dropped_residual", "squares_of_a_written_norm")],
    ),
    ids=lambda planted: planted.name,
)
def test_it_is_found_in_a_pruned_file(planted):
    done = compared(*pruned(planted), planted.precision)
    places = [(None, "stem"), (0, "attention"), (0, "mlp"), (1, "attention"), (1, "mlp")]
    assert [(one.block, one.part) for one in done.sections[:-1]] == places[: len(done.sections) - 1]
    first = done.faults[0]
    assert (first.block, first.part, first.kind) == (planted.block, planted.part, planted.kind)
    assert planted.node is None or first.node == planted.node
    assert len(done.faults) == 1 or planted.precision


@pytest.mark.parametrize(
    "planted",
    sampled(
        named("softmax_over_the_wrong_axis", "wrong_gather", "dropped_residual", "transposed_weight"),
        named("wrong_gather", "transposed_weight"),
    ),
    ids=lambda planted: planted.name,
)
def test_it_is_found_in_a_file_with_other_names(planted):
    reference, candidate = base(), base()
    candidate = renamed(planted.plant(reference, candidate))
    first, *others = compared(candidate, reference).faults
    assert (first.block, first.part) == (planted.block, planted.part) and not others
    assert first.kind in ("wrong graph", "different weights")


def lowered() -> ir.Model:
    model = base()
    LowerOpset(16)(model)
    return model


def with_tanh() -> ir.Model:
    model = base()
    for one in model.graph:
        if one.op_type == "Gelu":
            one.attributes["approximate"] = ir.AttrString("approximate", "tanh")
    return model


def folded(seed: int | None) -> ir.Model:
    geometry = exported("layer scale", depth=2).geometry
    return with_plan(base(), TokenPlan.identity("tiny", geometry) if seed is None else random_plan(geometry, seed))


#: Name -> (candidate, reference, precision) of what is right.
CLEAN = {
    "itself": (base, base, None),
    "FP16": (base, base, "fp16"),
    "BF16": (base, base, "bf16"),
    "an older opset in FP16": (lowered, base, "fp16"),
    "other names": (lambda: renamed(base()), base, None),
    "GELU by tanh": (with_tanh, base, None),
    "INT8": (lambda: to_int8(base(), IMAGES), base, None),
    "an open batch": (lambda: load_model(exported("layer scale", dynamic_batch=True, depth=2).path), base, None),
    "without work that nothing reads": (lambda: folded(None), base, None),
    "pruned": (lambda: folded(1), lambda: folded(1), "fp16"),
}


@pytest.mark.parametrize("name", sampled(list(CLEAN), [name for name in CLEAN if name != "an older opset in FP16"]))
def test_nothing_is_found_in_what_is_right(name):
    candidate, reference, precision = CLEAN[name]
    done = compared(candidate(), reference(), precision)
    assert not done.faults
    assert done.sections and done.output.error < done.tolerance / 3


def half_file(model: ir.Model, precision: str, **options) -> ir.Model:
    with TemporaryDirectory() as folder:
        convert(model, f"{folder}/half.onnx", precision, **options)
        return into_memory(load_model(f"{folder}/half.onnx"))


def test_rounded_weights_are_no_error_of_the_graph():
    done = compared(half_file(base(), "bf16"), base())
    assert not done.faults and all(section.graph.error < 1e-5 < section.computed.error for section in done.sections)


def test_a_cast_of_the_converter_is_not_taken_for_the_node_ahead_of_it():
    planted = next(one for one in FAULTS if one.name == "softmax_over_the_wrong_axis")
    reference, candidate = base(), base()
    both(reference, candidate, "node_MatMul_45", lambda array: array * 8)  # Otherwise attention is nearly even.
    candidate = half_file(planted.plant(reference, candidate), "fp16", keep_nodes=[planted.node])
    (found,) = compared(candidate, reference).faults
    assert (found.node, found.kind) == (planted.node, planted.kind) and "axis" in found.found


def test_halves_of_blocks_that_a_plan_leaves_out_are_not_counted():
    geometry = exported("average pooling").geometry
    masks = np.ones((3, geometry.depth, geometry.patches), bool)
    masks[1, 1] = masks[2, 2] = False
    masks[1:, :, ::2] = False
    with TemporaryDirectory() as folder:
        fold_file(exported("average pooling").path, TokenPlan.from_masks("tiny", geometry, masks), f"{folder}/a.onnx")
        traced = trace(open_graph(f"{folder}/a.onnx"))
    halves = [(0, "attention"), (0, "mlp"), (1, "mlp"), (2, "attention"), (3, "attention"), (3, "mlp")]
    assert [(one.block, one.part) for one in traced.points[1:]] == halves and not traced.lacking


# -- what a runtime does ----------------------------------------------------------------------------------------------


def other_kernel(model: ir.Model) -> ir.Model:
    """The softmax of the second block computed by a runtime that gets its scale wrong."""
    put(model, "node_mul_3", np.float32(0.5), 1)
    return model


def beside(model, program, precision=None):
    """A bench on which ``program`` is the runtime."""
    traced = trace(OpenedGraph(model))
    computes = precision or "fp32"
    emulated = programs("ort", "fp32", precision)[1]
    return Bench(traced, traced, IMAGES, "fp32", computes, program, emulated)


def test_a_kernel_that_is_wrong_is_told_from_rounding():
    model = base()
    put(model, "node_MatMul_45", weights(model, "node_MatMul_45") * 4)  # Otherwise attention is nearly even.
    for precision in (None, "fp16"):
        bench = beside(model, Program(other_kernel, WIDE.open), precision)
        (found,) = bench.faults(bench.sections())
        assert (found.block, found.part, found.node, found.kind) == (1, "attention", "node_mul_3", "wrong kernel")


def test_an_overflow_in_a_runtime_is_seen_by_emulation():
    reference, candidate = base(), base()
    planted = next(one for one in FAULTS if one.name == "logits_beyond_the_range")
    planted.plant(reference, candidate)
    bench = beside(reference, programs("ort", "fp32", "fp16")[0], "fp16")
    # Of another object, so that it stands for a device, whose inner values are not looked at.
    bench.real = replace(bench.real, costly=True)
    (found,) = bench.faults(bench.sections())
    assert (found.node, found.kind) == (planted.node, planted.kind) and "FP32" in found.cure


def test_what_is_wrong_only_where_nobody_looks_is_a_fusion(monkeypatch):
    def open_wrongly(path):
        session = WIDE.open(path)
        if len(session.inputs) == 1:
            run = session.run
            session.run = lambda feeds: {name: array * 2 for name, array in run(feeds).items()}
        return session

    model = base()
    monkeypatch.setattr(module, "programs", lambda *_: (Program(WIDE.rewrite, open_wrongly), None, "fp32", "a runtime"))
    done = compared(model, model)
    assert all(section.wrong is None for section in done.sections)
    assert [one.kind for one in done.faults] == ["wrong kernel"] and "keep these outputs" in done.faults[0].cure


def test_rounding_that_adds_up_is_lost_precision(monkeypatch):
    first = compared(base(), base(), "fp16")
    largest = max(section.computed.error for section in first.sections)
    assert largest * 1.05 < first.output.error
    # Each section keeps within this, all of them together do not.
    monkeypatch.setitem(TOLERANCES, "fp16", largest * 1.05)
    monkeypatch.setitem(TOLERANCES, "fp32", 1e-5)
    done = compared(base(), base(), "fp16")
    assert [one.kind for one in done.faults] == ["lost precision"] and "together" in done.faults[0].found


def test_openvino_is_compared_too():
    pytest.importorskip("openvino")
    planted = next(one for one in FAULTS if one.name == "weights_of_another_block")
    reference, candidate = base(), base()
    done = compared(planted.plant(reference, candidate), reference, runtime="openvino")
    assert [one.node for one in done.faults] == [planted.node] and done.computed == "OpenVINO"
    assert all(section.computed.error < 1e-5 for section in done.sections)


@pytest.mark.parametrize("release", ["8.5", "10.13"])
def test_tensorrt_builds_engines_that_show_their_inside(machine, release, tmp_path, images):
    pytest.importorskip("polygraphy")
    there = machine(release)
    path = exported("class token", opset=17, depth=2).path
    done = diagnose(path, path, data=str(images), images=2, runtime="trt")
    assert done.computed == "TensorRT" and len(done.sections) == 6 and not done.faults
    assert sum(entry[0] == "build" for entry in there.trt.log) == 2, "one that is cut, one that is whole"


def test_of_an_engine_the_outputs_are_compared(machine, tmp_path, images):
    pytest.importorskip("polygraphy")
    machine("10.13")
    from vpruner.pipeline.engines import build_engine

    path, other = exported("class token", depth=2).path, tmp_path / "other.onnx"
    model = load_model(path)
    put(model, "node_MatMul_11", weights(model, "node_MatMul_11") * 2)
    save_model(model, other)
    build_engine(path, tmp_path / "a.engine")
    done = diagnose(tmp_path / "a.engine", path, data=str(images), images=2)
    assert not done.faults and not done.sections and "the ONNX file that it is built from" in done.remarks[0]
    done = diagnose(tmp_path / "a.engine", other, data=str(images), images=2)
    assert [one.kind for one in done.faults] == ["unknown"]
    with pytest.raises(UserError, match="is an engine, which nothing mends"):
        diagnose(tmp_path / "a.engine", path, data=str(images), fix=tmp_path / "fixed.onnx")


# -- mending ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "planted",
    sampled(
        named("overflow_in_one_channel", "values_that_vanish", "squares_of_a_written_norm", "logits_beyond_the_range",
              "massive_activation_in_the_stream", "overflow_ahead_of_the_bias", "logits_with_too_few_digits"),
        named("squares_of_a_written_norm", "overflow_ahead_of_the_bias", "logits_with_too_few_digits"),
    ),
    ids=lambda planted: planted.name,
)  # fmt: skip
def test_a_file_that_is_mended_is_right(planted, tmp_path, images):
    reference, candidate = base(), base()
    candidate = planted.plant(reference, candidate)
    save_model(reference, tmp_path / "reference.onnx")
    save_model(candidate, tmp_path / "candidate.onnx")
    done = diagnose(tmp_path / "candidate.onnx", tmp_path / "reference.onnx", data=str(images), images=2,
                    precision="fp16", fix=tmp_path / "mended.onnx")  # fmt: skip
    assert done.faults and done.fixed is not None and not done.fixed.faults
    assert done.fixed.output.error < 5e-3
    mended = load_model(tmp_path / "mended.onnx")
    halves = [value for value in mended.graph.initializers.values() if value.dtype == ir.DataType.FLOAT16]
    assert len(halves) > 20, "no more than needed is in float32"


def test_what_nothing_mends_is_said(tmp_path, images):
    path = exported("class token", depth=2).path
    convert(path, tmp_path / "int8.onnx", "int8", images=IMAGES)
    with pytest.raises(UserError, match="is int8, and 'fix' writes FP16 or BF16"):
        diagnose(tmp_path / "int8.onnx", path, data=str(images), images=2, fix=tmp_path / "mended.onnx")
    assert not (tmp_path / "mended.onnx").exists()


# -- mistakes ---------------------------------------------------------------------------------------------------------


def test_files_that_are_not_of_one_model_are_refused(tmp_path, images):
    path, plan = exported("class token", depth=2).path, random_plan(exported("class token", depth=2).geometry, 1)
    fold_file(path, plan, tmp_path / "pruned.onnx")
    convert(path, tmp_path / "fp16.onnx", "fp16")
    model, wide = load_model(path), tmp_path / "wide.onnx"
    for position in (1, 2):
        put(
            model,
            "node_linear_8",
            np.resize(weights(model, "node_linear_8", position), (7, 32)[: 3 - position]),
            position,
        )
    model.graph.outputs[0].shape = ir.Shape([1, 7])
    save_model(model, wide)

    def refused(candidate, reference, **options):
        with pytest.raises(UserError) as caught:
            diagnose(candidate, reference, data=str(images), images=2, **options)
        return str(caught.value)

    assert "one of the two is pruned" in refused(tmp_path / "pruned.onnx", path)
    assert "one of the two is pruned" in refused(path, tmp_path / "pruned.onnx")
    assert "expected the float32 file as the reference" in refused(path, tmp_path / "fp16.onnx")
    assert "give two files of one model" in refused(wide, path)
    assert "is fp16, bf16 was asked for" in refused(tmp_path / "fp16.onnx", path, precision="bf16")


def test_what_is_not_finite_in_the_reference_is_no_error():
    right = np.array([[1.0, np.inf, np.nan]])
    same = deviation(right, right.copy(), "fp32")
    assert same.error == 0 and same.lost == 0
    lost = deviation(np.ones((2, 3)), np.array([[1, 1, 1], [1, np.inf, 1]]), "fp32")
    assert lost.error == np.inf and lost.lost == 1 and lost.image == 1
