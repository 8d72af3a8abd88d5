"""Charts are SVG whose shapes lie where the numbers are."""

import xml.etree.ElementTree as ElementTree

import pytest

from vpruner.report.charts import (
    COLOURS,
    HEIGHT,
    Bars,
    Plot,
    blocks_chart,
    curves_chart,
    learning_chart,
    nice_ticks,
    tokens_chart,
)


def shapes(svg, kind):
    return [one for one in ElementTree.fromstring(svg).iter() if one.tag.endswith(kind)]


def points(line):
    return [tuple(map(float, pair.split(","))) for pair in line.get("points").split()]


@pytest.mark.parametrize("most", [0.0, 0.0137, 1.0, 7.3, 197.0, 12345.0])
def test_ticks_are_round_and_reach_the_largest_value(most):
    ticks = nice_ticks(most)
    assert ticks[0] == 0 and ticks[-1] >= most and 2 <= len(ticks) <= 8
    assert len({round(b - a, 9) for a, b in zip(ticks, ticks[1:], strict=False)}) == 1


def test_charts_are_svg_with_a_bar_for_each_block():
    tree = ElementTree.fromstring(
        blocks_chart([Bars("dense <&>", (1.0, 2.0), (10, 10)), Bars("pruned", (1.0, 0.5), (10, 5))])
    )
    bars = [one for one in tree.iter() if one.tag.endswith("rect")]
    heights = [float(one.get("height")) for one in bars]
    assert len(bars) == 4 and heights[1] == pytest.approx(2 * heights[0], abs=0.2)
    assert heights[3] == pytest.approx(0.5 * heights[2], abs=0.2)
    assert "dense <&>, block 1: 2 ms, 10 tokens" in [one[0].text for one in bars]
    assert len([one for one in tree.iter() if one.tag.endswith("polyline")]) == 2


def test_curves_have_a_point_for_each_measurement_and_rings_for_a_plan():
    curves = {"as many queries": [1.0, 2.0, 2.0, 3.0], "4 queries": [0.5, 1.0, 1.0, 1.5]}
    tree = ElementTree.fromstring(curves_chart("keys", curves, [8, 9, 16, 17], [(8, 1.0), (12, 2.0), (12, 2.0)]))
    circles = [one for one in tree.iter() if one.tag.endswith("circle")]
    assert len(circles) == 8 + 2 and len([one for one in tree.iter() if one.tag.endswith("polyline")]) == 2
    points = {one[0].text: float(one.get("cy")) for one in circles}
    many = "as many queries, {} tokens: {} ms"
    assert points[many.format(8, 1)] > points[many.format(9, 2)] == points[many.format(16, 2)]
    assert points["12 tokens, in this plan: 2 ms"] == points[many.format(9, 2)]
    assert points["4 queries, 9 tokens: 1 ms"] == points[many.format(8, 1)]


@pytest.mark.parametrize("least, most", [(-0.3, 0.2), (-26.0, 2.0), (-1.0, -0.5), (0.0, 3.0), (-7.0, 0.0)])
def test_ticks_reach_below_zero_and_hold_it(least, most):
    ticks = nice_ticks(most, least)
    assert ticks[0] <= least and ticks[-1] >= most and 0 in ticks and 2 <= len(ticks) <= 9


def test_a_plot_maps_its_ends_to_its_edges_and_keeps_what_lies_outside_in_it():
    plot = Plot((10, 20), [-1.0, 0.0, 1.0], ("y", "x"))
    assert plot.x(15) == (plot.x(10) + plot.x(20)) / 2 and plot.y(0) == (plot.y(-1) + plot.y(1)) / 2
    assert plot.y(7) == plot.y(1) < plot.y(-1) == plot.y(-7) < HEIGHT
    plot.line([10, 20], [0, 1], "#000", steps=True)
    (line,) = shapes(plot.svg("a <b>"), "polyline")
    corners = [(plot.x(10), plot.y(0)), (plot.x(20), plot.y(0)), (plot.x(20), plot.y(1))]
    assert sum(points(line), ()) == pytest.approx(sum(corners, ()), abs=0.1)
    assert "a &lt;b&gt;" in plot.svg("a <b>")


def test_each_block_has_a_bar_for_what_is_read_attends_and_passes_the_mlp():
    svg = tokens_chart([17, 16, 4], [17, 8, 1], [16, 4, 1], 17)
    bars = {one[0].text: one for one in shapes(svg, "rect")}
    assert list(bars)[::3] == [f"block 0: {what}" for what in ("17 tokens read", "17 that attend",
                                                              "16 in the MLP")]  # fmt: skip
    height = {name: float(one.get("height")) for name, one in bars.items()}
    of_one = height["block 2: 1 that attend"]
    assert height["block 1: 8 that attend"] == pytest.approx(8 * of_one, abs=0.5)
    assert height["block 1: 4 in the MLP"] == pytest.approx(4 * of_one, abs=0.5)
    lefts = [float(one.get("x")) for name, one in bars.items() if name.startswith("block 1")]
    assert lefts == sorted(lefts) and lefts[0] + float(bars["block 1: 16 tokens read"].get("width")) <= lefts[1]
    assert "dense: 17" in [one.text for one in shapes(svg, "text")]


def test_a_rearrangement_is_three_lines_and_one_bad_plan_does_not_flatten_them():
    svg = learning_chart([16, 32, 48], [-900.0, -0.1, 0.05], [0.0, 0.1, 0.2], [0.0, 0.1, 0.2])
    mean, best, chosen = shapes(svg, "polyline")
    assert [one.get("stroke") for one in (mean, best, chosen)] == [COLOURS[0], COLOURS[2], COLOURS[1]]
    assert len(points(best)) == 3 and len(points(chosen)) == 5
    assert points(chosen)[-1] == points(best)[-1] and points(mean)[0][1] > points(best)[0][1]
    assert "−100" in [one.text for one in shapes(svg, "text")]
