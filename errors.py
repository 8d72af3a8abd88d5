"""The two exception families: a user's mistake, and a broken promise of ours."""

from __future__ import annotations


class UserError(Exception):
    """Something the user gave cannot be used: bad file, wrong model, budget out of reach.

    The command line prints it as one line and exits with code 2, without a traceback.

    Args:
        problem: What was found and what was expected.
        hint: What to type or change next.
    """

    exit_code = 2

    def __init__(self, problem: str, hint: str = ""):
        super().__init__(f"{problem}; {hint}" if hint else problem)
        self.problem = problem
        self.hint = hint


def counted(count: int, what: str) -> str:
    """``"1 image"``, ``"2 images"``."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def first_line(error: BaseException, limit: int = 200) -> str:
    """The first line of another package's message, for a message of ours; the type's name where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0][:limit] if lines else type(error).__name__


class PlanError(UserError, ValueError):
    """A token plan that cannot exist, or that belongs to another model."""


class GraphError(UserError):
    """An ONNX graph that the folding passes do not understand; the message names the node."""


class ParityError(Exception):
    """Two forms of the same pruned model disagree: never the user's fault, so it keeps its traceback in the library."""
