"""What ships is exactly the package and its assets, built from an sdist that is the repository."""

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import requires
from pathlib import Path

import pytest

import vpruner
from vpruner.core.extras import EXTRA_OF

#: Top-level folders with Python files that are no part of the package.
OUTSIDE = ("tests", "benchmarks", ".ci")


@pytest.fixture(scope="module")
def sources(repository, tmp_path_factory):
    """A copy of what belongs to the repository: building in place would litter it, and old litter would get in."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=repository, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if listed.returncode:  # an unpacked sdist has no git
        litter = (".venv*", ".transformers", "runs", "build", "dist", "__pycache__", ".*_cache", ".hypothesis")
        skipped = shutil.ignore_patterns(*litter)
        return shutil.copytree(repository, tmp_path_factory.mktemp("sources") / "vpruner", ignore=skipped)
    copy = tmp_path_factory.mktemp("sources")
    for name in filter(None, listed.stdout.split("\0")):
        if (repository / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(repository / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def built(sources, tmp_path_factory):
    """``{".whl": path, ".tar.gz": path}``; the wheel is built from the sdist, offline."""
    pytest.importorskip("build", reason="the dev extra brings build")
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(sources)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=out, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return {".whl": next(out.glob("*.whl")), ".tar.gz": next(out.glob("*.tar.gz"))}


def test_wheel_holds_the_package_and_nothing_else(built, sources):
    modules = {path.relative_to(sources) for path in sources.rglob("*.py")}
    modules = {path for path in modules if path.parts[0] not in OUTSIDE} | {Path("py.typed")}
    assets = {path.relative_to(sources) for path in (sources / "assets").iterdir()}
    assets |= {Path("report/page.html.jinja"), Path("report/slider.js"), Path("report/style.css")}
    expected = {f"vpruner/{path.as_posix()}" for path in modules | assets}
    assert {"vpruner/cli/group.py", "vpruner/core/plan.py", "vpruner/assets/reference.json"} <= expected
    with zipfile.ZipFile(built[".whl"]) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == expected


def test_wheel_stays_small(built):
    assert built[".whl"].stat().st_size < 13_000_000


def test_wheel_metadata(built):
    with zipfile.ZipFile(built[".whl"]) as wheel:
        info = f"vpruner-{vpruner.__version__}.dist-info"
        metadata = wheel.read(f"{info}/METADATA").decode()
        entry_points = wheel.read(f"{info}/entry_points.txt").decode()
        licence = wheel.read(f"{info}/licenses/LICENSE").decode()
    assert f"\nVersion: {vpruner.__version__}\n" in metadata and "\nLicense-Expression: Apache-2.0\n" in metadata
    assert "vpruner = vpruner.cli:main" in entry_points
    assert "Apache License" in licence and "END OF TERMS AND CONDITIONS" in licence


def test_wheel_works_without_the_repository(built, tmp_path):
    with zipfile.ZipFile(built[".whl"]) as wheel:
        wheel.extractall(tmp_path)
    code = (
        "import vpruner.core.bundled as b, vpruner.cli;"
        "print(b.reference_card(), b.calibration_data(), b.evaluation_data())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, cwd=tmp_path,
        check=True,
    )  # fmt: skip
    assert done.stdout.split() == [
        str(tmp_path.resolve() / "vpruner/assets" / name)
        for name in ("reference.json", "calibration.tar", "evaluation.tar")
    ]


def test_sdist_can_be_tested_and_rebuilt(built):
    with tarfile.open(built[".tar.gz"]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    wanted = {"Makefile", "LICENSE", "CHANGELOG.md", "CITATION.cff", "README.md", ".ci/run", "tests/conftest.py"}
    wanted |= {"constraints.txt", ".ci/lock.py"}
    wanted |= {"tests/test_packaging.py", "tests/recorded/train.tar", "benchmarks/reference/make_assets.py"}
    wanted |= {"assets/calibration.tar", "cli/group.py"}
    assert wanted <= names
    assert not [name for name in names if name.startswith((".venv", "runs", "build/")) or "__pycache__" in name]


@pytest.mark.parametrize("package", sorted(EXTRA_OF))
def test_each_extra_brings_the_package_it_is_named_for(package):
    extra = EXTRA_OF[package]
    brought = {
        re.split(r"[^A-Za-z0-9_.-]", requirement)[0].lower().replace("_", "-")
        for requirement in requires("vpruner")
        if re.search(rf"extra == ['\"]{extra}['\"]", requirement)
    }
    assert package.replace("_", "-") in brought


def test_changelog_and_citation_name_this_version(repository):
    version = re.escape(vpruner.__version__)
    assert re.search(rf"^## \[?{version}\]? ", (repository / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert re.search(rf"^version: {version}$", (repository / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)


def test_make_lists_its_targets(repository):
    if not shutil.which("make"):
        pytest.skip("make is not installed")
    done = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=repository, capture_output=True, text=True, check=True
    )
    targets = [line.split()[1] for line in done.stdout.splitlines()]
    tests = ["test", "test-all", "test-newest"]
    assert targets == ["help", "demo", *tests, "lint", "gpu-check", "wheel", "docs", "lock", "clean"]
    assert len({len(re.match(r"  make [\w-]+ +", line)[0]) for line in done.stdout.splitlines()}) == 1


def test_continuous_integration_can_be_run(repository):
    script = repository / ".ci" / "run"
    assert script.stat().st_mode & 0o111, ".ci/run is not executable"
    subprocess.run(["bash", "-n", str(script)], check=True)
