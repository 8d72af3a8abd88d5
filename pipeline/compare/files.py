"""Files of a comparison: its rows, and what an earlier one left."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ...core.errors import UserError
from ...core.rows import read_rows
from ...core.text import option

_FILES = r"(results\.jsonl|comparison\.(svg|png)|report\.(html|md))"
#: What the folder of a comparison holds besides its rows; ``--force`` removes these and nothing else. With a dot before
#: and more behind: what a process that was killed left unfinished.
COMPARE_FILES = re.compile(rf"graphs|plans|{_FILES}|\.{_FILES}\..*")


def rows_of_earlier(results: Path) -> list[dict[str, Any]]:
    """The rows that are there already; none where there is no file.

    Raises:
        UserError: The file is none of rows.
    """
    hint = f"correct it, or name another file with {option('results')}"
    return read_rows(results, hint) if results.exists() else []


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
            f"{output} holds {foreign[0]}, which no comparison wrote",
            f"choose another folder with {option('output')}, or move that away",
        )
    return found
