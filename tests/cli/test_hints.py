"""What the library says, through both faces: an option or a command on the command line, a call in Python."""

import ast
import functools
import importlib
import json
from pathlib import Path

import click
import onnx
import pytest
from commands import call, fails
from onnx import TensorProto, helper

import vpruner
from vpruner.cli import main
from vpruner.cli.hints import typed
from vpruner.core import progress
from vpruner.core.content_plan import load_plan
from vpruner.core.errors import UserError
from vpruner.core.specs import DataSpec, ExportSpec, LearnSpec, ModelSpec, PrecisionSpec, TimingSpec
from vpruner.core.text import IN_PYTHON
from vpruner.runtime.session import Session

ROOT = Path(vpruner.__file__).parent
MARKS = set("\x02\x03\x04")


# -- every mark in the source -----------------------------------------------------------------------------------------


def marks():
    """(place, call) of every ``option(...)`` and ``command(...)`` in the library."""
    for room in ("core", "prune", "export", "runtime", "pipeline", "report"):
        for path in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                called = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
                first = node.args[0] if called in ("option", "command") and node.args else None
                if isinstance(first, ast.Constant):
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", node, called, first.value


@functools.cache
def offered() -> dict[str, set[str]]:
    """Command -> the options that it takes."""
    context = click.Context(main)
    found = {name: main.get_command(context, name) for name in main.list_commands(context)}
    for name, group in list(found.items()):
        if isinstance(group, click.Group):
            found |= {f"{name} {inner}": group.get_command(context, inner) for inner in group.list_commands(context)}
    return {
        name: {text for parameter in one.params for text in (*parameter.opts, *parameter.secondary_opts)}
        for name, one in found.items()
    }


def value(node: ast.expr):
    """As far as it matters for the name of an option: False and several values are typed by other names."""
    if isinstance(node, (ast.Tuple, ast.List)):
        return [""]
    return node.value is not False if isinstance(node, ast.Constant) and isinstance(node.value, bool) else ""


def test_what_the_library_names_can_be_typed():
    everything, wrong, count = set().union(*offered().values()), [], 0
    for place, node, called, name in marks():
        count += 1
        if called == "option":
            given = value(node.args[1]) if len(node.args) > 1 else None
            if typed(name, given).split()[0] not in everything:
                wrong.append(f"{place}: option {name}")
            continue
        if name not in offered() or name not in IN_PYTHON:
            wrong.append(f"{place}: command {name}")
            continue
        named = {keyword.arg: value(keyword.value) for keyword in node.keywords if keyword.arg}
        unknown = [key for key, given in named.items() if typed(key, given, name).split()[0] not in offered()[name]]
        wrong += [f"{place}: {name} with {key}" for key in unknown]
    assert count > 150 and not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", sorted(IN_PYTHON))
def test_what_the_library_names_can_be_called(name):
    module, _, function = IN_PYTHON[name].replace("(...)", "").rpartition(".")
    if module == "vpruner.open":
        owner = Session
    elif module in ("model", "vpruner"):
        api = pytest.importorskip("vpruner.api")
        owner = api.Model if module == "model" else vpruner
    else:
        owner = importlib.import_module(module)
    assert callable(getattr(owner, function))


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def graph(tmp_path_factory) -> Path:
    """A file whose operators TensorRT 8.5 takes, in an opset that it does not."""
    path = tmp_path_factory.mktemp("graph") / "relu.onnx"
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, (1, 4)) for name in "xy"]
    made = helper.make_graph([helper.make_node("Relu", ["x"], ["y"], name="relu")], "graph", values[:1], values[1:])
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=8), path)
    return path


def open_torch(**options):
    from vpruner.prune.models import open_model

    return open_model(**options)


def checked(path, target="trt10"):
    from vpruner.export.check import check

    return check(path, target)


def profiled(paths):
    from vpruner.runtime.profile import profile_files

    return profile_files(paths)


def pruned(**options):
    from vpruner.prune.vlm.baselines import prunings_from

    return prunings_from(("vit",), (), **options)


def ran(output, *, force=False, **options):
    from vpruner.pipeline.options import RunOptions
    from vpruner.pipeline.run import run

    return run(RunOptions(**options), output, force=force)


def table_spec(**options):
    from vpruner.pipeline.table import TableSpec

    return TableSpec(**options)


def evaluated(model, **options):
    from vpruner.pipeline.evaluate import evaluate

    return evaluate(ModelSpec(model), DataSpec(), **options)


#: room: (arguments, what the command line says, the same in Python, what that says); ``FOLDER`` is an empty one.
MISTAKES = {
    "core": (
        ("export", "CARD", "--plan", "FOLDER/absent.json", "-o", "FOLDER/x.onnx"),
        "No such file or directory; make a plan with: vpruner prune MODEL",
        lambda card, folder, graph: load_plan(folder / "absent.json"),
        "No such file or directory; make a plan with: model.prune(...)",
    ),
    "core, Specs": (
        ("run", "CARD", "--io", "same", "-o", "FOLDER/x"),
        "--io same goes with --precision fp16 or bf16; leave it out",
        lambda card, folder, graph: PrecisionSpec(io="same"),
        'io="same" goes with precisions=("fp16",) or bf16; leave it out',
    ),
    "prune": (
        ("export", "deit_tiny_patch16_224", "-o", "FOLDER/x.onnx"),
        "no weights given for deit_tiny_patch16_224; give one of --weights FILE or --pretrained",
        lambda card, folder, graph: open_torch(spec="deit_tiny_patch16_224"),
        "no weights given for deit_tiny_patch16_224; give one of weights=FILE or pretrained=True",
    ),
    "prune, an ONNX file": (
        ("export", "GRAPH", "-o", "FOLDER/x.onnx"),
        "vpruner prune GRAPH --data DIR; fold a plan into it: vpruner fold GRAPH --plan plan.json",
        lambda card, folder, graph: open_torch(spec=graph),
        'vpruner.open_model("GRAPH").prune(...); fold a plan into it: vpruner.fold_plan("GRAPH", plan="plan.json")',
    ),
    "prune.vlm": (
        ("vlm", "profile", "FOLDER", "--mode", "vit", "--threshold", 0.8),
        "--threshold goes with --mode llm or hybrid; leave out --threshold",
        lambda card, folder, graph: pruned(threshold=0.8),
        "'threshold' goes with 'mode' llm or hybrid; leave out 'threshold'",
    ),
    "export": (
        ("check", "CARD"),
        "is a model card, expected an ONNX model; write the ONNX file with: vpruner export CARD",
        lambda card, folder, graph: checked(card),
        'write the ONNX file with: vpruner.open_model("CARD").export(...)',
    ),
    "runtime": (
        ("profile", "GRAPH", "--against", "FOLDER/dense.engine"),
        "build the other one too: vpruner build DENSE.onnx -o DENSE.engine",
        lambda card, folder, graph: profiled({"dense": folder / "dense.engine", "pruned": graph}),
        'build the other one too: vpruner.build_engine(..., output="DENSE.engine")',
    ),
    "pipeline, a file in the way": (
        ("run", "CARD", "-o", "CARD"),
        "is a file; choose another folder with -o",
        lambda card, folder, graph: ran(card, model=ModelSpec(card)),
        "is a file; choose another folder with 'output'",
    ),
    "pipeline, a table": (
        ("table", "CARD", "--precision", "fp16", "-o", "FOLDER/t.json"),
        "--precision goes with --runtime openvino and --runtime trt; leave it out",
        lambda card, folder, graph: table_spec(precision="fp16"),
        '\'precision\' goes with runtime="openvino" and runtime="trt"; leave it out',
    ),
    "pipeline, against": (
        ("evaluate", "CARD", "--against", "GRAPH"),
        "--against goes with an ONNX file; for a PyTorch model give --plan",
        lambda card, folder, graph: evaluated(card, against=graph),
        "'against' goes with an ONNX file; for a PyTorch model give 'plan'",
    ),
}


@pytest.mark.parametrize("room", MISTAKES)
def test_a_mistake_reads_as_it_was_made(room, card, graph, tmp_path):
    arguments, says, again, says_again = MISTAKES[room]
    (tmp_path / "dense.engine").touch()

    def filled(text) -> str:
        return str(text).replace("CARD", str(card)).replace("GRAPH", str(graph)).replace("FOLDER", str(tmp_path))

    fails(*map(filled, arguments), says=filled(says))
    assert not MARKS & set(call(*map(filled, arguments), code=2).output)
    with pytest.raises(UserError) as caught:
        again(card, tmp_path, graph)
    assert filled(says_again) in str(caught.value)
    assert not MARKS & set(f"{caught.value}{caught.value!r}{caught.value.problem}{caught.value.hint}")


# -- what is no error -------------------------------------------------------------------------------------------------


def test_findings_say_what_to_do(graph):
    said = "vpruner export MODEL --for trt8.5, or: vpruner fold DENSE --plan PLAN --for trt8.5"
    table = call("check", graph, "--for", "trt8.5", code=1).stdout
    rows = json.loads(call("check", graph, "--for", "trt8.5", "--json", code=1).stdout)["findings"]
    assert said in table and any(said in row["todo"] for row in rows)
    found = checked(graph, "trt8.5")
    in_python = 'model.export(..., deploy_for="trt8.5"), or: vpruner.fold_plan(..., plan=PLAN, deploy_for="trt8.5")'
    assert len(found) == len(rows) and any(in_python in finding.todo for finding in found)
    assert not MARKS & set(table + json.dumps([finding.to_json() for finding in found]))


def test_lines_of_an_inspected_file_name_the_command():
    from vpruner.export.inspect import inspect_file, lines_of

    theirs = Path(__file__).parents[1] / "golden" / "inputs" / "theirs.onnx"
    shown, lines = call("inspect", theirs).stdout, "\n".join(lines_of(inspect_file(theirs)))
    assert "(vpruner fold --identity)" in shown and "(vpruner.fold_plan(..., identity=True))" in lines
    assert not MARKS & set(shown + lines)


def test_files_of_a_run_hold_the_words_of_who_made_it(card, images, tmp_path):
    """Remarks are in the rows and in the report; nothing that is written holds a mark."""
    quick = ("--rounds", 1, "--rearrange", "none", "--tune", "none", "--seconds", 0.1)
    done = call("run", card, "--data", images, *quick, "-o", tmp_path / "typed")
    with progress.reporting(progress.Sink()):
        result = ran(
            tmp_path / "called",
            model=ModelSpec(str(card)),
            data=DataSpec(str(images)),
            learn=LearnSpec(rounds=1, rearrange="none", tune="none"),
            export=ExportSpec(),
            timing=TimingSpec(seconds=0.1),
        )
    assert "no --eval-data: " in done.stderr and not MARKS & set(done.output)
    assert any(remark.startswith("no 'eval_data': ") for remark in result["remarks"])
    for folder, here, there in (
        ("typed", "no --eval-data: ", "eval_data"),
        ("called", "no 'eval_data': ", "--eval-data"),
    ):
        texts = {
            path.name: path.read_text(encoding="utf-8")
            for path in (tmp_path / folder).iterdir()
            if path.suffix in (".json", ".jsonl", ".md", ".html")
        }
        assert {"plan.json", "results.jsonl", "report.md", "report.html"} == set(texts)
        assert here in texts["results.jsonl"] and there not in texts["results.jsonl"]
        assert not [name for name, text in texts.items() if MARKS & set(text)]
        assert not [name for name, text in texts.items() if any(rf"\u000{mark}" in text for mark in (2, 3, 4))]
