"""benchmarks/content_scores.py from end to end, on a few of the bundled images."""

import pytest
import torch
from tiny_vits import tiny
from token_rules import images_for

from vpruner.core.plan import TokenPlan
from vpruner.core.rows import read_rows
from vpruner.prune.backbones.vit import ViTAdapter
from vpruner.prune.methods.content import PRIOR_WEIGHTS, ContentRule


@pytest.fixture
def content_scores(script):
    return script("content_scores")


@pytest.mark.nightly
def test_rows_of_scores_with_and_without_refit(content_scores, tmp_path, monkeypatch):
    output = tmp_path / "content_scores.jsonl"
    options = ["--targets", "0.5", "--images", "64", "--eval-images", "32", "-o", str(output)]
    content_scores.main([*options, "--scores", "static", "norm", "--refit", "without"])
    before = read_rows(output)
    content_scores.main([*options, "--scores", "static", "norm", "linear", "--refit", "without"])
    rows = read_rows(output)
    # What was there is not made again.
    assert rows[: len(before)] == before and [row["score"] for row in rows[::4]] == ["static", "norm", "linear"]
    content_scores.main([*options, "--scores", "static", "linear", "--refit", "with"])
    rows = read_rows(output)
    assert [(row["score"], row["refit"]) for row in rows[12::4]] == [("static", True), ("linear", True)]
    kl = {(row["score"], row["refit"]): row["value"] for row in rows if row["metric"] == "kl"}
    assert len(set(kl.values())) == 5 and kl["static", True] < kl["static", False]
    counts = [row["counts"] for row in rows]
    assert counts == [counts[0]] * len(rows)
    for row in rows:
        assert row["benchmark"] == "content_scores" and (row["images"], row["eval_images"]) == (64, 32)
        assert 0.48 < row["macs_ratio"] <= 0.51
        assert "/" not in str({key: value for key, value in row.items() if key != "environment"})


@pytest.mark.parametrize("name", ["attention", "norm", "short", "distinct"])
def test_other_scores_rank_by_what_they_say(content_scores, name):
    adapter = ViTAdapter(tiny("class token").requires_grad_(False), "tiny")
    adapter.model.double()
    geometry, images = adapter.geometry, images_for(adapter, 2)
    counts = [geometry.patches, 9, 9, 0]
    plan = TokenPlan("tiny", geometry, *([range(count) for count in kind] for kind in ([24] * 4, counts, counts)))
    with ContentRule(plan, content_scores.SCORES[name](plan, 0.0)).applied(adapter) as run:
        run(images)
    model, block = adapter.model, adapter.model.blocks[1]
    x = model.blocks[0](model.norm_pre(model._pos_embed(model.patch_embed(images))))
    qkv = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, geometry.num_heads, geometry.head_dim))
    query, key = qkv[:, :, 0], qkv[:, :, 1]
    if name == "attention":
        logits = torch.einsum("bhc,bthc->bht", query[:, 0], key) * geometry.head_dim**-0.5
        values = logits.softmax(-1)[:, :, 1:].mean(1)
    elif name in ("norm", "short"):
        values = (1 if name == "norm" else -1) * key[:, 1:].flatten(2).norm(dim=-1)
    else:
        unit = torch.nn.functional.normalize(key[:, 1:].mean(2), dim=-1)
        values = -torch.einsum("bnc,bmc->bnm", unit, unit).mean(2)
    expected = values.argsort(dim=1, descending=True) + 1
    assert run.decisions[1][:, 1:].tolist() == expected.tolist()


def test_the_prior_is_one_of_those_that_a_run_tries(content_scores, monkeypatch, tmp_path):
    weights = []
    real = content_scores.ContentRule.scored.__func__

    def scored(cls, plan, channels, weight):
        weights.append(weight)
        return real(cls, plan, channels, weight)

    monkeypatch.setattr(content_scores.ContentRule, "scored", classmethod(scored))
    options = ["--targets", "0.6", "--images", "16", "--eval-images", "4", "-o", str(tmp_path / "rows.jsonl")]
    content_scores.main([*options, "--scores", "linear", "--refit", "without"])
    assert weights[:-1] == list(PRIOR_WEIGHTS) and weights[-1] in PRIOR_WEIGHTS
