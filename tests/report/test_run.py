"""The report says what the rows say, says what is missing, and lets no text of the user become markup."""

import json
import math
import re
import shutil
import sys
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from latency_tables import make_table, stairs
from PIL import Image
from products import each_with_some

from vpruner.cli.hints import TypedSink
from vpruner.core import progress
from vpruner.core.cost import LatencyCost, block_macs, cost_ratio, dense_macs, plan_macs
from vpruner.core.errors import UserError
from vpruner.core.plan import Geometry, TokenPlan
from vpruner.report import run as report
from vpruner.report.render import to_markdown
from vpruner.report.results import Results
from vpruner.report.run.files import precision_sections

RECORDED = Path(__file__).parents[1] / "recorded" / "static"


def make_plan(model="tiny_vit", output="logits", **provenance):
    geometry = Geometry(
        depth=4, embed_dim=64, num_heads=2, head_dim=32, grid=(4, 6), prefix_tokens=1, image_size=(16, 24),
        mlp_macs=2 * 64 * 256, stem_macs=64 * 48 * 24, head_macs=640, outputs=10, output=output,
    )  # fmt: skip
    steps = np.arange(24) % 5
    exits = np.stack([np.minimum(steps + 2, 4), np.minimum(steps + 1, 3), np.clip(steps - 1, 0, 3)])
    return TokenPlan.from_exits(model, geometry, exits, seed=7, weights_sha256="cd" * 32, **provenance)


def estimate(label, metric, value, low, high):
    return {
        "kind": "accuracy",
        "label": label,
        "metric": metric,
        "value": value,
        "low": low,
        "high": high,
        "count": 2000,
    }


def timing(label, p50, ratio, **spread):
    values = {"p50_ms": p50, "p90_ms": 1.2 * p50, "p99_ms": 2 * p50, "images_per_s": 1000 / p50, "ratio": ratio}
    setting = {"batch": 1, "threads": 1, "runtime": "onnxruntime", "provider": "cpu", "precision": "fp32"}
    protocol = {"warmup": 20, "iterations": 300, "clock": {"source": "perf_counter_ns"}}
    described = {"protocol": protocol, "environment": {"cpu": "Example 9000"}}
    return {"kind": "latency", "label": label, **values, **spread, **setting, **described}


def check(name, difference, tolerance):
    compared = {"compared": "64 images", "passed": True}
    return {"kind": "parity", "rung": name, "difference": difference, "tolerance": tolerance, **compared}


def make_rows(**changes):
    """Rows of a complete run; ``changes`` replace values of rows by kind, metric, or kind_label."""
    size = {"parameters": 1_600_000, "file_bytes": 6_500_000}
    run = {
        "kind": "run",
        "model": "tiny_vit",
        "target": 0.65,
        "target_kind": "macs",
        "seconds": {"score": 12.34, "export": 2},
        "peak_memory_bytes": {"score": 812_000_000},
        "command": "vpruner run --target 0.65",
        "loss": "labels",
        "data": {"calibration": {"name": "calibration.tar", "count": 1024, "labels": True, "skipped": 0}},
        "note": [],
    }
    rows = [
        run,
        {"kind": "cost", "label": "dense", **size},
        {"kind": "cost", "label": "pruned", **size},
        estimate("dense", "top1", 0.781, 0.762, 0.799),
        estimate("pruned", "top1", 0.773, 0.754, 0.791),
        estimate("pruned", "top1_difference", -0.008, -0.0151, -0.0009),
        estimate("pruned", "kl", 0.0331, 0.029, 0.0372),
        timing("dense", 1.213, 1.0),
        timing("pruned", 0.842, 0.694, ratio_low=0.68, ratio_high=0.71),
        check("masked = gathered", 3.1e-15, 1e-10),
        check("PyTorch = pruned.onnx", 4.4e-6, 1e-4),
    ]
    for name, values in changes.items():
        for row in rows:
            if name in (row["kind"], row.get("metric"), f"{row['kind']}_{row.get('label')}"):
                row.update(values)
    return rows


def written(folder, rows, plan=None, examples=()):
    html_path, markdown_path = report.write_report(folder, plan=plan or make_plan(), rows=rows, examples=examples)
    return html_path.read_text(encoding="utf-8"), unescape(markdown_path.read_text(encoding="utf-8").replace("\\", ""))


def notes(markdown):
    return markdown.split("## Notes")[1].split("\n## ")[0]


class Outline(HTMLParser):
    """Tags opened and not closed, and every address that the page would load."""

    VOID = frozenset({"meta", "img", "br", "path", "use"})

    def __init__(self, page):
        super().__init__()
        self.open, self.addresses, self.tags = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "xlink:href", "srcset")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "xlink:href", "srcset")]

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_headline_says_what_was_gained_and_what_it_cost(tmp_path):
    page, markdown = written(tmp_path, make_rows())
    percent = round(100 * (1 - cost_ratio(make_plan())))
    sentence = (
        f"The pruned tiny_vit takes {percent} % fewer multiply-adds and 31 % less time per image "
        "(onnxruntime cpu fp32, 1 thread) than the dense model; top-1 falls from 78.10 % to 77.30 % "
        "(−0.80 pp, paired 95 % interval −1.51 to −0.09) on 2,000 unseen images."
    )
    assert sentence in page and sentence in markdown


def test_tables_hold_the_measurements(tmp_path):
    _, markdown = written(tmp_path, make_rows())
    plan = make_plan()
    lines = {line.split(" | ")[0].lstrip("| "): line for line in markdown.splitlines() if line.startswith("|")}
    top1 = "78.10 % (76.20 to 79.90) | 77.30 % (75.40 to 79.10) | −0.80 pp (−1.51 to −0.09)"
    assert top1 in lines["top-1 accuracy"]
    assert f"{plan_macs(plan) / dense_macs(plan.geometry):.3f}×" in lines["MACs"]
    assert "1.21 ms | 0.842 ms | 0.694× (0.680 to 0.710)" in lines["p50, onnxruntime cpu fp32, batch 1, 1 thread"]
    assert "6.50 MB | 6.50 MB | 1.000×" in lines["file size"]
    assert "4.4e-06 | 1.0e-04 | 64 images | passed" in lines["PyTorch = pruned.onnx"]
    assert "perf_counter_ns" in lines["clock.source"] and "Example 9000" in lines["cpu"]
    assert plan.digest in lines["plan"] and "cd" * 32 in lines["plan.weights_sha256"] and "7" in lines["plan.seed"]
    assert "12.3 s | 812 MB" in lines["score"]
    macs = block_macs(plan.geometry, 25, 20, 10)
    block = lines["1"].strip("| ").split(" | ")
    assert block[1:4] == ["24 of 24", "19 of 24", "9 of 24"] and block[4] == f"{macs / 1e3:.0f} k"
    assert block[5] == f"{macs / block_macs(plan.geometry, 25, 25, 25):.3f}×"


def test_page_is_one_well_formed_file_that_loads_nothing(tmp_path):
    page, _ = written(tmp_path, make_rows(), examples=[Image.new("RGB", (24, 16), "teal")] * 2)
    outline = Outline(page)
    assert outline.open == []
    assert outline.tags.count("image") == 2 and outline.tags.count("figure") == 3
    assert all(address.startswith(("data:image/", "#")) for address in outline.addresses)
    assert page.count("<script") == 1 and "@import" not in page and not re.search(r"url\((?!#)", page)
    assert "prefers-color-scheme: dark" in page
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.md"]


def test_the_same_run_gives_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        written(tmp_path / name, make_rows(), examples=[Image.new("RGB", (24, 16), "teal")])
    for name in ("report.html", "report.md"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.parametrize("missing", ["run", "cost", "accuracy", "latency", "parity"])
def test_a_missing_kind_of_row_is_said_and_does_no_harm(tmp_path, missing):
    page, markdown = written(tmp_path, [row for row in make_rows() if row["kind"] != missing])
    Outline(page)
    said = {
        "run": "was not recorded beyond what the plan holds", "cost": "MACs",
        "accuracy": "Accuracy: not measured", "latency": "Latency: not measured",
        "parity": "was not compared with the model",
    }  # fmt: skip
    assert said[missing] in page and said[missing] in markdown


def stage(name, method, label, kept, before, after, **more):
    judged = {"before": before, "after": after, "error": 0.001, "images": 256}
    return {"kind": "stage", "stage": name, "method": method, "label": label, "kept": kept, "seconds": 12.34,
            "held_out": judged, "note": "", **more}  # fmt: skip


def make_stages(**rearranged):
    history = [
        {"episodes": 16 * n, "mean_reward": -0.2 + n / 10, "best_reward": n / 10, "improvement": n / 20}
        for n in range(1, 5)
    ]
    before = make_plan().exits.copy()
    before[:, [0, 4]] = before[:, [4, 0]]
    return [
        stage("search", "fisher", "search", True, 0.0, 0.05, exits=before.tolist()),
        stage("rearrange", "ppo", "rearrange", True, 0.05, 0.04, history=history, episodes=64, incumbents=3)
        | rearranged,
        stage("tune", "weights", "pruned", True, 0.04, 0.02),
        estimate("search", "top1", 0.741, 0.72, 0.76),
        estimate("rearrange", "top1", 0.752, 0.73, 0.77),
        estimate("search", "kl", 0.0512, 0.05, 0.06),
    ]


def test_stages_are_told_apart(tmp_path):
    page, markdown = written(tmp_path, make_rows() + make_stages())
    assert Outline(page).open == [] and Outline(page).tags.count("figure") == 5
    section = markdown.split("## Stages")[1].split("\n## ")[0]
    lines = {line.split(" | ")[0].lstrip("| "): line for line in section.splitlines() if line.startswith("|")}
    assert "| 78.10 % (76.20 to 79.90) | the reference |" in lines["dense"]
    assert (
        "74.10 % (72.00 to 76.00) | 0.0512 (0.0500 to 0.0600) | 0.0000 → 0.0500 | 12.3 s | kept"
        in (lines["search (fisher)"])
    )
    assert "0.0500 → 0.0400" in lines["rearrange (ppo)"] and "77.30 % (75.40" in lines["tune (weights)"]
    assert "divergence, on 256 held-out images" in section and "64 plans were tried" in section
    assert "is read: 1 later, 1 earlier; attends: 1 later, 1 earlier; passes the MLP: 1 later, 1 earlier." in page
    updated, passes = section.split("```text")[1].split("```")[0].strip().split("\n\n")[1:]
    assert updated.splitlines()[:2] == ["is read, attends:", "-2  .  .  . +2  ."]
    assert passes.splitlines()[:2] == ["passes the MLP:", "-3  .  .  . +3  ."] and ". as the search had it" in section
    assert "history" not in markdown


def test_rows_of_a_search_that_dropped_tokens_still_tell_what_was_moved(tmp_path):
    plan, exits = make_plan(), np.arange(24) % 4 + 1
    before = exits.copy()
    before[[0, 3]] = before[[3, 0]]
    plan = TokenPlan.dropping_from_exits(plan.model, plan.geometry, exits)
    _, markdown = written(
        tmp_path, [*make_rows(), stage("search", "fisher", "search", True, 0, 0.1, exits=before.tolist())], plan
    )
    grids = markdown.split("## Stages")[1].split("```text")[1].split("```")[0].strip().split("\n\n")[1:]
    # A patch dropped at block 1 is updated in none; one that is never dropped, in all but the last, where it is dead.
    assert grids[0].splitlines()[:2] == ["is read, attends, passes the MLP:", "-3  .  . +3  .  ."] and len(grids) == 1
    assert written(tmp_path, make_rows(), plan)[1].count("```text") == 1


def test_a_plan_that_is_not_nested_has_no_map_of_exits(tmp_path):
    masks = make_plan().masks.copy()
    masks[0, 1, :2] = False
    plan = TokenPlan.from_masks("tiny_vit", make_plan().geometry, masks)
    page, markdown = written(tmp_path, make_rows() + make_stages(), plan)
    assert not plan.is_nested and "In how many blocks a patch is read" in page and "stops at block" not in page
    assert "search had it" not in page and ". in all blocks" in markdown
    assert "block 1: 22 read, 19 attend, 9 pass the MLP" in page


def test_a_stage_that_was_undone_says_so(tmp_path):
    undone = {"kept": False, "label": "search", "note": "nothing better was found", "history": []}
    page, markdown = written(tmp_path, make_rows() + make_stages(**undone))
    line = next(line for line in markdown.splitlines() if line.startswith("| rearrange"))
    assert "as before" in line and line.endswith("| undone |")
    assert "- nothing better was found" in markdown and Outline(page).tags.count("figure") == 4


def test_what_a_stage_says_is_said_once_beside_its_numbers(tmp_path):
    note = "rearrangement stopped at its time limit after 64 of 384 episodes"
    rows = [{**row, "note": [note, "another remark"]} if row["kind"] == "run" else row for row in make_rows()]
    _, markdown = written(tmp_path, rows + make_stages(note=note))
    notes, stages = (markdown.split(f"## {name}")[1].split("\n## ")[0] for name in ("Notes", "Stages"))
    assert note in stages and note not in notes and "another remark" in notes
    assert "another remark" in written(tmp_path, rows)[1] and note in written(tmp_path, rows)[1]


def test_columns_of_the_latency_table_that_are_the_same_in_every_row_are_a_sentence(tmp_path):
    rows = [row for row in make_rows() if row["kind"] == "latency"]
    alike = [{**row, "batch": 1, "threads": 1, "precision": "fp32"} for row in rows]
    section = written(tmp_path, alike)[1].split("## Latency")[1]
    assert "**timed with onnxruntime cpu fp32, batch 1, 1 thread**" in section
    assert "| model | p50 | p90 | p99 | images/s | time / dense |" in section
    section = written(tmp_path, alike + [{**row, "batch": 8, "threads": 4} for row in alike])[1].split("## Latency")[1]
    assert "**timed with onnxruntime cpu fp32**" in section and "| model | batch | threads | p50 |" in section


def test_pictures_and_numbers_fit_the_page(tmp_path):
    page, _ = written(tmp_path, make_rows())
    assert ".wide svg { display: block; max-width: 100%; height: auto;" in page
    # A cell may break before its interval, or eight columns of them are wider than the page.
    assert '<td class="number spread"><span>78.10 %</span> <span>(76.20 to 79.90)</span></td>' in page


def test_results_without_stages_have_no_such_section(tmp_path):
    assert "## Stages" not in written(tmp_path, make_rows())[1]
    # The plan alone knows it too, without the accuracy in between.
    plan = make_plan(stages=[{k: v for k, v in row.items() if k != "kind"} for row in make_stages()[:3]])
    _, markdown = written(tmp_path, make_rows(), plan=plan)
    assert "0.0400 → 0.0200" in markdown and "plan.stages" not in markdown


ODD = [None, "fast", float("nan"), [], {}, [1, "x"], -1]
STAGE_KEYS = ("stage", "method", "label", "kept", "seconds", "held_out", "note", "exits", "history", "episodes")


@pytest.mark.parametrize("key, value", each_with_some(STAGE_KEYS, ODD, 2))
def test_stage_rows_of_another_form_do_no_harm(tmp_path, key, value):
    rows = [{**row, key: value} if row["kind"] == "stage" else row for row in make_rows() + make_stages()]
    page, _ = written(tmp_path, rows)
    assert Outline(page).open == []


@pytest.mark.parametrize("value", ODD)
def test_stages_of_another_form_in_a_plan_do_no_harm(tmp_path, value):
    written(tmp_path, make_rows(), plan=make_plan(stages=value))


def test_the_table_that_a_plan_was_searched_on_is_drawn(tmp_path):
    shape = make_plan().geometry
    cost = LatencyCost(make_table(shape, **stairs(8), tokens=[2, 8, 9, 25], runtime="tensorrt", provider="cuda"), shape)
    facts = cost.to_json(make_plan())
    html_path, markdown_path = report.write_report(tmp_path, plan=make_plan(cost=facts), rows=[])
    page, markdown = html_path.read_text(), markdown_path.read_text()
    # Attention over keys for some numbers of queries, and the MLP.
    assert "as many queries, 9 tokens: 0.62 ms" in page and "9 queries, 25 tokens: 0.78 ms" in page
    assert "MLP, 9 tokens: 0.32 ms" in page and "MLP of a block by its tokens, measured on tensorrt cuda fp32" in page
    keys, ms = make_plan().key_counts[0], facts["block_attention_ms"][0]
    assert f"{keys} tokens, in this plan: {ms:.4g} ms" in page and "    9 tokens in the MLP  0.320 ms" in markdown
    damaged = ({"tokens": [2, 8]}, {"mlp_ms": None}, {"split_ms": 3}, {"block_mlp_ms": ["a"]}, {"whole_ms": [-1] * 4})
    for change in damaged:
        html_path, _ = report.write_report(tmp_path, plan=make_plan(cost={**facts, **change}), rows=[])
        assert html_path.read_text().count("measured on tensorrt") == (2 if "split_ms" in change else 1)
    for useless in ({"keys": [2, 16], "whole_ms": [1.0, 2.0]}, {"kind": "macs"}, None):
        html_path, _ = report.write_report(tmp_path, plan=make_plan(cost=useless), rows=[])
        assert "in this plan" not in html_path.read_text()


def test_what_a_latency_table_promised(tmp_path):
    promise = {
        "kind": "prediction", "label": "pruned", "predicted_ms": 0.8, "predicted_ratio": 0.66, "measured_ms": 0.842,
        "measured_ratio": 0.694, "error_ms": -0.05, "error_ratio": -0.049,
    }  # fmt: skip
    rows = [*make_rows(run={"target_kind": "latency"}), promise]
    _, markdown = written(tmp_path, rows, plan=make_plan(ratio=0.648))
    assert "| time / dense | 0.660× | 0.694× | −4.9 % |" in markdown
    assert "| p50 of the pruned model | 0.800 ms | 0.842 ms | −5.0 % |" in markdown
    assert "is met by the latency table: asked for 0.6500" in notes(markdown)
    assert "multiply-adds, this plan takes" not in notes(markdown)


def test_what_gates_cost(tmp_path):
    gates = {"kind": "gates", "p50_ms": 0.842, "ungated_p50_ms": 0.83, "ratio": 1.0145}
    _, markdown = written(tmp_path, [*make_rows(), gates, timing("ungated", 0.83, 0.684)])
    assert "| p50 of the pruned model | 0.830 ms | 0.842 ms | 1.014× |" in markdown
    assert "| ungated |" in markdown


def test_no_rows_at_all(tmp_path):
    page, markdown = written(tmp_path, [])
    assert "what that costs in quality was not measured" in markdown and "exported no pruned.onnx yet" in page


NAMES = {"kind", "label", "metric", "rung", "model", "runtime", "provider", "precision"}
NO_NUMBERS = [None, "fast", float("nan"), float("inf"), True, [], {}]


@pytest.mark.parametrize(
    "key, value", each_with_some(sorted({key for row in make_rows() for key in row} - NAMES), NO_NUMBERS, 2)
)
def test_values_that_are_no_numbers_are_not_measured(tmp_path, key, value):
    page, _ = written(tmp_path, [{**row, key: value} if key in row else row for row in make_rows()])
    results = page.split("<section>")[1]
    assert not re.search(r"\b(nan|inf)\b", results)


def test_text_of_the_user_never_becomes_markup(tmp_path):
    evil = "<script>alert(1)</script> | `x` & **b** [l](http://e)"
    rows = make_rows(run={"note": [evil], "command": evil}, latency={"provider": evil}, parity={"rung": evil})
    page, markdown = written(tmp_path, rows, plan=make_plan(model=evil, data=evil))
    assert page.count("<script") == 1 and "<script>alert" not in page and "&lt;script&gt;" in page
    raw = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "<script" not in raw and not re.search(r"(?<!\\)\*\*b", raw)
    tables = [block.splitlines() for block in raw.split("\n\n") if block.startswith("|")]
    assert sum("&lt;script" in line for table in tables for line in table) == 4
    for table in tables:
        bars = {len(re.findall(r"(?<!\\)\|", line)) for line in table}
        assert len(bars) == 1, "a bar in a name must not open a new column"
    assert evil in markdown


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"run": {"target": 0.1}}, "budget was not reached: asked for 0.1000"),
        ({"run": {"target": 0.9}}, "budget is met: asked for 0.9000"),
        ({"run": {"loss": "self"}}, "own predictions. The labels of the calibration images were not used."),
        (
            {"run": {"loss": "self", "data": {"calibration": {"labels": False}}}},
            "own predictions. There were no labels.",
        ),
        (
            {"run": {"loss": "self", "data": None}},
            "- The plan was chosen to preserve the dense model's own predictions.\n",
        ),
        ({"run": {"loss": "features"}}, "no classifier"),
        ({"run": {"note": ["kept the Fisher plan"]}}, "kept the Fisher plan"),
        (
            {"run": {"data": {"evaluation": {"skipped": 3}}}},
            "3 files of the evaluation data could not be read and were",
        ),
        ({"run": {"data": {"evaluation": {"skipped": 1}}}}, "1 file of the evaluation data could not be read and was"),
        ({"latency_pruned": {"ratio": 1.2}}, "not faster here"),
        ({"latency_pruned": {"ratio_high": 1.01}}, "interval of the latency ratio includes 1"),
        ({"latency": {"environment": {"load_average_1m": 5.83, "cores_usable": 2}}}, "load average 5.83 on 2 usable"),
        ({"parity": {"passed": False}}, "Parity checks failed: masked = gathered, PyTorch = pruned.onnx"),
        ({"top1_difference": {"high": 0.002}}, "includes 0"),
        (
            {"top1": {"metric": "agreement"}},
            "Top-1 accuracy was not measured. Agreement with the dense model does",
        ),
        ({"top1": {"metric": "kl"}}, "Top-1 accuracy was not measured. Agreement with the dense model does"),
        ({"top1": {"metric": "cosine"}}, "Similarity to the dense model's features is not accuracy"),
    ],
)
def test_notes_are_honest(tmp_path, changes, said):
    _, markdown = written(tmp_path, make_rows(**changes))
    assert said in notes(markdown)


def test_a_clean_run_has_no_warnings(tmp_path):
    _, markdown = written(tmp_path, make_rows())
    assert not re.search(r"not reached|failed|not faster|includes|skipped|no labels|busy|agreement", notes(markdown))


def test_features_are_not_said_to_agree(tmp_path):
    rows = [row for row in make_rows(run={"loss": "features"}) if row["kind"] != "accuracy"]
    rows.append(estimate("pruned", "cosine", 0.98, 0.97, 0.99))
    _, markdown = written(tmp_path, rows, plan=make_plan(output="features"))
    assert "no classifier" in notes(markdown) and "which of them is right" not in markdown


def test_failed_parity_is_visible_at_the_top(tmp_path):
    page, markdown = written(tmp_path, make_rows(parity={"passed": False}))
    assert 'class="tile bad"' in page and "0 of 2" in page and "FAILED" in markdown


@pytest.mark.parametrize(
    ("metric", "value", "said"),
    [
        ("agreement", 0.931, "it gives the dense model's class for 93.10 % of 500 unseen images."),
        ("cosine", 0.9871, "its features have a 0.9871 cosine similarity to the dense model's on 500 unseen images"),
        ("kl", 0.02, "its outputs diverge from the dense model's by 0.0200 nats on 500 unseen images"),
    ],
)
def test_headline_without_labels(tmp_path, metric, value, said):
    rows = [row for row in make_rows() if row["kind"] != "accuracy"]
    rows.append({"kind": "accuracy", "label": "pruned", "metric": metric, "value": value, "count": 500})
    _, markdown = written(tmp_path, rows)
    assert said in markdown


@pytest.mark.parametrize(
    ("points", "said"), [(0.004, "top-1 rises"), (0.0, "top-1 stays at 77.30 % (±0.00 pp"), (-0.01, "top-1 falls")]
)
def test_headline_tells_the_direction(tmp_path, points, said):
    _, markdown = written(tmp_path, make_rows(top1_difference={"value": points}))
    assert said in markdown


def test_one_image_is_one_image(tmp_path):
    rows = [row for row in make_rows() if row["kind"] != "accuracy"]
    rows += [
        {**estimate("pruned", "agreement", 1.0, 0.2065, 1.0), "count": 1},
        {**estimate("pruned", "kl", 0.02, None, None), "count": 1},
    ]
    page, markdown = written(tmp_path, rows)
    assert "class for 100.00 % of 1 unseen image." in markdown and "on 1 unseen image<" in page
    assert "measured on 1 image that no stage" in markdown
    assert "| KL to dense (nats) | the reference | 0.0200 (no interval) |" in markdown
    assert "None" not in markdown.split("## Notes")[0]


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ([128] * 8, "Searched in 8 rounds on 128 images each."),
        ([16, 16, 15], "Searched in 3 rounds on 15 to 16 images each."),
        ([1024], "Searched in 1 round on 1,024 images."),
        ([1, 1], "Searched in 2 rounds on 1 image each."),
    ],
)
def test_rounds_are_one_sentence(tmp_path, sizes, said):
    steps = [{"images": n, "ratio": 0.8, "importance_lost": 0.1, "quadratic_estimate": 0.2} for n in sizes]
    _, markdown = written(tmp_path, make_rows(), plan=make_plan(rounds=steps))
    assert said in markdown.split("## Provenance")[1] and "importance_lost" not in markdown
    _, markdown = written(tmp_path, make_rows(run={"rounds": steps}))
    assert said in markdown.split("## Provenance")[1]


@pytest.mark.parametrize("rounds", [8, [], [5], [{"images": "x"}], "abc", [{}]])
def test_rounds_of_another_form_do_no_harm(tmp_path, rounds):
    _, markdown = written(tmp_path, make_rows(), plan=make_plan(rounds=rounds))
    assert "Searched in" not in markdown and "plan.rounds" in markdown


def test_a_plan_that_keeps_everything_is_not_called_pruned(tmp_path):
    shape = make_plan().geometry
    rows = make_rows(top1_difference={"value": 0.0, "low": -0.0019, "high": 0.0019}, run={"target": 1.0})
    _, markdown = written(tmp_path, rows, plan=TokenPlan.identity("tiny_vit", shape))
    percent = round(100 * (1 - cost_ratio(TokenPlan.identity("tiny_vit", shape))))
    assert (
        "tiny_vit, with every patch kept and only work that nothing reads removed, takes "
        f"{percent} % fewer multiply-adds and 31 % less time per image" in markdown
    )
    assert "budget is met" in notes(markdown) and "includes 0" not in notes(markdown)
    pooled = TokenPlan.identity("tiny_vit", replace(shape, head_patches=True))
    _, markdown = written(tmp_path, make_rows(latency_pruned={"ratio": 1.001}), plan=pooled)
    sentence = "tiny_vit, with every patch kept, takes about as many multiply-adds and about as much time per image (on"
    assert sentence in markdown and "1 thread) as the dense model; top-1" in markdown
    _, markdown = written(tmp_path, make_rows(), plan=pooled)
    assert "1 thread) than the dense model and about as many multiply-adds; top-1" in markdown


def test_slower_is_called_more_time(tmp_path):
    _, markdown = written(tmp_path, make_rows(latency_pruned={"ratio": 1.2}))
    assert "20 % more time per image" in markdown


def test_what_choosing_tokens_costs_is_counted(tmp_path):
    plan = make_plan()
    rows = make_rows(cost_dense={"macs": dense_macs(plan.geometry)}, cost_pruned={"macs": plan_macs(plan) + 50_000})
    _, markdown = written(tmp_path, rows)
    assert "Choosing the patches of each image takes 50.0 k MACs that" in notes(markdown)
    assert f"this plan takes {(plan_macs(plan) + 50_000) / dense_macs(plan.geometry):.4f}" in notes(markdown)
    assert "Choosing the patches" not in notes(written(tmp_path, make_rows())[1])


def test_the_last_of_repeated_rows_counts(tmp_path):
    rows = make_rows()
    old = [{**row, "value": 0.5} if row["kind"] == "accuracy" else row for row in rows]
    assert written(tmp_path, old + rows)[1] == written(tmp_path, rows)[1]


def test_batch_one_is_what_the_headline_is_about(tmp_path):
    rows = make_rows()
    batched = [{**row, "batch": 32, "ratio": 0.5} for row in rows if row["kind"] == "latency"]
    _, markdown = written(tmp_path, batched + rows)
    assert "31 % less time per image" in markdown and "0.500×" in markdown


def test_plan_and_rows_are_read_from_the_folder(tmp_path):
    for name in ("plan.json", "results.jsonl"):
        shutil.copy(RECORDED / name, tmp_path)
    html_path, _ = report.write_report(tmp_path)
    page = html_path.read_text(encoding="utf-8")
    rows = [json.loads(line) for line in (RECORDED / "results.jsonl").read_text().splitlines()]
    assert page == written(tmp_path, rows, plan=TokenPlan.load(RECORDED / "plan.json"))[0]
    assert page != written(tmp_path, rows[:1], plan=TokenPlan.load(RECORDED / "plan.json"))[0]


def test_a_folder_without_a_plan_is_the_users_to_mend(tmp_path):
    with pytest.raises(UserError, match="model.prune"):
        report.write_report(tmp_path)


def test_usage_fits_the_model(tmp_path):
    (tmp_path / "pruned.onnx").write_bytes(b"graph")
    page, _ = written(tmp_path, [], plan=make_plan(output="features"))
    assert "prediction.features" in page and "exported no" not in page
    page, markdown = written(tmp_path, [])
    assert "prediction.label" in page
    snippet = markdown.split("```python\n")[1].split("```")[0]
    compile(snippet, "snippet", "exec")
    # Who called a function is not told what to type.
    assert "vpruner predict" not in page
    with progress.reporting(TypedSink()):
        assert "vpruner predict pruned.onnx IMAGE.jpg" in written(tmp_path, [])[1]


def test_a_failure_leaves_the_old_report(tmp_path, monkeypatch):
    written(tmp_path, make_rows())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*_):
        raise RuntimeError("stop")

    monkeypatch.setattr("vpruner.report.render.to_markdown", fail)
    with pytest.raises(RuntimeError):
        written(tmp_path, [])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_charts_need_no_plotting_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page, _ = written(tmp_path, make_rows() + make_stages())
    assert page.count('<figure class="chart">') == 4


def test_large_pictures_stay_small_in_the_file(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (512, 768, 3), np.uint8))
    plan = TokenPlan.identity("big", Geometry(12, 8, 2, 4, (32, 48), 1, (512, 768)))
    page, _ = written(tmp_path, [], plan=plan, examples=[noise])
    assert "data:image/jpeg" in page and "data:image/png" not in page and len(page) < 1_500_000


def test_no_more_examples_than_a_page_takes(tmp_path):
    page, _ = written(tmp_path, [], examples=[Image.new("RGB", (24, 16))] * 9)
    assert page.count("<image ") == report.MOST_EXAMPLES


def precision_row(name, **changes):
    same, top1, change = (
        dict(metric=metric, value=value, low=value - 0.01, high=value + 0.01, count=2000)
        for metric, value in (("agreement", 0.985), ("top1", 0.77), ("top1_difference", -0.002))
    )
    row = {"kind": "precision", "precision": name, "label": f"pruned.{name}", "file": f"pruned.{name}.onnx"}
    row |= {"failure": None, "images": 2000, "max_relative_error": 0.14, "file_bytes": 1_820_000, "p50_ms": 2.1}
    row |= {"ratio": 0.675, "top1_agreement": same, "top1_converted": top1, "top1_difference": change}
    return row | {"calibrated_on": None, "computed": "onnxruntime", "latency_note": None, "beyond": []} | changes


def test_precisions_are_shown_against_float32(tmp_path):
    rows = [
        *make_rows(),
        {**check("pruned.int8.onnx stays near pruned.onnx", 0.14, 0.5), "precision": "int8", "passed": False},
        precision_row("int8", calibrated_on=128, beyond=["top-1 changes by -2.00 pp"]),
        precision_row(
            "bf16", p50_ms=None, ratio=None, computed="float32 emulation", latency_note="not timed: no kernels"
        ),
        {"kind": "precision", "precision": "fp16", "file": "pruned.fp16.onnx", "failure": "a weight is too large"},
    ]
    page, text = written(tmp_path, rows)
    assert "| int8 | 77.00 % (76.00 to 78.00) | −0.20 pp (−1.20 to +0.80) | 98.50 % (97.50 to 99.50) |" in text
    assert "| fp32 | 77.30 % (75.40 to 79.10) |  | the reference |  | 6.50 MB | 0.842 ms |  |" in text
    assert "| 1.4e-01 | 1.82 MB | 2.10 ms | 0.675× |" in text
    assert "| – |  |" in next(line for line in text.splitlines() if line.startswith("| bf16"))
    for said in (
        "pruned.onnx in other precisions, compared with fp32, on 2,000 images",
        "int8: calibrated on 128 images.",
        "int8 costs more than expected: top-1 changes by -2.00 pp.",
        "bf16: accuracy is that of float32 with every value rounded",
        "bf16: not timed: no kernels.",
        "pruned.fp16.onnx was left out: a weight is too large.",
    ):
        assert said in text and said in page.replace("&#x27;", "'"), said
    # A precision that costs more than it should is no fault of the exported file.
    assert "Parity checks failed" not in text and "pruned.int8.onnx stays near pruned.onnx" in text


def test_runs_in_float32_alone_have_no_such_section(tmp_path):
    assert "## Precision" not in written(tmp_path, make_rows())[1]


@pytest.mark.parametrize("value", ["many", math.nan, [], {}, True])
def test_precision_rows_of_another_form_do_no_harm(value):
    row = precision_row("int8")
    for name in set(row) - {"kind", "failure"}:
        (section,) = precision_sections(Results(({**row, name: value},)))
        text = to_markdown("", "", [section])
        assert text.count("1.82 MB") == (name != "file_bytes"), name
