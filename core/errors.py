"""The two exception families: a user's mistake, and a broken promise of ours."""

from __future__ import annotations

from .text import as_python


class UserError(Exception):
    """Something the user gave cannot be used: bad file, wrong model, budget out of reach.

    The command line prints it as one line and exits with code 2, without a traceback.

    Args:
        problem: What was found and what was expected.
        hint: What to change next. Options and commands are named by the marks of :mod:`vpruner.core.text`: ``str`` of
            the error reads as Python, and the command line puts its own words.
    """

    exit_code = 2

    def __init__(self, problem: str, hint: str = ""):
        super().__init__(f"{problem}; {hint}" if hint else problem)
        self.problem = problem
        self.hint = hint

    @property
    def marked(self) -> str:
        """The message with its marks."""
        return super().__str__()

    def __str__(self) -> str:
        return as_python(self.marked)


class PlanError(UserError, ValueError):
    """A token plan that cannot exist, or that belongs to another model."""


class GraphError(UserError):
    """An ONNX graph that the folding passes do not understand; the message names the node."""


class ParityError(Exception):
    """Two forms of the same pruned model disagree: never the user's fault, so it keeps its traceback in the library."""
