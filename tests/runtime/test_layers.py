"""Layer times folded onto blocks: graphs made here; what TensorRT and onnxruntime write, in its documented form."""

import json

import pytest

from vpruner.core.errors import UserError
from vpruner.core.metadata import ModelMetadata
from vpruner.core.plan import Geometry, TokenPlan
from vpruner.runtime.layers import (
    BlockMap,
    BlockTimes,
    block_map,
    blocks_row,
    fold_layers,
    parse_layer_information,
    parse_layer_times,
    parse_ort_profile,
)

DEPTH = 3


def vit_nodes(depth=DEPTH, pooled=False, prefix="n"):
    """(name, operator, inputs, output) of a small pre-norm ViT; names say nothing about blocks."""
    count = iter(range(1000))
    nodes = []

    def add(operator, *inputs):
        number = next(count)
        nodes.append((f"{prefix}{number}", operator, inputs, f"v{number}"))
        return f"v{number}"

    stream = add("Add", add("Reshape", add("Conv", "image", "w"), "w"), "w")
    for _ in range(depth):
        norm = add("LayerNormalization", stream, "w", "w")
        parts = [add("Reshape", add("MatMul", norm, "w"), "w") for _ in range(3)]
        logits = add("Softmax", add("MatMul", add("Mul", parts[0], "w"), parts[1]))
        attended = add("MatMul", add("MatMul", logits, parts[2]), "w")
        stream = add("Add", stream, attended)
        hidden = add("Gelu", add("MatMul", add("LayerNormalization", stream, "w", "w"), "w"))
        stream = add("Add", stream, add("MatMul", hidden, "w"))
    last = add("LayerNormalization", stream, "w", "w")
    if pooled:
        keys, values = add("MatMul", last, "w"), add("MatMul", last, "w")
        last = add("MatMul", add("Softmax", add("MatMul", "w", keys)), values)
    add("MatMul", last, "w")
    return nodes


def save(path, nodes, batch=1):
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper

    made = [helper.make_node(operator, list(inputs), [output], name=name) for name, operator, inputs, output in nodes]
    graph = helper.make_graph(
        made,
        "vit",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [batch, 3, 8, 8])],
        [helper.make_tensor_value_info(nodes[-1][3], TensorProto.FLOAT, None)],
        [helper.make_tensor("w", TensorProto.FLOAT, [1], [1.0])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), path)
    return path


@pytest.fixture
def vit(tmp_path):
    return save(tmp_path / "vit.onnx", vit_nodes())


@pytest.fixture
def blocks(vit):
    return BlockMap.from_onnx(vit)


PER_BLOCK = 18
FIRST = 3


def name(block, position):
    """Of a node of a block by its position: 0 norm, 7 q k product, 9 softmax, 12 first sum, 17 second sum."""
    return f"n{FIRST + block * PER_BLOCK + position}"


# -- blocks of graphs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooled", [False, True])
def test_blocks_are_found_in_the_structure(tmp_path, pooled):
    nodes = vit_nodes(pooled=pooled)
    found = BlockMap.from_onnx(save(tmp_path / "vit.onnx", nodes))
    assert found.depth == DEPTH and len(found.places) == len(nodes)
    numbers = [place for place in found.places.values() if isinstance(place, int)]
    assert numbers == sorted(numbers) and {numbers.count(block) for block in range(DEPTH)} == {PER_BLOCK}
    assert [found.places[f"n{index}"] for index in range(FIRST)] == ["stem"] * FIRST
    behind = [found.places[node[0]] for node in nodes[FIRST + DEPTH * PER_BLOCK :]]
    assert behind == ["head"] * (7 if pooled else 2)


def test_sizes_that_reach_everywhere_do_not_hide_the_blocks(tmp_path):
    nodes = vit_nodes()
    size = ("shape", "Shape", ("image",), "size")
    nodes = [size, *(n if n[1] != "Reshape" else (n[0], n[1], (n[2][0], "size"), n[3]) for n in nodes)]
    assert BlockMap.from_onnx(save(tmp_path / "vit.onnx", nodes, batch="batch")).depth == DEPTH


def test_products_of_integers_are_products(tmp_path):
    nodes = []
    for node in vit_nodes():
        label, operator, inputs, output = node
        if operator == "MatMul" and inputs[1] == "w":
            # Scale and zero point of the activation are computed from it.
            nodes.append((label + "q", "DynamicQuantizeLinear", inputs[:1], label + "a"))
            node = (label, "MatMulInteger", (label + "a", "w", label + "a", "w"), output)
        nodes.append(node)
    assert BlockMap.from_onnx(save(tmp_path / "vit.onnx", nodes)).depth == DEPTH


def test_a_parallel_block_is_one(tmp_path):
    nodes = [("a", "Conv", ("image", "w"), "x0")]
    for block in range(2):
        x, b = f"x{block}", str(block)
        nodes += [
            ("norm" + b, "LayerNormalization", (x, "w", "w"), "y" + b),
            ("q" + b, "MatMul", ("y" + b, "w"), "q" + b),
            ("soft" + b, "Softmax", ("q" + b,), "s" + b),
            ("mlp" + b, "MatMul", ("y" + b, "w"), "m" + b),
            ("both" + b, "Add", ("s" + b, "m" + b), "z" + b),
            ("sum" + b, "Add", (x, "z" + b), f"x{block + 1}"),
        ]
    nodes.append(("fc", "Gemm", ("x2", "w"), "out"))
    found = BlockMap.from_onnx(save(tmp_path / "vit.onnx", nodes))
    assert found.depth == 2 and found.places["mlp1"] == 1 and found.places["sum0"] == 0 and found.places["fc"] == "head"


def test_a_graph_without_blocks_leaves_it_to_the_names(tmp_path):
    found = BlockMap.from_onnx(save(tmp_path / "a.onnx", [("/blocks.2/x", "Conv", ("image", "w"), "out")]))
    assert not found.places and found.depth == 0 and found.place("/blocks.2/x") == 2


def test_more_blocks_than_the_model_has_are_the_heads(vit):
    found = BlockMap.from_onnx(vit, depth=2)
    assert found.depth == 2 and found.places[name(2, 9)] == "head"


@pytest.mark.parametrize(
    "node, place",
    [
        ("/blocks.3/attn/qkv/MatMul", 3),
        ("vpruner.block.7.q", 7),
        ("/vit/encoder/layer.11/attention/MatMul", 11),
        ("encoder_layer_5/mlp/Add", 5),
        ("/visual/transformer/resblocks.10/ln_1/Mul", 10),
        ("/encoder/layers/4/Add", 4),
        ("node_layer_norm_13", None),
        ("node_add_3", None),
        ("/blocks.30/x", None),
        ("/patch_embed/proj/Conv", "stem"),
        ("/embeddings/Add", "stem"),
        ("/head/Gemm", "head"),
        ("/fc_norm/Mul", "head"),
        ("PWN", None),
    ],
)
def test_names_tell_where_there_is_no_graph(node, place):
    assert BlockMap(depth=12).place(node) == place


# -- what TensorRT writes ---------------------------------------------------------------------------------------------

US = "\x1f"
#: Up to 10: tensors are names; from 11 on objects, and formats are apart from data types.
DIALECTS = {
    "10": {
        "Layers": [
            {
                "Name": "a",
                "LayerType": "gemm",
                "Inputs": [{"Name": "image", "Format/Datatype": "Row major linear FP16"}],
                "Metadata": f"[ONNX Layer: n3]{US}[ONNX Layer: n4]",
            },
            {"Name": "b", "LayerType": "kgen", "Metadata": ""},
        ],
        "Bindings": ["image", "logits"],
    },
    "11": {
        "Layers": [
            {
                "Name": "a",
                "LayerType": "gemm",
                "Inputs": [{"Name": "image", "Format": "kLINEAR", "DataType": "Half"}],
                "Metadata": "[ONNX Layer: n3]\x1e[ONNX Layer: n4]",
            },
            {"Name": "b", "LayerType": "kgen"},
        ],
        "I/O Tensors": [{"Name": "image", "DataType": "Half"}, {"Name": "logits", "DataType": "Half"}],
    },
}


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("escaped", [True, False])
def test_both_dialects_of_the_inspector(dialect, escaped):
    text = json.dumps(DIALECTS[dialect])
    if not escaped:  # trtexec writes control characters as they are
        text = text.replace("\\u001f", US).replace("\\u001e", "\x1e")
    found = parse_layer_information(text)
    assert found.tensors == ("image", "logits") and found.detailed
    assert [(one.name, one.nodes) for one in found.layers] == [("a", ("n3", "n4")), ("b", ())]


def test_layers_of_an_engine_without_details_are_names():
    found = parse_layer_information(json.dumps({"Layers": ["x + y", "z"], "Bindings": []}))
    assert [one.name for one in found.layers] == ["x + y", "z"] and not found.detailed


@pytest.mark.parametrize(
    "text, says",
    [("{", "is not JSON"), ("[1, 2]", "holds no layers"), ('{"Layers": 3}', "holds no layers"),
     ('{"Layers": [5]}', "holds the layer 5")],
)  # fmt: skip
def test_layer_information_that_is_none(text, says):
    with pytest.raises(UserError, match=says):
        parse_layer_information(text, "layers.json")


def test_profiles_of_old_and_new_releases():
    old = '[\n  { "count" : 10 }\n, {  "name" : "a", "timeMs" : 5, "averageMs" : 0.5, "percentage" : 100 }\n]\n'
    assert parse_layer_times(old) == [("a", 0.5)]
    new = [{"count": 4}, {"name": "a", "timeMs": 2.0, "averageMs": 0.5, "medianMs": 0.4, "percentage": 50.0}]
    assert parse_layer_times(json.dumps(new)) == [("a", 0.5)]
    assert parse_layer_times('[{"count": 4}, {"name": "b", "timeMs": 2.0}]') == [("b", 0.5)]


@pytest.mark.parametrize(
    "text, says",
    [("{}", "is no list"), ("[1]", "is no list"), ("[]", "holds no layer"), ('[{"count": 3}]', "holds no layer"),
     ('[{"name": "a"}]', "no time for layer 'a'"), ('[{"name": "a", "averageMs": -1}]', "no time"),
     ('[{"count": 2}, {"name": "a", "timeMs": 1', "is not JSON")],
)  # fmt: skip
def test_profiles_that_are_none(text, says):
    with pytest.raises(UserError, match=says):
        parse_layer_times(text, "profile.json")


# -- folding ----------------------------------------------------------------------------------------------------------


def test_layers_are_summed_by_the_nodes_that_they_name(blocks):
    times = [
        ("n0 + n1", 1.0),
        ("__myl_gemm_0", 2.0),
        ("__myl_fused_1", 3.0),
        (f"{name(1, 9)} || {name(1, 10)}", 4.0),
        ("__myl_gemm_2", 5.0),
        (f"PWN({name(2, 17)})", 6.0),
        (f"n{FIRST + DEPTH * PER_BLOCK + 1}", 7.0),
    ]
    layers = [
        {"Name": "__myl_gemm_0", "Metadata": f"[ONNX Layer: {name(0, 1)}]"},
        # The last sum of block 0 fused into the norm of block 1: one node of each.
        {"Name": "__myl_fused_1", "Metadata": f"[ONNX Layer: {name(0, 17)}]{US}[ONNX Layer: {name(1, 0)}]"},
        {"Name": "__myl_gemm_2", "Metadata": f"[ONNX Layer: {name(2, 3)}]"},
    ]
    found = fold_layers(times, blocks, parse_layer_information(json.dumps({"Layers": layers})))
    assert found.blocks == (3.5, 5.5, 11.0) and found.stem_ms == 1.0 and found.head_ms == 7.0
    assert found.total_ms == 28.0 and found.several_ms == found.other_ms == 0 and found.layers == 7
    assert found.explained == 1.0 and found.remarks() == []


def test_a_range_is_what_lies_between_its_ends(blocks):
    inside = f"{{ForeignNode[{name(1, 0)}...{name(1, 12)}]}}"
    across = f"{{ForeignNode[{name(0, 14)}...{name(1, 3)}]}}"  # four nodes of block 0, four of block 1
    whole = f"{{ForeignNode[n0...{name(2, 17)}]}}"
    found = fold_layers([(inside, 2.0), (across, 8.0)], blocks)
    assert found.blocks == (4.0, 6.0, 0.0)
    found = fold_layers([(whole, 2.0)], blocks)
    assert found.several_ms == 2.0 and sum(found.blocks) == 0 and found.several == (whole,)
    assert "over several blocks" in found.remarks()[0] and "profilingVerbosity=detailed" in found.remarks()[0]
    copied = f"Reformatting CopyNode for Input Tensor 0 to {inside}"
    assert fold_layers([(copied, 1.0)], blocks).blocks == (0.0, 1.0, 0.0)


def test_a_range_by_names_alone():
    nameless = BlockMap(depth=12)
    one = "{ForeignNode[/blocks.3/norm1/Mul.../blocks.3/mlp/fc2/Add]}"
    found = fold_layers([(one, 2.0)], nameless)
    assert found.blocks[3] == 2.0 and len(found.blocks) == 12
    found = fold_layers([("{ForeignNode[/blocks.0/norm1/Mul.../blocks.11/Add]}", 2.0)], nameless)
    assert found.several_ms == 2.0
    # Without a depth there are as many blocks as are named.
    assert len(fold_layers([("/blocks.3/x", 1.0)], BlockMap()).blocks) == 4


def test_what_names_no_node_takes_the_place_of_its_neighbours(blocks):
    times = [
        ("reorder", 0.5),  # before the stem
        ("n0", 1.0),
        (name(0, 3), 1.0),
        ("copy", 0.25),  # between two layers of block 0
        (name(0, 9), 1.0),
        ("strange", 4.0),  # between block 0 and 1
        (name(1, 3), 1.0),
        (f"n{FIRST + DEPTH * PER_BLOCK}", 1.0),
        ("last", 0.125),
    ]
    found = fold_layers(times, blocks)
    assert found.blocks == (2.25, 1.0, 0.0) and found.other_ms == 4.0
    assert found.stem_ms == 1.5 and found.head_ms == 1.125
    assert "name no node" in found.remarks()[0] and found.explained == pytest.approx(1 - 4 / 9.875)
    assert fold_layers([("a", 1.0), ("b", 2.0)], blocks).other_ms == 3.0


def test_no_time_is_no_share():
    assert BlockTimes((0.0,)).explained == 1.0 and BlockTimes((0.0,)).remarks() == []


# -- onnxruntime ------------------------------------------------------------------------------------------------------


def ort_events(*runs):
    events, now = [{"cat": "Session", "name": "model_loading_uri", "ts": 0, "dur": 5}], 10
    for run in runs:
        events.append({"cat": "Session", "name": "model_run", "ts": now, "dur": 1000})
        for node, dur in run:
            events.append({"cat": "Node", "name": f"{node}_kernel_time", "ts": now + 1, "dur": dur, "args": {}})
            now += dur + 1
        now += 2000
    return json.dumps(events)


def test_runs_of_onnxruntime_count_by_their_median():
    text = ort_events([("a", 9000)], [("a", 100), ("b", 10)], [("a", 300), ("b", 10)], [("a", 200), ("b", 700)])
    assert parse_ort_profile(text, skip=1) == [("a", 0.2), ("b", 0.01)]
    with pytest.raises(UserError, match="4 runs, expected more than 4"):
        parse_ort_profile(text, skip=4)
    with pytest.raises(UserError, match="0 runs"):
        parse_ort_profile("{}")


def test_names_that_onnxruntime_extends_are_known(blocks):
    assert blocks.place(f"{name(1, 1)}/MatMulAddFusion") == 1


# -- rows -------------------------------------------------------------------------------------------------------------


def test_rows_say_the_tokens_of_each_block(vit):
    geometry = Geometry(
        depth=DEPTH, embed_dim=64, num_heads=2, head_dim=32, grid=(3, 3), prefix_tokens=1, image_size=(24, 24),
        mlp_macs=2 * 64 * 256, stem_macs=1, head_macs=1, head_prefix=1, head_patches=False, outputs=5,
    )  # fmt: skip
    times = BlockTimes((1.0, 2.0, 3.0), stem_ms=0.5)
    plan = TokenPlan("m", geometry, (range(9), range(6), (0, 2)), (range(6), (0, 2), ()), (range(5), (), ()))
    metadata = ModelMetadata(model="m", geometry=geometry, token_plan=plan, plan="ab")
    row = blocks_row(times, metadata, "a test", label="pruned", batch=8)
    assert row["kind"] == "blocks" and row["label"] == "pruned" and row["total_ms"] == 6.5 and row["plan"] == "ab"
    assert row["blocks"][1] == {"block": 1, "ms": 2.0, "keys": 7, "queries": 3, "mlps": 1}
    json.dumps(row, allow_nan=False)
    scaled = times.scaled(13.0)
    assert (scaled.blocks, scaled.stem_ms, scaled.total_ms) == ((2.0, 4.0, 6.0), 1.0, 13.0)
    assert BlockTimes((0.0,)).scaled(2.0) == BlockTimes((0.0,))
    assert "keys" not in blocks_row(times, ModelMetadata(), "a test")["blocks"][0]
    assert block_map(vit, metadata).depth == DEPTH
    assert block_map(vit.with_name("gone.onnx"), metadata) == BlockMap(depth=DEPTH)
    assert block_map(None, ModelMetadata()) == BlockMap()
