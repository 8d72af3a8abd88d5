"""Each JSON that vpruner reads, gone wrong by seed, through all that is done with it short of running a model."""

import json
from pathlib import Path

import fuzz
import numpy as np
import pytest
from latency_tables import macs_table

from vpruner.core.content_plan import ContentPlan, load_plan, rankings
from vpruner.core.cost import plan_macs
from vpruner.core.errors import UserError
from vpruner.core.latency_table import LatencyTable
from vpruner.core.metadata import ModelMetadata
from vpruner.core.plan import TokenPlan
from vpruner.pipeline.compare.files import rows_of_earlier
from vpruner.report.compare import write_comparison
from vpruner.report.profile import write_profile_report
from vpruner.report.run import write_report
from vpruner.runtime.cuda import DeviceProperties
from vpruner.runtime.sidecar import EngineRecord

RECORDED = Path(__file__).parent / "recorded"


def read_plan(path: Path, output: Path) -> None:
    found = load_plan(path)
    plan = found.plan if isinstance(found, ContentPlan) else found
    assert TokenPlan.from_json(json.loads(json.dumps(plan.to_json()))).digest == plan.digest
    plan_macs(plan)
    str(plan), plan._repr_html_()
    found.save(output / "plan.json")
    assert load_plan(output / "plan.json").digest == found.digest


def read_table(path: Path, output: Path) -> None:
    table = LatencyTable.load(path)
    assert np.isfinite(table.dense_ms) and table.dense_ms > 0
    table.remarks(threads=2, batch=1, model="m"), table.summary(), table.error_remark()
    table.save(output / "table.json")
    assert LatencyTable.load(output / "table.json").sha256 == table.sha256


def read_record(path: Path, output: Path) -> None:
    engine = path.with_suffix("")
    record = EngineRecord.load(engine)
    device = DeviceProperties("Orin", "8.7", 1 << 30, "12.6", "12.6", "560.35.03")
    ModelMetadata.from_props(record.metadata, engine.name)
    record.save(output / engine.name)
    for check in (lambda: record.check_machine(engine, device, "10.3.0"), lambda: record.check_files(engine)):
        try:
            check()
        except UserError:
            pass  # Of another machine; what it says is made all the same.


def read_metadata(path: Path, output: Path) -> None:
    """Each line is a property of an ONNX file, and a property is text."""
    found = ModelMetadata.from_props(
        dict(zip(PROPS, path.read_text(errors="replace").split("\n"), strict=False)), "x.onnx"
    )
    assert ModelMetadata.from_props(found.to_props(), "x.onnx").to_props() == found.to_props()


def report_latencies(path: Path, output: Path) -> None:
    write_profile_report([path], output)


def report_run(path: Path, output: Path) -> None:
    write_report(output, plan=TokenPlan.load(RECORDED / "static" / "plan.json"))


def lines(name: str) -> list[dict]:
    return [json.loads(line) for line in (RECORDED / name).read_text(encoding="utf-8").splitlines()]


def loaded(name: str) -> dict:
    return json.loads((RECORDED / name).read_text(encoding="utf-8"))


def compare_rows(path: Path, output: Path) -> None:
    kinds = ("compared", "graph", "latency")
    write_comparison(output, [row for row in rows_of_earlier(path) if row.get("kind") in kinds])


RULE = {
    "method": "tome",
    "counts": [17, 13, 10, 10],
    "merges": False,
    "work": [[17, 13, 10], [13, 9, 1], [9, 1, 1]],
    "settings": {"proportional": True},
}
GEOMETRY = TokenPlan.load(RECORDED / "static" / "plan.json").geometry
PROPS = {**loaded("engine/pruned.engine.json")["metadata"], "vpruner.rule": json.dumps(RULE)}
#: Name of the file -> what it holds before it goes wrong, and its reader. Rows go wrong one line at a time.


def plan_by_content() -> dict:
    patches, depth = GEOMETRY.patches, GEOMETRY.depth
    exits = np.array([[depth], [depth - 1], [1]]).repeat(patches, 1)
    exits[1:, ::2] -= 1
    plan = TokenPlan.from_exits("tiny", GEOMETRY, exits)
    channels = np.random.default_rng(0).standard_normal((len(rankings(plan)), GEOMETRY.embed_dim)).round(3)
    return ContentPlan(plan, channels.tolist(), 4.0).to_json()


TARGETS = {
    "plan": ("plan.json", loaded("static/plan.json"), read_plan),
    "plan by content": ("plan.json", plan_by_content(), read_plan),
    "latency table": ("table.json", macs_table(GEOMETRY).to_json(), read_table),
    "record of an engine": ("pruned.engine.json", loaded("engine/pruned.engine.json"), read_record),
    "metadata": ("props.txt", [json.loads(v) if v[0] in "[{" else v for v in PROPS.values()], read_metadata),
    "rows of latencies": ("rows.jsonl", lines("profile.jsonl"), report_latencies),
    "rows of a run": ("results.jsonl", lines("static/results.jsonl"), report_run),
    "rows of a comparison": ("results.jsonl", lines("compare/results.jsonl"), compare_rows),
}


@pytest.mark.parametrize("seeds", fuzz.examples())
@pytest.mark.parametrize("target", TARGETS)
def test_a_file_gone_wrong_is_used_or_refused(target, seeds, tmp_path, monkeypatch):
    name, content, read = TARGETS[target]
    whole = content if isinstance(content, list) else [content]
    output = tmp_path / "out"
    output.mkdir()
    (output / "pruned.engine").touch()
    path = output / name

    def write(faulty: int | None, seed: int = 0) -> None:
        """Of several values one goes wrong, since a reader stops at the first."""
        texts = [value.encode() if isinstance(value, str) else json.dumps(value).encode() for value in whole]
        if faulty is not None:
            bare = isinstance(whole[faulty], str)
            texts[faulty] = fuzz.mutated_bytes(texts[faulty], seed) if bare else fuzz.mutated_json(whole[faulty], seed)
        path.write_bytes(b"\n".join(texts))

    write(None)
    read(path, output)
    if target == "rows of a comparison":  # Drawing takes a second, and is of numbers that are checked before.
        monkeypatch.setattr(
            "vpruner.report.compare.plot_comparison", lambda entries, path: path.write_text("<svg></svg>")
        )
    for seed in seeds:
        write(seed % len(whole), seed)
        with fuzz.survives(seed, output):
            read(path, output)
