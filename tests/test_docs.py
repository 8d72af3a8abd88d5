"""What the README tells people to type exists, and its tables are the measured rows."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from vpruner.cli.commands import main
from vpruner.core.bundled import reference_card
from vpruner.core.plan import TokenPlan


@pytest.fixture(scope="module")
def readme(repository):
    return (repository / "README.md").read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands(text: str) -> list[list[str]]:
    lines = "\n".join(blocks(text, "console")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("vpruner ")]


@pytest.mark.parametrize("page", ["README.md", "docs/jetson.md"])
def test_every_command_parses(repository, page):
    found = commands((repository / page).read_text(encoding="utf-8"))
    assert len(found) >= 1
    for name, *arguments in found:
        main.commands[name].make_context(name, arguments)


#: What trtexec writes, in its documented form.
TIMES = [
    {"startEnqMs": 2.0 * n, "endEnqMs": 2.0 * n + 0.1, "startH2dMs": 2.0 * n, "endH2dMs": 2.0 * n + 0.1,
     "startComputeMs": 2.0 * n + 0.1, "endComputeMs": 2.0 * n + 1.6, "startD2hMs": 2.0 * n + 1.6,
     "endD2hMs": 2.0 * n + 1.7, "h2dMs": 0.1, "computeMs": 1.5, "d2hMs": 0.1, "latencyMs": 1.7}
    for n in range(20)
]  # fmt: skip
PROFILE = [{"count": 20}, {"name": "a", "timeMs": 20.0, "averageMs": 1.0, "medianMs": 1.0, "percentage": 100.0}]
LAYERS = {"Layers": [{"Name": "a", "LayerType": "gemm", "Metadata": "[ONNX Layer: node_MatMul_11]"}], "Bindings": []}


def test_what_the_page_on_jetsons_says_of_a_workstation_runs(repository, tmp_path, monkeypatch):
    """In the order of the page, up to what needs the device; the plan is the one thing that is given."""
    pytest.importorskip("timm")
    from vpruner.prune.models import open_model

    card = json.loads(reference_card().read_text(encoding="utf-8"))
    geometry = open_model(None).adapter.geometry
    kept = [list(range(geometry.patches - 5 * block)) for block in range(geometry.depth)]
    hashes = {"weights_sha256": open_model(None).sha256}
    TokenPlan(card.get("name", "reference"), geometry, kept, provenance=hashes).save(tmp_path / "plan.json")
    for name in ("dense", "pruned"):
        for kind, content in (("times", TIMES), ("profile", PROFILE), ("layers", LAYERS)):
            (tmp_path / f"{name}.{kind}.json").write_text(json.dumps(content))
    monkeypatch.chdir(tmp_path)
    here = {"export", "check", "report"}
    ran = []
    for name, *arguments in commands((repository / "docs" / "jetson.md").read_text(encoding="utf-8")):
        off = "--print-trtexec" in arguments or "--from-trtexec" in arguments
        if (name in here and (name != "report" or Path("results.jsonl").exists())) or off:
            result = CliRunner().invoke(main, [name, *arguments], catch_exceptions=False)
            assert result.exit_code == 0, (name, arguments, result.output)
            ran.append(name)
    assert ran == ["export", "export", "export", "check", "profile", "profile", "profile", "profile", "report"]
    report = (tmp_path / "profile" / "report.md").read_text()
    assert "| pruned | with copies | 1.700 |" in report and "Where the time goes" in report


def test_make_targets_in_the_readme_exist(readme, repository):
    targets = re.findall(r"^make ([\w-]+)", "\n".join(blocks(readme, "console")), re.MULTILINE)
    makefile = (repository / "Makefile").read_text()
    assert {"demo", "test"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_every_command_is_listed(readme):
    listed = set(re.findall(r"^\| `vpruner (\w+)` \|", readme, re.MULTILINE))
    assert listed == set(main.commands)


def test_python_in_the_readme_compiles_and_names_what_exists(readme):
    for code in blocks(readme, "python"):
        compile(code, "README.md", "exec")
        for module, names in re.findall(r"from (vpruner[\w.]*) import (.+)", code):
            found = __import__(module, fromlist=["_"])
            for name in names.split(","):
                assert hasattr(found, name.strip())


def test_links_to_files_lead_somewhere(readme, repository):
    for target in re.findall(r"\]\(([^)]+)\)", readme):
        if not target.startswith("http"):
            assert (repository / target).exists(), target


def test_tables_are_rendered_from_the_rows(repository):
    check = subprocess.run([sys.executable, "benchmarks/render.py", "--check"], cwd=repository, capture_output=True)
    assert check.returncode == 0, check.stderr.decode()
