"""What the README tells people to type exists, and its tables are the measured rows."""

import re
import shlex
import subprocess
import sys

import pytest

from vpruner.cli import main


@pytest.fixture(scope="module")
def readme(repository):
    return (repository / "README.md").read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_every_command_in_the_readme_parses(readme):
    lines = "\n".join(blocks(readme, "console")).replace("\\\n", " ").splitlines()
    commands = [shlex.split(line, comments=True) for line in lines if line.startswith("vpruner ")]
    assert len(commands) >= 1
    for _, name, *arguments in commands:
        main.commands[name].make_context(name, arguments)


def test_make_targets_in_the_readme_exist(readme, repository):
    targets = re.findall(r"^make (\w+)", "\n".join(blocks(readme, "console")), re.MULTILINE)
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
