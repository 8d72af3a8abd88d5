from __future__ import annotations

import gc
import json
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpruner.core import timing as module
from vpruner.core.timing import (
    MIN_ROUNDS,
    Latency,
    Ratio,
    is_stable,
    measure,
    median_interval,
    nearest_rank,
    random_images,
)


class FakeTime:
    """A clock that only moves when a candidate does; ``log`` lists who ran."""

    def __init__(self):
        self.now, self.log = 100.0, []

    def __call__(self) -> float:
        return self.now

    def candidate(self, name, *seconds):
        calls = iter(range(10**9))

        def call():
            self.log.append(name)
            self.now += seconds[min(next(calls), len(seconds) - 1)]

        return call


# -- statistics with known answers ------------------------------------------------------------------------------------


def test_latency_of_one_to_hundred_milliseconds():
    latency = Latency.from_seconds(np.random.default_rng(0).permutation(np.arange(1, 101)) / 1e3, batch=4)
    assert latency.count == 100
    assert latency.mean_ms == pytest.approx(50.5)
    assert (latency.p50_ms, latency.p90_ms, latency.p99_ms) == pytest.approx((50, 90, 99))
    assert (latency.min_ms, latency.max_ms) == pytest.approx((1, 100))
    assert latency.std_ms == pytest.approx((100 * 101 / 12) ** 0.5)  # n (n + 1) / 12 for 1..n
    assert latency.images_per_s == pytest.approx(4 / 0.0505)
    assert set(latency.to_json()) >= {"p50_ms", "p99_ms", "images_per_s"}


def test_an_outlier_stays_in():
    latency = Latency.from_seconds([0.001] * 9 + [1.0])
    assert latency.p50_ms == pytest.approx(1) and latency.p99_ms == latency.max_ms == pytest.approx(1000)
    assert latency.mean_ms == pytest.approx(100.9)


def test_one_sample():
    latency = Latency.from_seconds([0.002])
    assert latency.p50_ms == latency.p99_ms == latency.min_ms == pytest.approx(2) and latency.std_ms == 0


@given(st.lists(st.floats(0.001, 1000), min_size=1, max_size=200), st.integers(1, 100))
def test_nearest_rank_is_numpys_inverted_cdf(values, percent):
    assert nearest_rank(np.asarray(values), percent) == np.percentile(values, percent, method="inverted_cdf")


@pytest.mark.parametrize(
    ("count", "rank"), [(1, 1), (5, 1), (6, 1), (9, 2), (10, 2), (20, 6), (50, 18), (100, 40), (1000, 469)]
)
def test_median_interval_has_the_tabulated_ranks(count, rank):
    # Ranks of the 95 % interval of a median from the usual tables of the binomial distribution.
    values = np.random.default_rng(count).permutation(np.arange(1.0, count + 1))
    assert median_interval(values) == (rank, count + 1 - rank)


def test_median_interval_holds_its_coverage():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(1000):
        low, high = median_interval(rng.exponential(size=41))
        hits += low <= np.log(2) <= high
    assert hits >= 940  # at least 95 % by construction; 1,000 trials have a standard error of 0.7 %


def test_median_interval_of_many_values_follows_the_normal_approximation():
    low, _ = median_interval(np.arange(100_000.0))
    assert low == pytest.approx(50_000 - NormalDist().inv_cdf(0.975) * 100_000**0.5 / 2, abs=2)


def test_ratio_pairs_rounds():
    # The machine slows down threefold half way; every single round has the ratio 0.5.
    drift = np.concatenate([np.full(50, 1.0), np.full(50, 3.0)])
    ratio = Ratio.from_seconds(0.5 * drift, drift)
    assert set(ratio.to_json().values()) == {0.5}
    ratio = Ratio.from_seconds(np.arange(1.0, 101), np.full(100, 100.0))
    assert ratio.ratio == pytest.approx(0.505)
    assert (ratio.ratio_low, ratio.ratio_high) == pytest.approx((0.40, 0.61))
    assert (ratio.ratio_p10, ratio.ratio_p90) == pytest.approx((0.10, 0.90))


@pytest.mark.parametrize("times", [[], [0.0, 1.0], [-1.0], [float("nan")], [[1.0]]])
def test_times_that_cannot_be_are_refused(times):
    with pytest.raises(ValueError):
        Latency.from_seconds(times)


def test_unpaired_rounds_are_refused():
    with pytest.raises(ValueError, match="3 and 1"):
        Ratio.from_seconds([1.0, 1.0, 1.0], [1.0])


def test_stability():
    assert not is_stable([1.0] * 9)
    assert is_stable([1.0] * 10) and is_stable([9.0, *[1.0] * 5, *[1.04] * 5])
    assert not is_stable([1.0] * 5 + [1.1] * 5)


# -- the protocol, on a fake clock ------------------------------------------------------------------------------------


def test_known_candidates():
    clock = FakeTime()
    result = measure(
        {"dense": clock.candidate("dense", 0.010), "pruned": clock.candidate("pruned", 0.006)},
        rounds=200,
        seconds=None,
        clock=clock,
        batch=2,
        protocol={"threads": 1},
    )
    assert result.baseline == "dense"
    assert result.latencies["dense"].p50_ms == pytest.approx(10) and result.latencies["dense"].count == 200
    assert result.latencies["pruned"].images_per_s == pytest.approx(2 / 0.006)
    assert result.ratios["pruned"].ratio == pytest.approx(0.6)
    assert result.ratios["dense"].to_json() == dict.fromkeys(result.ratios["dense"].to_json(), 1.0)
    assert result.protocol["rounds"] == 200 and result.protocol["threads"] == 1 and result.protocol["batch"] == 2
    assert result.protocol["outliers_dropped"] == 0
    row = result.row("pruned")
    assert row["ratio_to"] == "dense" and row["ratio"] == pytest.approx(0.6)
    json.dumps([row, result.protocol])


def test_rounds_are_interleaved_in_a_shuffled_reproducible_order():
    def order(seed):
        clock = FakeTime()
        names = ["a", "b", "c"]
        measure(
            {n: clock.candidate(n, 0.01) for n in names}, warmup=0, warmup_limit=0, rounds=60, seed=seed, clock=clock
        )
        return [tuple(clock.log[i : i + 3]) for i in range(0, len(clock.log), 3)]

    rounds = order(0)
    assert len(rounds) == 60 and all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len(set(rounds)) == 6  # every order occurs
    assert order(0) == rounds != order(1)


def test_warm_up_goes_on_until_stable_and_is_not_counted():
    clock = FakeTime()
    # 20 calls, each faster than the last; then steady.
    falling = [0.1 - 0.004 * step for step in range(20)]
    result = measure({"a": clock.candidate("a", *falling, 0.01)}, warmup=3, rounds=50, seconds=None, clock=clock)
    assert 20 <= result.protocol["warmup_rounds"] <= 30 and result.protocol["warmup_stable"]
    assert result.latencies["a"].max_ms == pytest.approx(10)


def test_warm_up_has_a_floor_and_two_caps():
    clock = FakeTime()
    steady = measure({"a": clock.candidate("a", 0.01)}, warmup=25, rounds=10, clock=clock)
    assert steady.protocol["warmup_rounds"] == 25
    never = [0.01, 0.02, 0.03, 0.04, 0.05] * 100
    growing = [0.01 * 1.2**step for step in range(60)]
    capped = measure({"a": clock.candidate("a", *growing)}, warmup_limit=40, rounds=10, seconds=None, clock=clock)
    assert capped.protocol["warmup_rounds"] == 40 and not capped.protocol["warmup_stable"]
    late = measure({"a": clock.candidate("a", *growing)}, warmup_limit=40, rounds=10, seconds=1.0, clock=clock)
    assert 10 <= late.protocol["warmup_rounds"] < 40
    # Periodic times are stable: the windows have the same median.
    assert measure({"a": clock.candidate("a", *never)}, rounds=10, clock=clock).protocol["warmup_stable"]


def test_time_limit_and_its_floor():
    clock = FakeTime()
    limited = measure({"a": clock.candidate("a", 0.25), "b": clock.candidate("b", 0.25)}, seconds=20.0, clock=clock)
    assert limited.protocol["rounds"] == 40
    slow = measure({"a": clock.candidate("a", 60.0)}, warmup=0, seconds=1.0, clock=clock)
    assert slow.protocol["rounds"] == MIN_ROUNDS
    assert measure({"a": clock.candidate("a", 60.0)}, rounds=3, seconds=1.0, clock=clock).protocol["rounds"] == 3


def test_candidates_settle_before_their_turn_counts():
    clock = FakeTime()
    candidates = {"slow": clock.candidate("slow", 0.010), "quick": clock.candidate("quick", 0.004)}
    result = measure(candidates, warmup=10, rounds=50, seconds=None, clock=clock, settle=0.015)
    # As many untimed runs as fit into 15 ms; the timed ones are all that counts.
    assert result.protocol["untimed_before_each"] == {"slow": 1, "quick": 3}
    assert result.protocol["settle_seconds"] == 0.015
    assert clock.log[20:].count("slow") == 50 * 2 and clock.log[20:].count("quick") == 50 * 4
    assert result.latencies["quick"].count == 50 and result.latencies["quick"].p50_ms == pytest.approx(4)
    # In one piece: nothing comes between a candidate's untimed runs and its timed one.
    turns = "".join("s" if name == "slow" else "q" for name in clock.log[20:])
    assert not turns.replace("ss", "").replace("qqqq", "")
    assert measure({"a": clock.candidate("a", 0.02)}, rounds=10, clock=clock, settle=0.015).protocol[
        "untimed_before_each"
    ] == {"a": 0}
    # Either all find their weights in the caches, or none does.
    pair = {"slow": clock.candidate("slow", 0.02), "quick": clock.candidate("quick", 0.01)}
    found = measure(pair, rounds=10, clock=clock, settle=0.015)
    assert found.protocol["untimed_before_each"] == {"slow": 1, "quick": 1}


def test_a_candidate_is_fast_only_after_itself():
    """As with caches: 10 ms after another candidate, 5 ms after itself."""
    clock, last = FakeTime(), [None]

    def candidate(name):
        def call():
            clock.now += 0.005 if last[0] == name else 0.010
            last[0] = name

        return call

    def p50(**options):
        pair = {name: candidate(name) for name in "ab"}
        return measure(pair, rounds=50, seconds=None, clock=clock, **options).latencies["a"].p50_ms

    assert p50(settle=0.015) == pytest.approx(5)
    assert p50() > 7


def test_rounds_are_bounded_without_a_limit_that_acts(monkeypatch):
    monkeypatch.setattr(module, "MAX_ROUNDS", 500)
    clock = FakeTime()
    assert measure({"a": clock.candidate("a", 1e-9)}, clock=clock).protocol["rounds"] == 500


def test_garbage_collector_is_off_inside_and_back_on_after():
    seen = []

    def call():
        seen.append(gc.isenabled())
        if len(seen) == 5:
            raise RuntimeError("broken model")

    with pytest.raises(RuntimeError, match="broken model"):
        measure({"a": call})
    assert seen == [False] * 5 and gc.isenabled()


@pytest.mark.parametrize(
    "options",
    [
        {"rounds": 0},
        {"rounds": None, "seconds": None},
        {"seconds": 0},
        {"warmup": -1},
        {"warmup_limit": 1},
        {"batch": 0},
        {"settle": -0.1},
    ],
)
def test_a_protocol_that_is_none(options):
    with pytest.raises(ValueError):
        measure({"a": lambda: None}, **options)
    with pytest.raises(ValueError):
        measure({})


def test_random_images_are_seeded_and_normal_sized():
    images = random_images(2, (3, 33, 50))
    assert images.shape == (2, 3, 33, 50) and images.dtype == np.float32
    np.testing.assert_array_equal(images, random_images(2, (3, 33, 50)))
    assert not np.array_equal(images, random_images(2, (3, 33, 50), seed=1))
    assert abs(images.mean()) < 0.3 and 0.3 < images.std() < 1 and np.abs(images).max() <= 1
