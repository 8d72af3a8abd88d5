"""Latency with its protocol: interleaved candidates, paired ratios, nothing dropped.

Two latencies taken minutes apart on a machine that does other things, or whose clock follows its temperature, differ
for reasons that have nothing to do with the models. So all candidates run in one process, once per *round*, in an order
shuffled anew each round, and what is compared is the ratio of two times of the *same* round. Slow drifts hit both alike
and cancel; the order of the round cannot favour one.

What the numbers mean:

* percentiles are nearest-rank: ``p99`` is the smallest time that at least 99 % of the rounds did not exceed, so it is
  always a time that occurred. Below 100 rounds it is the slowest round (``p99_ms`` equals ``max_ms``);
* ``std_ms`` is the sample standard deviation (n - 1); throughput is images over mean time;
* a ratio is the median over rounds of candidate time / baseline time, with a distribution-free 95 % confidence interval
  of that median (binomial order statistics; rounds counted as independent) and the 10th and 90th percentile of the
  rounds themselves. The interval says how well the ratio is known *on this machine in this run*; another run on a busy
  machine may fall outside;
* every timed round counts. A round that an interrupt made ten times slower is in the mean, the p99 and the maximum.

Candidates that take turns sweep each other out of the caches, and the more of them there are the more; a deployed model
runs alone. A model of 6 MB at 0.27 of the multiply-adds took 0.49 of the dense time among 43 graphs, 0.44 among three,
and 0.38 where each had run a few times before its turn counted. So a turn may begin with untimed runs of the same
candidate (``settle``).
"""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .preprocess import Preprocessing

#: How long a candidate runs untimed before each timed run. More than four runs of a model of 3 ms, or ten of one of
#: 1 ms, change nothing. Where everything takes longer than this, nothing runs untimed.
SETTLE_SECONDS = 0.015
#: More runs than this never are needed, however short.
MOST_SETTLING_RUNS = 20
#: Fewer rounds than this are not worth a median; a time limit is overrun for them.
MIN_ROUNDS = 10
#: A time limit and a function that takes microseconds would otherwise fill the memory with samples.
MAX_ROUNDS = 100_000
#: Warm-up is over when the medians of two successive windows of rounds agree to within this, for every candidate.
WARMUP_WINDOW, WARMUP_TOLERANCE = 5, 0.05


@dataclass(frozen=True)
class Latency:
    """Distribution of the times of one candidate; see the module for the definitions."""

    count: int
    mean_ms: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    std_ms: float
    min_ms: float
    max_ms: float
    images_per_s: float

    @classmethod
    def from_seconds(cls, seconds: Sequence[float] | np.ndarray, batch: int = 1) -> Latency:
        """Args:
        seconds: float [round], at least one, each positive.
        batch: Images that one call processes.
        """
        times = _checked(seconds) * 1e3
        return cls(
            count=len(times),
            mean_ms=float(times.mean()),
            p50_ms=nearest_rank(times, 50),
            p90_ms=nearest_rank(times, 90),
            p99_ms=nearest_rank(times, 99),
            std_ms=float(times.std(ddof=1)) if len(times) > 1 else 0.0,
            min_ms=float(times.min()),
            max_ms=float(times.max()),
            images_per_s=float(batch * 1e3 / times.mean()),
        )

    def to_json(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True)
class Ratio:
    """Time of a candidate relative to the baseline, from paired rounds; below 1 is faster.

    Attributes:
        ratio: Median over the rounds.
        ratio_low, ratio_high: 95 % confidence interval of that median.
        ratio_p10, ratio_p90: Percentiles of the rounds.
    """

    ratio: float
    ratio_low: float
    ratio_high: float
    ratio_p10: float
    ratio_p90: float

    @classmethod
    def from_seconds(cls, candidate: Sequence[float] | np.ndarray, baseline: Sequence[float] | np.ndarray) -> Ratio:
        """Args:
        candidate, baseline: float [round], times of the same rounds.
        """
        candidate, baseline = _checked(candidate), _checked(baseline)
        if candidate.shape != baseline.shape:
            raise ValueError(f"{len(candidate)} and {len(baseline)} rounds cannot be paired")
        ratios = candidate / baseline
        low, high = median_interval(ratios)
        return cls(float(np.median(ratios)), low, high, nearest_rank(ratios, 10), nearest_rank(ratios, 90))

    def to_json(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True, eq=False)
class Comparison:
    """What :func:`measure` found.

    Attributes:
        baseline: The candidate that ratios refer to.
        latencies: By candidate.
        ratios: By candidate; the baseline's own is exactly 1.
        seconds: float64 [round] by candidate, in the order of the rounds, all of them.
        protocol: How it was measured; JSON values.
    """

    baseline: str
    latencies: dict[str, Latency]
    ratios: dict[str, Ratio]
    seconds: dict[str, np.ndarray]
    protocol: dict[str, Any]

    def row(self, name: str) -> dict[str, Any]:
        """The numbers of one candidate, flat, for a ``results.jsonl``."""
        return {**self.latencies[name].to_json(), "ratio_to": self.baseline, **self.ratios[name].to_json()}


def measure(
    candidates: Mapping[str, Callable[[], object]],
    *,
    warmup: int = 10,
    warmup_limit: int = 100,
    rounds: int | None = None,
    seconds: float | None = 10.0,
    batch: int = 1,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
    own_time: bool = False,
    settle: float = 0.0,
    protocol: Mapping[str, Any] | None = None,
) -> Comparison:
    """Time candidates against the first of them.

    A call must be complete when it returns: a candidate that only queues work on a GPU has to wait for it itself. The
    garbage collector is off while measuring. Results of the calls are thrown away, unless they are the times.

    Args:
        candidates: What to call, by name; the first is the baseline.
        warmup: Untimed rounds, at least. They go on until, for every candidate, the medians of the last two windows of
            five rounds differ by at most 5 %, but not
        warmup_limit: beyond this many rounds, nor longer than ``seconds``. ``protocol["warmup_stable"]`` says how it
            ended.
        rounds: Timed rounds; None: as many as fit in ``seconds``.
        seconds: Time limit for the timed rounds of all candidates together; None: no limit. At least ten rounds (or
            ``rounds``, if fewer) are made even so. A p99 needs 100 rounds to say more than the maximum.
        batch: Images that one call processes, for the throughput.
        seed: Of the order within the rounds.
        clock: Gives seconds, monotonically.
        own_time: A call returns its time itself, in seconds: what events on a GPU say, for example. The clock then only
            keeps the time limit.
        settle: Seconds of untimed runs of the same candidate before each timed one: as many as fit, by the median of
            the warm-up, and one at least unless all take longer; see the module.
        protocol: What the caller knows (precision, threads, what is inside the clock); recorded as it is.

    Raises:
        ValueError: No candidates, or numbers that make no protocol.
        Exception: Whatever a candidate raises, as it is.
    """
    if not candidates:
        raise ValueError("there is nothing to measure")
    _check_protocol(warmup, warmup_limit, rounds, seconds, batch, settle)
    turns = _Turns(candidates, seed, clock, own_time)
    with _no_garbage_collection():
        warm = turns.warm_up(warmup, warmup_limit, seconds)
        untimed = {name: settling_runs(values, settle) for name, values in warm.items()}
        # One for all where there is one for any: the quicker would otherwise find their weights in the caches, and the
        # slower would not.
        least = min(1, max(untimed.values()))
        turns.untimed = {name: max(count, least) for name, count in untimed.items()}
        samples = turns.repeat(rounds, seconds)
    names = list(candidates)
    times = {name: np.asarray(values, np.float64) for name, values in samples.items()}
    return Comparison(
        baseline=names[0],
        latencies={name: Latency.from_seconds(values, batch) for name, values in times.items()},
        ratios={name: Ratio.from_seconds(values, times[names[0]]) for name, values in times.items()},
        seconds=times,
        protocol={
            "warmup_rounds": len(warm[names[0]]),
            "warmup_stable": all(map(is_stable, warm.values())),
            "rounds": len(times[names[0]]),
            "rounds_asked": rounds,
            "seconds_limit": seconds,
            "order": f"interleaved, shuffled each round, seed {seed}",
            "interleaved_with": names,
            "settle_seconds": settle,
            "untimed_before_each": turns.untimed,
            "percentiles": "nearest rank",
            "interval": "95 % of the median, binomial order statistics",
            "outliers_dropped": 0,
            "garbage_collector": "off",
            "batch": batch,
            **(protocol or {}),
        },
    )


def _check_protocol(
    warmup: int, warmup_limit: int, rounds: int | None, seconds: float | None, batch: int, settle: float
) -> None:
    if warmup < 0 or warmup_limit < warmup or (rounds is not None and rounds < 1) or batch < 1:
        raise ValueError(f"no protocol: warmup {warmup}..{warmup_limit}, rounds {rounds}, batch {batch}")
    if rounds is None and seconds is None:
        raise ValueError("give rounds, seconds or both")
    if seconds is not None and not seconds > 0:
        raise ValueError(f"seconds is {seconds}, expected a positive number")
    if settle < 0:
        raise ValueError(f"settle is {settle}, expected seconds, 0 or more")


class _Turns:
    """Rounds of all candidates, each round in an order drawn anew; arguments as of :func:`measure`.

    Attributes:
        untimed: By candidate, how many runs come before each that is timed.
    """

    def __init__(
        self, candidates: Mapping[str, Callable[[], object]], seed: int, clock: Callable[[], float], own_time: bool
    ):
        self.candidates, self.clock, self.own_time = candidates, clock, own_time
        self.shuffle = random.Random(seed).shuffle
        self.untimed = dict.fromkeys(candidates, 0)

    def warm_up(self, at_least: int, at_most: int, seconds: float | None) -> dict[str, list[float]]:
        """Seconds [round] by candidate, of rounds until times are stable or a limit is reached."""
        times: dict[str, list[float]] = {name: [] for name in self.candidates}
        started = self.clock()
        for done in range(at_most):
            late = seconds is not None and self.clock() - started >= seconds
            if done >= at_least and (late or all(map(is_stable, times.values()))):
                break
            self._add_round(times)
        return times

    def repeat(self, rounds: int | None, seconds: float | None) -> dict[str, list[float]]:
        """Seconds [round] by candidate."""
        times: dict[str, list[float]] = {name: [] for name in self.candidates}
        started = self.clock()
        for done in range(min(rounds or MAX_ROUNDS, MAX_ROUNDS)):
            if done >= MIN_ROUNDS and seconds is not None and self.clock() - started >= seconds:
                break
            self._add_round(times)
        return times

    def _add_round(self, times: dict[str, list[float]]) -> None:
        order = list(self.candidates)
        self.shuffle(order)
        for name in order:
            call = self.candidates[name]
            for _ in range(self.untimed[name]):
                call()
            start = self.clock()
            result = call()
            times[name].append(float(result) if self.own_time else self.clock() - start)


def nearest_rank(values: np.ndarray, percent: float) -> float:
    """The smallest of ``values`` float [n] that at least ``percent`` % of them do not exceed."""
    ordered = np.sort(values)
    # The subtraction keeps 0.99 * 100 = 99.00000000000001 from becoming rank 100.
    rank = math.ceil(len(ordered) * percent / 100 - 1e-9)
    return float(ordered[max(rank, 1) - 1])


def median_interval(values: np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """Confidence interval of the median without assuming a distribution.

    The interval [x(j), x(n + 1 - j)] of order statistics misses the median with probability 2 * P(Binomial(n, 1/2) < j)
    (e.g. Hollander and Wolfe, Nonparametric Statistical Methods, 3.6); j is the largest for which that is at most
    1 - confidence. Fewer than six values cannot give 95 %; then it is their range.
    """
    ordered = np.sort(values)
    count = len(ordered)
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, count + 1)))])
    log_chance = log_factorial[-1] - log_factorial - log_factorial[::-1] - count * math.log(2)
    missed = 2 * np.cumsum(np.exp(log_chance))  # [j - 1]: probability that [x(j), x(n + 1 - j)] misses the median
    j = max(1, int(np.searchsorted(missed[: (count + 1) // 2], 1 - confidence, side="right")))
    return float(ordered[j - 1]), float(ordered[count - j])


def is_stable(times: Sequence[float]) -> bool:
    """Whether the medians of the last two windows of ``times`` agree."""
    if len(times) < 2 * WARMUP_WINDOW:
        return False
    before = float(np.median(times[-2 * WARMUP_WINDOW : -WARMUP_WINDOW]))
    return abs(float(np.median(times[-WARMUP_WINDOW:])) - before) <= WARMUP_TOLERANCE * before


def settling_runs(times: Sequence[float] | np.ndarray, settle: float = SETTLE_SECONDS) -> int:
    """How many runs of the median of ``times`` (seconds) fit into ``settle`` seconds; 0 when nothing is known."""
    return min(int(settle / max(float(np.median(times)), 1e-9)), MOST_SETTLING_RUNS) if len(times) else 0


def _checked(seconds: Sequence[float] | np.ndarray) -> np.ndarray:
    times = np.asarray(seconds, np.float64)
    if times.ndim != 1 or not times.size:
        raise ValueError(f"expected a list of times, found shape {list(times.shape)}")
    if not (np.isfinite(times).all() and (times > 0).all()):
        raise ValueError("a time is not positive: the clock is too coarse for this, or runs backwards")
    return times


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def random_images(
    batch: int, shape: tuple[int, int, int], preprocessing: Preprocessing | None = None, seed: int = 0
) -> np.ndarray:
    """float32 [batch, channel, height, width]: what photos look like after preprocessing, roughly.

    Coarse colour patches with fine noise, as uint8, then normalised. Pure noise or zeros would do for most kernels, not
    for all: denormal numbers slow a CPU down, zeros may let it skip work.
    """
    channels, height, width = shape
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(0, 255, (batch, channels, -(-height // 16), -(-width // 16)))
    pixels = coarse.repeat(16, axis=2).repeat(16, axis=3)[:, :, :height, :width] + rng.normal(0, 10, (batch, *shape))
    pixels = np.clip(np.rint(pixels), 0, 255).astype(np.float32) / np.float32(255)
    mean, std = (0.5,), (0.5,)
    if preprocessing is not None and channels == 3:
        mean, std = preprocessing.mean, preprocessing.std
    return ((pixels - np.float32(mean).reshape(-1, 1, 1)) / np.float32(std).reshape(-1, 1, 1)).astype(np.float32)
