"""What a user sees and gets, recorded: help, messages, printed tables, written files, rows, reports and folded graphs.

Through the command line alone, so that nothing here knows how the package is divided. What is meant to change is
recorded again by ``python tests/golden/record.py``.
"""

import json
import shutil
from collections import Counter
from importlib import metadata
from pathlib import Path

import click
import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from commands import call
from golden_files import GOLDEN, Recorded, on_terminal, without_measurements
from onnx import numpy_helper
from PIL import Image

from vpruner.cli import main
from vpruner.core.plan import KINDS

COLOURS = {"cat": (220, 40, 40), "cow": (40, 220, 40), "dog": (40, 40, 220), "fox": (220, 220, 40)}
THEIRS = ("--mean", "0.5,0.5,0.5", "--std", "0.25,0.25,0.25")
TORCH = f"torch {'.'.join(metadata.version('torch').split('.')[:2])}"
QUICK = ("--rounds", 1, "--episodes", 8, "--seconds", 0.2)


def write_images(folder: Path, each: int, seed: int) -> None:
    """A square of its colour in each image of a class: what is cut away can be told from what is not."""
    random = np.random.RandomState(seed)
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for index in range(each):
            pixels = random.randint(90, 130, (16, 16, 3))
            y, x = random.randint(0, 10, 2)
            square = np.array(colour) + random.randint(-30, 30, (7, 7, 3))
            pixels[y : y + 7, x : x + 7] = square[: 16 - y, : 16 - x]
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name / f"{index:02}.png")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A folder with a model card, an ONNX file of another exporter, two plans, and images of four classes."""
    folder = tmp_path_factory.mktemp("golden")
    for path in (GOLDEN / "inputs").iterdir():
        shutil.copy(path, folder)
    write_images(folder / "train", 16, seed=3)
    write_images(folder / "val", 3, seed=4)
    return folder


@pytest.fixture
def there(inputs, monkeypatch) -> Path:
    """The inputs as the current folder, and a terminal that breaks no line: paths are the same on every machine."""
    monkeypatch.chdir(inputs)
    monkeypatch.setenv("COLUMNS", "250")
    return inputs


def commands(group: click.Group = main, before: tuple[str, ...] = ()):
    """Every command and group with its path: ``()`` is vpruner itself."""
    yield before
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if isinstance(command, click.Group):
            yield from commands(command, (*before, name))
        else:
            yield (*before, name)


def test_the_help_of_every_command(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with Recorded("help") as recorded:
        for path in commands():
            recorded[f"{'.'.join(('vpruner', *path))}.txt"] = call(*path, "--help", prog_name="vpruner").stdout


# -- runs -------------------------------------------------------------------------------------------------------------


def json_type(value) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "true or false", int: "integer", float: "number"}
    return "null" if value is None else names[type(value)]


def members(row: dict, before: str = ""):
    """``("protocol.rounds", "integer")`` of everything in a row; what differs between machines is not gone into."""
    for key, value in row.items():
        yield before + key, json_type(value)
        if isinstance(value, dict) and key not in ("environment", "untimed_before_each"):
            yield from members(value, f"{before}{key}.")


def described_rows(path: Path) -> str:
    """Keys and types of each kind of row; a question mark where not every row of the kind has the key."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    kinds, counts = {}, Counter(row["kind"] for row in rows)
    for row in rows:
        for key, kind in members(row):
            kinds.setdefault(row["kind"], {}).setdefault(key, []).append(kind)
    lines = []
    for kind, keys in kinds.items():
        lines += ["", f"{kind}: {counts[kind]}"]
        lines += [
            f"  {key}{'?' * (len(types) < counts[kind])}: {' or '.join(sorted(set(types)))}"
            for key, types in sorted(keys.items())
        ]
    return "\n".join(lines)


def run(name: str, *arguments, monkeypatch) -> None:
    """A whole run, and everything of it that is recorded."""
    arguments = ("run", *arguments, *QUICK, "-o", name)
    monkeypatch.setattr("sys.argv", ["vpruner", *map(str, arguments)])
    result = call(*arguments)
    plan = json.loads(Path(name, "plan.json").read_text())
    with Recorded(name) as recorded:
        recorded["stdout.txt"] = on_terminal(result.stdout)
        recorded["stderr.txt"] = on_terminal(result.stderr)
        recorded["files.txt"] = "\n".join(sorted(path.name for path in Path(name).iterdir()))
        recorded["rows.txt"] = described_rows(Path(name, "results.jsonl"))
        recorded["report.md"] = without_measurements(Path(name, "report.md").read_text(encoding="utf-8"))
        for kind in (*KINDS, "kept"):
            if kind in plan:
                recorded[f"{kind}.txt"] = "\n".join(" ".join(map(str, block)) for block in plan[kind])
        recorded["plan.txt"] = "\n".join(f"{key}: {kind}" for key, kind in members(plan))
        for path in Path(name).glob("pruned*.onnx"):
            if str(arguments[1]).endswith(".onnx"):
                recorded[f"{path.name}.txt"] = described_graph(path)
            else:
                recorded.under(TORCH, f"{path.name}.txt", described_graph(path))


def test_a_static_run(there, monkeypatch):
    run("static", "tiny.json", "--data", "train", "--eval-data", "val", "--target", 0.5, "--tune", "weights",
        monkeypatch=monkeypatch)  # fmt: skip


def test_a_run_whose_images_choose(there, monkeypatch):
    run("content", "tiny.json", "--data", "train", "--eval-data", "val", "--target", 0.6, "--select", "content",
        "--seed", 1, monkeypatch=monkeypatch)  # fmt: skip


def test_a_run_of_an_onnx_file(there, monkeypatch):
    run("onnx", "theirs.onnx", *THEIRS, "--data", "train", "--target", 0.5, "--precision", "fp16",
        monkeypatch=monkeypatch)  # fmt: skip


# -- folded graphs ----------------------------------------------------------------------------------------------------


def described_graph(path: Path) -> str:
    """Nodes with attributes and the constants that are no weights, by number instead of by name."""
    model = onnx.load(path)
    graph, names = model.graph, {"": "-"}
    lines = [
        f"opset {model.opset_import[0].version}, metadata: {', '.join(sorted(p.key for p in model.metadata_props))}"
    ]
    for kind, values in (("input", graph.input), ("output", graph.output)):
        for value in values:
            shape = [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
            lines.append(f"{kind} {value.name} {value.type.tensor_type.elem_type} {shape}")
            names.setdefault(value.name, value.name)
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}

    def shown(name: str) -> str:
        if name not in weights:
            return names[name]
        value = weights[name]
        return f"{value.dtype}{list(value.shape)}" + ("" if value.dtype.kind == "f" else f"={value.ravel().tolist()}")

    def attribute(item: onnx.AttributeProto) -> str:
        value = onnx.helper.get_attribute_value(item)
        if isinstance(value, onnx.TensorProto):
            array = numpy_helper.to_array(value)
            value = f"{array.dtype}{list(array.shape)}" + (
                "" if array.dtype.kind == "f" else f"={array.ravel().tolist()}"
            )
        return f"{item.name}={f'{value:.6g}' if isinstance(value, float) else value}"

    for number, node in enumerate(graph.node):
        attributes = ", ".join(sorted(map(attribute, node.attribute)))
        for position, name in enumerate(node.output):
            names.setdefault(name, f"%{number}" + (f".{position}" if position else ""))
        lines.append(f"%{number} {node.op_type}({', '.join(map(shown, node.input))}) {attributes}")
    return "\n".join(lines)


def test_folded_graphs(there):
    """Of an ONNX file that lies here: what torch exports depends on its version."""
    with Recorded("folded") as recorded:
        for name, options in {
            "plan": ("--plan", "plan.json"),
            "gates": ("--plan", "gates.json"),
            "frozen": ("--plan", "frozen.json"),
            "identity": ("--identity",),
        }.items():
            result = call("fold", "theirs.onnx", *options, "-o", f"{name}.onnx")
            recorded[f"{name}.graph.txt"] = described_graph(Path(f"{name}.onnx"))
            recorded[f"{name}.stdout.txt"] = on_terminal(result.stdout)
            recorded[f"{name}.stderr.txt"] = on_terminal(result.stderr)


def test_what_is_said_of_a_file(there):
    with Recorded("look") as recorded:
        recorded["inspect.txt"] = on_terminal(call("inspect", "theirs.onnx").stdout)
        recorded["inspect.json"] = call("inspect", "theirs.onnx", "--json").stdout
        recorded["check.trt10.txt"] = on_terminal(call("check", "theirs.onnx", "--for", "trt10").stdout)
        recorded["check.trt8.5.txt"] = on_terminal(call("check", "theirs.onnx", "--for", "trt8.5", code=1).stdout)


# -- mistakes ---------------------------------------------------------------------------------------------------------

#: One command a line, typed in the folder of the inputs.
MISTAKES = """
run tiny.json --data absent
run tiny.json --data train -o holds-a-thesis --force
run tiny.json --data train --target 1.5
run tiny.json --data train --target 0.01
run vit_tiny_patch16_224 --data train
run no_such_vit --weights tiny.safetensors --data train
run theirs.onnx --data train
run theirs.onnx --mean 0.5 --std 0.5 --data train --opset 18
run tiny.json --data train --precision fp12
run tiny.json --data train --no-such-option
prune tiny.json --data train -o tiny.json
prune tiny.json --data train --cost latency:absent.json
prune tiny.json --data train --select content --tune gates
prune tiny.json --data train --weights broken.onnx
prune tiny.json --data train --mean 0.5
export theirs.onnx -o dense.onnx
export tiny.json -o dense.txt
export tiny.json --plan plan.json -o out.onnx
export tiny.json --method no-such-method --data train -o out.onnx
fold theirs.onnx -o out.onnx
fold theirs.onnx --plan plan.json -o theirs.onnx
fold pruned.onnx --plan plan.json -o out.onnx
fold broken.onnx --plan plan.json -o out.onnx
fold theirs.onnx --plan broken.json -o out.onnx
evaluate theirs.onnx --eval-data val --mean 0.5 --std 0.5
evaluate theirs.onnx --against pruned.onnx --eval-data val --mean 0.5 --std 0.5
evaluate pruned.onnx --against pruned.onnx --eval-data val
evaluate tiny.json --eval-data val --mean 0.5
evaluate pruned.onnx --eval-data unlabelled --mean 0.5 --std 0.5
profile broken.onnx
profile theirs.onnx --against pruned.onnx
profile theirs.onnx --batch-size 0
predict theirs.onnx broken.json
predict absent.onnx val/cat/00.png
show plan.json -o plan.pdf
show tiny.json -o plan.png
report broken.json
report absent.jsonl
table tiny.json -o table.txt
convert theirs.onnx --precision int8 -o int8.onnx
convert theirs.onnx --precision fp16 -o theirs.onnx
inspect broken.onnx
check plan.json
build theirs.onnx -o engine.onnx
analyze tiny.json --data train -o curves.pdf
compare tiny.json --data train --methods no-such-method
compare tiny.json --data train --targets 2
vlm profile val
vlm profile val --keep 2
vlm evaluate val
vlm evaluate val --data absent.jsonl
"""


def test_mistakes_end_in_one_line(there):
    call("fold", "theirs.onnx", "--plan", "plan.json", "-o", "pruned.onnx")
    Path("broken.onnx").write_bytes(Path("theirs.onnx").read_bytes()[:5000])
    Path("broken.json").write_text('{"schema": 1')
    Path("unlabelled").mkdir()
    shutil.copy("val/cat/00.png", "unlabelled")
    Path("holds-a-thesis").mkdir()
    Path("holds-a-thesis", "thesis.tex").write_text("years of work")
    before = {path: path.read_bytes() for path in there.rglob("*") if path.is_file()}
    told: dict[str, list[str]] = {}
    for line in MISTAKES.strip().splitlines():
        result = CliRunner().invoke(main, line.split(), prog_name="vpruner")
        errors = [part for part in result.stderr.splitlines() if part.startswith("Error")]
        assert isinstance(result.exception, SystemExit), (line, result.exception)
        assert len(errors) == 1 and result.stdout == "", (line, result.output)
        error = without_measurements(errors[0].replace(f"{there}/", ""))
        told.setdefault(line.split()[0], []).append(f"$ vpruner {line}\n{error}\nexit code {result.exit_code}\n")
    assert before == {path: path.read_bytes() for path in there.rglob("*") if path.is_file()}
    with Recorded("mistakes") as recorded:
        for command, texts in told.items():
            recorded[f"{command}.txt"] = "\n".join(texts)
