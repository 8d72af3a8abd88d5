"""Work in threads, ahead of who asks for its results.

Threads and not processes: of the time that an image takes to be read and prepared, nine tenths pass in Pillow, numpy
and hashlib, which let other threads run meanwhile, and the model waits little enough (``benchmarks/data_loading.py``).
Threads start at once where a process first imports torch, work on a data set that the program holds, raise the very
error, and need no guard around the main module of a user's program. Of several processes that learn together each has
its own.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from queue import SimpleQueue
from typing import TypeVar

from .choices import MOST_WORKERS
from .environment import usable_cores

Item, Result = TypeVar("Item"), TypeVar("Result")
#: Results that wait take no more than this, however many were to be computed ahead.
WAITING_BYTES = 256 << 20


def default_workers() -> int:
    """Threads where the user names no number: the cores of this process but one, which is the model's; at least one.

    The processes that ``torchrun`` starts on a machine share its cores.
    """
    processes = os.environ.get("LOCAL_WORLD_SIZE", "")
    cores = usable_cores() // max(1, int(processes) if processes.isdigit() else 1)
    return min(max(1, cores - 1), MOST_WORKERS)


def in_order(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    workers: int,
    *,
    ahead: int = 16,
    size: Callable[[Result], int] = lambda result: 0,
) -> Iterator[Result]:
    """``map(work, items)``, computed by ``workers`` threads; 0: by the caller, when it asks.

    An exception of ``work`` or of ``items`` is raised where the result would have come. Items are taken by the thread
    of the caller. The first result is waited for alone, so that to ask for one costs one; then more and more are
    computed ahead.

    Args:
        ahead: How many results wait at most; more than a caller takes at once, or it will have to wait.
        size: Bytes of a result, by which fewer wait than :data:`WAITING_BYTES` hold.
    """
    if workers < 1:
        yield from map(work, items)
        return
    jobs: SimpleQueue[tuple[Future[Result], Item] | None] = SimpleQueue()
    threads = 0
    waiting: deque[Future[Result]] = deque()
    room, largest, failed = 0, 1, None

    def run() -> None:
        while (job := jobs.get()) is not None:
            future, item = job
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work(item))
                except BaseException as error:
                    future.set_exception(error)
            # Or what the last item led to is held for as long as there is no other.
            del job, future, item

    remaining = iter(items)
    try:
        while True:
            while failed is None and len(waiting) <= room:
                try:
                    item = next(remaining)
                except Exception as error:
                    failed = error
                    break
                waiting.append(Future())
                jobs.put((waiting[-1], item))
                if threads < min(workers, len(waiting)):
                    # A read that hangs must not keep the process from its end.
                    threading.Thread(target=run, daemon=True, name="vpruner-ahead").start()
                    threads += 1
            if not waiting:
                break
            result = _result_of(waiting.popleft())
            largest = max(largest, size(result))
            room = min(2 * room + 1, ahead, max(workers, WAITING_BYTES // largest))
            # One is taken while another is asked for: the threads are to be at work meanwhile.
            yield result
            del result
    finally:
        for future in waiting:
            future.cancel()
        for _ in range(threads):
            jobs.put(None)
    if not isinstance(failed, StopIteration):
        raise failed


def _result_of(future: Future[Result]) -> Result:
    """Waits in parts: Ctrl-C is not heard during a wait on Windows, and elsewhere not if it comes just before one."""
    while True:
        try:
            return future.result(0.5)
        except NotYet:
            if future.done():  # Or it is the error of the work.
                return future.result()
