import math

import numpy as np
import pytest

from vpruner.prune.evaluate import Outputs, collect_outputs, compare, cosine, kl_divergence, mean, proportion


def test_wilson_interval_of_known_values():
    # Brown, Cai, DasGupta (2001): 0 of 10 gives an upper limit of z^2 / (n + z^2).
    nothing = proportion("top1", np.zeros(10, bool))
    assert (nothing.value, nothing.low) == (0, 0)
    assert nothing.high == pytest.approx(1.96**2 / (10 + 1.96**2), abs=1e-4)
    half = proportion("top1", np.arange(100) < 50)
    assert (half.low, half.high) == (pytest.approx(0.4038, abs=1e-4), pytest.approx(0.5962, abs=1e-4))


def test_normal_interval_of_a_mean():
    values = np.array([1.0, 2.0, 3.0, 4.0])
    result = mean("kl", values)
    half = 1.96 * math.sqrt(5 / 3) / 2
    assert (result.value, result.low, result.high) == (
        2.5,
        pytest.approx(2.5 - half, rel=1e-3),
        pytest.approx(2.5 + half, rel=1e-3),
    )
    assert mean("kl", np.array([1.0])).high == math.inf


def test_kl_against_a_loop_and_at_extreme_logits():
    random = np.random.default_rng(0)
    one, other = random.normal(size=(5, 4)), random.normal(size=(5, 4))
    for row in range(5):
        p = np.exp(one[row]) / np.exp(one[row]).sum()
        q = np.exp(other[row]) / np.exp(other[row]).sum()
        assert kl_divergence(one, other)[row] == pytest.approx(sum(p * np.log(p / q)))
    assert kl_divergence(one, one).max() == pytest.approx(0, abs=1e-12)
    assert np.isfinite(kl_divergence(np.array([[1e4, 0]]), np.array([[0, 1e4]]))).all()


def test_cosine():
    assert cosine(np.array([[3.0, 4.0]]), np.array([[6.0, 8.0]])) == pytest.approx(1)
    assert cosine(np.array([[1.0, 0.0]]), np.array([[0.0, 2.0]])) == pytest.approx(0)


def by_metric(estimates):
    return {estimate.metric: estimate for estimate in estimates}


def test_comparison_is_paired_and_counts_right_answers():
    logits = np.eye(4, dtype=np.float32)[[0, 1, 2, 3]] * 5
    changed = logits[[0, 1, 2, 0]]
    result = compare(
        Outputs({"dense": logits, "pruned": changed}, np.array([0, 1, 3, 3])), baseline="dense", output="logits"
    )
    assert by_metric(result["dense"])["top1"].value == 0.75
    assert set(by_metric(result["dense"])) == {"top1"}
    pruned = by_metric(result["pruned"])
    assert pruned["top1"].value == 0.5
    assert pruned["top1_difference"].value == -0.25
    assert pruned["agreement"].value == 0.75
    assert pruned["kl"].value > 0
    same = compare(
        Outputs({"dense": logits, "pruned": logits}, np.array([0, 1, 3, 3])), baseline="dense", output="logits"
    )
    difference = by_metric(same["pruned"])["top1_difference"]
    assert (difference.value, difference.low, difference.high) == (0, 0, 0)  # Paired: no spread where nothing differs.


def test_without_labels_and_for_features():
    values = np.array([[1.0, 2.0], [2.0, 1.0]], np.float32)
    unlabelled = compare(Outputs({"dense": values, "pruned": values}, None), baseline="dense", output="logits")
    assert unlabelled["dense"] == [] and set(by_metric(unlabelled["pruned"])) == {"agreement", "kl"}
    features = compare(Outputs({"dense": values, "pruned": values}, None), baseline="dense", output="features")
    assert by_metric(features["pruned"])["cosine"].value == pytest.approx(1)


def test_collecting_reads_each_batch_once_for_all_models():
    seen = []
    outputs = collect_outputs(
        {"dense": lambda x: np.array(x)[:, None], "pruned": lambda x: -np.array(x)[:, None]},
        iter([([1, 2], [0, 1]), ([3], [1])]),
        on_batch=seen.append,
    )
    assert seen == [2, 1]
    assert outputs.labels.tolist() == [0, 1, 1]
    assert outputs.of["pruned"].ravel().tolist() == [-1, -2, -3]
    row = proportion("top1", np.array([True])).row("dense")
    assert (row["kind"], row["label"], row["metric"], row["count"]) == ("accuracy", "dense", "top1", 1)
