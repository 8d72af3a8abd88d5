"""Tables for terminal and page, from made-up rows with known answers, and from rows of an earlier version."""

import io
from pathlib import Path

import pytest
from latency_tables import make_table, stairs

from vpruner.cli import console
from vpruner.core.geometry import Geometry
from vpruner.core.plan import TokenPlan
from vpruner.core.rows import read_rows
from vpruner.report.blocks import Table
from vpruner.report.entries import entries_of
from vpruner.report.results import Results, by_setting
from vpruner.report.tables import compare, latency, plan, run, vlm

RECORDED = Path(__file__).parents[1] / "recorded"


def accuracy(label, metric, value, half, count=12):
    row = {"kind": "accuracy", "label": label, "metric": metric, "value": value, "count": count}
    return {**row, "low": value - half, "high": value + half}


def timed(label, p50, **changes):
    row = {"kind": "latency", "label": label, "runtime": "onnxruntime", "provider": "cpu", "precision": "fp32"}
    row |= {"batch": 1, "threads": 1, "p50_ms": p50, "p90_ms": p50, "p99_ms": 2 * p50, "images_per_s": 1000 / p50}
    return {**row, "ratio_to": "dense", **changes}


RUN = [
    {"kind": "run", "model": "tiny", "target": 0.5, "target_kind": "macs", "seconds": {"Folding": 1.25}},
    {"kind": "cost", "label": "dense", "macs": 200_000, "parameters": 11_012, "file_bytes": 50_000},
    {"kind": "cost", "label": "pruned", "macs": 100_000, "parameters": 11_012, "file_bytes": 51_000},
    accuracy("dense", "top1", 0.75, 0.05),
    accuracy("pruned", "top1", 0.70, 0.05),
    accuracy("pruned", "top1_difference", -0.05, 0.02),
    accuracy("pruned", "kl", 0.03, 0.01),
    timed("dense", 2.0),
    timed("pruned", 1.5, ratio=0.74, ratio_low=0.7, ratio_high=0.78),
]


def test_the_summary_of_a_run():
    table = run.summary_table(Results(tuple(RUN)))
    assert table.title == "tiny at 0.5 of its MACs; accuracy on 12 images"
    assert table.header == ("", "dense", "pruned", "change")
    assert table.rows == (
        ("top-1 accuracy", "75.00 % (70.00 to 80.00)", "70.00 % (65.00 to 75.00)", "−5.00 pp (−7.00 to −3.00)"),
        ("KL to dense (nats)", "the reference", "0.0300 (0.0200 to 0.0400)", ""),
        ("MACs", "200 k", "100 k", "0.500×"),
        ("parameters", "11.0 k", "11.0 k", "1.000×"),
        ("file size", "50.0 kB", "51.0 kB", "1.020×"),
        ("p50, onnxruntime cpu fp32, batch 1, 1 thread", "2.00 ms", "1.50 ms", "0.740× (0.700 to 0.780)"),
    )
    assert run.timings_table(RUN[0]).rows == (("Folding", "1.2 s", "–"),)
    assert run.timings_table({}) is None


def test_stages_with_and_without_their_accuracy():
    held_out = {"before": 0.05, "after": 0.02, "images": 16}
    stages = [
        {"stage": "search", "method": "fisher", "label": "search", "kept": True, "seconds": 1.0, "held_out": held_out},
        {"stage": "rearrange", "method": "ppo", "label": "search", "kept": False, "seconds": 2.0, "held_out": None},
    ]
    table = run.stages_table(stages)
    assert table.header == ("stage", "divergence, on 16 held-out images", "time", "outcome")
    assert table.rows == (
        ("search (fisher)", "0.0500 → 0.0200", "1.0 s", "kept"),
        ("rearrange (ppo)", "–", "2.0 s", "undone"),
    )
    rows = run.stages_table(stages, Results((*RUN, accuracy("search", "top1", 0.6, 0.1)))).rows
    assert rows[0][:3] == ("dense", "75.00 % (70.00 to 80.00)", "the reference")
    assert rows[1][1:3] == ("60.00 % (50.00 to 70.00)", "") and rows[2][1:3] == ("as before", "as before")


def test_a_search_that_could_drop_nothing_says_so():
    (line,) = run.stages_table([{"stage": "search", "method": "fisher", "kept": False, "seconds": 1.0}]).rows
    assert line[-1] == "nothing to drop"


def test_parity_checks_end_with_their_verdict():
    row = {"rung": "one equals the other", "difference": 3e-7, "tolerance": 1e-4, "compared": 1600, "passed": True}
    table = run.parity_table([row, {**row, "passed": False, "near_ties": 2}])
    assert [line[1:] for line in table.rows] == [
        ("3.0e-07", "1.0e-04", "1,600", "passed"), ("3.0e-07", "1.0e-04", "1,600, 2 near-ties", "FAILED")
    ]  # fmt: skip


def test_features_in_another_precision_have_no_columns_of_classes():
    row = {"kind": "precision", "precision": "fp16", "failure": None, "max_relative_error": 0.01, "images": 12}
    table = run.precision_table(Results((*RUN, {**row, "file_bytes": 25_000, "top1_agreement": None})))
    assert table.header == ("precision", "largest relative error", "file size", "p50")
    assert table.rows[1] == ("fp16", "1.0e-02", "25.0 kB", "–")
    assert run.precision_table(Results(tuple(RUN))) is None


def test_settings_that_differ_are_columns():
    rows = [timed("dense", 2.0), timed("pruned", 1.0, ratio=0.5, precision="fp16", batch=8)]
    table = latency.latency_table(rows)
    assert table.header[:3] == ("model", "precision", "batch") and table.header[-1] == "time / dense"
    assert table.words == 3 and table.rows[1][:3] == ("pruned", "fp16", "8") and table.rows[0][-1] == ""
    assert latency.timed_alike(rows) == "onnxruntime cpu, 1 thread"
    assert latency.timed_alike(rows[:1]) == latency.named(rows[0]) == "onnxruntime cpu fp32, batch 1, 1 thread"


def test_without_a_baseline_there_is_no_column_for_it():
    assert latency.latency_table([timed("alone", 2.0, ratio=1.0, ratio_to="alone")]).header[-1] == "images/s"


def test_what_compares_blocks_is_computed_from_times_and_not_from_text():
    """0.00051 and 0.00149 ms round to one digit each in a short form; their ratio does not come from that."""
    one, other = ({"label": n, "blocks": [{"block": 0, "ms": ms}]} for n, ms in (("a", 0.00051), ("b", 0.00149)))
    table = latency.blocks_table({"a": one, "b": other})
    assert table.rows == (("0", "–", "0.000510 ms", "–", "0.00149 ms", "2.922×"),)


# -- rows of an earlier version ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["static", "content", "onnx"])
def test_recorded_runs(name):
    results = Results(tuple(read_rows(RECORDED / name / "results.jsonl")))
    summary = run.summary_table(results)
    assert {"top-1 accuracy", "MACs", "parameters"} <= {row[0] for row in summary.rows}
    assert len(run.stages_table(results.stages(), results).rows) == 1 + len(results.stages())
    assert {row[-1] for row in run.parity_table(results.parity).rows} == {"passed"}
    assert (run.precision_table(results) is None) == (name != "onnx")


def test_recorded_times():
    rows = read_rows(RECORDED / "profile.jsonl")
    for group in by_setting(rows).values():
        table = latency.latency_table(list(group.values()))
        assert len({len(row) for row in table.rows} | {len(table.header)}) == 1
        assert all(row[-1] == "" or "×" in row[-1] for row in table.rows)


def test_a_latency_table_in_words():
    row = {"label": "a", "counts": [], "measured_ms": 2.0, "predicted_ms": 2.1, "error": 0.05}
    shape = Geometry(
        depth=4, embed_dim=64, num_heads=2, head_dim=32, grid=(4, 4), prefix_tokens=1, image_size=(32, 32),
        head_prefix=1, head_patches=False,
    )  # fmt: skip
    made = make_table(
        shape, **stairs(4), tokens=[2, 9, 17], fixed_ms=0.25, pass_ms=0.01, pass_token_ms=0.01, validation=[row]
    )
    table = latency.block_times_table(made)
    assert table.header == ("tokens", "patches", "attention: all attend", "half of all attend", "one attends", "MLP")
    assert table.rows[1] == ("9", "8", "0.540 ms", "0.534 ms", "0.460 ms", "0.240 ms")
    assert [line[0] for line in table.rows[3:]] == ["tokens that skip a block", "outside the blocks", "dense model"]
    assert [line[2] for line in table.rows[3:]] == ["0.180 ms", "0.250 ms", "4.65 ms"]
    assert "1 thread" in table.title and "tiny" in table.title
    assert latency.predictions_table(made).rows == (("a", "2.10 ms", "2.00 ms", "+5.0 %"),)


def test_recorded_comparison():
    entries = entries_of(read_rows(RECORDED / "compare" / "results.jsonl"))
    table = compare.comparison_table(entries)
    assert len(table.rows) == sum(not entry.failure for entry in entries) and table.words == 2


def test_recorded_answers():
    rows = read_rows(RECORDED / "vlm.jsonl")
    times = vlm.vlm_latency_table([row for row in rows if row["kind"] == "vlm_latency"])
    assert times.rows[0][:3] == ("dense", "8.52 ms", "1.000× (1.000 to 1.000)") and times.rows[0][5] == "102 kB"
    answers = [row for row in rows if row["kind"] != "vlm_latency"]
    tables = vlm.vlm_accuracy_tables(answers)
    assert len(tables) == len({row["question_kind"] for row in answers})
    assert all(table.rows[0][0] == "dense" and table.rows[0][3].endswith(")") for table in tables)
    # Rows that were written before the tower was counted, and others.
    assert {row[-1] for row in times.rows} | {row[2] for table in tables for row in table.rows} == {""}
    counted = [{**row, "tower": {"macs": 80 - 20 * ("hybrid" in row["label"])}} for row in answers]
    assert [row[2] for row in vlm.vlm_accuracy_tables(counted)[0].rows] == ["1.000", "0.750"]


def test_recorded_plan_and_analysis():
    loaded = TokenPlan.load(RECORDED / "plan.json")
    table = plan.plan_table(loaded)
    patches = loaded.geometry.patches
    assert table.header[1:4] == (
        "patches read (keys)", "that attend (queries)", "in the MLP",
    )  # fmt: skip
    for place, kind in enumerate(("keys", "queries", "mlps"), 1):
        sets = getattr(loaded, kind)
        assert [row[place] for row in table.rows] == [f"{len(mine)} of {patches}" for mine in sets]
    assert table.title.startswith(f"{loaded.model}: ") and " MACs (" in table.title
    (row,) = read_rows(RECORDED / "analyze.jsonl")
    assert len(plan.analysis_table(row).rows) == len(row["blocks"])


def test_findings_of_one_kind_share_a_note():
    one = {
        "severity": "error",
        "node": "/a",
        "op_type": "If",
        "found": "x",
        "why": "it is",
        "todo": "mend",
        "source": "s",
    }
    table, notes = plan.findings_table([one, {**one, "node": "/b"}, {**one, "why": "another"}])
    assert [row[-1] for row in table.rows] == ["1", "1", "2"]
    assert notes[0] == "1. It is.\n   Mend.\n   Source: s" and len(notes) == 2
    assert plan.findings_table([]) == (None, [])


# -- in the terminal --------------------------------------------------------------------------------------------------


def printed(table, monkeypatch, encoding="utf-8"):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr("sys.stdout", stream)
    console.print_table(table)
    stream.flush()
    return stream.buffer.getvalue().decode(encoding)


def test_a_table_is_as_wide_as_it_needs_to_be(monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    lines = printed(Table(("[b]x[/b]", "n"), (("a" * 80, "1"), ("b", "22")), "title [red]"), monkeypatch).splitlines()
    assert lines[0].rstrip() == "title [red]" and "[b]x[/b]" in lines[2]
    assert f"│ {'a' * 80} │  1 │" in lines and f"│ b{' ' * 79} │ 22 │" in lines
    assert printed(None, monkeypatch) == ""


def test_a_terminal_of_few_letters_shows_plain_ones(monkeypatch):
    text = printed(Table(("x", "y"), (("−0.80 pp", "0.5×"), ("a → b", "–"))), monkeypatch, "ascii")
    assert "-0.80 pp" in text and "0.5x" in text and "a -> b" in text
