"""Text that is compared with a recorded file, and what is taken out of it before: times, sizes, hashes, the machine."""

import difflib
import os
import re
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "golden"
RECORDING = bool(os.environ.get("VPRUNER_RECORD"))


class Recorded:
    """The recorded files of one folder of tests/golden. Leaving the block compares them all, or records them."""

    def __init__(self, folder: str):
        self.folder, self.texts = GOLDEN / folder, {}

    def __setitem__(self, name: str, text: str) -> None:
        self.texts[name] = "".join(f"{line.rstrip()}\n" for line in text.strip("\n").splitlines())

    def under(self, version: str, name: str, text: str) -> None:
        """Text that holds for one version of another package: under another it is not compared."""
        before = self._kept().get(name, "")
        self[name] = before if before and not RECORDING and before.split("\n")[0] != version else f"{version}\n{text}"

    def __enter__(self) -> "Recorded":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is None:
            self._record() if RECORDING else self._compare()

    def _kept(self) -> dict[str, str]:
        paths = sorted(self.folder.iterdir()) if self.folder.is_dir() else []
        return {path.name: path.read_text(encoding="utf-8") for path in paths}

    def _record(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in self._kept().keys() - self.texts.keys():
            (self.folder / name).unlink()
        for name, text in self.texts.items():
            (self.folder / name).write_text(text, encoding="utf-8")

    def _compare(self) -> None:
        kept, differences = self._kept(), []
        for name in sorted(kept.keys() | self.texts.keys()):
            before, now = kept.get(name, ""), self.texts.get(name, "")
            before, now = before.splitlines(), _with_last_digits_of(before, now).splitlines()
            where = f"{self.folder.relative_to(GOLDEN.parent)}/{name}"
            differences += difflib.unified_diff(before, now, where, "today", lineterm="", n=1)
        if differences:
            differences.append("if that is meant: python tests/golden/record.py, and say why in CHANGELOG.md")
            pytest.fail("\n".join(differences), pytrace=False)


def _with_last_digits_of(before: str, now: str) -> str:
    """``now``, where its fourth decimals differ by one from those recorded: another processor rounds another way."""
    pattern = r"\d\.\d{4}\b"
    if re.sub(pattern, "", before) != re.sub(pattern, "", now):
        return now
    recorded = iter(re.findall(pattern, before))

    def number(match: re.Match) -> str:
        value = next(recorded)
        return value if abs(float(value) - float(match[0])) < 1.5e-4 else match[0]

    return re.sub(pattern, number, now)


NUMBER = r"(?<![\w.])[−+-]?\d[\d,]*(?:\.\d+)?(?:e[+-]\d+)?"
#: Sentences of a report that are there or not, as the clock has it.
AS_TIMED = (
    "- The pruned model is not faster here",
    "- The interval of the latency ratio includes 1",
    "- The machine was busy while it was timed",
)


def without_measurements(text: str) -> str:
    """``text`` of a report or of a terminal without what another machine, version or minute would change in it."""
    text = re.sub(r"[─━═]+", "─", re.sub(r"(?<=\S)[^\S\n]+", " ", text))
    text = re.sub(rf"{NUMBER} (ms|s)\b", r"N \1", text)
    text = re.sub(rf"{NUMBER} (B|kB|MB|GB)\b", "SIZE", text)
    text = re.sub(r"\b[0-9a-f]{12,64}\b", "HASH", text)
    text = re.sub(r"\d{4}-\d\d-\d\dT[\d:]+(?:\.\d+)?(?:Z|[+-]\d\d:\d\d)", "DATE", text)
    text = re.sub(r"timm \d[\w.+]*", "timm VERSION", text)
    text = re.sub(r"(\| Environment.*\n\|.*\n)(?:\|.*\n)+", r"\1| … | … |\n", text)
    timed = r"time per (?:image|batch of \d+) \([^)]*\)"
    text = re.sub(rf" and \d+ % (?:less|more) ({timed}) than the dense model", r" TIMED \1", text)
    text = re.sub(rf" than the dense model and about as much ({timed})", r" TIMED \1", text)
    return "\n".join(_line(line) for line in text.splitlines() if not line.startswith(AS_TIMED))


def on_terminal(text: str) -> str:
    """The same of what was printed: where a line begins depends on the width of the numbers below it."""
    text = "\n".join(line.strip() for line in without_measurements(text).splitlines())
    return text


def _line(line: str) -> str:
    cells = re.split(r"(?<!\\)([|│])", line)
    if re.search(r"N ms|SIZE", line) and len(cells) > 1:  # Ratios of what was measured, rates, and their intervals.
        number = rf"{NUMBER}×?"
        spread = rf"^ ({number})(?: (?:\({number} to {number}\)|\[{number}, {number}\]))? $"
        cells = [re.sub(spread, " N ", cell) for cell in cells]
    if cells[-3:-1] in ([" passed ", "|"], [" passed ", "│"]):  # How far two forms of a model are apart: rounding.
        cells[4] = " E "
    if len(cells) == 7 and re.match(MACHINE, cells[2].strip()):
        cells[4] = " … "
    return "".join(cells)


#: Rows of the tables of protocol and provenance whose values are of a machine or a minute.
MACHINE = r"(?:warmup\\_\w+|rounds|settle\\_seconds|untimed\\_before\\_each\..*|vpruner|plan\.versions\..*)$"
