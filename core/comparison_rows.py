"""What the rows of a comparison must hold for it to go on from them; see :mod:`vpruner.core.rows`."""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import UNSET, Meta, Struct, UnsetType

Positive = Annotated[float, Meta(gt=0)]
Count = Annotated[int, Meta(ge=1)]
#: Of a file in the comparison's own folder.
Name = Annotated[str, Meta(pattern=r"^[^/\\\x00]+$")]


class _Estimate(Struct):
    value: float
    low: float | None
    high: float | None


class _Images(Struct):
    name: str
    count: int


class _Environment(Struct):
    cpu: str | None = None
    packages: dict[str, Any] = {}


class _Row(Struct):
    key: str
    method: str
    target: float
    seed: int | None


class Failed(_Row):
    model: str
    failure: str


class Compared(_Row):
    model: str
    macs_ratio: Positive
    seconds: float
    form: str
    eval_data: _Images
    eval_set: str | UnsetType = UNSET
    data: _Images | None = None
    cpu_seconds: float | None = None
    note: str | None = None
    top1_difference: _Estimate | UnsetType = UNSET
    kl: _Estimate | UnsetType = UNSET
    cosine: _Estimate | UnsetType = UNSET
    relative_error: _Estimate | UnsetType = UNSET


class Graph(_Row):
    batch: Count
    opset: int
    file: Name | None
    failure: str | None
    file_bytes: int | None = None


class Latency(_Row):
    runtime: str
    batch: Count
    threads: Count
    count: Count
    p50_ms: Positive
    ratio: Positive
    environment: _Environment
    protocol: dict[str, Any] = {}
    ratio_low: float | None = None
    ratio_high: float | None = None


def type_of(row: dict[str, Any]) -> type | None:
    """What a row must hold; None for one of another command."""
    if row.get("kind") == "compared":
        return Compared if row.get("failure") is None else Failed
    if row.get("kind") == "graph":
        return Graph
    return Latency if row.get("kind") == "latency" and "key" in row else None
