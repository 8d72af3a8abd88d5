"""What a report of measured times says, from rows alone."""

from vpruner.report.profile import profile_sections
from vpruner.report.results import by_setting
from vpruner.report.tables.latency import profile_tables, throughput_table, timing_remarks


def latency(label, batch=1, **changes):
    values = dict(kind="latency", label=label, runtime="tensorrt", provider="cuda", precision="fp16", batch=batch,
                  cuda_graph=True, p50_ms=1.0, p90_ms=1.1, p99_ms=1.2, images_per_s=1000.0,
                  throughput_images_per_s=1200.0)  # fmt: skip
    return {**values, **changes}


POWER = {"watts_mean": 12.5, "joules_per_image": 0.0123, "gpu_mhz": [306, 1300, 1300], "celsius_max": 71.5,
         "throttled": ["power cap"]}  # fmt: skip


def test_what_a_device_did_is_in_the_report():
    rows = [
        latency("dense", power=POWER),
        latency("pruned", ratio=0.6, ratio_low=0.59, ratio_high=0.61, ratio_to="dense",
                protocol={"warmup_stable": False}, remarks=["clocks are not pinned"]),
        latency("dense", batch=8),
        {"kind": "accuracy", "label": "dense"},
    ]  # fmt: skip
    title, lead, tiles, sections = profile_sections(rows)
    by_title = {section.title: section for section in sections}
    (line,) = by_title["Power and clocks"].blocks[0].rows
    assert line == ("dense", "1", "12.5 W", "12.3 mJ", "1300 MHz (306 to 1300)", "71.5 °C", "power cap")
    assert tiles[0].value == "0.600×" and "pruned takes 0.600× the time of dense" in lead and title == "Latency"
    remarks = timing_remarks(rows)
    assert any("the device throttled (power cap)" in one for one in remarks)
    assert any("not stable" in one for one in remarks) and "clocks are not pinned" in remarks
    assert by_title["Throughput"].blocks[0].rows == (("dense", "tensorrt cuda fp16", "1,200", "1,200"),
                                                     ("pruned", "tensorrt cuda fp16", "1,200", "–"))  # fmt: skip


def test_of_rows_for_the_same_thing_the_newest_counts():
    groups = by_setting([latency("a", p50_ms=1.0), latency("a", p50_ms=2.0), latency("a", batch=2)])
    assert [group["a"]["p50_ms"] for group in groups.values()] == [2.0, 1.0]
    assert throughput_table([latency("a")]) is None


def test_times_of_nothing_have_no_ratio():
    rows = [
        {"kind": "blocks", "label": label, "blocks": [{"ms": 0.0}, {"ms": ms}], "total_ms": ms}
        for label, ms in (("dense", 2.0), ("pruned", 1.0))
    ]
    rows[1]["blocks"].append({"ms": 0.0})
    rows[0]["blocks"].append({"ms": 0.1})
    (table,) = profile_tables(rows)
    assert [line[-1] for line in table.rows] == ["", "0.500×", "", "0.500×"]


def test_blocks_without_latency_and_tokens_are_a_report_too():
    row = {"kind": "blocks", "label": "it", "blocks": [{"block": 0, "ms": 1.0}], "stem_ms": 0.5, "total_ms": 1.5}
    _, lead, tiles, sections = profile_sections([row])
    assert not tiles and "without a baseline" in lead
    assert sections[0].blocks[0].text == "Not measured."
    table = sections[1].blocks[1]
    assert table.rows == (("0", "–", "1.00 ms"), ("before the blocks", "", "0.500 ms"), ("all", "", "1.50 ms"))
    assert "carry no protocol" in sections[-1].blocks[0].text
