"""Write constraints.txt: the versions that pip chooses today for all that the make targets install.

    python .ci/lock.py python3.10 python3.11

Each interpreter resolves on its own, and nothing is installed. A package of which they get different versions has one
line for each, with a marker. A package that one of them alone needs has a plain line: nobody else installs it.
"""

import json
import re
import subprocess
import sys
import tempfile
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = "prune,export,cpu,dev"
# PyTorch comes in several builds, and each names its own libraries exactly: what was tested is a range.
RANGES = {"torch": ">=2.14,<2.16", "torchvision": ">=0.29,<0.30"}
LIBRARIES = re.compile(r"triton|nvidia-.*|cuda-.*")
HEADER = f"""\
# What `make demo` and `make test` install: vpruner[{EXTRAS}] and all that it needs.
# Tested with Python {{pythons}}. Written by `make lock`; `make test-newest` installs without it.
"""


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def resolve(python: str) -> tuple[tuple[int, ...], dict[str, str]]:
    """The version of an interpreter, and that of each package that pip would install there by its normalized name."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([python, "-m", "venv", folder], check=True)
        report = Path(folder, "report.json")
        pip = [f"{folder}/bin/python", "-m", "pip", "install", "--dry-run", "--ignore-installed", "--report", report]
        torch = [name + versions for name, versions in RANGES.items()]
        subprocess.run([*pip, "--quiet", f"{ROOT}[{EXTRAS}]", *torch], check=True)
        chosen = json.loads(report.read_text())
    found = {normalized(item["metadata"]["name"]): item["metadata"]["version"] for item in chosen["install"]}
    del found["vpruner"]
    version = chosen["environment"]["python_version"]
    return tuple(map(int, version.split("."))), found


def constraints(resolved: dict[tuple[int, ...], dict[str, str]]) -> list[str]:
    """Lines of constraints.txt for what was resolved under each version of Python."""
    pythons = sorted(resolved)
    lines = []
    for name in sorted(set().union(*resolved.values())):
        if name in RANGES:
            lines.append(name + RANGES[name])
            continue
        versions = {python: resolved[python][name] for python in pythons if name in resolved[python]}
        if LIBRARIES.fullmatch(name):
            majors = [int(version.partition(".")[0]) for version in versions.values()]
            lines.append(f"{name}>={min(majors)},<{max(majors) + 1}")
            continue
        # A version holds from the first Python that got it up to the first that got another.
        groups = [(version, next(group)) for version, group in groupby(versions, versions.get)]
        for index, (version, first) in enumerate(groups):
            marker = [f'python_version >= "{dotted(first)}"'] * (index > 0)
            marker += [f'python_version < "{dotted(following)}"' for _, following in groups[index + 1 : index + 2]]
            lines.append(" ; ".join(filter(None, [f"{name}=={version.partition('+')[0]}", " and ".join(marker)])))
    return lines


def dotted(python: tuple[int, ...]) -> str:
    return ".".join(map(str, python))


def main(pythons: list[str]) -> None:
    resolved = dict(resolve(python) for python in pythons)
    header = HEADER.format(pythons=" and ".join(dotted(python) for python in sorted(resolved)))
    path = ROOT / "constraints.txt"
    lines = constraints(resolved)
    path.write_text(header + "\n".join(lines) + "\n")
    print(f"{path.name}: {len(lines)} lines")


if __name__ == "__main__":
    main(sys.argv[1:])
