"""Work in threads, ahead of the caller and in order."""

import gc
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from vpruner.core import ahead
from vpruner.core.ahead import default_workers, in_order


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "vpruner-ahead"]


def gone() -> bool:
    gc.collect()
    for thread in threads():
        thread.join(5)
    return not threads()


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_results_come_in_order(workers):
    delays = np.random.default_rng(0).uniform(0, 2e-3, 50)

    def work(index):
        time.sleep(delays[index])
        return index * index

    assert list(in_order(work, range(50), workers)) == [index * index for index in range(50)]
    assert list(in_order(work, iter(()), workers)) == []
    assert gone()


def test_work_goes_on_while_the_caller_does_something_else():
    reached = threading.Event()
    stream = in_order(lambda index: reached.set() if index == 9 else index, range(20), 1, ahead=8)
    for _ in range(8):  # It begins with one at a time.
        next(stream)
    assert reached.wait(5)
    stream.close()


@pytest.mark.parametrize(("size", "most"), [(0, 7), (100, 4), (10**6, 2)])
def test_what_waits_is_bounded_in_number_and_in_bytes(monkeypatch, size, most):
    monkeypatch.setattr(ahead, "WAITING_BYTES", 400)
    begun, waiting = [], []
    stream = in_order(lambda index: begun.append(index), range(60), 2, ahead=7, size=lambda result: size)
    for taken, _ in enumerate(stream, 1):
        time.sleep(1e-3)
        waiting.append(len(begun) - taken)
    assert max(waiting) == most and waiting[0] == 0  # Who asks for one pays for one.


@pytest.mark.parametrize("workers", [0, 3])
def test_errors_are_raised_in_their_place(workers):
    def items():
        yield from range(6)
        raise OSError("the line is down")

    def work(index):
        if index == at:
            raise ValueError("a bad one")
        return index

    for at, error, before in ((3, ValueError, 3), (-1, OSError, 6)):  # noqa: B007 - work reads it
        seen = []
        with pytest.raises(error):
            seen.extend(in_order(work, items(), workers))
        assert seen == list(range(before)) and gone()


def test_a_stream_that_is_left_ends_its_threads():
    begun = []
    stream = in_order(begun.append, range(1000), 3, ahead=40)
    for _ in range(10):
        next(stream)
    del stream
    assert gone() and len(begun) < 60


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signals between processes")
def test_ctrl_c_ends_the_wait():
    """In a process of its own, which alone gets the signal."""
    program = """
import gc, os, signal, threading, time
from vpruner.core.ahead import in_order

# What a shell starts in the background ignores Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
hold, started = threading.Event(), time.monotonic()

def work(index):
    if index == 3:
        os.kill(os.getpid(), signal.SIGINT)
        hold.wait(5)
    return index

try:
    list(in_order(work, range(10), 2))
except KeyboardInterrupt:
    print(time.monotonic() - started < 4)
hold.set()
gc.collect()
for thread in threading.enumerate():
    if thread.name == "vpruner-ahead":
        thread.join(5)
        print(thread.is_alive())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout.split()[:1] == ["True"] and "True" not in done.stdout.split()[1:], done


def test_the_number_follows_cores_and_processes(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    for cores, processes, expected in ((1, None, 1), (2, None, 1), (8, None, 7), (64, None, 12), (16, "4", 3)):
        monkeypatch.setattr(ahead, "usable_cores", lambda cores=cores: cores)
        if processes:
            monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        assert default_workers() == expected
