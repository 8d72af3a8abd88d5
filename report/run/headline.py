"""What a reader of a run's report sees first: one sentence, and a few numbers."""

from __future__ import annotations

from ...core.plan import TokenPlan
from ...core.text import counted
from ..blocks import Tile
from ..numbers import METRICS, NOT_MEASURED, interval, milliseconds, number, quantity, ratio, value_of
from ..results import Results, Row, latency_ratio
from ..tables.latency import runtime_of


def headline(plan: TokenPlan, results: Results) -> str:
    """What was gained, what it cost, on what: one sentence."""
    pair, cost = results.headline_latency, results.macs_ratio(plan)
    quantities = [(cost, "multiply-adds", "many", "fewer")]
    if (time := latency_ratio(pair)) is not None:
        quantities.append((time, f"time per {_what_was_timed(pair['pruned'])}", "much", "less"))
    changed, same = [], []
    for value, what, much, less in quantities:
        if percent := round(100 * (value - 1)):
            changed.append(f"{abs(percent)} % {less if percent < 0 else 'more'} {what}")
        else:
            same.append(f"about as {much} {what}")
    takes = f"{' and '.join(changed)} than the dense model" if changed else ""
    if same:
        takes += (" and " if changed else "") + " and ".join(same) + ("" if changed else " as the dense model")
    subject = f"The pruned {plan.model}"
    if plan.is_identity:
        removed = " and only work that nothing reads removed" if cost < 1 else ""
        subject = f"{plan.model}, with every patch kept{removed},"
    return f"{subject} takes {takes}; {_quality_sentence(results)}."


def _quality_sentence(results: Results) -> str:
    metric = results.metric
    if metric is None:
        return "what that costs in quality was not measured"
    row = results.accuracy("pruned", metric)
    images = _images(row)
    on = f" on {images}" if images else ""
    value, difference = value_of(row, metric), results.accuracy("pruned", "top1_difference")
    change = number(difference, "value")
    if metric == "top1" and change is not None:
        dense = results.accuracy("dense", "top1")
        before = f"from {value_of(dense, metric)} " if dense else ""
        spread = interval(difference)
        spread = f", paired 95 % interval {spread}" if spread else ""
        verb = "stays" if abs(change) < 5e-5 else "falls" if change < 0 else "rises"
        moved = f" at {value}" if verb == "stays" else f" {before}to {value}"
        return f"top-1 {verb}{moved} ({value_of(difference)}{spread}){on}"
    return {
        "top1": f"its top-1 is {value}{on}",
        "agreement": f"it gives the dense model's class for {value} of {images or 'the images'}",
        "cosine": f"its features have a {value} cosine similarity to the dense model's{on}",
        "relative_error": f"its outputs have a squared error of {value} relative to the dense model's{on}",
        "kl": f"its outputs diverge from the dense model's by {value} nats{on}",
    }[metric]


def _images(row: Row) -> str:
    """``"2,000 unseen images"``; empty where the row does not say how many."""
    count = number(row, "count")
    return "" if count is None else counted(int(count), "unseen image")


def _what_was_timed(row: Row) -> str:
    batch, threads = number(row, "batch"), number(row, "threads")
    what = "run" if not batch else "image" if batch == 1 else f"batch of {batch:.0f}"
    where = [runtime_of(row)] if runtime_of(row) else []
    where += [counted(int(threads), "thread")] if threads else []
    return what + (f" ({', '.join(where)})" if where else "")


def headline_tiles(plan: TokenPlan, results: Results) -> list[Tile]:
    return [_macs_tile(plan, results), _latency_tile(results), _quality_tile(results), _parity_tile(results)]


def _macs_tile(plan: TokenPlan, results: Results) -> Tile:
    value = results.macs_ratio(plan)
    detail = " → ".join(quantity(results.macs(label, plan)) for label in ("dense", "pruned"))
    return Tile("Multiply-adds", ratio(value), detail, "good" if value < 1 else "plain")


def _latency_tile(results: Results) -> Tile:
    pair = results.headline_latency
    value = latency_ratio(pair)
    if value is None:
        return Tile("Latency, p50", NOT_MEASURED, "not measured")
    times = (number(pair.get(label), "p50_ms") for label in ("dense", "pruned"))
    detail = " → ".join(milliseconds(time) for time in times if time is not None)
    return Tile("Latency, p50", ratio(value), detail, "good" if value < 1 else "bad")


def _quality_tile(results: Results) -> Tile:
    metric = results.metric
    if not metric:
        return Tile("Accuracy", NOT_MEASURED, "not measured")
    row, difference = results.accuracy("pruned", metric), results.accuracy("pruned", "top1_difference")
    if metric == "top1" and number(difference, "value") is not None:
        dense = results.accuracy("dense", "top1")
        detail = " → ".join(value_of(one, metric) for one in (dense, row) if one)
        return Tile(_capital(METRICS["top1_difference"]), value_of(difference), detail)
    images = _images(row)
    return Tile(_capital(METRICS[metric]), value_of(row, metric), f"on {images}" if images else "")


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _parity_tile(results: Results) -> Tile:
    checks = results.parity
    if not checks:
        return Tile("Parity checks", NOT_MEASURED, "not measured")
    passed = sum(bool(row.get("passed")) for row in checks)
    mood, detail = ("good", "passed") if passed == len(checks) else ("bad", "failed: see below")
    return Tile("Parity checks", f"{passed} of {len(checks)}", detail, mood)
