"""Exported rules: what the graph holds, that it keeps what PyTorch keeps, and what is said where scores tie."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from export_tools import dims, nodes, run
from products import sampled
from tiny_vits import tiny
from token_rules import images_for

from vpruner.core import bundled
from vpruner.core.content_plan import rankings
from vpruner.core.errors import ParityError, UserError
from vpruner.core.metadata import REQUIRED, ModelMetadata
from vpruner.core.plan import Geometry, TokenPlan
from vpruner.core.preprocess import Preprocessing
from vpruner.export import rules
from vpruner.export.check import check
from vpruner.export.deploy import deploy_file
from vpruner.export.rules import check_rule, compare_rule, describe_rule, export_rule
from vpruner.prune.backbones.vit import ViTAdapter, weights_sha256
from vpruner.prune.loaded import LoadedModel
from vpruner.prune.methods.content import ContentRule
from vpruner.prune.methods.diffrate import DiffRateRule
from vpruner.prune.methods.evit import EvitRule
from vpruner.prune.methods.rule import Keep, TokenRule, rank_descending, with_prefix
from vpruner.prune.methods.saint import FrozenSaintRule, SaintRule
from vpruner.prune.methods.tome import TomeRule
from vpruner.prune.models import open_model

DEPTH = 2


@dataclass(frozen=True)
class Ruled:
    loaded: LoadedModel
    rule: TokenRule
    path: Path
    decisions_path: Path

    @property
    def adapter(self) -> ViTAdapter:
        return self.loaded.adapter

    def images(self, count: int, seed: int = 1) -> torch.Tensor:
        return images_for(self.adapter, count, seed, torch.float32)


def load(kind: str, **changes) -> LoadedModel:
    model = tiny(kind, **{"depth": DEPTH, **changes}).requires_grad_(False)
    if kind == "class token":
        # All keys of block 0 are equal, and so are the scores: which patches go is the tie-break's choice alone.
        model.blocks[0].attn.qkv.weight[32:64] = 0
    adapter = ViTAdapter(model, "tiny")
    size = adapter.geometry.image_size
    preprocessing = Preprocessing(mean=(0.5,) * 3, std=(0.25,) * 3, size=size)
    return LoadedModel(adapter, preprocessing, None, weights_sha256(model))


def content_rule(geometry: Geometry, counts) -> ContentRule:
    """The first so many patches of the grid are read, attend and pass the MLP of each block; random scores."""
    plan = TokenPlan("tiny", geometry, *([range(count) for count in kind] for kind in counts))
    channels = np.random.default_rng(0).standard_normal((len(rankings(plan)), geometry.embed_dim))
    return ContentRule.scored(plan, channels, 0.5)


#: name -> kind of model, rule, options of the export.
CASES = {
    "saint": ("class token", lambda g: FrozenSaintRule(g, (5, 0), (0.5, None)), {}),
    # The last block drops too, because the head pools over what is left.
    "saint, pooling": ("average pooling", lambda g: FrozenSaintRule(g, (4, 3), (0.5, 0.4)), {"dynamic_batch": True}),
    "tome": ("average pooling beside a class token", lambda g: TomeRule(g, (4, 3)), {"opset": 17}),
    "evit": ("registers", lambda g: EvitRule(g, 0.6, (0,)), {"batch_size": 2}),
    # The patches of the first case all pass the last MLP or none does; the head of the second reads frozen ones too.
    "content": ("registers", lambda g: content_rule(g, ((24, 20), (20, 0), (9, 0))), {"batch_size": 2}),
    "content, pooling": (
        "average pooling",
        lambda g: content_rule(g, ((24, 20), (18, 9), (9, 9))),
        {},
    ),
    "diffrate": ("average pooling", lambda g: DiffRateRule(g, (2, 3), (5, 2), class_token=False), {}),
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """``exported(name)``: a rule of :data:`CASES` in ONNX, made once."""
    made: dict[str, Ruled] = {}

    def export(name: str) -> Ruled:
        if name not in made:
            kind, rule_of, options = CASES[name]
            loaded = load(kind)
            rule = rule_of(loaded.adapter.geometry)
            folder = tmp_path_factory.mktemp("rule")
            path = export_rule(loaded, rule, folder / "rule.onnx", decisions_path=folder / "decisions.onnx", **options)
            made[name] = Ruled(loaded, rule, path, folder / "decisions.onnx")
        return made[name]

    return export


@pytest.mark.parametrize("name", sampled(list(CASES), [name for name in CASES if name != "content"]))
def test_the_file_computes_what_the_rule_does(exported, name):
    ruled = exported(name)
    checks = check_rule(ruled.adapter, ruled.rule, ruled.path, ruled.decisions_path, ruled.images(9))
    expected = ["a rule that does nothing changes nothing", "masked equals gathered"][: 1 if ruled.rule.merges else 2]
    assert [check.name for check in checks] == [*expected, f"rule.onnx equals {ruled.rule.name} in PyTorch"]
    assert all(check.passed and check.difference <= 1e-10 for check in checks[:-1])
    assert checks[-1].compared == 9 and checks[-1].top1_changed == 0 and checks[-1].near_ties == 0


@pytest.mark.parametrize("name", sampled(list(CASES), [name for name in CASES if name != "content"]))
def test_the_graph_is_static_and_scatters_nothing(exported, name):
    ruled = exported(name)
    graph = ir.load(ruled.path)
    kinds = {node.op_type for node in graph.graph}
    assert {"TopK", "Gather"} <= kinds and not {kind for kind in kinds if "Scatter" in kind or kind == "NonZero"}
    assert "GatherElements" not in kinds and [value.name for value in graph.graph.outputs] == ["logits"]
    for node in nodes(graph, "TopK"):
        assert node.inputs[1].const_value is not None
        assert node.attributes["largest"].as_int() in (0, 1) and node.attributes["sorted"].as_int() == 1
    # Weights are cut and turned when the file is written.
    for node in (*nodes(graph, "Slice"), *nodes(graph, "Transpose")):
        assert node.inputs[0].const_value is None
    batch = CASES[name][2]
    expected = "batch" if batch.get("dynamic_batch") else batch.get("batch_size", 1)
    assert dims(graph.graph.outputs[0]) == [expected, 5]
    onnx.checker.check_model(str(ruled.path), full_check=True)


@pytest.mark.parametrize("target, opset", [("trt10", 20), ("trt8.5", 16), ("ort-cpu", 20)])
def test_deployment_targets_take_it(exported, target, opset, tmp_path):
    for name in ("saint", "evit"):
        ruled = exported(name)
        paths = tmp_path / "rule.onnx", tmp_path / "decisions.onnx"
        for source, path in zip((ruled.path, ruled.decisions_path), paths, strict=True):
            assert deploy_file(source, target, path).opset == opset
        serious = [finding.rule for finding in check(paths[0], target) if finding.severity in ("error", "warning")]
        assert serious == (["written-norm"] if target == "trt8.5" else [])  # it has no LayerNormalization
        parity = compare_rule(
            ruled.adapter, ruled.rule, *paths, ruled.images(4), optimized=False, what=f" for {target}"
        )
        assert parity.name == f"rule.onnx for {target} equals {ruled.rule.name} in PyTorch" and parity.passed


def test_what_the_file_says_of_itself(exported):
    ruled = exported("saint")
    props = {entry.key: entry.value for entry in onnx.load(ruled.path).metadata_props}
    described = json.loads(props["vpruner.rule"])
    assert described == {
        "method": "saint-frozen",
        "merges": False,
        # The head reads the class token alone.
        "counts": [25, 20, 1],
        "settings": {"drops": [5, 0], "thresholds": [0.5, None], "gamma": 10.0},
    }
    about = ModelMetadata.from_props(props, "rule.onnx")
    assert about.rule == described and about.token_plan is None and about.plan == props["vpruner.plan"]
    assert about.weights_sha256 == ruled.loaded.sha256 and about.tuned_sha256 is None
    assert about.to_props() == props
    for wrong in ("7", '{"method": "saint"}', '{"method": "saint", "counts": [1, 2]}'):
        with pytest.raises(UserError, match="rule does not name a method and the tokens of each block"):
            ModelMetadata.from_props({**props, "vpruner.rule": wrong}, "rule.onnx")


def test_refitted_weights_are_filed_under_those_they_were_trained_from(tmp_path):
    loaded = load("class token", depth=1)
    rule = FrozenSaintRule(loaded.adapter.geometry, (0,), (None,))
    path = export_rule(loaded, rule, tmp_path / "rule.onnx", trained_sha256="ab" * 32)
    about = ModelMetadata.from_props(
        {p.key: p.value for p in onnx.load(path).metadata_props}, "rule.onnx", require=REQUIRED
    )
    assert (about.weights_sha256, about.tuned_sha256) == ("ab" * 32, loaded.sha256)
    assert list(tmp_path.iterdir()) == [path]


@dataclass(frozen=True)
class Scored:
    """Settings as rules have them: arrays small and large."""

    name = "scored"
    small: np.ndarray
    large: torch.Tensor


def test_settings_are_json(exported):
    rule = exported("tome").rule

    @dataclass(frozen=True)
    class Setting(TomeRule):
        score: Scored = None

    score = Scored(np.arange(3), torch.zeros(100))
    settings = describe_rule(Setting(rule.geometry, (np.int64(4), 3), score=score))["settings"]
    large = settings["score"].pop("large")
    assert settings == {"reduce": [4, 3], "proportional": True, "score": {"name": "scored", "small": [0, 1, 2]}}
    assert large["shape"] == [100] and len(large["sha256"]) == 64
    json.dumps(settings)


# -- near-ties --------------------------------------------------------------------------------------------------------


def edited(ruled: Ruled, folder: Path, edit) -> tuple[Path, Path]:
    """The two files after ``edit(graph)``."""
    paths = []
    for source in (ruled.path, ruled.decisions_path):
        model = ir.load(source)
        edit(model.graph)
        paths.append(folder / source.name)
        ir.save(model, paths[-1])
    return tuple(paths)


def nudge_positions(graph) -> None:
    """Move every token by about one in a million: scores that are equal part, results stay."""
    value = graph.initializers["pos_embed"]
    array = value.const_value.numpy()
    noise = np.random.default_rng(0).standard_normal(array.shape, np.float32)
    value.const_value = ir.tensor(array + 1e-6 * noise, name="pos_embed")


def flip_ranking(graph) -> None:
    for node in graph:
        if node.op_type == "TopK":
            node.attributes["largest"] = ir.AttrInt64("largest", 0)


def move_logits(graph) -> None:
    value = graph.initializers["head.bias"]
    value.const_value = ir.tensor(value.const_value.numpy() + np.float32(0.01), name="head.bias")


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> Ruled:
    """SAINT where tokens differ by position alone, and positions hardly: a whole image of near-ties."""
    loaded = load("average pooling")
    model = loaded.adapter.model
    model.pos_embed.fill_(0.1)
    rule = FrozenSaintRule(loaded.adapter.geometry, (4, 0), (0.5, None))
    folder = tmp_path_factory.mktemp("tied")
    path = export_rule(loaded, rule, folder / "rule.onnx", decisions_path=folder / "decisions.onnx")
    return Ruled(loaded, rule, path, folder / "decisions.onnx")


def test_images_whose_scores_tie_are_counted_and_compared_with_what_was_kept(tied, tmp_path):
    plain = tied.images(3)
    # The even patches of the second image are all alike, and so are the odd ones: the scores are equal. (Were all
    # patches alike, their cosines would be 1, where a small move changes nothing.)
    striped = plain[1:2, :, :8, :16].repeat(1, 1, 4, 3)
    images = torch.cat([plain[:1], striped, plain[2:]])
    parity = check_rule(tied.adapter, tied.rule, *edited(tied, tmp_path, nudge_positions), images)[-1]
    assert parity.near_ties == 1 and parity.compared == 3 and parity.passed


def test_another_choice_without_a_tie_is_a_fault(tied, tmp_path):
    files = edited(tied, tmp_path, flip_ranking)
    with pytest.raises(ParityError, match="image 0 keeps other tokens in onnxruntime, though no scores"):
        check_rule(tied.adapter, tied.rule, *files, tied.images(2))


def test_merged_images_that_part_without_a_tie_are_a_fault(exported, tmp_path):
    ruled = exported("tome")
    with pytest.raises(ParityError, match="rule.onnx equals tome in PyTorch"):
        check_rule(ruled.adapter, ruled.rule, *edited(ruled, tmp_path, flip_ranking), ruled.images(3))


def test_a_merge_with_no_image_but_near_ties_passes_and_compares_none(exported, tmp_path, monkeypatch):
    ruled = exported("tome")
    files = edited(ruled, tmp_path, flip_ranking)  # Every image merges others there; the proof is taken as given.
    monkeypatch.setattr(rules, "_prove_near_tie", lambda *about: None)
    parity = compare_rule(ruled.adapter, ruled.rule, *files, ruled.images(3))
    assert parity.passed and (parity.compared, parity.near_ties, parity.difference, parity.top1_changed) == (
        0,
        3,
        0.0,
        0,
    )


@pytest.mark.parametrize("name", ["saint, pooling", "tome"])
def test_another_result_of_the_same_choice_is_a_fault(exported, name, tmp_path):
    ruled = exported(name)
    files = edited(ruled, tmp_path, move_logits)
    with pytest.raises(ParityError, match=f"not so: rule.onnx equals {ruled.rule.name} in PyTorch: relative"):
        check_rule(ruled.adapter, ruled.rule, *files, ruled.images(2))


# -- what cannot be exported ------------------------------------------------------------------------------------------


def test_counts_that_images_decide_are_refused(tmp_path):
    loaded = load("average pooling")
    rule = SaintRule(loaded.adapter.geometry, (0.5, None))
    with pytest.raises(UserError, match="saint leaves the number of tokens to each image.*method=.saint-frozen"):
        export_rule(loaded, rule, tmp_path / "rule.onnx")
    assert not list(tmp_path.iterdir())


class Gathering(TokenRule):
    """Takes its rows by an index per image, which ONNX has no lean operator for."""

    name = "gathering"

    def static_counts(self):
        tokens = self.geometry.tokens
        return tokens, tokens - 1

    def step(self, block):
        def drop(view):
            order = rank_descending(view.key.sum((1, 3))[:, view.prefix :])
            return Keep(with_prefix(order.gather(1, order)[:, 1:], view.prefix))

        return drop


def test_a_rule_that_gathers_by_element_is_refused_and_the_model_left_alone(tmp_path):
    loaded = load("average pooling", depth=1)
    model = loaded.adapter.model.train()
    rule = Gathering()
    rule.geometry = loaded.adapter.geometry
    before = sorted(vars(model)), [sorted(vars(block)) for block in model.blocks]
    with pytest.raises(UserError, match="the rule gathering cannot be exported: its graph holds GatherElements"):
        export_rule(loaded, rule, tmp_path / "rule.onnx")
    assert not list(tmp_path.iterdir()) and model.training
    assert (sorted(vars(model)), [sorted(vars(block)) for block in model.blocks]) == before


# -- the bundled model ------------------------------------------------------------------------------------------------


@pytest.mark.nightly
def test_saint_on_500_bundled_images(tmp_path):
    """Top-1 equal on all of them, and every token kept alike but for proven near-ties."""
    from vpruner.prune.data import ImageSet, ImageSource

    loaded = open_model()
    drops = (10, 9, 9, 8, 0, 0, 0, 0)
    rule = FrozenSaintRule(loaded.adapter.geometry, drops, (0.7,) * 4 + (None,) * 4)
    path = export_rule(
        loaded, rule, tmp_path / "rule.onnx", decisions_path=tmp_path / "decisions.onnx", dynamic_batch=True
    )
    images = ImageSet(
        ImageSource(str(bundled.evaluation_data()), split="validation"), np.arange(0, 2000, 4), None, True
    )
    batch, _ = next(images.batches(loaded.preprocessing, 500))
    parity = compare_rule(loaded.adapter, rule, path, tmp_path / "decisions.onnx", batch)
    assert parity.compared == 500 and parity.top1_changed == 0 and parity.near_ties <= 5
    assert run(path, batch[:3]).shape == (3, 10)
