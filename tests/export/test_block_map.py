"""Which block a node is of, read from the structure alone, against the recogniser that folding relies on."""

import onnx_ir as ir
import pytest
from export_tools import random_plan

from vpruner.export.files import load_model
from vpruner.export.fold import fold_file
from vpruner.export.passes.clean import clean
from vpruner.export.recognise.graph import recognise
from vpruner.runtime.layers import BlockMap


@pytest.mark.parametrize("kind", ["class token", "attention pooling", "qk-norm", "layer scale", "average pooling"])
def test_nodes_belong_to_the_blocks_that_folding_finds(exported, kind, tmp_path):
    dense = exported(kind)
    found = BlockMap.from_onnx(dense.path)
    assert found.depth == dense.geometry.depth
    model = load_model(dense.path)
    clean(model)
    for block in recognise(model, dense.geometry).blocks:
        for node in (block.norm1, block.qkv.matmul, block.softmax, block.residual1, block.residual2):
            assert found.places[node.name] == block.index, node.name
    names = {node.name for node in ir.load(dense.path).graph}
    assert set(found.places) <= names and "stem" in found.places.values() and "head" in found.places.values()

    geometry = dense.geometry
    for seed in range(2):
        # Tokens that leave, and tokens that stop passing the MLP, then attending, and are read to the end.
        fold_file(dense.path, random_plan(geometry, seed), tmp_path / "pruned.onnx")
        pruned = BlockMap.from_onnx(tmp_path / "pruned.onnx", geometry.depth)
        assert pruned.depth == geometry.depth
        ours = {name: place for name, place in pruned.places.items() if name.startswith("vpruner.block.")}
        assert ours and all(int(name.split(".")[2]) == place for name, place in ours.items())
        common = set(found.places) & set(pruned.places)
        assert len(common) > 0.7 * len(found.places) and all(found.places[n] == pruned.places[n] for n in common)
