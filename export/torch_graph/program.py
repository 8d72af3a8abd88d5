"""The part of a graph that certain values need, with functions of the caller in it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...core.text import first_line
from .lower import Lowered
from .peepholes import fuse
from .table import Call

#: Where a result goes that nothing reads.
_UNUSED = ":unused"


@dataclass(frozen=True)
class Program:
    """The calls that certain values need.

    Attributes:
        names: Of those values.
        frees: For each call, names of values that nothing reads after it.
        reads: Names that must be given: inputs, constants, and values that are not computed.
    """

    names: tuple[str, ...]
    calls: tuple[Call, ...]
    frees: tuple[tuple[str, ...], ...]
    reads: frozenset[str]

    def run(self, values: dict[str, Tensor | None], placed: Mapping[tuple, Sequence[tuple]]) -> list[Tensor]:
        """The values of :attr:`names`.

        Args:
            values: What :attr:`reads` names; it is used up.
            placed: (value, reader) -> (function, further arguments) of each that stands there.

        Raises:
            GraphError: A function failed: the graph does not fit its inputs; names the node.
        """
        values[""] = None
        for call, frees in zip(self.calls, self.frees, strict=True):
            arguments = [values[name] for name in call.inputs]
            if call.place is not None:
                (result,) = arguments
                for function, tensors in placed[call.place]:
                    result = function(result, *tensors)
            else:
                try:
                    result = call.function(*arguments)
                except (RuntimeError, IndexError, ValueError, TypeError) as error:
                    if call.site is None or isinstance(error, torch.OutOfMemoryError):
                        raise
                    raise call.site.refuse(first_line(error)) from error
            results = result if isinstance(result, (tuple, list)) else (result,)
            values.update(zip(call.outputs, results, strict=True))
            del arguments, result, results
            for name in frees:
                del values[name]
        return [values[name] for name in self.names]


def compile_calls(
    lowered: Lowered,
    names: Sequence[str],
    places: Collection[tuple[str, str | None]],
    given: Collection[str] = (),
) -> Program:
    """The calls that ``names`` need, where functions stand at ``places``: (value, output of its reader or None).

    Args:
        given: Names of values that are not computed, and nothing ahead of them is.
    """
    needed, kept = set(names), []
    for call in reversed(list(_with_places(lowered, places))):
        if not needed.isdisjoint(set(call.outputs).difference(given)):
            needed.update(call.inputs)
            # What a Split makes beside the needed value may be given.
            kept.append(replace(call, outputs=tuple(_UNUSED if name in given else name for name in call.outputs)))
    calls = fuse(kept[::-1], {*names, *(value for value, reader in places if reader is None)})
    last = {name: at for at, call in enumerate(calls) for name in (*call.inputs, *call.outputs)}
    frees = [
        [name for name in {*call.inputs, *call.outputs} - {*names, ""} if last[name] == at]
        for at, call in enumerate(calls)
    ]
    made = {name for call in calls for name in call.outputs if name not in call.inputs}
    reads = {*names, *(name for call in calls for name in call.inputs)} - made - {""}
    return Program(tuple(names), tuple(calls), tuple(map(tuple, frees)), frozenset(reads))


def _with_places(lowered: Lowered, places: Collection[tuple[str, str | None]]) -> Iterator[Call]:
    """All calls. One for a place changes a value under its own name, or under another for one reader."""
    everywhere = {value for value, reader in places if reader is None}
    made = {name for call in lowered.calls for name in call.outputs}
    for name in everywhere - made:
        yield Call("Place", None, (name,), (name,), place=(name, None))
    for call in lowered.calls:
        for place in {(value, call.outputs[0]) for value in call.inputs} & set(places):
            alias = ":for:".join(place)
            yield Call("Place", None, place[:1], (alias,), place=place)
            call = replace(call, inputs=tuple(alias if name == place[0] else name for name in call.inputs))
        yield call
        for name in everywhere.intersection(call.outputs):
            yield Call("Place", None, (name,), (name,), place=(name, None))
