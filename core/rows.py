"""Rows of measurements: their types, and the one reader and writer of ``results.jsonl``, one JSON object a line.

A row says its ``kind``; the types below say what every row of a kind has. A row may have more: what a stage found, or
who compared it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypedDict

from .boundary import writing
from .errors import UserError
from .json_file import json_text, parse_json, read_json_lines


class _Row(TypedDict):
    schema: int
    kind: str


class _Run(_Row):
    model: str
    target: float
    target_kind: str
    loss: str
    seed: int
    seconds: dict[str, float]
    peak_memory_bytes: dict[str, int]
    command: str
    data: dict[str, Any]
    note: list[str]
    deployment: dict[str, Any] | None
    environment: dict[str, Any]


class RunRow(_Run, total=False):
    """A run as a whole. ``seconds`` are by stage, ``note`` holds its remarks; ``device`` is where PyTorch learned."""

    device: str


class CostRow(_Row):
    """MACs of one form of the model, and ``ratio`` to the dense model's."""

    label: str
    macs: int
    ratio: float
    parameters: int


class _Stage(_Row):
    stage: str
    method: str
    label: str
    kept: bool
    seconds: float
    held_out: dict[str, float] | None
    note: str
    macs: int
    ratio: float


class StageRow(_Stage, total=False):
    """What a stage did; ``label`` says which accuracy rows show the model after it.

    A search whose plan is nested has ``exits``, [kind 3, patch N] as :attr:`vpruner.core.plan.TokenPlan.exits`. Rows of
    plans that drop tokens whole have one list, [patch N]: the first block that a patch does not enter.
    """

    exits: list[list[int] | int]


class _Parity(_Row):
    rung: str
    difference: float | None
    tolerance: float
    passed: bool


class ParityRow(_Parity, total=False):
    """A parity check; ``rung`` is its name. Checks of engines count no images, and an
    output that is not finite has no difference."""

    compared: int
    top1_changed: int | None
    near_ties: int | None
    own_error: float | None


class _Accuracy(_Row):
    label: str
    metric: str
    value: float
    low: float | None
    high: float | None
    count: int


class AccuracyRow(_Accuracy, total=False):
    """An estimate with its 95 % interval; None where one image has none. ``eval_set`` is the name of the evaluation
    set, if it has one; of several sets the first is the one that summaries go by."""

    eval_set: str


class LatencyRow(_Row):
    """Times of one file or method, with what they mean: protocol and environment."""

    label: str
    model: str | None
    runtime: str
    provider: str
    precision: str
    batch: int
    p50_ms: float
    protocol: dict[str, Any]
    environment: dict[str, Any]


class _Block(TypedDict):
    ms: float


class Block(_Block, total=False):
    """``keys`` and ``queries`` are where the file says its tokens."""

    keys: int
    queries: int


class BlocksRow(_Row):
    """Milliseconds of each block, from the times of single layers."""

    label: str
    runtime: str
    blocks: list[Block]
    total_ms: float


class PrecisionRow(_Row):
    """A file in another precision; ``failure`` says why there is none, and then nothing else is known."""

    label: str
    precision: str
    file: str
    failure: str | None


class GatesRow(_Row):
    """What gate constants cost in time."""

    p50_ms: float
    ungated_p50_ms: float
    ratio: float


class PredictionRow(_Row):
    """What a latency table promised, next to what was measured."""

    label: str
    predicted_ms: float
    predicted_dense_ms: float
    predicted_ratio: float
    measured_ms: float
    measured_dense_ms: float
    measured_ratio: float
    error_ms: float
    error_ratio: float
    table_sha256: str


class AnalysisRow(_Row):
    """What tokens do in each block of a model."""

    model: str
    weights_sha256: str
    data: dict[str, Any]
    blocks: list[dict[str, Any]]
    environment: dict[str, Any]


class ComparedRow(_Row):
    """What a method made of a model within a budget; ``failure`` says why it made nothing. On several evaluation sets
    there is a row for each; ``eval_set`` as in :class:`AccuracyRow`."""

    key: str
    method: str
    target: float
    seed: int | None
    model: str
    failure: str | None
    environment: dict[str, Any]


class GraphRow(_Row):
    """The graph of what a method made."""

    key: str
    method: str
    target: float
    seed: int | None
    batch: int
    opset: int
    file: str | None
    failure: str | None


class VlmRow(_Row):
    """What dropping visual tokens saves or costs."""

    label: str
    model: str
    dtype: str
    batch: int
    pruning: dict[str, Any] | None
    environment: dict[str, Any]


#: Kind -> what every row of it has.
KINDS: Mapping[str, type] = {
    "run": RunRow,
    "cost": CostRow,
    "stage": StageRow,
    "parity": ParityRow,
    "accuracy": AccuracyRow,
    "latency": LatencyRow,
    "blocks": BlocksRow,
    "precision": PrecisionRow,
    "gates": GatesRow,
    "prediction": PredictionRow,
    "analysis": AnalysisRow,
    "compared": ComparedRow,
    "graph": GraphRow,
    "vlm_latency": VlmRow,
    "vlm_accuracy": VlmRow,
}


def append_rows(path: str | os.PathLike, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add rows to a ``results.jsonl``; each is written in one call, so no reader sees half a row.

    Raises:
        ValueError: A value is not finite (JSON has no word for it), or a row lacks what its kind has. Nothing is
            written then.
    """
    lines = "".join(map(_line, rows)).encode()
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab", buffering=0) as stream:
            before, written = stream.seek(0, os.SEEK_END), 0
            try:
                while written < len(lines):
                    written += stream.write(lines[written:])
            except OSError:  # The disk is full: half a row would make the rows before it unreadable.
                stream.truncate(before)
                raise


def finish_last_row(path: str | os.PathLike) -> bool:
    """End the last line of a ``results.jsonl``, or cut it off where it is half a row: its writer was killed.

    Returns:
        Whether something was cut off.
    """
    with Path(path).open("r+b") as stream:
        content = stream.read()
        last = content[content.rfind(b"\n") + 1 :]
        if not last.strip():
            return False
        try:
            parse_json(last, "the last row", expected=dict)
        except UserError:
            stream.truncate(len(content) - len(last))
            return True
        stream.write(b"\n")
        return False


def read_rows(
    path: str | os.PathLike, hint: str = "", *, type_of: Callable[[dict[str, Any]], type | None] | None = None
) -> list[dict[str, Any]]:
    """The rows of a ``results.jsonl``, whatever their kinds; blank lines are skipped.

    Args:
        hint: What the user may do instead, for the error.
        type_of: What else a row must hold for its reader; None: nothing.

    Raises:
        UserError: The file cannot be read, a line is no JSON object, or a row lacks what its kind has. The message
            names the line.
    """
    rows = []
    for number, row in read_json_lines(path, "the rows in", hint):
        for kind in (_kind_of(row), type_of and type_of(row)):
            if kind and (problem := _misfit(row, kind)):
                raise UserError(f"{path}, line {number}: a row of kind {row['kind']!r} is malformed: {problem}", hint)
        rows.append(row)
    return rows


def _kind_of(row: Mapping[str, Any]) -> type | None:
    kind = row.get("kind")
    return KINDS.get(kind) if isinstance(kind, str) else None


def _misfit(row: Mapping[str, Any], kind: type) -> str:
    """What keeps a row from being of a type; empty if nothing does."""
    import msgspec

    try:
        msgspec.convert(row, kind)
    except msgspec.ValidationError as error:
        return str(error)
    return ""


def _line(row: Mapping[str, Any]) -> str:
    import msgspec

    text = json_text(row)
    if kind := _kind_of(row):
        try:
            msgspec.json.decode(text, type=kind)
        except msgspec.ValidationError as error:
            raise ValueError(f"a row of kind {row['kind']!r} is malformed: {error}") from error
    return f"{text}\n"
