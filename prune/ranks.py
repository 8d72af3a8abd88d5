"""Several processes that learn one plan, as torchrun and accelerate launch start them.

All of them run the same program with the same seeds. What is learned from is a sum over images: each process takes its
share of them, the sums are those of all, and every process decides alike on them. Outside of :func:`joined`, and where
a process was started alone, there is one process: a share is everything, a sum is what it is, and torch.distributed is
not imported.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from ..core import progress
from ..core.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
#: How long a process waits for another: the images of a round may take one of two unlike machines much longer. One that
#: has ended is noticed at once.
PATIENCE = timedelta(hours=1)
#: How long the store is asked, at most, who has said already why the processes end.
ASKING = timedelta(seconds=5)
_STARTED_BY = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class World:
    """The processes that work together.

    Attributes:
        rank: Which of them this is.
        size: How many there are.
        local: Which of those on this machine this is.
    """

    rank: int = 0
    size: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        """Whether this is the one that writes files and prints."""
        return self.rank == 0


_world = ALONE = World()
_store: Any = None
_groups = 0


class LostProcess(UserError):
    """Another of the processes has ended, or does not answer."""


def world() -> World:
    """The processes that learn together at this moment."""
    return _world


def launched() -> World:
    """The processes that were started together, whether they have joined or not.

    Raises:
        UserError: The environment that says so makes no sense.
    """
    if not all(os.environ.get(name) for name in _STARTED_BY):
        return ALONE
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    values = [os.environ.get(name) or os.environ["RANK"] for name in names]
    if not all(value.isdecimal() for value in values) or not int(values[0]) < int(values[1]):
        found = ", ".join(f"{name}={value}" for name, value in zip(names, values, strict=True))
        raise UserError(f"the environment says {found}", "start the processes with torchrun, or unset these variables")
    place = World(*map(int, values))
    return place if place.size > 1 else ALONE


@contextmanager
def joined() -> Iterator[World]:
    """Learn together with the processes that were started with this one, until the context is left.

    Progress is reported by the first of them alone. In a program that has process groups of its own, each process
    learns for itself.

    Raises:
        LostProcess: Not all of them come, or one ends meanwhile.
    """
    global _world, _store, _groups
    place = launched()
    if place.size == 1 or _world.size > 1 or _has_groups():
        yield _world
        return
    import torch.distributed as dist

    with _talking():
        _store = _store or _open_store(PATIENCE)
        _groups += 1
        _await_all(_store, f"group {_groups}", place.size)
        store = dist.PrefixStore(f"group {_groups}", _store)
        dist.init_process_group("gloo", store=store, rank=place.rank, world_size=place.size, timeout=PATIENCE)
    _world = place
    try:
        with ExitStack() as quiet:
            if not place.first:
                quiet.enter_context(progress.reporting(progress.Sink()))
            yield place
        with _talking():
            dist.barrier()  # What is under way still arrives.
    finally:
        _world = ALONE
        dist.destroy_process_group()


def leave_to_first() -> None:
    """End this process if it is not the first: what follows is done once."""
    if not launched().first and not _has_groups():
        raise SystemExit(0)


def speaks() -> bool:
    """Whether this process is the first of those started together to say why they end; ask once."""
    try:
        if launched().size == 1:
            return True
        if _store is None and not _held_outside():
            return True  # There is no store before the processes have joined.
        return (_store or _open_store(ASKING)).add("said", 1) == 1
    except (RuntimeError, UserError):  # The process that held it has ended: whoever notices may say so.
        return True


# -- shares and sums --------------------------------------------------------------------------------------------------


def bounds(count: int) -> tuple[int, int]:
    """Where this process's share of so many things begins and ends; it may be empty."""
    return count * _world.rank // _world.size, count * (_world.rank + 1) // _world.size


def share(things: Sequence[T]) -> Sequence[T]:
    """This process's share: the shares of all, one behind the other, are ``things``."""
    start, stop = bounds(len(things))
    return things[start:stop]


def summed(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Sums over the processes, in float64, of tensors of the same shapes everywhere: the same bits in every process."""
    if _world.size == 1:
        return tensors
    import torch
    import torch.distributed as dist

    found = []
    for tensor in tensors:
        total = tensor.detach().to("cpu", torch.float64, copy=True).contiguous()
        with _talking():
            dist.reduce(total, 0)
            dist.broadcast(total, 0)
        found.append(total.to(tensor.device, tensor.dtype))
    return tuple(found)


def everywhere(holds: bool) -> bool:
    """Whether it holds in every process."""
    if _world.size == 1:
        return holds
    return all(collected([holds]))


def gathered(rows: Tensor) -> Tensor:
    """The rows of every process, one share behind the other, on the CPU.

    Args:
        rows: [row, ...] of this process's share; without a row, of any shape.
    """
    if _world.size == 1:
        return rows
    import torch
    import torch.distributed as dist

    rows = rows.detach().cpu()
    facts = collected([(len(rows), tuple(rows.shape[1:]), rows.dtype)])
    shape, dtype = next(((shape, dtype) for count, shape, dtype in facts if count), facts[0][1:])
    padded = torch.zeros(max(count for count, _, _ in facts), *shape, dtype=dtype)
    if len(rows):
        padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in facts]
    with _talking():
        dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, (count, _, _) in zip(parts, facts, strict=True)])


def collected(things: Sequence[T]) -> list[T]:
    """The small objects of every process, one share behind the other."""
    if _world.size == 1:
        return list(things)
    import torch.distributed as dist

    found: list[Any] = [None] * _world.size
    with _talking():
        dist.all_gather_object(found, list(things))
    return [thing for part in found for thing in part]


def from_first(thing: T) -> T:
    """What the first process has."""
    if _world.size == 1:
        return thing
    import torch.distributed as dist

    found = [thing]
    with _talking():
        dist.broadcast_object_list(found, 0)
    return found[0]


def require_same(facts: Mapping[str, Any]) -> None:
    """Refuse to learn together from different things.

    Args:
        facts: Name of what must be the same in every process -> something small that tells it from others.

    Raises:
        UserError: In every process: what differs.
    """
    first, *others = collected([facts])
    for name, fact in first.items():
        if any(other[name] != fact for other in others):
            raise UserError(
                f"processes that were started together learn from different things: {name}",
                "give every one of them the same files and options",
            )


# -- below ------------------------------------------------------------------------------------------------------------


def _has_groups() -> bool:
    dist = sys.modules.get("torch.distributed")
    return dist is not None and dist.is_available() and dist.is_initialized()


def _held_outside() -> bool:
    """Whether whoever started the processes holds a store for them; else the first process does."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _open_store(timeout: timedelta) -> Any:
    from torch.distributed import PrefixStore, TCPStore

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    holds = launched().first and not _held_outside()
    store = TCPStore(address, port, is_master=holds, timeout=timeout, wait_for_workers=False)
    # It outlives processes that are started again.
    return PrefixStore(f"vpruner {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _await_all(store: Any, name: str, count: int) -> None:
    """Wait for so many processes; here and not in PyTorch, which would not hear of a signal to end meanwhile."""
    store.add(name, 1)
    until = time.monotonic() + PATIENCE.total_seconds()
    while store.add(name, 0) < count:
        if time.monotonic() > until:
            raise TimeoutError
        time.sleep(0.05)


@contextmanager
def _talking() -> Iterator[None]:
    """Around everything that waits for other processes."""
    try:
        yield
    except (RuntimeError, ValueError, TimeoutError) as error:  # What gloo raises has no class of its own.
        raise LostProcess(
            "a process that was started with this one has ended or does not answer",
            "see what it said, and start all of them again",
        ) from error
