"""Latency tables from a formula, shared by the tests of costs, search and tables."""

from vpruner.core.cost import block_macs
from vpruner.core.geometry import Geometry
from vpruner.core.latency_table import LatencyTable

ABOUT = dict(runtime="onnxruntime", provider="cpu", precision="fp32", threads=1, batch=1, opset=20)


def geometry(depth=6, grid=(6, 6), pooled=False, prefix=1, **changes) -> Geometry:
    values = dict(
        depth=depth, embed_dim=64, num_heads=2, head_dim=32, grid=grid, prefix_tokens=prefix, image_size=(48, 48),
        mlp_macs=2 * 64 * 256, stem_macs=36 * 192 * 64, head_macs=640, head_prefix=0 if pooled else 1,
        head_patches=pooled, head_macs_per_token=2 * 64 * 64 if pooled else 0, outputs=10,
    )  # fmt: skip
    return Geometry(**{**values, **changes})


def make_table(shape: Geometry, attention, mlp, tokens=None, whole=None, fixed_ms=1.0, **changes) -> LatencyTable:
    """``attention(keys, queries)``, ``mlp(tokens)`` and ``whole(tokens)`` in ms, on ``tokens`` or on every count there
    can be."""
    tokens = list(tokens or range(max(1, shape.prefix_tokens), shape.tokens + 1))
    rows = tokens if tokens[0] == 1 else [1, *tokens]
    values = dict(
        model="tiny",
        geometry=shape,
        **ABOUT,
        tokens=tokens,
        whole=[(whole or (lambda count: attention(count, count)))(count) for count in tokens],
        split=[[attention(keys, queries) for queries in rows] for keys in tokens],
        mlp=[mlp(row) for row in rows],
        fixed_ms=fixed_ms,
    )
    return LatencyTable(**{**values, **changes})


def macs_table(shape: Geometry) -> LatencyTable:
    """A table whose milliseconds are MACs."""
    return make_table(
        shape, lambda k, q: block_macs(shape, k, q, 0), lambda m: block_macs(shape, 0, 0, m),
        fixed_ms=shape.stem_macs + shape.head_macs, head_token_ms=shape.head_macs_per_token,
    )  # fmt: skip


def stairs(step: int) -> dict:
    """Attention and MLP of a runtime that works in tiles of ``step`` tokens."""

    def up(count: int) -> int:
        return step * -(-count // step)

    return dict(attention=lambda k, q: 0.3 + 0.01 * up(k) + 0.01 * up(q), mlp=lambda m: 0.02 * up(m))
