"""One name for each measured quantity, and one form for its numbers: on the page and in the terminal.

Every form takes None for what was not measured and shows it as :data:`NOT_MEASURED`. Intervals stand in brackets behind
the value: ``78.10 % (76.20 to 79.90)``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

NOT_MEASURED = "–"
#: Metric of a row -> its name. Of those without labels the strongest comes first.
METRICS = {
    "top1": "top-1 accuracy",
    "top1_difference": "change in top-1",
    "agreement": "agreement with dense",
    "cosine": "cosine to dense",
    "relative_error": "relative squared error",
    "kl": "KL to dense (nats)",
    "accuracy": "accuracy",
    "accuracy_difference": "change in accuracy",
}
_SHARES = ("top1", "agreement", "accuracy")


def number(row: Any, key: str) -> float | None:
    """A finite number of a row, or None for whatever else a row of somebody's may hold."""
    value = row.get(key) if isinstance(row, Mapping) else None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return value


def _if_known(form: Callable[..., str]) -> Callable[..., str]:
    @functools.wraps(form)
    def shown(value: float | None, *more: Any) -> str:
        return NOT_MEASURED if value is None else form(value, *more)

    return shown


@_if_known
def three(value: float) -> str:
    """Three significant digits, zeros included, so that a column has one precision; all digits of larger numbers."""
    return (f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:#.3g}").replace("-", "−")


def _with_unit(value: float, units: Mapping[str, float]) -> str:
    for unit, size in units.items():
        # 999.6 k has three digits as 1.00 M.
        if value >= 0.9995 * size:
            return f"{three(value / size)} {unit}"
    return f"{value:.0f}"


@_if_known
def quantity(value: float) -> str:
    """Multiply-adds or parameters: ``1.26 G``, ``197 k``, ``640``."""
    return _with_unit(value, {"T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3})


@_if_known
def size(value: float) -> str:
    """Bytes: ``6.50 MB``."""
    return _with_unit(value, {"GB": 1e9, "MB": 1e6, "kB": 1e3}) + (" B" if value < 999.5 else "")


@_if_known
def milliseconds(value: float) -> str:
    return f"{three(value)} ms"


@_if_known
def seconds(value: float) -> str:
    return f"{value:,.1f} s"


@_if_known
def percent(value: float) -> str:
    """A share: 0.781 is ``78.10 %``."""
    return f"{100 * value:.2f} %"


@_if_known
def share(value: float) -> str:
    """A share of a budget, whose fourth digit decides whether it is met: ``0.6478``."""
    return f"{value:.4f}"


@_if_known
def decimal(value: float) -> str:
    """A divergence or a similarity: ``0.0331``."""
    return f"{value:.4f}".replace("-", "−")


def _signed(value: float, digits: int) -> str:
    """With its sign, and without a minus zero."""
    text = f"{value:+.{digits}f}"
    return f"±{text[1:]}" if not float(text) else text.replace("-", "−")


@_if_known
def points(value: float) -> str:
    """A difference of two shares, in percentage points: -0.008 is ``−0.80 pp``."""
    return f"{_signed(100 * value, 2)} pp"


@_if_known
def deviation(value: float) -> str:
    """A relative error with its sign: -0.049 is ``−4.9 %``."""
    return f"{_signed(100 * value, 1)} %"


@_if_known
def error(value: float) -> str:
    """A numerical error: ``4.4e-06``."""
    return "0" if value == 0 else f"{value:.1e}"


@_if_known
def ratio(value: float, low: float | None = None, high: float | None = None) -> str:
    """To a baseline, with its interval if there is one: ``0.694× (0.680 to 0.710)``."""
    spread = "" if low is None or high is None else f" ({low:.3f} to {high:.3f})"
    return f"{value:.3f}×{spread}"


def ratio_of(row: Any, name: str = "ratio") -> str:
    """The ratio of a row with its interval; empty where the row has none."""
    value = number(row, name)
    return "" if value is None else ratio(value, number(row, f"{name}_low"), number(row, f"{name}_high"))


def value_of(row: Any, metric: str | None = None) -> str:
    """The value of a row of accuracy, in the form of its metric."""
    return _form(metric or row.get("metric"))(number(row, "value"))


def estimate(row: Any, metric: str | None = None) -> str:
    """Value and interval of a row of accuracy; empty where there is no such row.

    A row that says of its interval that there is none (one image has no spread) is told from one that says nothing.
    """
    if not row:
        return ""
    value = value_of(row, metric)
    if "low" in row and row["low"] is None and value != NOT_MEASURED:
        return f"{value} (no interval)"
    spread = interval(row, metric)
    return value + (f" ({spread})" if spread else "")


def interval(row: Any, metric: str | None = None) -> str:
    """``"76.20 to 79.90"``; empty where the row has no interval. The unit is that of the value."""
    low, high = number(row, "low"), number(row, "high")
    if low is None or high is None:
        return ""
    form = _form(metric or row.get("metric"))
    return " to ".join(form(end).partition(" ")[0] for end in (low, high))


def _form(metric: str | None) -> Callable[[float | None], str]:
    if metric in _SHARES:
        return percent
    return points if str(metric).endswith("_difference") else decimal
