"""What the pages tell people to type runs, or parses, or is marked with what it needs; generated text is up to date."""

import importlib
import importlib.util
import json
import re
import shutil
from collections import Counter
from pathlib import Path

import click
import documents
import pytest
from commands import call
from documents import NEEDS, PAGES, QUICK, page_text, python_blocks, shell_blocks

from vpruner.cli import main

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

#: Learning, measuring a whole table and building take too long here, and a LLaVA is too large: these are parsed alone.
NEVER_RUN = {"table", "compare", "build", "vlm"}
#: The pages on which slower commands run; on the others they are parsed alone. The first page's run makes the files.
SLOW = {
    "run": {"docs/compare.md"},
    "export": {"docs/run.md", "docs/jetson.md", "docs/compare.md"},
    "prune": {"README.md", "docs/onnx.md"},
    "profile": {"docs/jetson.md", "docs/tensorrt.md"},
    "analyze": {"docs/compare.md"},
}
#: What runs on each page, in its order; everything else there is parsed, and cli.md holds the examples of --help.
RUNS = {
    "README.md": "inspect prune fold fold",
    "docs/compare.md": "export run export analyze",
    "docs/diagnose.md": "diagnose diagnose",
    "docs/jetson.md": "export export export check bundle profile profile profile profile report",
    "docs/onnx.md": "inspect prune fold fold convert convert convert check check fold",
    "docs/openvino.md": "fold check",
    "docs/run.md": "export show",
    "docs/tensorrt.md": "profile report",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of tiny files under the names that the pages use."""
    for package in ("timm", "onnxruntime", "onnx"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("pages")
    with pytest.MonkeyPatch.context() as patch:
        documents.make_workplace(folder, patch)
        yield folder


@pytest.fixture
def workplace(made, tmp_path, monkeypatch):
    """A copy of it as the current folder: a page may write there."""
    shutil.copytree(made, tmp_path / "there", ignore=shutil.ignore_patterns("assets"))
    monkeypatch.chdir(tmp_path / "there")
    return tmp_path / "there"


def parsed(words: list[str]) -> click.Command:
    """The command that ``words`` call, every option and argument taken by click; nothing runs."""
    command = main
    while isinstance(command, click.Group):
        name, *words = words
        command = command.get_command(click.Context(command), name)
        assert command is not None, f"there is no command {name}"
    command.make_context(name, words)
    return command


# -- shell ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_every_command_line_is_one_that_exists(page, repository):
    makefile = (repository / "Makefile").read_text(encoding="utf-8")
    for block in shell_blocks(page):
        for program, *words in block.commands:
            if program == "vpruner":
                parsed(words)
            elif program == "make":
                assert re.search(rf"^{words[0]}:", makefile, re.MULTILINE), f"{page}: make {words[0]}"
            elif program == "pip":
                assert_extras_exist(" ".join(words))
            else:
                assert block.needs, f"{page}: {program} is no command that the tests know: mark what it needs"


def assert_extras_exist(text: str) -> None:
    project = tomllib.loads((documents.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for extras in re.findall(r"(?:\.|vpruner)\[([\w,]+)\]", text):
        assert set(extras.split(",")) <= set(project["optional-dependencies"]), extras


@pytest.mark.parametrize("page", RUNS)
def test_commands_run_on_tiny_files(page, workplace):
    if page == "docs/jetson.md":
        write_files_of_trtexec(workplace)
    ran = []
    for block in shell_blocks(page):
        for program, *words in block.commands:
            if program != "vpruner" or block.needs or not can_run(page, words):
                continue
            extra = () if {"--print-trtexec", "--from-trtexec"} & set(words) else QUICK.get(words[0], ())
            # Its exit code 1 says that a file is not for this runtime.
            call(*words, *extra, code=1 if words[0] == "check" and "trt8.5" in words else 0)
            ran.append(words[0])
            documents.keep_weights(workplace)
    assert " ".join(ran) == RUNS[page]


def can_run(page: str, words: list[str]) -> bool:
    name = words[0]
    needs_more = "--cost" in words or any("llava" in word for word in words)
    return not (name in NEVER_RUN or needs_more or page not in SLOW.get(name, {page}))


#: What trtexec writes, in its documented form.
TIMES = [
    {"startEnqMs": 2.0 * n, "endEnqMs": 2.0 * n + 0.1, "startH2dMs": 2.0 * n, "endH2dMs": 2.0 * n + 0.1,
     "startComputeMs": 2.0 * n + 0.1, "endComputeMs": 2.0 * n + 1.6, "startD2hMs": 2.0 * n + 1.6,
     "endD2hMs": 2.0 * n + 1.7, "h2dMs": 0.1, "computeMs": 1.5, "d2hMs": 0.1, "latencyMs": 1.7}
    for n in range(20)
]  # fmt: skip
PROFILE = [{"count": 20}, {"name": "a", "timeMs": 20.0, "averageMs": 1.0, "medianMs": 1.0, "percentage": 100.0}]
LAYERS = {"Layers": [{"Name": "a", "LayerType": "gemm", "Metadata": "[ONNX Layer: node_MatMul_11]"}], "Bindings": []}


def write_files_of_trtexec(folder: Path) -> None:
    for name in ("dense", "pruned"):
        for kind, content in (("times", TIMES), ("profile", PROFILE), ("layers", LAYERS)):
            (folder / f"{name}.{kind}.json").write_text(json.dumps(content), encoding="utf-8")


def test_times_of_trtexec_become_a_report(workplace):
    write_files_of_trtexec(workplace)
    for block in shell_blocks("docs/jetson.md"):
        for program, *words in block.commands:
            if program == "vpruner" and not block.needs and ("--from-trtexec" in words or words[0] == "report"):
                call(*words)
    report = (workplace / "profile" / "report.md").read_text(encoding="utf-8")
    assert "| pruned | with copies | 1.70 ms |" in report and "Where the time goes" in report


def test_what_needs_hardware_is_marked_and_said():
    marked = [block for page in PAGES for block in documents.blocks(page) if block.needs]
    assert Counter(block.needs for block in marked) == {"GPU": 6, "Jetson": 6, "openvino": 3, "model": 1}
    for block in marked:
        assert NEEDS[block.needs] in block.before, f"{block.page} does not say what this needs:\n{block.text}"


def test_options_in_the_text_exist():
    """Inline code such as ``--target 0.65``; those of other programs are in blocks."""
    known = set()

    def collect(command: click.Command) -> None:
        for parameter in command.params:
            known.update(parameter.opts, parameter.secondary_opts)
        if isinstance(command, click.Group):
            for name in command.list_commands(click.Context(command)):
                collect(command.get_command(click.Context(command), name))

    collect(main)
    known |= {"--help", "--version", "--show"}  # jetson_clocks has --show
    for page in PAGES:
        text = documents.BLOCK.sub("", page_text(page))
        for code in re.findall(r"`([^`]+)`", text):
            for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", code):
                assert option in known, f"{page}: {code}"
        assert_extras_exist(text)
        for script in re.findall(r"`python (\S+\.py)", text):
            assert (documents.ROOT / script).is_file(), f"{page}: {script}"


# -- Python -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)])
def test_python_of_a_page_runs(page, workplace, capsys):
    """The blocks of a page share one namespace, as a reader has it who types them one after the other."""
    names = {}
    for block in python_blocks(page):
        code = compile(block.text, page, "exec")
        if block.needs == "GPU" or (block.needs == "openvino" and importlib.util.find_spec("openvino") is None):
            continue
        if block.needs == "model":
            names |= model_and_inputs()
        exec(code, names)


def model_and_inputs() -> dict:
    pytest.importorskip("transformers", reason="the vlm extra brings transformers")
    from tiny_vlms import prompts, tiny_vlm

    return {"model": tiny_vlm(), "inputs": prompts([7], [1])}


# -- the pages themselves ---------------------------------------------------------------------------------------------


def test_the_first_page_is_short():
    assert len(page_text("README.md").encode()) <= 8192


def test_every_page_can_be_reached_from_the_first():
    reached, todo = set(), ["README.md"]
    while todo:
        page = todo.pop()
        if page in reached or not (documents.ROOT / page).is_file():
            continue
        reached.add(page)
        for target in links(page):
            path = (documents.ROOT / page).parent / target
            if path.suffix == ".md":
                todo.append(str(path.resolve().relative_to(documents.ROOT)))
    assert set(PAGES) <= reached


def links(page: str) -> list[str]:
    targets = re.findall(r"(?:\]\(|src=\")([^)\s\"]+)[)\"]", documents.BLOCK.sub("", page_text(page)))
    return [target.split("#")[0] for target in targets if not re.match(r"[a-z]+:|#", target)]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in links(page):
        path = (documents.ROOT / page).parent / target
        assert path.exists(), f"{page} links to {target}"


@pytest.mark.parametrize("page", PAGES)
def test_anchors_exist(page):
    """Links to a heading, by the name that GitHub gives it."""
    for target, anchor in re.findall(r"\]\(([^)\s#]*)#([\w-]+)\)", page_text(page)):
        if not target.startswith("http"):
            aim = (documents.ROOT / page).parent / target if target else documents.ROOT / page
            headings = re.findall(r"^#+ (.+)$", aim.read_text(encoding="utf-8"), re.MULTILINE)
            names = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in names, f"{page} links to {target}#{anchor}"


@pytest.mark.parametrize("page", [page for page in PAGES if page != "docs/cli.md"])
def test_words_of_the_field(page):
    """No metaphors of our own: a parity check is one, and a file is converted."""
    found = re.findall(r"\b(?:rungs?|ladders?|audit\w*|lowered|told|worlds?)\b", page_text(page))
    assert not found, f"{page}: {found}"


def test_pictures_are_small():
    for path in (documents.ROOT / "docs").rglob("*.png"):
        assert path.stat().st_size < 60_000, path


def test_what_is_generated_is_up_to_date(repository, monkeypatch):
    monkeypatch.syspath_prepend(repository / "benchmarks")
    monkeypatch.setattr("sys.argv", ["render.py", "--check"])
    importlib.import_module("render").main()


def test_the_tested_versions_are_those_of_the_constraints(repository):
    """Counted here in another way than benchmarks/pages.py reads them."""
    (sentence,) = re.findall(r"^Tested with .+\.$", page_text("README.md"), re.MULTILINE)
    pins = (repository / "constraints.txt").read_text(encoding="utf-8")
    for package in ("timm", "onnx", "onnxruntime", "transformers"):
        named = re.search(rf"[ ,]{package} ([\d., and]+?)(?:, [a-z]|\.$)", sentence)[1]
        assert set(re.findall(rf"^{package}==(\S+)", pins, re.MULTILINE)) <= set(re.split(", | and ", named)), package


def test_what_was_not_measured_is_said():
    measured = (documents.ROOT / "benchmarks" / "results" / "gpu.jsonl").exists()
    assert ("No GPU has been measured yet" in page_text("README.md")) != measured
