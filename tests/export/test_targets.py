"""The declared tables: complete, consistent, and naming operators that exist."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from vpruner.cli.hints import as_typed
from vpruner.core.errors import UserError
from vpruner.core.text import as_python
from vpruner.export.check import check
from vpruner.export.targets import TARGETS, find_target
from vpruner.export.targets.rules import SEVERITIES, Bound, Rule, Target
from vpruner.export.targets.tensorrt import REDUCTIONS
from vpruner.export.targets.tensorrt_rtx import NOT_IN_RTX


def rules_of(target: Target) -> list[Rule]:
    """Every rule of a target, wherever it stands in the table."""
    rules = []
    for field in dataclasses.fields(target):
        value = getattr(target, field.name)
        if isinstance(value, Rule):
            rules.append(value)
        elif isinstance(value, tuple):
            rules.extend(value)
        elif isinstance(value, dict):
            rules.extend(value.values())
    return rules


@pytest.mark.parametrize("name", TARGETS)
def test_every_rule_says_why_and_what_to_do_and_where_that_is_from(name):
    rules = rules_of(TARGETS[name])
    assert len(rules) > 3 and all(isinstance(rule, Rule) for rule in rules)
    for rule in rules:
        assert rule.severity in SEVERITIES
        for text in (rule.why, rule.todo, rule.source):
            assert text.strip() == text and len(text) > 8
        # Findings print them as sentences.
        assert not rule.why.endswith(".") and not rule.todo.endswith(".")


def test_what_the_form_of_a_graph_decides_is_mended_by_writing_it_for_the_target():
    for name, target in TARGETS.items():
        for bound in target.opset:
            if bound.high is not None:
                assert f"vpruner export MODEL --for {name}, or: vpruner fold" in as_typed(bound.todo)
                assert f'model.export(..., deploy_for="{name}"), or: vpruner.fold_plan(' in as_python(bound.todo)
    todo = as_typed(TARGETS["trt8.5"].forbidden["", "LayerNormalization"].todo)
    assert "vpruner export MODEL --for trt8.5" in todo and "--plan PLAN --for trt8.5" in todo


def test_targets_are_found_by_their_own_name():
    assert list(TARGETS) == ["ort-cpu", "ort-cuda", "trt10", "trt11", "trt8.5", "trt-rtx", "openvino", "generic"]
    for name in TARGETS:
        assert find_target(name).name == name


def test_an_unknown_target_is_refused_with_the_choices():
    with pytest.raises(UserError, match=r"no target 'trt9'; choose one of: ort-cpu, .*generic"):
        find_target("trt9")


def test_targets_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        find_target("trt10").name = "other"


def test_forbidden_operators_exist():
    """A misspelt name would never be found in a graph, and its rule would be dead."""
    known = {schema.name for schema in onnx.defs.get_all_schemas_with_history() if not schema.domain}
    for target in TARGETS.values():
        named = {op_type for domain, op_type in target.forbidden if not domain}
        assert named <= known, named - known
        assert {rule.op_type for rule in target.constant_inputs} <= known


def test_operators_of_onnxruntime_exist():
    """The names of com.microsoft are those that onnxruntime defines."""
    state = pytest.importorskip("onnxruntime.capi.onnxruntime_pybind11_state")
    known = {schema.name for schema in state.get_all_operator_schema() if schema.domain == "com.microsoft"}
    for target in TARGETS.values():
        named = {op_type for domain, op_type in target.forbidden if domain == "com.microsoft"} | target.foreign_runs
        assert named <= known, named - known


def test_onnxruntime_has_no_cpu_kernel_of_what_the_table_says_it_lacks():
    state = pytest.importorskip("onnxruntime.capi.onnxruntime_pybind11_state")
    kernels = {
        kernel.op_name
        for kernel in state.get_all_opkernel_def()
        if kernel.domain == "com.microsoft" and kernel.provider == "CPUExecutionProvider"
    }
    named = {op_type for domain, op_type in TARGETS["ort-cpu"].forbidden if domain == "com.microsoft"}
    assert {"SkipLayerNormalization", "BiasGelu", "MultiHeadAttention"} <= kernels
    assert named and not named & kernels


def test_opset_limits_are_the_documented_ones():
    limits = {
        name: (
            max((bound.low for bound in target.opset if bound.low is not None), default=None),
            min((bound.high for bound in target.opset if bound.high is not None), default=None),
        )
        for name, target in TARGETS.items()
    }
    assert limits == {
        "ort-cpu": (7, 26),
        "ort-cuda": (7, 26),
        "trt10": (9, 20),
        "trt11": (9, 25),
        "trt8.5": (None, 17),
        "trt-rtx": (7, 25),
        "openvino": (None, None),
        "generic": (None, 20),
    }


def test_bounds_are_inclusive():
    bound = Bound("error", "why", "todo", "source", low=9, high=20)
    assert [bound.allows(number) for number in (8, 9, 20, 21)] == [False, True, True, False]
    assert Bound("error", "why", "todo", "source").allows(10**6)


def test_constant_inputs_are_found_by_operator_and_position():
    target = TARGETS["trt10"]
    for reduction in REDUCTIONS:
        assert target.constant_input(reduction, 1).name == "axes"
        assert target.constant_input(reduction, 0) is None
    assert target.constant_input("Slice", 3) is None
    assert TARGETS["trt8.5"].constant_input("Slice", 3).severity == "error"


def test_the_tables_need_no_heavy_package():
    code = """
import sys
for name in ("onnx", "onnx_ir", "torch", "onnxruntime", "numpy"):
    sys.modules[name] = None
from vpruner.export.targets import TARGETS
print(len(TARGETS))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "8\n", done.stderr


@pytest.fixture
def rtx():
    """A function that gives a network, its parser and their builder; TensorRT-RTX needs no GPU for that."""
    package = pytest.importorskip("tensorrt_rtx", reason="needs the package tensorrt-rtx, and no GPU")
    logger = package.Logger(package.Logger.INTERNAL_ERROR)
    builder = package.Builder(logger)

    def make():
        network = builder.create_network(0)
        return network, package.OnnxParser(network, logger), builder

    return make


def test_the_parser_of_tensorrt_rtx_knows_what_the_table_does_not_name(rtx):
    _network, parser, _builder = rtx()
    known = {schema.name for schema in onnx.defs.get_all_schemas_with_history() if not schema.domain}
    assert {name for name in known if not parser.supports_operator(name)} == set(NOT_IN_RTX.split())


@pytest.mark.parametrize("name", ["static/pruned.onnx", "content/pruned.onnx"])
def test_tensorrt_rtx_builds_what_has_no_errors_for_it(rtx, name):
    path = Path(__file__).parents[1] / "recorded" / name
    assert not [finding for finding in check(path, "trt-rtx") if finding.severity == "error"]
    network, parser, builder = rtx()
    assert parser.parse(path.read_bytes())
    assert builder.build_serialized_network(network, builder.create_builder_config()) is not None
