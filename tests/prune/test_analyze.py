"""The curves against their definitions in loops, and stages found in curves whose stages are known."""

import math
from itertools import combinations, product

import numpy as np
import pytest
import torch
from tiny_vits import KINDS, tiny
from token_rules import add_mlp, attention_matrix, cosine, embed, heads, images_for, project

from vpruner.core.errors import UserError
from vpruner.prune import analyze as analysis_module
from vpruner.prune.analyze import MEASURES, STAGES, Analysis, Segments, analyze, draw_analysis, find_stages
from vpruner.prune.backbones.vit import ViTAdapter
from vpruner.prune.methods.saint import SaintRule, first_blocks

TOLERANCE = 1e-9
#: Few neighbours make a vote in models of 24 patches.
NEIGHBOURS, THRESHOLD = 2, 0.4


def by_hand(adapter: ViTAdapter, image) -> dict[str, list[float]]:
    model, geometry, prefix = adapter.model, adapter.geometry, adapter.geometry.prefix_tokens
    grid = list(product(range(geometry.grid[0]), range(geometry.grid[1])))
    x = first = embed(model, image)
    found = {name: [] for name in MEASURES}
    for block in model.blocks:
        entering = x
        query, key, value = heads(block.attn, block.norm1(x))
        matrix = attention_matrix(block.attn, query, key)
        x = add_mlp(block, x + project(block, matrix, value))
        keys = key.mean(0)[prefix:]
        pairs = list(combinations(range(len(keys)), 2))
        found["key_similarity"].append(np.mean([cosine(keys[i], keys[j]) for i, j in pairs]))
        found["token_similarity"].append(np.mean([cosine(x[prefix + i], x[prefix + j]) for i, j in pairs]))
        close = [
            sum(cosine(keys[i], keys[j]) >= THRESHOLD for j in range(1, len(keys), 2)) for i in range(0, len(keys), 2)
        ]
        found["votes"].append(sum(count >= NEIGHBOURS for count in close) / len(keys))
        found["drift"].append(
            np.mean([float((x[t] - entering[t]).norm() / entering[t].norm()) for t in range(prefix, len(x))])
        )
        found["from_input"].append(np.mean([1 - cosine(x[t], first[t]) for t in range(prefix, len(x))]))
        entropies, most, distances = [], [], []
        for rows in matrix:
            for query_token, row in enumerate(rows):
                shares = row[prefix:] / row[prefix:].sum()
                if query_token >= prefix:
                    away = [math.dist(grid[query_token - prefix], place) for place in grid]
                    distances.append(float(shares @ torch.tensor(away, dtype=torch.float64)))
                if query_token == 0 if model.cls_token is not None else query_token >= prefix:
                    entropies.append(-sum(float(s) * math.log(s) for s in shares) / math.log(len(grid)))
                    most.append(sum(sorted(shares.tolist())[-max(1, round(len(grid) / 10)) :]))
        found["entropy"].append(np.mean(entropies))
        found["top"].append(np.mean(most))
        found["distance"].append(np.mean(distances))
    return found


@pytest.mark.parametrize("kind", ["class token", "registers", "distilled", "average pooling", "qk-norm", "pre-norm"])
def test_curves_are_their_definitions(kind, monkeypatch):
    monkeypatch.setattr(analysis_module, "THRESHOLD", THRESHOLD)
    monkeypatch.setattr(analysis_module.Saint, "neighbours", NEIGHBOURS)
    adapter = ViTAdapter(tiny(kind, depth=2).double().requires_grad_(False), kind)
    images, seen = images_for(adapter, 3), []
    found = analyze(adapter, images.split(2), on_batch=seen.append)
    assert seen == [2, 1] and found.images == 3
    assert found.attention_from == ("class token" if adapter.model.cls_token is not None else "patches")
    expected = [by_hand(adapter, image) for image in images]
    for name in MEASURES:
        assert np.abs(found.values[name] - [one[name] for one in expected]).max() < TOLERANCE, name
    assert 0 < found.values["votes"].mean() < 0.5  # The threshold is put to the test.


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_can_be_analyzed_and_is_left_as_it_was(kind):
    adapter = ViTAdapter(tiny(kind, depth=3).requires_grad_(False), kind)
    images = images_for(adapter, 2, dtype=torch.float32)
    before = adapter.model(images)
    found = analyze(adapter, [images])
    row = found.to_json()
    assert len(row["blocks"]) == 3 and row["images"] == 2
    for block in row["blocks"]:
        assert all(math.isfinite(block[name]) for name in MEASURES)
        assert 0 <= block["votes"] <= 0.5 and 0 <= block["entropy"] <= 1 and 0 < block["top"] <= 1
    assert torch.equal(adapter.model(images), before)


def test_votes_are_what_saint_drops_in_its_first_block():
    adapter = ViTAdapter(tiny("class token").requires_grad_(False), "tiny")
    images = images_for(adapter, 4, dtype=torch.float32)
    found = analyze(adapter, [images])
    with SaintRule(adapter.geometry, (analysis_module.THRESHOLD, None, None, None)).applied(adapter) as run:
        run(images)
    dropped = (run.key_counts[:, 0] - run.key_counts[:, 1]) / adapter.geometry.patches
    assert np.allclose(found.values["votes"][:, 0], dropped)


# -- stages -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("starts", [(0, 3, 8), (0, 1, 2), (0, 1, 11), (0, 10, 11), (0, 4, 8)])
@pytest.mark.parametrize("seed", range(3))
def test_steps_are_found_where_they_are(starts, seed):
    random = np.random.default_rng(seed)
    stage = np.searchsorted(starts, np.arange(12), side="right") - 1
    # A rise and a fall, in units of their own, and one curve that does not know of the second stage.
    levels = np.array([[0.0, 5e3, 1.0], [1.0, 1e3, 1.0], [0.2, 4e3, 7.0]])
    curves = levels[stage] + random.normal(size=(12, 3)) * [0.02, 80.0, 0.1]
    found, explained, line = find_stages(curves)
    assert found == starts
    assert explained > 0.95 and explained > line


def test_a_steady_change_has_no_stages():
    ramp = np.stack([np.arange(12.0), 3 - 2 * np.arange(12.0)], 1)
    starts, explained, line = find_stages(ramp)
    assert starts == (0, 4, 8) and line == pytest.approx(1)
    assert explained == pytest.approx(1 - (16 - 1) / (144 - 1))  # Variances of 4 and of 12 numbers in a row.
    assert not Segments(starts, explained, line, ("drift",)).clear


def test_cuts_are_the_best_of_all():
    random = np.random.default_rng(1)
    curves = random.normal(size=(7, 2))
    scaled = (curves - curves.mean(0)) / curves.std(0)

    def left(cuts):
        return sum(len(part) * part.var(0).sum() for part in np.split(scaled, cuts))

    best = min(combinations(range(1, 7), 2), key=left)
    starts, explained, _ = find_stages(curves)
    assert starts == (0, *best) and explained == pytest.approx(1 - left(best) / 14)
    with pytest.raises(ValueError, match="2 blocks cannot be cut into 3"):
        find_stages(curves[:2])


def analysis_of(curve: np.ndarray, noise: float = 0.0, images: int = 50) -> Analysis:
    """An analysis in which every curve but one is constant up to noise."""
    random = np.random.default_rng(0)
    geometry = ViTAdapter(tiny("class token", depth=len(curve)), "tiny").geometry
    values = {name: 0.3 + 0.01 * random.normal(size=(images, len(curve))) for name in MEASURES}
    values["drift"] = curve + noise * random.normal(size=(images, len(curve)))
    return Analysis(geometry, values, "class token")


def test_saint_acts_before_the_aggregator():
    found = analysis_of(np.array([1.0, 1.1, 3.0, 3.1, 2.9, 0.0, 0.1, 0.0]))
    stages = found.stages()
    assert stages.starts == (0, 2, 5) and stages.measures == ("drift",) and stages.clear
    assert [stages.stage_of(block) for block in (0, 1, 2, 4, 5, 7)] == [STAGES[s] for s in (0, 0, 1, 1, 2, 2)]
    blocks, why = found.saint_blocks()
    assert blocks == (0, 1, 2, 3, 4) and "begins in block 5" in why
    row = found.to_json()
    assert row["saint"]["share"] == 5 / 8 and row["blocks"][5]["stage"] == "aggregator"
    # The share is what SAINT takes.
    acting = first_blocks(found.geometry, 0.75, row["saint"]["share"])
    assert [block for block, value in enumerate(acting) if value is not None] == list(blocks)


@pytest.mark.parametrize(
    ("curve", "noise", "says"),
    [
        (np.arange(8.0), 0.0, "change steadily"),
        (np.zeros(8), 1.0, "no stages were found"),  # Nothing but noise.
        (np.zeros(8), 0.0, "no stages were found"),
        (np.array([0.0, 5.0]), 0.0, "no stages were found"),  # Too few blocks.
    ],
)
def test_without_stages_saint_acts_as_published(curve, noise, says):
    found = analysis_of(curve, noise)
    blocks, why = found.saint_blocks()
    assert blocks == tuple(range(len(curve) // 2)) and says in why and "as published" in why
    assert found.to_json()["saint"]["blocks"] == list(blocks)


def test_the_picture_is_the_same_for_the_same_numbers():
    pytest.importorskip("matplotlib")
    found = analysis_of(np.array([1.0, 1.1, 3.0, 3.1, 2.9, 0.0, 0.1, 0.0]))
    svg = draw_analysis(found, "svg", "a model").decode()
    assert svg.lstrip().startswith("<?xml") and "</svg>" in svg and "Date" not in svg
    assert draw_analysis(found, "svg", "a model").decode() == svg
    assert draw_analysis(analysis_of(np.arange(2.0), images=1), "png", "few").startswith(b"\x89PNG")


def test_nothing_to_analyze_is_refused():
    adapter = ViTAdapter(tiny("class token"), "tiny")
    with pytest.raises(UserError, match=r"no images .*name some with 'data'"):
        analyze(adapter, [])
    single = ViTAdapter(tiny("class token", img_size=(32, 32), patch_size=32), "single")
    with pytest.raises(UserError, match="single has a single patch"):
        analyze(single, [])
