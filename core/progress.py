"""Progress and remarks of long work, as events.

Library code says ``with progress.stage("Folding")`` and ``progress.remark("...")``; who hears it is decided outside,
once: ``with progress.reporting(sink)``. Without that, events go to Python's logging, under ``vpruner``. Nothing here
prints.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from .errors import UserError
from .text import as_python

logger = logging.getLogger("vpruner")
# Without a handler of the program's, remarks would go to stderr: nothing prints here.
logger.addHandler(logging.NullHandler())


class Sink:
    """Hears of progress. Every method may be overridden; here they do nothing."""

    def started(self, title: str, total: int | None) -> None:
        """A stage begins.

        Args:
            total: How many items it will work through; None where that is not known.
        """

    def advanced(self, title: str, count: int, best: str) -> None:
        """``count`` more items are done; ``best`` is the best result so far as text, or empty."""

    def finished(self, title: str, seconds: float, done: int | None, unit: str) -> None:
        """A stage is over.

        Args:
            seconds: Wall-clock time of all stages of that title so far.
            done: Items that were done; None for a stage that counts none. A stage may stop early.
            unit: What the items are, in the plural.
        """

    def stopped(self, title: str) -> None:
        """A stage ended with an exception."""

    def remarked(self, text: str) -> None:
        """Something that the user should know and that is no error."""

    def words(self, text: str) -> str:
        """How this listener's user names options and commands, see :mod:`vpruner.core.text`."""
        return as_python(text)


class LogSink(Sink):
    """Events as log lines: finished stages as INFO, remarks as WARNING."""

    def finished(self, title: str, seconds: float, done: int | None, unit: str) -> None:
        logger.info("%s%s: %.1f s", title, "" if done is None else f" ({done} {unit})", seconds)

    def remarked(self, text: str) -> None:
        logger.warning("%s", text)


@dataclass
class Record:
    """What a job has reported so far.

    Attributes:
        seconds: Wall-clock time of each finished stage, in the order they ran.
        remarks: Everything the user should know, once each and in order; reports repeat it.
    """

    sink: Sink
    seconds: dict[str, float] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)


_current: ContextVar[Record | None] = ContextVar("vpruner_progress", default=None)


@contextmanager
def reporting(sink: Sink | None = None) -> Iterator[Record]:
    """Send the events of the block to ``sink``; None: to whoever listens already, with a record of its own."""
    if sink is None:
        outer = _current.get()
        sink = LogSink() if outer is None else outer.sink
    if not isinstance(sink, Sink):
        raise UserError(f"progress goes to a {type(sink).__name__}", "expected a vpruner.Sink")
    record = Record(sink)
    token = _current.set(record)
    try:
        yield record
    finally:
        _current.reset(token)


def current() -> Record:
    """The record of the job under way; an empty one outside of any."""
    return _current.get() or Record(LogSink())


def words(text: str) -> str:
    """``text`` with options and commands named as the user of the current job names them."""
    return current().sink.words(text)


def words_of(error: BaseException) -> str:
    """The message of an error in one line, with options and commands named as :func:`words` does."""
    return " ".join(words(error.marked if isinstance(error, UserError) else str(error)).split())


@contextmanager
def stage(title: str, total: int | None = None, *, unit: str = "images") -> Iterator[Callable[..., None]]:
    """Report a stage: its beginning, its progress and the time it took.

    Yields:
        A function to call with the number of items just done, and if there is one, the best result so far as text.
    """
    record = current()
    started, done = time.perf_counter(), 0
    record.sink.started(title, total)

    def advance(count: int, best: str = "") -> None:
        nonlocal done
        done += count
        record.sink.advanced(title, count, best)

    try:
        yield advance
    except BaseException:
        record.sink.stopped(title)
        raise
    record.seconds[title] = record.seconds.get(title, 0.0) + time.perf_counter() - started
    record.sink.finished(title, record.seconds[title], None if total is None else done, unit)


def remark(text: str) -> None:
    """Tell the user something that is no error; within a job a repeated remark is said once, and an empty one never."""
    record = current()
    text = record.sink.words(text)
    if text and text not in record.remarks:
        record.remarks.append(text)
        record.sink.remarked(text)
