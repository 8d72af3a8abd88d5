import json
import math

import numpy as np
import pytest

from vpruner.core.rows import append_rows, read_rows
from vpruner.core.statistics import (
    Outputs,
    collect_outputs,
    compare,
    cosine,
    kl_divergence,
    mean,
    paired_difference,
    proportion,
)


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


def test_one_image_has_a_mean_and_no_interval():
    row = mean("kl", np.array([1.0])).row("pruned")
    assert (row["value"], row["low"], row["high"], row["count"]) == (1.0, None, None, 1)
    assert json.loads(json.dumps(row, allow_nan=False)) == row


def test_intervals_end_where_the_quantity_does():
    skewed = np.array([0.0, 0.0, 0.0, 1.0])
    assert mean("kl", skewed).low < 0
    assert mean("kl", skewed, least=0.0).low == 0
    assert mean("cosine", 1 - skewed, most=1.0).high == 1
    assert mean("cosine", np.full(3, 1 + 1e-9), most=1.0).value == 1
    logits = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    changed = logits.copy()
    changed[0] += [9, 0, 0]
    kl = by_metric(compare(Outputs({"d": logits, "p": changed}, None), baseline="d", output="logits")["p"])["kl"]
    assert kl.low == 0 < kl.value < kl.high
    cos = by_metric(compare(Outputs({"d": logits, "p": changed}, None), baseline="d", output="features")["p"])["cosine"]
    assert cos.high == 1 > cos.value > cos.low


def pairs(gained, lost, count):
    """bool [image] hits and reference with these numbers of images that only one of them got right."""
    hits, reference = np.arange(count) % 2 == 0, np.arange(count) % 2 == 0
    hits[: gained + lost] = np.arange(gained + lost) < gained
    reference[: gained + lost] = np.arange(gained + lost) >= gained
    return hits, reference


@pytest.mark.parametrize(
    ("gained", "lost", "count", "low", "high", "digits"),
    [
        # Fagerland, Lydersen, Laake (2017), "Statistical Analysis of Contingency Tables", chapter 8: airway
        # hyper-responsiveness (Bentur et al. 2009) and complete response (Cavo et al. 2012).
        (1, 7, 21, -0.517, -0.026, 3),
        (6, 16, 161, -0.1240, -0.0054, 4),
    ],
)
def test_paired_interval_of_published_examples(gained, lost, count, low, high, digits):
    result = paired_difference("top1_difference", *pairs(gained, lost, count))
    assert result.value == pytest.approx((gained - lost) / count)
    assert (round(result.low, digits), round(result.high, digits)) == (low, high)
    mirrored = paired_difference("top1_difference", *pairs(lost, gained, count))
    assert (mirrored.low, mirrored.high) == (pytest.approx(-result.high), pytest.approx(-result.low))


@pytest.mark.parametrize(
    ("gained", "lost", "count"), [(0, 0, 50), (3, 0, 40), (0, 3, 40), (5, 9, 300), (20, 0, 20), (2, 2, 4)]
)
def test_paired_interval_ends_where_the_score_test_rejects(gained, lost, count):
    """The score test from scratch: the likelihood is maximised on a grid, with no closed form."""
    result = paired_difference("top1_difference", *pairs(gained, lost, count))

    def score(difference):
        shares = np.linspace(max(0, -difference), (1 - difference) / 2, 200_001)[1:-1]
        with np.errstate(divide="ignore", invalid="ignore"):
            likelihood = (
                gained * np.log(shares + difference)
                + lost * np.log(shares)
                + (count - gained - lost) * np.log(1 - 2 * shares - difference)
            )
        share = shares[np.nanargmax(likelihood)]
        return abs(gained - lost - count * difference) / math.sqrt(
            count * (2 * share + difference - difference * difference)
        )

    for limit, end in ((result.low, -1), (result.high, 1)):
        if limit == end:
            assert (gained - lost) / count == end
        else:
            assert score(limit) == pytest.approx(1.96, abs=5e-3)


@pytest.mark.parametrize("count", [1, 20, 2000])
def test_models_that_never_disagree_still_have_an_interval(count):
    result = paired_difference("top1_difference", *pairs(0, 0, count))
    width = 1.96**2 / (count + 1.96**2)
    assert (result.value, result.low, result.high) == (0, pytest.approx(-width, 1e-3), pytest.approx(width, 1e-3))


def test_paired_interval_covers_what_it_claims():
    random = np.random.default_rng(0)
    counts = random.multinomial(150, [0.03, 0.05, 0.92], size=1000)
    inside = [
        result.low <= -0.02 <= result.high
        for gained, lost, _ in counts
        for result in [paired_difference("top1_difference", *pairs(gained, lost, 150))]
    ]
    assert 0.93 <= np.mean(inside) <= 0.98


def test_rows_that_json_cannot_hold_are_not_written(tmp_path):
    with pytest.raises(ValueError, match="value is inf, which JSON has no word for"):
        append_rows(tmp_path / "results.jsonl", [{"value": 1.0}, {"value": math.inf}])
    assert not (tmp_path / "results.jsonl").exists()
    append_rows(tmp_path / "results.jsonl", iter([{"value": 1.0}, {"low": None}]))
    assert read_rows(tmp_path / "results.jsonl") == [{"value": 1.0}, {"low": None}]


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
    assert difference.value == 0 and difference.low < 0 < difference.high


def test_without_labels_and_for_features():
    values = np.array([[1.0, 2.0], [2.0, 1.0]], np.float32)
    unlabelled = compare(Outputs({"dense": values, "pruned": values}, None), baseline="dense", output="logits")
    assert unlabelled["dense"] == [] and set(by_metric(unlabelled["pruned"])) == {"agreement", "kl"}
    features = compare(Outputs({"dense": values, "pruned": values}, None), baseline="dense", output="features")
    assert by_metric(features["pruned"])["cosine"].value == pytest.approx(1)


def test_values_are_compared_by_their_relative_squared_error():
    random = np.random.default_rng(0)
    dense = random.standard_normal((40, 6, 4)).astype(np.float32)
    noise = random.standard_normal(dense.shape).astype(np.float32)
    outputs = Outputs({"dense": dense, "pruned": dense + 0.3 * noise}, None)
    found = compare(outputs, baseline="dense", output="values")
    assert found["dense"] == []
    (error,) = found["pruned"]
    expected = np.square(0.3 * noise).sum() / np.square(dense).sum()
    assert error.metric == "relative_error" and error.value == pytest.approx(expected, rel=1e-5)
    # Scores of 4 classes at 6 places, the classes on either side of the places.
    for axis, values in ((2, outputs), (1, Outputs({k: v.swapaxes(1, 2) for k, v in outputs.of.items()}, None))):
        agreement, _ = compare(values, baseline="dense", output="values", classes=4)["pruned"]
        same = outputs.of["pruned"].argmax(2) == dense.argmax(2)
        assert agreement.metric == "agreement" and agreement.value == pytest.approx(same.mean()), axis


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


def test_collecting_ends_with_the_batch_whose_outputs_are_not_finite():
    read, told = [], []

    def batches():
        for start in range(0, 40, 10):
            read.append(start)
            yield range(start, start + 10), None

    def refuse(label, values):
        told.append((label, len(values), int(np.isnan(values).sum())))
        raise ZeroDivisionError

    def pruned(images):
        return np.array([np.nan if image == 13 else image for image in images])[:, None]

    runners = {"dense": lambda images: np.array(images)[:, None], "pruned": pruned}
    with pytest.raises(ZeroDivisionError):
        collect_outputs(runners, batches(), not_finite=refuse)
    assert read == [0, 10] and told == [("pruned", 20, 1)]
    outputs = collect_outputs(runners, batches())
    assert np.isnan(outputs.of["pruned"]).sum() == 1 and len(outputs.of["dense"]) == 40
