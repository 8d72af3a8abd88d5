"""What is said of compared methods, from rows alone: means over seeds, the front, accuracy at equal time."""

import json

import pytest

from vpruner.report.compare import _cut_below, plot_comparison, protocol_sentence, write_comparison
from vpruner.report.entries import at_equal_time, entries_of, pareto
from vpruner.report.tables.compare import comparison_remarks, comparison_table, equal_time_table

DATA = {"name": "train", "count": 64, "labels": True, "sha256": "a"}


def result(method, target, lost, *, seed=None, macs=None, **changes):
    row = {
        "kind": "compared", "method": method, "target": target, "seed": seed, "failure": None, "model": "toy",
        "macs_ratio": macs or target - 0.001, "seconds": 100.0, "cpu_seconds": 12.5, "data": DATA,
        "eval_data": {**DATA, "name": "val", "count": 500}, "form": "static",
    }  # fmt: skip
    row["top1_difference"] = {"value": lost, "low": lost - 0.01, "high": lost + 0.02, "count": 500}
    row["kl"] = {"value": -lost, "low": 0.0, "high": 1.0, "count": 500}
    return {**row, **changes}


def latency(method, target, ratio, *, batch=1, runtime="onnxruntime"):
    return {
        "kind": "latency", "method": method, "target": target, "seed": 0, "batch": batch, "runtime": runtime,
        "p50_ms": 10 * ratio, "ratio": ratio, "ratio_low": ratio - 0.01, "ratio_high": ratio + 0.01, "count": 50,
        "threads": 1, "environment": {"cpu": "a CPU", "packages": {"onnxruntime": "1.20"}},
    }  # fmt: skip


@pytest.fixture
def rows():
    """Ours is the better of two at 0.5; the peer's line goes through (0.8, -1 pp) and (0.6, -5 pp)."""
    return [
        result("v-pruner", 0.5, -0.02, seed=0),
        result("v-pruner", 0.5, -0.04, seed=1),
        result("fisher", 0.5, -0.06, seed=0),
        result("tome", 0.7, -0.01),
        result("tome", 0.5, -0.05),
        result("random", 0.5, -0.09, seed=0),
        latency("dense", 0.5, 1.0),
        latency("v-pruner", 0.5, 0.65),
        latency("fisher", 0.5, 0.64),
        latency("tome", 0.7, 0.8),
        latency("tome", 0.5, 0.6),
        latency("random", 0.5, 0.7),
    ]


def test_seeds_of_one_method_are_one_entry(rows):
    entries = entries_of(rows)
    assert [(e.target, e.method) for e in entries] == [
        (0.7, "tome"), (0.5, "v-pruner"), (0.5, "fisher"), (0.5, "tome"), (0.5, "random"),
    ]  # fmt: skip
    ours = entries[1]
    assert ours.mean("top1_difference") == pytest.approx(-0.03) and ours.macs_ratio == pytest.approx(0.499)
    assert ours.latency_ratio(1) == 0.65 and ours.latency_ratio(8) is None


def test_of_rows_about_the_same_the_last_counts():
    again = [result("tome", 0.5, -0.5), result("tome", 0.5, -0.1)]
    assert entries_of(again)[0].values("top1_difference") == [-0.1]


def test_the_front_by_time_and_by_macs(rows):
    entries = entries_of(rows)
    # fisher is a little faster than v-pruner and worse, tome faster still and better than fisher; random is beaten.
    assert pareto(entries, 1) == {("tome", 0.7), ("v-pruner", 0.5), ("tome", 0.5)}
    # By MACs v-pruner and tome cost the same at 0.5, and v-pruner loses less.
    assert pareto(entries, None) == {("tome", 0.7), ("v-pruner", 0.5)}


def test_costs_within_a_hundredth_are_equal_on_the_front():
    rows = [
        result("a", 0.5, -0.02, macs=0.500),
        result("b", 0.5, -0.03, macs=0.496),
        result("c", 0.5, -0.04, macs=0.48),
    ]
    assert pareto(entries_of(rows), None) == {("a", 0.5), ("c", 0.5)}


def test_a_peer_at_our_time_is_read_off_its_line(rows):
    found = {one.peer: one for one in at_equal_time(entries_of(rows), 1)}
    assert set(found) == {"tome"}  # random is no peer, and fisher is ours
    one = found["tome"]
    # A quarter of the way from 0.6 to 0.8.
    assert one.method == "v-pruner" and one.peer_value == pytest.approx(-0.05 + 0.25 * 0.04) and one.better
    table = equal_time_table([one], 1)
    assert table.header[1:] == ("time of", "time / dense", "ours, change in top-1", "tome at that time")
    assert table.rows == (("0.5", "v-pruner", "0.650×", "−3.00 pp", "−4.00 pp"),)


def test_ours_at_a_time_is_the_best_of_our_methods(rows):
    """The plan by content is slower than the static one, whose line to the dense model has lost less by then."""
    rows = [*rows, result("content", 0.5, -0.025, form="rule"), latency("content", 0.5, 0.79)]
    static, content = at_equal_time(entries_of(rows), 1)[::-1]
    assert (static.method, static.ratio, static.value) == ("v-pruner", 0.65, pytest.approx(-0.03))
    assert (content.method, content.ratio, content.value) == ("content", 0.79, pytest.approx(-0.018))
    assert content.peer_value == pytest.approx(-0.05 + 0.95 * 0.04)
    assert [row[:4] for row in equal_time_table([static, content], 1).rows] == [
        ("0.5", "v-pruner", "0.650×", "−3.00 pp"), ("0.5", "content", "0.790×", "−1.80 pp")
    ]  # fmt: skip


def test_a_peer_that_is_better_is_said_to_be(rows):
    rows = [*rows, result("tome", 0.5, -0.001)]
    (one,) = at_equal_time(entries_of(rows), 1)
    assert one.better is False
    assert equal_time_table([one], 1).rows[0][-1].endswith(", better")


def test_beyond_the_budgets_of_a_peer_there_is_no_value(rows):
    rows = [*rows, latency("v-pruner", 0.5, 0.5)]
    (one,) = at_equal_time(entries_of(rows), 1)
    assert one.peer_value is None and one.better is None
    assert equal_time_table([one], 1).rows[0][-1] == "not measured there"


def test_between_dense_and_its_largest_budget_a_peer_has_a_value(rows):
    rows = [*rows, latency("v-pruner", 0.5, 0.9)]
    (one,) = at_equal_time(entries_of(rows), 1)
    assert one.peer_value == pytest.approx(-0.005)


def test_times_of_pytorch_are_marked_and_not_compared_with_graphs(rows):
    rows += [result("saint", 0.5, -0.001, seed=0), latency("saint", 0.5, 0.2, runtime="pytorch")]
    entries = entries_of(rows)
    assert ("saint", 0.5) not in pareto(entries, 1)
    assert "saint" not in {one.peer for one in at_equal_time(entries, 1)}
    table = comparison_table(entries)
    cells = next(row for row in table.rows if row[1] == "saint")
    assert cells[table.header.index("p50, batch 1")] == "2.00 ms †"
    assert any(line.startswith("†") for line in comparison_remarks(entries))


def test_the_table(rows):
    table = comparison_table(entries_of(rows))
    assert table.header == (
        "budget", "method", "MACs / dense", "change in top-1", "KL to dense (nats)", "p50, batch 1", "time / dense",
        "time / MACs", "made in",
    )  # fmt: skip
    assert table.rows[0][:4] == ("0.7", "tome *", "0.699×", "−1.00 pp (−2.00 to +1.00)")
    assert table.rows[1][1:4] == ("v-pruner *", "0.499×", "−3.00 pp ± 1.41 (2 seeds)")
    assert table.rows[1][5:] == ("6.50 ms", "0.650× (0.640 to 0.660)", "1.303×", "12.5 s")
    assert table.rows[2][1] == "fisher"


def test_what_could_not_be_made_is_said_with_its_reason(rows):
    rows += [
        {"kind": "compared", "method": "evit", "target": 0.5, "seed": None, "failure": "no class token"},
        {"kind": "graph", "method": "fisher", "target": 0.5, "seed": 0, "batch": 1, "failure": "too odd"},
    ]
    entries = entries_of(rows)
    assert "evit" not in {row[1] for row in comparison_table(entries).rows}
    lines = comparison_remarks(entries)
    assert "evit at 0.5: no class token" in lines
    assert "fisher (0.5): no ONNX graph: too odd" in lines


def test_a_failure_that_was_mended_is_none():
    rows = [{**result("evit", 0.5, 0.0), "failure": "broken"}, result("evit", 0.5, -0.1)]
    (entry,) = entries_of(rows)
    assert entry.failure is None and entry.mean("top1_difference") == -0.1


def test_features_are_compared_by_cosine(rows):
    for row in rows:
        if row["kind"] == "compared":
            value = 1 + row.pop("top1_difference")["value"]
            del row["kl"]
            row["cosine"] = {"value": value, "low": value, "high": value, "count": 5}
    entries = entries_of(rows)
    assert pareto(entries, None) == {("tome", 0.7), ("v-pruner", 0.5)}
    (one,) = at_equal_time(entries, 1)
    assert one.metric == "cosine" and one.peer_value == pytest.approx(0.96)


def test_without_labels_less_divergence_is_better(rows):
    for row in rows:
        row.pop("top1_difference", None)
    entries = entries_of(rows)
    assert pareto(entries, None) == {("tome", 0.7), ("v-pruner", 0.5)}
    (one,) = at_equal_time(entries, 1)
    assert one.metric == "kl" and one.peer_value == pytest.approx(0.04) and one.better


def test_the_report_is_written_and_the_same_twice(rows, tmp_path):
    pytest.importorskip("matplotlib")
    names = ["comparison.svg", "comparison.png", "report.html", "report.md"]
    assert [path.name for path in write_comparison(tmp_path, rows)] == names
    first = {name: (tmp_path / name).read_bytes() for name in names}
    write_comparison(tmp_path, rows)
    assert first == {name: (tmp_path / name).read_bytes() for name in names}
    text = first["report.md"].decode()
    assert "v-pruner at 0.5" in text and "At equal measured time" in text and "500 images of val" in text
    assert first["report.html"].count(b"<svg") == 1 and b"axes_2" in first["comparison.svg"]


def graph(method, target, batch, failure):
    return {"kind": "graph", "method": method, "target": target, "seed": 0, "batch": batch, "failure": failure}


@pytest.mark.parametrize("order", [(1, 8), (8, 1)])
def test_a_graph_that_is_missing_at_one_batch_is_said_with_it(rows, order):
    failures = {1: "too small", 8: None}
    rows += [graph("tome", 0.5, batch, failures[batch]) for batch in order]
    (remark,) = (line for line in comparison_remarks(entries_of(rows)) if "no ONNX graph" in line)
    assert remark == "tome (0.5): no ONNX graph: at batch 1: too small"
    rows += [graph("tome", 0.5, 8, "too small")]
    assert "tome (0.5): no ONNX graph: too small" in comparison_remarks(entries_of(rows))


def test_the_protocol_is_that_of_what_was_timed(rows):
    text = protocol_sentence(entries_of(rows))
    assert text.startswith("Graphs of one budget") and "onnxruntime 1.20" in text and "untimed" not in text
    for row in rows:
        if row["kind"] == "latency":
            row["protocol"] = {"settle_seconds": 0.015}
    assert "up to 15 ms of untimed runs" in protocol_sentence(entries_of(rows))
    alone = [result("saint", 0.5, -0.02), latency("saint", 0.5, 0.9, runtime="pytorch")]
    text = protocol_sentence(entries_of(alone))
    assert text.startswith("Methods of one budget") and "onnxruntime" not in text and "dense model" in text


def test_the_best_is_named_with_those_whose_intervals_overlap(rows, tmp_path):
    pytest.importorskip("matplotlib")
    rows[2] = result("fisher", 0.5, -0.07, seed=0)
    write_comparison(tmp_path, rows)
    text = (tmp_path / "report.md").read_text()
    # 3 points wide each: -3 of two seeds overlaps with -5, not with -7.
    assert "v-pruner at 0.5 (change in top-1 −3.00 pp; intervals overlap with tome)" in text
    assert "tome at 0.7 (change in top-1 −1.00 pp)" in text and "on unseen images" in text
    write_comparison(tmp_path, rows, unseen=False)
    text = (tmp_path / "report.md").read_text()
    assert "unseen" not in text and "no method has seen" not in text


def test_a_report_on_nothing_says_why(tmp_path):
    failed = {"kind": "compared", "method": "evit", "target": 0.5, "seed": None, "failure": "no class token"}
    written = write_comparison(tmp_path, [failed], ["evit at 0.5: no class token", "3 images are in both sets"])
    assert [path.name for path in written] == ["report.html", "report.md"]
    text = (tmp_path / "report.md").read_text()
    assert text.count("no class token") == 1 and "3 images are in both sets" in text


def test_without_times_there_is_one_panel(rows, tmp_path):
    pytest.importorskip("matplotlib")
    entries = entries_of([row for row in rows if row["kind"] == "compared"])
    plot_comparison(entries, tmp_path / "plot.svg")
    assert "axes_2" not in (tmp_path / "plot.svg").read_text()
    assert not any("batch" in head for head in comparison_table(entries).header)
    assert json.dumps(comparison_remarks(entries)).count("MACs") == 1


@pytest.mark.parametrize(
    "metric, limits, cut", [("top1_difference", (-40.0, 1.0), (-12.0, 1.0)), ("kl", (0.4, 0.0), (0.12, 0.0))]
)
def test_a_method_that_collapses_does_not_squeeze_the_others(rows, metric, limits, cut):
    class Axis:
        def get_ylim(self):
            return limits

        def set_ylim(self, *limits):
            self.cut = limits

    axis = Axis()
    _cut_below(axis, entries_of([*rows, result("evit", 0.5, -0.4)]), metric)
    assert axis.cut == pytest.approx(cut)
