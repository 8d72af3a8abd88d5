"""Words in messages."""

from __future__ import annotations


def counted(count: int, what: str) -> str:
    """``"1 image"``, ``"2 images"``."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def first_line(error: BaseException, limit: int = 200) -> str:
    """The first line of another package's message, for a message of ours; the type's name where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0][:limit] if lines else type(error).__name__
