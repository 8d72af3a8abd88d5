"""Inputs gone wrong, by seed: whatever a reader is given, it uses or refuses it.

A target is one test::

    @pytest.mark.parametrize("seeds", fuzz.examples())
    def test_any_plan_is_read_or_refused(seeds, tmp_path):
        path = tmp_path / "plan.json"
        for seed in seeds:
            path.write_bytes(fuzz.mutated_json(PLAN, seed))
            with fuzz.survives(seed, tmp_path / "out"):
                TokenPlan.load(path)
"""

from __future__ import annotations

import copy
import json
import os
import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from vpruner.core.errors import UserError

#: Seeds under make test, and under make test-all. One test takes a block of them: a thousand tests cost more than they.
FEW, MANY, PER_TEST = 30, 2000, 100
#: More CPU time than this is a hang; one that waits is stopped by the timeout of its test.
MOST_SECONDS = 10
#: Values that have broken a reader of some project: borders of types, other types, names with a meaning elsewhere.
JUNK: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 2**31, -(2**31), 2**63, 10**25, 0.5, -0.0, 1e-320, 1.7e308, "", "a", "nan", "inf",
    "\x00", "\u2028", "a\nb", "../../x", "/dev/zero", "http://localhost/x", "<script>", "x" * 5000, [], {}, [[]],
    [None], [0], {"": 0}, {"a": {"a": {}}}, [[1]] * 50,
)  # fmt: skip
#: Pieces of JSON that json.dumps never writes.
RAW = (b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"[" * 5000, b'{"a":' * 5000, b'"\\ud800"', b"\xff", b"\x00", b'"')


def examples(few: int = FEW, many: int = MANY) -> list[Any]:
    """Ranges of seeds for ``parametrize``: ``few`` in the fast suite, ``many`` under make test-all."""
    starts = [0, *range(few, many, PER_TEST)]
    return [
        pytest.param(range(start, stop), marks=[pytest.mark.nightly] if start else [], id=f"{start}-{stop - 1}")
        for start, stop in zip(starts, [*starts[1:], many], strict=True)
    ]


def mutated_bytes(content: bytes, seed: int) -> bytes:
    """``content`` with one to four faults: flipped bits, parts cut out, doubled, moved or overwritten, a cut end."""
    chance, data = random.Random(seed), bytearray(content)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        start = chance.randrange(len(data) + 1)
        # Small faults mostly: a header is a small part of a file.
        stop = min(len(data), start + int(2 ** chance.uniform(0, 10)))
        match chance.randrange(8):
            case 0 | 1 if start < len(data):
                data[start] ^= 1 << chance.randrange(8)
            case 2:
                del data[start:stop]
            case 3:
                data[start:start] = data[start:stop] * chance.choice((1, 2, 100))
            case 4:
                data[start:stop] = chance.randbytes(stop - start)
            case 5:
                data[start : start + 8] = chance.choice((b"\xff", b"\x00", b"\x7f", b"\x80")) * 8
            case 6:
                del data[start:]
            case _:
                data[start:start] = chance.choice(RAW)
    return bytes(data)


def mutated_json(value: Any, seed: int) -> bytes:
    """JSON of ``value`` after one to four faults in its values: replaced, removed, added, renamed; or in its text."""
    chance, value = random.Random(seed), json.loads(json.dumps(value))
    if chance.random() < 0.15:
        return mutated_bytes(json.dumps(value).encode(), seed)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        places = list(_places(value))
        if not places:
            break
        parent, key = chance.choice(places)
        match chance.randrange(7):
            case 0 | 1 | 2:
                parent[key] = copy.deepcopy(chance.choice(JUNK))  # What is put in may be changed by the next fault.
            case 3:
                del parent[key]
            case 4:  # What stands elsewhere in the file.
                other, place = chance.choice(places)
                parent[key] = copy.deepcopy(other[place])
            case 5 if isinstance(parent, dict):
                parent[str(chance.choice(JUNK))] = parent.pop(key)
            case _:
                number = parent[key]
                if isinstance(number, (int, float)):
                    parent[key] = chance.choice((-number, number + 1, number * 1000, number / 3, bool(number)))
                else:
                    parent[key] = [number, copy.deepcopy(number)]
    return json.dumps(value).encode()


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(parent, key or index) of everything below ``value``."""
    for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
        yield value, key
        if isinstance(item, (dict, list)):
            yield from _places(item)


@contextmanager
def survives(seed: int, output: Path) -> Iterator[None]:
    """Assert that the block ends well or with a UserError, soon, and writes nowhere but below ``output``.

    What compiled code writes by itself is not seen.
    """
    began = time.process_time()
    _watched.append((output.resolve(), outside := []))
    try:
        yield
    except UserError:
        pass
    except Exception as error:
        raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
    finally:
        _watched.pop()
    assert not outside, f"seed {seed} wrote outside {output}: {outside}"
    assert (took := time.process_time() - began) < MOST_SECONDS, f"seed {seed} took {took:.0f} s"


_watched: list[tuple[Path, list[str]]] = []
#: Number of the argument that is made or goes away.
_WRITES = {
    "os.mkdir": 0,
    "os.rename": 1,
    "os.remove": 0,
    "os.rmdir": 0,
    "os.symlink": 1,
    "os.link": 1,
    "os.truncate": 0,
}


def _folder(number: int) -> Path:
    """Of a descriptor that a name is relative to, as shutil.rmtree has it."""
    return Path(os.readlink(f"/proc/self/fd/{number}")) if number >= 0 and os.path.isdir("/proc/self/fd") else Path()


def _audit(event: str, arguments: tuple) -> None:
    if not _watched:
        return
    if event == "socket.connect":
        _watched[-1][1].append(f"a connection to {arguments[1]}")
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if writes or event in _WRITES:
        path = arguments[_WRITES.get(event, 0)]
        if isinstance(path, (str, bytes, os.PathLike)):
            folder = _folder(arguments[1]) if event in ("os.remove", "os.rmdir") else Path()
            place = (folder / os.fsdecode(path)).resolve()
            # Modules that are imported on the way are compiled; other programs are given the null device.
            known = place == Path(os.devnull) or "__pycache__" in place.parts
            if not known and not place.is_relative_to(_watched[-1][0]):
                _watched[-1][1].append(str(place))


sys.addaudithook(_audit)
