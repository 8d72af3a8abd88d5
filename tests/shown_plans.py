"""Small plans whose pictures are looked at: a nested one, and one in which no patch just stops."""

import numpy as np

from vpruner.core.plan import Geometry, TokenPlan

#: Where patches stop being read, attending and passing the MLP: each kind of patch that a nested plan may have.
EXITS = ((3, 3, 3, 2, 3, 0), (2, 2, 2, 1, 0, 0), (2, 1, 0, 1, 0, 0))


def geometry_of(grid=(2, 3), depth=3, patch=8, **changes):
    return Geometry(
        depth=depth, embed_dim=8, num_heads=2, head_dim=4, grid=grid, prefix_tokens=1, mlp_macs=256,
        image_size=(grid[0] * patch, grid[1] * patch), **changes,
    )  # fmt: skip


def nested_plan(exits=EXITS, model="tiny", **shape):
    return TokenPlan.from_exits(model, geometry_of(**shape), np.asarray(exits))


def free_plan(grid=(8, 9), depth=4, seed=0):
    """With the default shape every combination of the three masks occurs."""
    masks = np.random.default_rng(seed).random((3, depth, grid[0] * grid[1])) < 0.5
    return TokenPlan.from_masks("free", geometry_of(grid, depth, head_patches=True), masks)
