"""constraints.txt names a version of everything that the make targets install, and ``make lock`` can write it again."""

import importlib.metadata
import importlib.util
import re

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

EXTRAS = ("prune", "export", "cpu", "dev")


@pytest.fixture(scope="module")
def lock(repository):
    spec = importlib.util.spec_from_file_location("lock", repository / ".ci" / "lock.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def constrained(repository) -> dict[str, list[Requirement]]:
    """Name -> its lines; each has a version, and none says where to get it."""
    found: dict[str, list[Requirement]] = {}
    for line in (repository / "constraints.txt").read_text().splitlines():
        if not line.startswith("#"):
            requirement = Requirement(line)
            assert requirement.specifier and not requirement.url and not requirement.extras, line
            found.setdefault(requirement.name, []).append(requirement)
    return found


def wanted(requirement: Requirement, extras=()) -> bool:
    return requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in ("", *extras))


def needed(name: str, extras: tuple[str, ...], seen: set) -> set[str]:
    """Names of all installed packages that ``name[extras]`` brings here."""
    try:
        texts = importlib.metadata.requires(name) or ()
    except importlib.metadata.PackageNotFoundError:
        return set()
    for text in texts:
        requirement = Requirement(text)
        key = (canonicalize_name(requirement.name), tuple(sorted(requirement.extras)))
        if wanted(requirement, extras) and key not in seen:
            seen.add(key)
            needed(*key, seen)
    return {name for name, _ in seen}


def test_everything_that_is_installed_has_one_version(constrained):
    pytest.importorskip("torch", reason="the extras are not installed")
    brought = needed("vpruner", EXTRAS, set())
    assert {"torch", "timm", "onnxruntime", "pytest", "ruff", "jinja2", "mpmath"} <= brought
    assert not {name for name in brought if sum(map(wanted, constrained.get(name, []))) != 1}


def test_what_is_asked_for_allows_what_was_tested(constrained):
    asked = [Requirement(text) for text in importlib.metadata.requires("vpruner")]
    for requirement in asked:
        if wanted(requirement, EXTRAS):
            for line in constrained[canonicalize_name(requirement.name)]:
                for version in re.findall(r"[=>]=([\w.]+)", str(line.specifier)):
                    assert requirement.specifier.contains(version), (str(requirement), str(line))


def test_versions_that_differ_between_pythons_get_markers(lock):
    lines = lock.constraints(
        {
            (3, 10): {"torch": "2.14.1", "nvidia-cublas": "13.1.1", "numpy": "2.2.6", "tomli": "2.5", "rich": "15.0"},
            (3, 11): {"torch": "2.14.1", "nvidia-cublas": "14.0", "numpy": "2.4.6", "rich": "15.0"},
            (3, 12): {"torch": "2.15.0+cpu", "nvidia-cublas": "14.1", "numpy": "2.5+local", "rich": "15.0"},
        }
    )
    assert lines == [
        'numpy==2.2.6 ; python_version < "3.11"',
        'numpy==2.4.6 ; python_version >= "3.11" and python_version < "3.12"',
        'numpy==2.5 ; python_version >= "3.12"',
        "nvidia-cublas>=13,<15",
        "rich==15.0",
        "tomli==2.5",
        "torch" + lock.RANGES["torch"],
    ]
