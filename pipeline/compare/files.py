"""Files of a comparison: its rows, and what an earlier one left."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ...core import progress
from ...core.errors import UserError
from ...core.ours import is_ours
from ...core.rows import finish_last_row, read_rows
from ...core.scratch import remove_leftovers
from ...core.text import option
from ..folders import refuse_foreign

#: What the folder of a comparison holds besides its rows; ``--force`` removes these and nothing else.
COMPARE_FILES = re.compile(r"graphs|plans|results\.jsonl|comparison\.(svg|png)|report\.(html|md)")

#: A plan that a comparison wrote has the key of its settings in its name, and is its own even when it is damaged.
_KEYED = re.compile(r".+-[0-9a-f]{8}(\.tuned)?\.(json|safetensors|onnx)")


def rows_of_earlier(results: Path) -> list[dict[str, Any]]:
    """The rows that are there already; none where there is no file.

    Raises:
        UserError: The file is none of rows.
    """
    hint = f"correct it, or name another file with {option('results')}"
    if not results.exists():
        return []
    if is_ours(results) and finish_last_row(results):
        progress.remark(f"the last row of {results} was half written, and is measured again")
    from ...core.comparison_rows import type_of  # Not at the top: reports of other kinds need none of it.

    return read_rows(results, hint, type_of=type_of)


def files_of_earlier(output: Path, results: Path) -> list[Path]:
    """What an earlier comparison left in the folder; rows that lie elsewhere are not of the folder.

    Raises:
        UserError: The folder is a file, or holds something that no comparison writes.
    """
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is a file", f"choose another folder with {option('output')}")
    for folder in (output, output / "plans", output / "graphs"):
        remove_leftovers(folder)
    found = sorted(output.iterdir()) if output.exists() else []
    rows = results.resolve()
    foreign = [
        file
        for path in found
        for file in (path.iterdir() if path.name in ("plans", "graphs") and path.is_dir() else [path])
        if file.resolve() != rows and not _is_of_comparison(file, path)
    ]
    refuse_foreign(output, foreign, "comparison")
    return found


def _is_of_comparison(file: Path, entry: Path) -> bool:
    """Whether a comparison wrote ``file``, which is an entry of its folder or lies in one."""
    keyed = file != entry and _KEYED.fullmatch(file.name) and file.is_file()
    return bool(COMPARE_FILES.fullmatch(entry.name)) and bool(keyed or is_ours(file))
