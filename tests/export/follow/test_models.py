"""Free plans on many kinds of models: masked and folded graphs give what PyTorch gives where it masks by itself."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from follow_tools import difference, identity_plan, misplaced, random_plan, run, written
from foreign_graphs import write_module
from many_vits import KINDS, kind_of, model_of, reference
from more_vits import MORE, ONE_OF_EACH

from vpruner.core.errors import GraphError, PlanError
from vpruner.export.files import load_model
from vpruner.export.follow import counts, fold, follow, mask
from vpruner.export.follow.fold import check_result
from vpruner.export.graph_gates import GraphGates
from vpruner.export.torch_graph import GraphModule

#: What is masked of each block of kinds of which not everything is; the others: keys, queries and MLPs.
PARTS = {"parallel, one product": ["kq"] * 2, "Swin": ["m"] * 2, "SAM": ["m", "kqm", "m"], "CaiT": ["qm"] * 2,
         "reduced keys": ["qm"] * 2}  # fmt: skip
MODULES = {"hf": "transformers", "CLIP": "transformers", "Depth": "transformers", "ViTDet": "transformers"}
CASES = [
    (name, exporter, opset, dynamic)
    for name, kind in {**KINDS, **MORE}.items()
    for exporter, opset, dynamic in (
        ("torchscript", 17, True),
        ("torchscript", 17, False),
        ("dynamo", 20, True),
        ("dynamo", 23, False),
    )
    if exporter in kind.exporters
]
#: An open batch of what stands for each kind of thing, and a fixed one of three. By PyTorch's newer exporter, which is
#: slow, kinds that only it writes, and one with an Attention operator.
FEW = [
    (name, exporter, opset, dynamic)
    for name, exporter, opset, dynamic in CASES
    if (name in ONE_OF_EACH and exporter == kind_of(name).exporters[0] and opset < 23 and dynamic)
    or (name in ("ViT, attention pooling", "Swin", "taps") and exporter == "torchscript")
    or (name, opset) == ("ViT", 23)
]


@pytest.mark.parametrize("name, exporter, opset, dynamic", FEW)
def test_plans_do_what_masks_do_in_pytorch(name, exporter, opset, dynamic):
    check(name, exporter, opset, dynamic)


@pytest.mark.nightly
@pytest.mark.parametrize("name, exporter, opset, dynamic", [case for case in CASES if case not in FEW])
def test_plans_do_what_masks_do_in_pytorch_from_every_exporter(name, exporter, opset, dynamic):
    check(name, exporter, opset, dynamic)


def check(name, exporter, opset, dynamic):
    pytest.importorskip(next((module for start, module in MODULES.items() if name.startswith(start)), "torch"))
    followed, kind = follow(written(name, exporter, opset, dynamic)), kind_of(name)
    assert len(followed.blocks) == len(kind.layers(model_of(name))), followed.reasons
    assert followed.prefix == kind.prefix + kind.behind
    for index, block in enumerate(followed.blocks):
        masked = "".join(c for c, able in zip("kqm", (block.keys, block.queries, block.mlps), strict=True) if able)
        assert masked == (PARTS[name][index] if name in PARTS else "kqm"), block.reasons
    random = np.random.default_rng(len(name))
    images = torch.from_numpy(random.random(kind.images(3 if dynamic else 1), np.float32))
    dense = run(followed.model, images.numpy())
    identity = identity_plan(followed)
    assert difference(run(mask(followed, identity), images.numpy()), dense) == 0
    folded = fold(followed, identity)
    check_form(folded, followed)
    assert difference(run(folded, images.numpy()), dense) < 3e-6
    for _ in range(2):
        plan = random_plan(followed, random)
        expected = reference(name, plan, images)
        assert difference(run(mask(followed, plan), images.numpy()), expected) < 1e-5
        folded = fold(followed, plan)
        check_form(folded, followed)
        assert difference(run(folded, images.numpy()), expected) < 1e-5
        assert difference(dense, expected) > 1e-3, "the plan changes nothing, and proves nothing"
    assert misplaced(followed, images.numpy()) == []


def check_form(folded, followed):
    """Shapes are known but for the batch, outputs keep theirs, and what is added is called after the package."""
    for node in folded.graph:
        for value in node.outputs:
            assert value.shape is not None and sum(not isinstance(dim, int) for dim in value.shape) <= 1, value
    for after, dense in zip(folded.graph.outputs, followed.model.graph.outputs, strict=True):
        assert after.name == dense.name and len(after.shape) == len(dense.shape)
        assert all(a == b or not isinstance(b, int) for a, b in zip(after.shape, dense.shape, strict=True))
    before = {node.name for node in followed.model.graph}
    added = [node.name for node in folded.graph if node.name not in before]
    assert all(name.startswith("vpruner.") for name in added), added


@pytest.mark.parametrize("name, exporter, opset, dynamic", [("ViT", "torchscript", 17, True),
                                                            ("ViT, average", "torchscript", 17, False),
                                                            ("parallel branches", "torchscript", 17, False),
                                                            ("ViT", "dynamo", 23, False)])  # fmt: skip
def test_tokens_are_counted_as_the_folded_graph_has_them(name, exporter, opset, dynamic):
    followed = follow(written(name, exporter, opset, dynamic))
    plan = random_plan(followed, np.random.default_rng(4))
    folded = {node.name: node for node in fold(followed, plan).graph}
    found = counts(followed, plan)
    for block, one in zip(followed.blocks, found, strict=True):
        for branches, count in ((block.attention, one.queries), (block.mlp, one.mlps)):
            assert {folded[branch.add.name].outputs[0].shape[1] for branch in branches} == {count}
        keyed = [folded[node.name] for branch in block.attention for node in branch.keyed]
        assert {node.inputs[1].shape[2] if node.op_type == "Attention" else node.outputs[0].shape[3]
                for node in keyed} == {one.keys}  # fmt: skip
        assert not one.gated
    if name != "ViT, average":
        assert found[-1].queries == found[-1].mlps == 1  # the class token alone is read
    plan.gates = [(1.0,) * len(plan.keys[0]), (0.5,) * len(plan.keys[1])]
    assert [one.gated for one in counts(followed, plan)] == [False, True]


def test_a_result_that_onnx_does_not_accept_is_refused():
    followed = follow(written("ViT", "torchscript", 17, False))
    outputs = [value.shape for value in followed.model.graph.outputs]
    wrong = followed.copy().model
    next(node for node in wrong.graph if node.op_type == "MatMul").outputs[0].shape = ir.Shape([1, 25, 33])
    with pytest.raises(GraphError, match="not valid ONNX"):
        check_result(wrong, outputs)
    with pytest.raises(AssertionError, match="changed output"):
        check_result(followed.model, [ir.Shape([1, 6])])


@pytest.mark.parametrize("name", ["ViT, average", "ViT, attention pooling", "ViT, registers"])
def test_the_head_reads_what_the_plan_says(name):
    followed, kind, module = follow(written(name, "torchscript", 17, False)), KINDS[name], model_of(name)
    plan = identity_plan(followed)
    plan.reads = (1, 4, 5, 17)
    images = torch.rand(1, 3, *kind.size)
    with torch.no_grad():
        tokens = module.forward_features(images)
        left = [*range(kind.prefix), *(kind.prefix + patch for patch in plan.reads)]
        expected = [module.forward_head(tokens[:, left]).numpy()]
    assert difference(run(mask(followed, plan), images.numpy()), expected) < 1e-5
    assert difference(run(fold(followed, plan), images.numpy()), expected) < 1e-5


def test_a_head_that_cannot_be_followed_reads_every_token():
    followed = follow(written("ViTPose", "torchscript", 17, True))
    plan = identity_plan(followed)
    plan.reads = (0, 1, 2)
    for function in (mask, fold, counts):
        with pytest.raises(PlanError, match="reads all tokens"):
            function(followed, plan)


@pytest.mark.parametrize(
    "name, exporter, opset",
    [
        ("ViT", "torchscript", 17),
        ("ViT", "dynamo", 23),
        pytest.param("EVA-02", "dynamo", 23, marks=pytest.mark.nightly),
    ],
)
def test_gates_weigh_keys(name, exporter, opset):
    followed = follow(written(name, exporter, opset, False))
    random = np.random.default_rng(1)
    plan = random_plan(followed, random)
    plan.gates = [tuple(random.uniform(0.2, 3, len(keys))) for keys in plan.keys]
    images = random.random((1, 3, *KINDS[name].size), np.float32)
    masked = run(mask(followed, plan), images)
    assert difference(run(fold(followed, plan), images), masked) < 1e-5
    plan.gates = None
    assert difference(run(mask(followed, plan), images), masked) > 1e-3


def test_only_what_the_plan_leaves_is_computed():
    """2 d^2 for each key and each query, 2 d for each pair of them, 8 d^2 for each MLP token."""
    followed = follow(written("ViT, average", "torchscript", 17, False))
    plan = random_plan(followed, np.random.default_rng(2))
    model, width = fold(followed, plan), 32
    macs = 0
    for node in model.graph:
        if node.op_type == "MatMul":
            macs += int(np.prod(node.outputs[0].shape.numpy())) * node.inputs[0].shape.numpy()[-1]
    needed, expected = set(range(followed.patches)), 0
    for keys, queries, mlps in reversed(list(zip(plan.keys, plan.queries, plan.mlps, strict=True))):
        queries, mlps = (set(patches) & needed for patches in (queries, mlps))
        needed |= set(keys)
        expected += 2 * width**2 * (len(keys) + len(queries)) + 2 * width * len(keys) * len(queries)
        expected += 8 * width**2 * len(mlps)
    assert macs == expected
    gathers = [node.op_type for node in model.graph if node.op_type in ("Gather", "Slice", "ScatterND", "GatherND")]
    assert not {"ScatterND", "GatherND"} & set(gathers)


def test_what_cannot_be_masked_is_named_and_not_pruned():
    followed = follow(written("Swin", "torchscript", 17, False))
    assert len(followed.reasons) == len(followed.blocks) == 2 and all(": windows: " in one for one in followed.reasons)
    for kind in ("keys", "queries"):
        plan = identity_plan(followed)
        setattr(plan, kind, [tuple(range(1, followed.patches))] * len(followed.blocks))
        for function in (fold, counts):
            with pytest.raises(PlanError, match="left whole"):
                function(followed, plan)
    plan = identity_plan(followed)
    plan.keys = plan.keys[1:]
    with pytest.raises(PlanError, match="1 blocks, the graph has 2"):
        fold(followed, plan)


class Cells(torch.nn.Module):
    """As MobileViT does: the first axis holds the images and, for each, the places of a cell of 2 x 2 patches."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.stem, self.norm, self.head = torch.nn.Conv2d(3, 32, 8, 8), torch.nn.LayerNorm(32), torch.nn.Linear(32, 5)
        self.first, self.second = (torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.GELU(),
                                                       torch.nn.Linear(64, 32)) for _ in range(2))  # fmt: skip

    def forward(self, pixels):
        x = self.stem(pixels).reshape(-1, 2, 3, 2).transpose(1, 2)
        x = x.reshape(-1, 32, 6, 4).transpose(1, 3).reshape(-1, 6, 32)
        x = x + self.first(x)
        x = x + torch.softmax(x @ x.transpose(1, 2), -1) @ x
        x = x + self.second(self.norm(x))
        return self.head(x.reshape(-1, 24, 32).mean(1))


def test_tokens_on_the_axis_of_an_open_batch_are_masked(tmp_path):
    module, images = Cells().eval(), torch.rand(3, 3, 32, 48)
    write_module(module, images, tmp_path / "open.onnx", "torchscript", 17, True)
    followed = follow(load_model(tmp_path / "open.onnx"))
    assert followed.blocks[-1].mlps and not followed.blocks[-1].queries
    plan = identity_plan(followed)
    plan.mlps = [tuple(range(0, 24, 5))] * len(followed.blocks)
    # Patches of the grid [4, 6] as they stand: [place of a cell 4, cell 6].
    order = np.arange(24).reshape(2, 2, 3, 2).transpose(1, 3, 0, 2).reshape(4, 6)
    keep = torch.from_numpy(np.isin(order, plan.mlps[0])).float().repeat(3, 1)[..., None]
    for part in (module.first, module.second)[-sum(block.mlps for block in followed.blocks) :]:
        part.register_forward_hook(lambda _module, _inputs, update: update * keep)
    expected = [module(images).detach().numpy()]
    assert difference(run(mask(followed, plan), images.numpy()), expected) < 1e-5
    assert difference(run(fold(followed, plan), images.numpy()), expected) < 1e-5
    assert difference(run(followed.model, images.numpy()), expected) > 1e-3
    with GraphGates(followed, GraphModule(followed.model)).closed(plan) as closed:
        assert difference([closed(images).detach().numpy()], expected) < 1e-5


class ClassTokenOfEachWindow(torch.nn.Module):
    """As RF-DETR does: four windows of 2 x 2 patches, each with a copy of the class token; attention in windows, and
    then over all."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.stem, self.norm, self.head = torch.nn.Conv2d(3, 32, 8, 8), torch.nn.LayerNorm(32), torch.nn.Linear(32, 5)
        self.token = torch.nn.Parameter(torch.randn(1, 1, 32))
        self.mlps = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.GELU(),
                                                            torch.nn.Linear(64, 32)) for _ in range(2))  # fmt: skip

    def forward(self, pixels):
        x = self.stem(pixels).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        x = tokens[:, 1:].reshape(-1, 2, 2, 2, 2, 32).transpose(2, 3).reshape(-1, 4, 32)
        x = torch.cat([tokens[:, :1].repeat_interleave(4, 0), x], 1)
        for shape, mlp in zip(((-1, 5, 32), (-1, 20, 32)), self.mlps, strict=True):
            own = self.norm(x).reshape(shape)
            x = x + (torch.softmax(own @ own.transpose(1, 2), -1) @ own).reshape(-1, 5, 32)
            x = x + mlp(self.norm(x))
        return self.head(self.norm(x)).reshape(-1, 20, 5).mean(1)


@pytest.mark.parametrize("open_batch", [False, True])
def test_a_class_token_in_each_window_leaves_mlps_and_global_attention(open_batch, tmp_path):
    module, images = ClassTokenOfEachWindow().eval(), torch.rand(3 if open_batch else 1, 3, 32, 32)
    write_module(module, images, tmp_path / "windows.onnx", "torchscript", 17, open_batch)
    followed = follow(load_model(tmp_path / "windows.onnx"))
    able = [(block.keys, block.queries, block.mlps) for block in followed.blocks]
    assert able == [(False, False, True), (True, True, True)] and "windows" in followed.reasons[0]
    plan = random_plan(followed, np.random.default_rng(0))
    masked = run(mask(followed, plan), images.numpy())
    assert difference(run(fold(followed, plan), images.numpy()), masked) < 1e-5
    plan.keys = plan.queries = [tuple(range(16))] * 2
    order = np.arange(16).reshape(2, 2, 2, 2).transpose(0, 2, 1, 3).reshape(4, 4)
    for mlp, patches in zip(module.mlps, plan.mlps, strict=True):
        keep = torch.from_numpy(np.pad(np.isin(order, patches), ((0, 0), (1, 0)), constant_values=True)).float()
        keep = keep.repeat(len(images), 1)[..., None]
        mlp.register_forward_hook(lambda _module, _inputs, update, keep=keep: update * keep)
    expected = [module(images).detach().numpy()]
    assert difference(run(followed.model, images.numpy()), expected) > 1e-3
    assert difference(run(mask(followed, plan), images.numpy()), expected) < 1e-5
    assert difference(run(fold(followed, plan), images.numpy()), expected) < 1e-5


def test_a_graph_without_tokens_is_refused():
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 18]> g (float[1, 3, 8, 8] x) => (float[1, 3, 8, 8] y) { y = Relu(x) }'
    )
    with pytest.raises(GraphError, match="no tokens"):
        follow(ir.from_proto(model))


def test_following_leaves_the_graph_as_it_was():
    model = written("ViT", "torchscript", 17, True)
    before = read(model)
    followed = follow(model)
    prepared = ir.to_proto(followed.model).SerializeToString()
    fold(followed, random_plan(followed, np.random.default_rng(0)))
    mask(followed, random_plan(followed, np.random.default_rng(1)))
    assert ir.to_proto(followed.model).SerializeToString() == prepared
    assert read(model) == before


def read(model):
    nodes = [
        (node.op_type, [used and used.name for used in node.inputs], node.outputs[0].shape) for node in model.graph
    ]
    return nodes, list(model.graph.initializers)
