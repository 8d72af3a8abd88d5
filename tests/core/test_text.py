"""Words of messages in both forms: a Python caller's and, through cli/hints.py, those one types."""

import numpy as np
import pytest

from vpruner.cli.hints import as_typed
from vpruner.core import progress
from vpruner.core.errors import PlanError, UserError
from vpruner.core.text import as_python, command, onnxruntime_says, option


@pytest.mark.parametrize(
    ("mark", "python", "typed"),
    [
        (option("eval_data"), "'eval_data'", "--eval-data"),
        (option("data", "DIR"), "data=DIR", "--data DIR"),
        (option("data", "my images"), 'data="my images"', "--data 'my images'"),
        (option("output"), "'output'", "-o"),
        (option("opset", np.int64(17)), "opset=17", "--opset 17"),
        (option("keep", 0.25), "keep=0.25", "--keep 0.25"),
        (option("trust", True), "trust=True", "--trust"),
        (option("check", False), "check=False", "--no-check"),
        (option("mean", (0.5, 0.4, 0.3)), "mean=(0.5, 0.4, 0.3)", "--mean 0.5,0.4,0.3"),
        (option("precisions", ["int8"]), 'precisions=("int8",)', "--precision int8"),
        (option("batch", ("MIN", "OPT", "MAX")), "batch=(MIN, OPT, MAX)", "--batch-range MIN OPT MAX"),
        (option("batch", 8), "batch=8", "--batch-size 8"),
        (option("workspace_bytes", 1 << 30), "workspace_bytes=1073741824", "--workspace 1024"),
        (option("tactic_sources", ()), "tactic_sources=()", "--tactic-sources none"),
        (command("prune"), "model.prune(...)", "vpruner prune"),
        (
            command("prune", "MODEL", select="content", output="plan.json"),
            'model.prune(..., select="content")',
            "vpruner prune MODEL --select content -o plan.json",
        ),
        (
            command("prune", "a b.onnx", data="DIR"),
            'vpruner.open_model("a b.onnx").prune(...)',
            "vpruner prune 'a b.onnx' --data DIR",
        ),
        (
            command("export", "MODEL", weights="a.pth", plan="PLAN"),
            'vpruner.open_model(..., weights="a.pth").export(..., plan=PLAN)',
            "vpruner export MODEL --weights a.pth --plan PLAN",
        ),
        (
            command("check", "a.onnx", target="trt10"),
            'vpruner.export.check.check("a.onnx", target="trt10")',
            "vpruner check a.onnx --for trt10",
        ),
        (
            command("build", "MODEL.onnx", output="MODEL.engine"),
            'vpruner.build_engine(..., output="MODEL.engine")',
            "vpruner build MODEL.onnx -o MODEL.engine",
        ),
    ],
)
def test_a_mark_reads_as_python_and_as_typed(mark, python, typed):
    assert as_python(f"see {mark}.") == f"see {python}."
    assert as_typed(f"see {mark}.") == f"see {typed}."


def test_names_of_files_may_hold_any_character():
    hostile = "a\x02b\x03c\x04d"
    for translated in (as_python, as_typed):
        text = translated(f"{hostile} is no plan, give {option('plan', hostile)}: {command('check', hostile)}")
        assert not set("\x02\x03\x04") & set(text), text
        assert "check" in text and text.startswith("a?b?c?d is no plan, give ")
    assert as_python(option("plan", hostile)) == r'plan="a\u0002b\u0003c\u0004d"'


def test_an_error_reads_as_python_whatever_is_asked_of_it():
    error = PlanError(f"{option('plan')} is of another model", f"make one: {command('prune', 'MODEL')}")
    text = "'plan' is of another model; make one: model.prune(...)"
    assert str(error) == text and error.problem + "; " + error.hint == text
    assert repr(error) == f"PlanError({text!r})"
    assert as_typed(error.marked) == "--plan is of another model; make one: vpruner prune MODEL"
    again = UserError(f"a.json: {error.marked_problem}", error.marked_hint)
    assert as_typed(again.marked) == f"a.json: {as_typed(error.marked)}" and str(again) == f"a.json: {text}"


def test_words_are_those_of_the_job_that_runs(caplog):
    class Typed(progress.Sink):
        def words(self, text):
            return as_typed(text)

    error, mark = UserError(f"no\n{option('data')}"), option("eval_data")
    assert (progress.words(mark), progress.words_of(error)) == ("'eval_data'", "no 'data'")
    with progress.reporting(Typed()) as record:
        assert (progress.words(mark), progress.words_of(error)) == ("--eval-data", "no --data")
        assert progress.words_of(ValueError("a\nb")) == "a b"
        progress.remark(f"no {mark}")
    assert record.remarks == ["no --eval-data"]
    progress.remark(f"no {mark}")
    assert caplog.messages == ["no 'eval_data'"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "[ONNXRuntimeError] : 1 : FAIL : Load model from a b.onnx failed:Fatal error: some.vendor:Add(-1) is not a "
            "registered function/op",
            "some.vendor:Add(-1) is not a registered function/op",
        ),
        (
            "[ONNXRuntimeError] : 7 : INVALID_PROTOBUF : Load model from x.onnx failed:Protobuf parsing failed.",
            "Protobuf parsing failed",
        ),
        (
            "[ONNXRuntimeError] : 1 : FAIL : Load model from x.onnx failed:/src/onnxruntime/core/graph/model.h:46 void "
            "onnxruntime::f(int, const X&) ONNX Runtime only *guarantees* support\nfor models of IR 11",
            "ONNX Runtime only *guarantees* support for models of IR 11",
        ),
        ("", "RuntimeError"),
    ],
)
def test_messages_of_onnxruntime_are_cut_to_what_they_say(text, said):
    assert onnxruntime_says(RuntimeError(text)) == said
