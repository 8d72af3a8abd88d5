"""Heavy packages are optional, and proven optional: everything that must work without them runs with them blocked."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import vpruner
from vpruner.core.extras import EXTRA_OF, NO_TELEMETRY

BLOCKED = sorted({*EXTRA_OF, "torch", "torchvision", "timm", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "tensorrt"}
                 | {"polygraphy", "matplotlib", "safetensors"})  # fmt: skip

#: Runs before the probe in a process of its own: the test process has torch loaded already.
BLOCKER = f"""
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocker())
"""


def probe(code, *arguments, check=True):
    """Run ``code`` with the packages blocked."""
    command = [sys.executable, "-c", BLOCKER + code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if check:
        assert done.returncode == 0, done.stderr
    return done


def test_tests_run_against_this_clone(repository):
    assert Path(vpruner.__file__).resolve().parent == repository


def test_the_blocker_blocks():
    done = probe("import torch", check=False)
    assert done.returncode == 1 and "No module named 'torch'" in done.stderr


def test_light_modules_import_without_heavy_packages(repository):
    names = ["vpruner", "vpruner.prune.plan", "vpruner.runtime", "vpruner.export.targets"]
    for room in ("core", "report", "cli", "runtime"):
        names += [".".join(("vpruner", *path.relative_to(repository).with_suffix("").parts))
                  for path in sorted((repository / room).rglob("*.py")) if path.stem != "__init__"]  # fmt: skip
    probe("import importlib\nfor name in sys.argv[1:]:\n    importlib.import_module(name)", *names)


def test_importing_vpruner_is_light():
    done = probe("import vpruner; print(sorted({name.partition('.')[0] for name in sys.modules}))")
    assert not {"numpy", "PIL", "click", "rich"} & set(json.loads(done.stdout.replace("'", '"')))


def test_every_command_shows_its_help():
    done = probe(
        """
import json
import os
import re
import click
from click.testing import CliRunner
from vpruner.cli import main

def walk(command, path):
    yield path
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            yield from walk(command.get_command(context, name), [*path, name])

results = {}
for path in walk(main, []):
    done = CliRunner().invoke(main, [*path, "--help"])
    results[" ".join(path)] = [done.exit_code, done.output, repr(done.exception)]
print(json.dumps(results))
"""
    )
    results = json.loads(done.stdout)
    assert len(results) > 1, "the group has no commands"
    for name, (exit_code, output, exception) in results.items():
        assert exit_code == 0, f"vpruner {name} --help: {exception}\n{output}"
        assert output.startswith("Usage: "), name


@pytest.mark.parametrize("name", sorted(EXTRA_OF))
def test_require_names_the_extra(name):
    done = probe(
        """
from vpruner.core.errors import UserError
from vpruner.core.extras import require
try:
    require(sys.argv[1])
except UserError as error:
    print(error.exit_code, error)
""",
        name,
    )
    (line,) = done.stdout.splitlines()
    assert line.startswith("2 ") and repr(name) in line and f"pip install 'vpruner[{EXTRA_OF[name]}]'" in line


def test_require_passes_other_failures_on(tmp_path, monkeypatch):
    """A package that is there and broken is no missing extra: hiding its error would send the user to pip in vain."""
    from vpruner.core import extras

    (tmp_path / "broken_package.py").write_text("import a_module_that_nobody_has\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(extras.EXTRA_OF, "broken_package", "prune")
    with pytest.raises(ModuleNotFoundError, match="a_module_that_nobody_has"):
        extras.require("broken_package")


def test_onnxruntime_collects_nothing(tmp_path):
    """Its packages for Linux write an identity of the device and a store of events while they load, if let."""
    code = f"""
import os
from vpruner.core.extras import require
require("onnxruntime.quantization")
print(os.environ["{NO_TELEMETRY}"])
"""
    suppressing = ("CI", "GITHUB_ACTIONS", "TF_BUILD", NO_TELEMETRY)
    clean = {name: value for name, value in os.environ.items() if name not in suppressing}
    clean |= {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=clean, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout == "1\n" and not list(tmp_path.rglob("*nnxruntime*"))
    kept = subprocess.run(
        [sys.executable, "-c", code], env={**clean, NO_TELEMETRY: "0"}, capture_output=True, text=True, timeout=120,
        check=True,
    )  # fmt: skip
    assert kept.stdout == "0\n"


def test_what_has_telemetry_is_imported_in_one_place(repository):
    """Where it is switched off."""
    importing = re.compile(r"^\s*(import|from) (onnxruntime|openvino)\b", re.MULTILINE)
    rooms = ("core", "prune", "runtime", "report", "export", "pipeline", "cli")
    files = [*repository.glob("*.py"), *(path for room in rooms for path in (repository / room).rglob("*.py"))]
    assert not [path for path in files if importing.search(path.read_text())]


def make_plan():
    from vpruner.core.plan import Geometry, TokenPlan

    geometry = Geometry(
        depth=2, embed_dim=8, num_heads=2, head_dim=4, grid=(4, 4), prefix_tokens=1, image_size=(32, 32)
    )
    return TokenPlan.from_exits("tiny", geometry, [[2] * 16, [1, 1] * 8, [0, 1] * 8])


def run_command(*arguments):
    return probe("from vpruner.cli import main\nmain(sys.argv[1:], prog_name='vpruner')", *arguments, check=False)


def test_a_plan_can_be_shown_without_any_extra(tmp_path):
    make_plan().save(tmp_path / "plan.json")
    done = run_command("show", tmp_path / "plan.json", "-o", tmp_path / "tokens.png")
    assert done.returncode == 0, done.stderr
    assert "tiny" in done.stdout and (tmp_path / "tokens.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        (["run", "--target", "0.65", "-o", "OUT"], "prune"),
        (["prune", "--target", "0.65", "-o", "OUT/plan.json"], "prune"),
        (["export", "-o", "OUT/dense.onnx"], "prune"),
        (["evaluate"], "prune"),
        (["fold", "IN/pruned.onnx", "--plan", "IN/plan.json", "-o", "OUT/folded.onnx"], "export"),
        (["profile", "IN/pruned.onnx"], "cpu"),
        (["predict", "IN/pruned.onnx", "IN/image.png"], "cpu"),
        (["build", "IN/pruned.onnx", "-o", "OUT/pruned.engine"], "trt"),
        (["vlm", "profile", "IN"], "vlm"),
        (["vlm", "evaluate", "IN", "--data", "IN/questions.jsonl"], "vlm"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_a_command_without_its_extra_says_so_in_one_line(arguments, extra, tmp_path):
    from PIL import Image

    Image.new("RGB", (32, 32)).save(tmp_path / "image.png")
    (tmp_path / "pruned.onnx").write_bytes(b"any bytes: the package is missing before the file is read")
    make_plan().save(tmp_path / "plan.json")
    arguments = [argument.replace("OUT", f"{tmp_path}/new").replace("IN", str(tmp_path)) for argument in arguments]
    done = run_command(*arguments)
    said = [line for line in done.stderr.splitlines() if f"vpruner[{extra}]" in line]
    assert done.returncode == 2 and len(said) == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "new").exists() or not any((tmp_path / "new").iterdir()), "a failed command left files"


def test_a_commands_help_is_the_same_whoever_asked_for_it_first():
    done = probe(
        """
import click
from click.testing import CliRunner
from vpruner.cli import main
alone = main.get_command(click.Context(main), "show")
alone.get_help_option(click.Context(alone))
assert "-h, --help" in CliRunner().invoke(main, ["show", "--help"]).output
"""
    )
    assert done.returncode == 0


def test_the_list_of_commands_loads_none_of_them():
    done = probe(
        """
from click.testing import CliRunner
from vpruner.cli import main
from vpruner.cli.catalogue import CATALOGUE
done = CliRunner().invoke(main, ["--help"])
assert done.exit_code == 0, done.output
for intent, commands in CATALOGUE.items():
    assert f"{intent}:" in done.output, intent
    for name in commands:
        assert f"\\n  {name} " in done.output, name
        assert f"vpruner.cli.{name}" not in sys.modules, name
print(sorted({name.partition(".")[0] for name in sys.modules}))
"""
    )
    assert not {"numpy", "PIL", "rich"} & set(json.loads(done.stdout.replace("'", '"')))
