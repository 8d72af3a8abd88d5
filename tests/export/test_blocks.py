"""Chains: right shapes, really runnable, and made of the model's own blocks."""

import numpy as np
import pytest
import torch
from export_tools import dims, nodes, relative_difference, run, token_gathers
from products import each_with_some

from vpruner.core.errors import UserError
from vpruner.core.plan import TokenPlan
from vpruner.export.fold import fold_file
from vpruner.export.graph import open_graph
from vpruner.export.graph_costs import geometry_of
from vpruner.pipeline.blocks import OnnxGraphs, cut_to_blocks, make_chain
from vpruner.runtime.table.graphs import Chain, Graphs
from vpruner.runtime.table.measure import measure_table

KINDS = ["class token", "registers", "average pooling", "attention pooling", "distilled", "layer scale", "qk-norm"]


def followed(dense):
    return open_graph(dense.path).followed()


def chain_reference(dense, images, chain: Chain) -> np.ndarray:
    """What a chain computes, written out: each block reads K rows and updates Q of them and M of them."""
    bias = torch.zeros(chain.tokens)
    bias[chain.keys :] = -torch.inf
    with torch.no_grad():
        model = dense.model
        tokens = model.norm_pre(model._pos_embed(model.patch_embed(images)))[:, : chain.tokens].clone()
        for block in model.blocks:
            update = block.ls1(block.attn(block.norm1(tokens), attn_mask=bias[None, None, None]))
            tokens[:, : chain.queries] += update[:, : chain.queries]
            tokens[:, : chain.mlps] += block.ls2(block.mlp(block.norm2(tokens[:, : chain.mlps])))
        return model.forward_head(model.norm(tokens)).numpy()


#: Keys, queries and MLP tokens as shares of all.
SHARES = [
    (1.0, 1.0, 1.0),
    (1.0, 0.5, 0.2),
    (0.6, 0.6, 0.6),
    (0.6, 0.2, 0.6),
    (0.3, 1.0, 0.5),
    (0.5, 0.2, 1.0),
    (0.0, 0.0, 0.0),
]


@pytest.mark.parametrize("kind, share", [*each_with_some(KINDS[:5], SHARES, 1), *each_with_some(KINDS[5:], SHARES, 0)])
def test_a_chain_has_the_shapes_it_says_and_computes_what_its_blocks_do(exported, kind, share):
    dense = exported(kind)
    shape = dense.geometry
    chain = Chain(shape.depth, *(max(shape.prefix_tokens + 1, round(part * shape.tokens)) for part in share))
    model = make_chain(cut_to_blocks(followed(dense), 4), chain)
    softmax = [node for node in nodes(model, "Softmax") if len(node.inputs[0].shape) == 4][: shape.depth]
    assert [dims(node.outputs[0])[2:] for node in softmax] == [[chain.queries, chain.keys]] * shape.depth
    # The first rows of everything: slices, and nothing to be gathered.
    assert not token_gathers(model)
    images = dense.images()
    assert relative_difference(run(model, images), chain_reference(dense, images, chain)) < 1e-4


def test_all_tokens_through_all_blocks_is_the_dense_model(exported):
    dense = exported()
    model = make_chain(cut_to_blocks(followed(dense), 4), Chain.whole(dense.geometry.depth, dense.geometry.tokens))
    assert relative_difference(run(model, dense.images()), run(dense.path, dense.images())) < 1e-6


@pytest.mark.parametrize("kind", ["class token", "attention pooling"])
@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_cutting_keeps_the_first_blocks_and_the_head(exported, kind, blocks):
    dense = exported(kind)
    cut = cut_to_blocks(followed(dense), blocks)
    assert len(cut.blocks) == blocks and geometry_of(cut).depth == blocks
    images = dense.images()
    with torch.no_grad():
        whole = dense.model
        tokens = whole.norm_pre(whole._pos_embed(whole.patch_embed(images)))
        expected = whole.forward_head(whole.norm(whole.blocks[:blocks](tokens))).numpy()
    assert relative_difference(run(cut.model, images), expected) < 1e-4


def test_impossible_chains(exported):
    dense = exported("registers")
    tokens = dense.geometry.tokens
    for chain in (Chain(4, 30, 20, 20), Chain(4, 20, 20, tokens + 1), Chain(3, 20, 20, 20), Chain(4, 2, 1, 3)):
        with pytest.raises(ValueError, match=f"no Chain.* of {tokens} tokens and 4 blocks"):
            make_chain(cut_to_blocks(followed(dense), 4), chain)
    for blocks in (0, 5):
        with pytest.raises(ValueError, match="of 4 blocks"):
            cut_to_blocks(followed(dense), blocks)


def test_graphs_run_and_leave_nothing_behind(exported, tmp_path):
    dense = exported()
    graphs: Graphs = OnnxGraphs(dense.path, tmp_path, threads=1)
    assert graphs.about == {"runtime": "onnxruntime", "provider": "cpu", "precision": "fp32", "threads": 1, "batch": 1,
                            "opset": 20}  # fmt: skip
    assert graphs.weight_bytes > 4 * 4 * 12 * 32 * 32
    # Two at once, of the same name on the disk.
    with graphs.chain(Chain(4, 20, 10, 5)) as one, graphs.chain(Chain.whole(4, 25)) as other:
        (first, _), (second, _) = one(), other()
        assert first.shape == second.shape == (1, 5) and not np.array_equal(first, second)
    with graphs.model(None) as call, graphs.model(TokenPlan.identity("tiny", dense.geometry)) as lean:
        assert np.allclose(call()[0], lean()[0], atol=1e-5)
    assert list(tmp_path.iterdir()) == []
    with graphs.chain(Chain.whole(2, 25)) as call:
        assert call()[0].shape == (1, 5)
    assert list(tmp_path.iterdir()) == []
    assert dense.path.exists()


def test_batches(exported, tmp_path):
    with OnnxGraphs(exported(dynamic_batch=True).path, tmp_path, threads=1, batch=3).model(None) as call:
        assert call()[0].shape == (3, 5)
    with pytest.raises(UserError, match="its own batch size 1, asked for 2; measure with batch_size=1"):
        OnnxGraphs(exported().path, tmp_path, threads=1, batch=2)


def test_only_dense_files(exported, tmp_path):
    dense = exported()
    fold_file(dense.path, TokenPlan.identity("tiny", dense.geometry), tmp_path / "pruned.onnx")
    with pytest.raises(UserError, match=r"pruned.onnx holds plan .* already"):
        OnnxGraphs(tmp_path / "pruned.onnx", tmp_path, threads=1)
    with pytest.raises(UserError, match="cannot read"):
        OnnxGraphs(tmp_path / "nothing.onnx", tmp_path, threads=1)


def test_a_table_of_real_graphs(exported, tmp_path):
    """Of a model whose head reads patches; tests/cli measures one whose head does not."""
    dense = exported("attention pooling")
    table = measure_table(OnnxGraphs(dense.path, tmp_path, threads=1), "tiny", dense.geometry, seconds=0.05)
    assert table.tokens[-1] == dense.geometry.tokens and table.dense_ms > 0 and len(table.validation) == 4
    assert table.head_token_ms > 0
