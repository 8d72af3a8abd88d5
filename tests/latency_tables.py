"""Latency tables from a formula, shared by the tests of costs, search and tables."""

from vpruner.core.latency_table import LatencyTable
from vpruner.core.plan import Geometry

ABOUT = dict(runtime="onnxruntime", provider="cpu", precision="fp32", threads=1, batch=1, opset=20)


def make_table(shape: Geometry, block, keys=None, whole=None, fixed_ms=1.0, **changes) -> LatencyTable:
    """``block(keys, queries)`` and ``whole(keys)`` in ms, on ``keys`` or on every count there can be."""
    keys = list(keys or range(max(1, shape.prefix_tokens), shape.tokens + 1))
    queries = keys if keys[0] == 1 else [1, *keys]
    values = dict(
        model="tiny",
        geometry=shape,
        **ABOUT,
        keys=keys,
        whole=[(whole or (lambda key: block(key, key)))(key) for key in keys],
        split=[[block(key, query) for query in queries if query <= key] for key in keys],
        fixed_ms=fixed_ms,
    )
    return LatencyTable(**{**values, **changes})


def stairs(step: int):
    """ms of a runtime that works in tiles of ``step`` tokens."""

    def block(keys: int, queries: int) -> float:
        up = [step * -(-count // step) for count in (keys, queries)]
        return 0.3 + 0.01 * up[0] + 0.03 * up[1]

    return block
