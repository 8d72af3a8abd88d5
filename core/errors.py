"""The two exception families: a user's mistake, and a defect of vpruner."""

from __future__ import annotations

import re

from .text import as_python


class UserError(Exception):
    """Something the user gave cannot be used: bad file, wrong model, budget out of reach.

    The command line prints it as one line and exits with code 2, without a traceback.

    Args:
        problem: What was found and what was expected.
        hint: What to change next. Options and commands are named by the marks of :mod:`vpruner.core.text`: ``problem``,
            ``hint`` and ``str`` of the error read as Python, and the command line puts its own words.

    Attributes:
        marked_problem, marked_hint, marked: The same with their marks, for an error that repeats them.
    """

    exit_code = 2

    def __init__(self, problem: str, hint: str = ""):
        super().__init__(f"{problem}; {hint}" if hint else problem)
        self.marked_problem = problem
        self.marked_hint = hint

    def rename(self, pattern: str, name: str) -> None:
        """Put another name into the message, such as the user's file for the temporary one that becomes it."""
        self.marked_problem = re.sub(pattern, lambda match: name, self.marked_problem)
        self.marked_hint = re.sub(pattern, lambda match: name, self.marked_hint)

    @property
    def problem(self) -> str:
        return as_python(self.marked_problem)

    @property
    def hint(self) -> str:
        return as_python(self.marked_hint)

    @property
    def marked(self) -> str:
        return f"{self.marked_problem}; {self.marked_hint}" if self.marked_hint else self.marked_problem

    def __str__(self) -> str:
        return as_python(self.marked)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"


class PlanError(UserError, ValueError):
    """A token plan that cannot exist, or that belongs to another model."""


class GraphError(UserError):
    """An ONNX graph that the folding passes do not understand; the message names the node."""


class ParityError(Exception):
    """Two forms of the same pruned model disagree.

    Attributes:
        proven: Whether that is a defect of vpruner: the model itself is computed well enough to tell. It keeps its
            traceback in the library.
    """

    def __init__(self, problem: str, *, proven: bool = True):
        super().__init__(problem)
        self.proven = proven
