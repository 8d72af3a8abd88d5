"""benchmarks/content_scores.py from end to end, on a few of the bundled images."""

import numpy as np
import pytest
import torch
from tiny_vits import calibration_for, tiny

from vpruner.core.rows import read_rows
from vpruner.prune.backbones.vit import ViTAdapter
from vpruner.prune.methods.content import PRIOR_WEIGHTS


@pytest.fixture
def content_scores(script):
    return script("content_scores")


def test_rows_of_scores_with_and_without_refit(content_scores, tmp_path, monkeypatch):
    output = tmp_path / "content_scores.jsonl"
    options = ["--targets", "0.5", "--images", "16", "--eval-images", "8", "-o", str(output)]
    content_scores.main([*options, "--scores", "static", "norm", "--refit", "without"])
    before = read_rows(output)
    content_scores.main([*options, "--scores", "static", "norm", "anchored", "--refit", "without"])
    rows = read_rows(output)
    # What was there is not made again.
    assert rows[: len(before)] == before and [row["score"] for row in rows[::4]] == ["static", "norm", "anchored"]
    content_scores.main([*options, "--scores", "static", "anchored", "--refit", "with"])
    rows = read_rows(output)
    assert [(row["score"], row["refit"]) for row in rows[12::4]] == [("static", True), ("anchored", True)]
    kl = {(row["score"], row["refit"]): row["value"] for row in rows if row["metric"] == "kl"}
    assert len(set(kl.values())) == 5 and kl["static", True] < kl["static", False]
    counts = [row["counts"] for row in rows]
    assert counts == [counts[0]] * len(rows)
    for row in rows:
        assert row["benchmark"] == "content_scores" and (row["images"], row["eval_images"]) == (16, 8)
        assert 0.48 < row["macs_ratio"] <= 0.51
        assert "/" not in str({key: value for key, value in row.items() if key != "environment"})


def test_the_probe_finds_what_importance_goes_with(content_scores, monkeypatch):
    """Importance made up of a channel and a place comes back as the ranking that they give."""
    adapter = ViTAdapter(tiny("class token", depth=2).requires_grad_(False), "tiny")
    calibration, geometry = calibration_for(adapter), adapter.geometry
    random = np.random.default_rng(0)
    places = random.standard_normal(geometry.patches)
    inputs = []

    def made_up(adapter, batches, loss, seed):
        images = torch.cat([images for images, _ in batches])
        normed = adapter.model.blocks[0].norm1(content_scores.embed_images(adapter.model, images))[:, 1:]
        score = (3 * normed[..., 5] + torch.from_numpy(places)).double().numpy()
        inputs.append(score)
        values = np.zeros((len(images), 3, 2, geometry.patches))
        values[:, 0, 1] = np.exp(score / 2) * random.choice([-1, 1], score.shape)
        yield values

    monkeypatch.setattr(content_scores, "gradients_of_images", made_up)
    monkeypatch.setattr(content_scores, "batch_size_for", lambda *a, **k: 8)
    probe = content_scores.fit_fisher_probe(adapter, calibration, calibration.fit)
    normed = adapter.model.blocks[0].norm1(content_scores.embed_images(adapter.model, calibration.images([0, 1])))
    found = (normed[:, 1:] @ torch.from_numpy(probe.token[0])).numpy() + probe.prior[0]
    for image in range(2):
        assert np.corrcoef(found[image], inputs[0][image])[0, 1] > 0.95


def test_the_prior_is_one_of_those_that_a_run_tries(content_scores, monkeypatch, tmp_path):
    weights = []
    real = content_scores.AnchoredScore.of_plan.__func__

    def of_plan(cls, plan, weight):
        weights.append(weight)
        return real(cls, plan, weight)

    monkeypatch.setattr(content_scores.AnchoredScore, "of_plan", classmethod(of_plan))
    options = ["--targets", "0.6", "--images", "16", "--eval-images", "4", "-o", str(tmp_path / "rows.jsonl")]
    content_scores.main([*options, "--scores", "anchored", "--refit", "without"])
    assert weights[:-1] == list(PRIOR_WEIGHTS) and weights[-1] in PRIOR_WEIGHTS
