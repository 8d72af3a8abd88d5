"""Which block a node is of, read from the structure alone, against the blocks that folding goes by."""

import onnx_ir as ir
import pytest
from export_tools import random_plan
from products import sampled

from vpruner.export.fold import fold_file
from vpruner.export.graph import open_graph
from vpruner.runtime.layers import BlockMap


@pytest.mark.parametrize(
    "kind",
    sampled(
        ["class token", "attention pooling", "qk-norm", "layer scale", "average pooling"],
        ["class token", "average pooling"],
    ),
)
def test_nodes_belong_to_the_blocks_that_folding_finds(exported, kind, tmp_path):
    dense = exported(kind)
    found = BlockMap.from_onnx(dense.path)
    assert found.depth == dense.geometry.depth
    followed = open_graph(dense.path).followed()
    for block in followed.blocks:
        branches = (*block.attention, *block.mlp)
        for node in (*(branch.add for branch in branches), *(node for branch in branches for node in branch.nodes)):
            assert found.places.get(node.name, block.index) == block.index, node.name
        assert all(branch.add.name in found.places for branch in branches)
    names = {node.name for node in ir.load(dense.path).graph}
    assert set(found.places) <= names and "stem" in found.places.values() and "head" in found.places.values()

    geometry = dense.geometry
    for seed in range(2):
        # Tokens that leave, and tokens that stop passing the MLP, then attending, and are read to the end.
        fold_file(dense.path, random_plan(geometry, seed), tmp_path / "pruned.onnx")
        pruned = BlockMap.from_onnx(tmp_path / "pruned.onnx", geometry.depth)
        assert pruned.depth == geometry.depth
        added = set(pruned.places) - names
        assert added and all(pruned.places[name] in (*range(geometry.depth), "stem", "head") for name in added)
        common = set(found.places) & set(pruned.places)
        assert len(common) > 0.7 * len(found.places) and all(found.places[n] == pruned.places[n] for n in common)
