"""The one form of each number, by known answers."""

import math

import pytest

from vpruner.report import numbers


@pytest.mark.parametrize(
    "form, value, shown",
    [
        ("three", 0.0, "0.00"), ("three", 0.84249, "0.842"), ("three", 9.996, "10.0"), ("three", 99.94, "99.9"),
        ("three", 99.96, "100"), ("three", 12345.6, "12,346"), ("three", -1.5, "−1.50"),
        ("quantity", 640, "640"), ("quantity", 11_012, "11.0 k"), ("quantity", 999_600, "1.00 M"),
        ("quantity", 1.2575e9, "1.26 G"), ("quantity", 1.5e12, "1.50 T"),
        ("size", 999, "999 B"), ("size", 1000, "1.00 kB"), ("size", 6_500_000, "6.50 MB"), ("size", 2.1e9, "2.10 GB"),
        ("milliseconds", 0.0137, "0.0137 ms"), ("milliseconds", 1234.5, "1,234 ms"), ("seconds", 1234.56, "1,234.6 s"),
        ("percent", 0.781, "78.10 %"), ("share", 0.64784, "0.6478"), ("decimal", -0.25, "−0.2500"),
        ("points", -0.008, "−0.80 pp"), ("points", 0.0833, "+8.33 pp"), ("points", -1e-9, "±0.00 pp"),
        ("deviation", -0.049, "−4.9 %"), ("deviation", 0.0, "±0.0 %"),
        ("error", 4.4e-6, "4.4e-06"), ("error", 0, "0"), ("ratio", 0.694, "0.694×"),
    ],
)  # fmt: skip
def test_each_form(form, value, shown):
    assert getattr(numbers, form)(value) == shown
    assert getattr(numbers, form)(None) == "–"


def test_a_ratio_has_its_interval():
    assert (
        numbers.ratio(0.694, 0.68, 0.71)
        == "0.694× (0.680 to 0.710)"
        == numbers.ratio_of({"ratio": 0.694, "ratio_low": 0.68, "ratio_high": 0.71})
    )
    assert numbers.ratio_of({"decode_ratio": 1.1}, "decode_ratio") == "1.100×"
    assert numbers.ratio_of({"ratio": "fast"}) == ""


@pytest.mark.parametrize(
    "metric, value, low, high, shown",
    [
        ("top1", 0.781, 0.762, 0.799, "78.10 % (76.20 to 79.90)"),
        ("top1_difference", -0.008, -0.0151, 0.0009, "−0.80 pp (−1.51 to +0.09)"),
        ("accuracy_difference", 0.5, 0.25, 0.75, "+50.00 pp (+25.00 to +75.00)"),
        ("agreement", 1.0, 0.9, 1.0, "100.00 % (90.00 to 100.00)"),
        ("kl", 0.0331, 0.029, 0.0372, "0.0331 (0.0290 to 0.0372)"),
        ("cosine", -0.5, -0.75, -0.25, "−0.5000 (−0.7500 to −0.2500)"),
    ],
)
def test_an_estimate_is_its_value_and_its_interval(metric, value, low, high, shown):
    row = {"metric": metric, "value": value, "low": low, "high": high}
    assert numbers.estimate(row) == shown
    # One image has no spread, and of an edited row nothing may be known.
    assert numbers.estimate({**row, "low": None, "high": None}) == f"{shown.partition(' (')[0]} (no interval)"
    assert numbers.estimate({"metric": metric, "value": value}) == shown.partition(" (")[0]
    assert numbers.estimate({**row, "value": math.nan}).startswith("–")


def test_where_there_is_no_row_there_is_nothing():
    assert numbers.estimate({}) == "" == numbers.estimate(None)


@pytest.mark.parametrize("value", [None, "1", True, math.nan, math.inf, [1], {}])
def test_what_is_no_finite_number_is_none(value):
    assert numbers.number({"p50_ms": value}, "p50_ms") is None


def test_a_number_is_read_from_a_row_alone():
    assert numbers.number({"count": 3}, "count") == 3
    assert numbers.number("count", "count") is None
