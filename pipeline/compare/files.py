"""Files of a comparison: its rows, and what an earlier one left."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ...core.errors import UserError
from ...core.text import option

_FILES = r"(results\.jsonl|comparison\.(svg|png)|report\.(html|md))"
#: What the folder of a comparison holds besides its rows; ``--force`` removes these and nothing else. With a dot before
#: and more behind: what a process that was killed left unfinished.
COMPARE_FILES = re.compile(rf"graphs|plans|{_FILES}|\.{_FILES}\..*")


def read_results(path: Path) -> list[dict[str, Any]]:
    """The rows of a results file; none where there is none.

    Raises:
        UserError: It is not one of JSON objects.
    """
    rows = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} cannot be read as rows: {error}", f"name another file with {option('results')}"
        ) from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict):
                raise UserError(
                    f"line {number} of {path} is not a row", f"correct it, or name another with {option('results')}"
                )
            rows.append(row)
    return rows


def files_of_earlier(output: Path, results: Path) -> list[Path]:
    """What an earlier comparison left in the folder; rows that lie elsewhere are not of the folder.

    Raises:
        UserError: The folder is a file, or holds something that no comparison writes.
    """
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is a file", f"choose another folder with {option('output')}")
    found = sorted(output.iterdir()) if output.exists() else []
    rows = results.resolve()
    foreign = [path.name for path in found if path.resolve() != rows and not COMPARE_FILES.fullmatch(path.name)]
    if foreign:
        raise UserError(
            f"{output} holds {foreign[0]}, which is not of a comparison",
            f"choose another folder with {option('output')}, or move that away",
        )
    return found
