"""The rooms of the package: who may import whom, how long a file may be, and that the library names no option."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
#: Each may import those below it, and nothing beside it.
FLOORS = {"core": 0, "prune": 1, "runtime": 1, "report": 1, "export": 2, "pipeline": 3, "api": 4, "cli": 4}
#: Imports that the floors allow and the rooms do not.
FORBIDDEN = {("export", "runtime"), ("export", "report")}
#: The root holds these and the rooms; ``api`` is the one module beside them.
FACE = {"__init__.py", "__main__.py", "api.py", "py.typed"}
MOST_LINES, MOST_IN_FUNCTION = 600, 90
#: An option as one types it, or a command.
TYPED = re.compile(
    r"(?<![\w-])(--[a-z][a-z-]+|-o\b)|\bvpruner (run|prune|fold|export|inspect|check|analyze|show|report|profile|table"
    r"|evaluate|compare|build|bundle|convert|diagnose|predict|vlm)\b"
)
#: Options of other programs, and variables of style sheets.
NOT_OURS = re.compile(r"\b(?:trtexec|jetson_clocks|polygraphy|pip)\b[^;:()]*|var\(--[\w-]+|--[\w-]+(?=:)")
#: These run other programs, or write what to type for them.
OTHER_PROGRAMS = {"runtime/device_script.py", "runtime/power.py", "runtime/trtexec.py"}


def files() -> dict[str, Path]:
    """Dotted name below ``vpruner`` -> file, of the whole package."""
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[0] in FLOORS or len(parts) == 1:
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


FILES = files()
NAMES = {path: name for name, path in FILES.items()}


def imports(name: str) -> set[str]:
    """Modules of ours that a module imports, at the top or inside a function."""
    base = name.split(".") if name else []
    if FILES[name].name != "__init__.py":
        base = base[:-1]
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                start = [*base[: len(base) - node.level + 1], *(node.module or "").split(".")]
                start = [part for part in start if part]
            elif (node.module or "").partition(".")[0] == "vpruner":
                start = node.module.split(".")[1:]
            else:
                continue
            for alias in node.names:
                inner = ".".join([*start, alias.name])
                found.add(inner if inner in FILES else ".".join(start))
        elif isinstance(node, ast.Import):
            found |= {a.name.partition(".")[2] for a in node.names if a.name.partition(".")[0] == "vpruner"}
    return found - {name}


def test_rooms_import_only_what_lies_below_them():
    wrong = []
    for name in FILES:
        room = name.partition(".")[0]
        for other in imports(name):
            below = other.partition(".")[0]
            if room == below or room not in FLOORS or below not in FLOORS:
                continue
            if FLOORS[below] >= FLOORS[room] or (room, below) in FORBIDDEN:
                wrong.append(f"{name} imports {other}")
    assert not wrong, "\n".join(sorted(wrong))


def test_nothing_imports_benchmarks_or_tests():
    assert not [
        name for name in FILES if {"benchmarks", "tests"} & {other.partition(".")[0] for other in imports(name)}
    ]


def test_names_with_a_leading_underscore_stay_in_their_module():
    wrong = [
        f"{name}: {alias.name}"
        for name, path in FILES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("vpruner"))
        for alias in node.names
        if alias.name.startswith("_") and not alias.name.startswith("__")
    ]
    assert not wrong, "\n".join(sorted(wrong))


def test_there_are_no_circles():
    reached: dict[str, int] = {}
    path: list[str] = []

    def visit(name: str) -> None:
        if name in path:
            pytest.fail(" -> ".join([*path[path.index(name) :], name]))
        if name in reached:
            return
        path.append(name)
        for other in sorted(imports(name)):
            # A package that offers names of its own modules lazily is no circle: nothing is imported until it is asked.
            if other in FILES and other:
                visit(other)
        path.pop()
        reached[name] = 1

    for name in sorted(FILES):
        visit(name)


def test_the_root_holds_the_face_and_nothing_else():
    modules = {path.name for path in ROOT.glob("*.py")} | {path.name for path in ROOT.glob("py.typed")}
    assert modules <= FACE


def test_one_module_reads_and_writes_json():
    """It limits size, depth and numbers. Marks in messages are JSON too, which core/text.py writes and reads itself."""
    wrong = [
        name
        for name, path in FILES.items()
        if name not in ("core.json_file", "core.text")
        and any(
            (isinstance(node, ast.Import) and any(alias.name == "json" for alias in node.names))
            or (isinstance(node, ast.ImportFrom) and node.module == "json" and not node.level)
            for node in ast.walk(ast.parse(path.read_text()))
        )
    ]
    assert not wrong, f"core/json_file.py does it for {', '.join(wrong)}"


@pytest.mark.parametrize("name", [str(path.relative_to(ROOT)) for path in sorted(NAMES)])
def test_files_and_functions_are_short_enough_to_read(name):
    text = (ROOT / name).read_text()
    assert len(text.splitlines()) <= MOST_LINES
    long = [
        f"{node.name}: {node.end_lineno - node.lineno + 1} lines"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and node.end_lineno - node.lineno >= MOST_IN_FUNCTION
    ]
    assert not long


def texts(tree: ast.AST) -> list[tuple[int, str]]:
    """(line, text) of strings that are no docstrings; what is filled in reads ``xx``."""
    left_out, found = set(), []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                left_out.add(id(first.value))
        elif isinstance(node, ast.JoinedStr):
            left_out |= {id(part) for part in node.values}
            parts = [part.value if isinstance(part, ast.Constant) else "xx" for part in node.values]
            found.append((node.lineno, "".join(parts)))
    constants = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in left_out]
    return found + [(node.lineno, node.value) for node in constants if isinstance(node.value, str)]


def test_the_library_names_no_option_and_no_command():
    """It says ``option("data")``, see core/text.py, and the command line turns that into ``--data``."""
    wrong = []
    for path, name in NAMES.items():
        place = str(path.relative_to(ROOT))
        if name.partition(".")[0] in ("cli", "__main__") or place in OTHER_PROGRAMS:
            continue
        wrong += [
            f"{place}:{line}: {text!r}"
            for line, text in texts(ast.parse(path.read_text()))
            if TYPED.search(NOT_OURS.sub("", text))
        ]
    assert not wrong, "\n".join(sorted(wrong))


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("'give --data'", True), ("f'give --{name}'", True), ("f'{x} with -o'", True),
        ("f'{a if b else \"--tf32\"}'", True),
        ("'run: vpruner prune MODEL'", True), ("'(--trust)'", True), ("f'out-o{opset}.onnx'", False),
        ("f'{stem}-o{opset}.onnx'", False), ("def f():\n 'give --data'", False), ("'pip install --upgrade'", False),
        ("'vpruner reads 1'", False), ("'px var(--font)'", False), ("'--font: serif'", False),
    ],
)  # fmt: skip
def test_a_named_option_is_found(source, named):
    assert any(TYPED.search(NOT_OURS.sub("", text)) for _, text in texts(ast.parse(f"import this\n{source}"))) == named
