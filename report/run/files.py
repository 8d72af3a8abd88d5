"""The files of a run: how to use them, how they were checked, and what they were made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ... import __version__
from ...core import progress
from ...core.files import file_sha256
from ...core.plan import TokenPlan
from ...core.text import command, counted
from ..blocks import Block, Code, Items, Section, Table, Text
from ..facts import facts
from ..numbers import number, size
from ..results import Results, listed, mapping
from ..tables.run import parity_table, precision_notes, precision_table, timings_table


def usage_section(folder: Path, plan: TokenPlan) -> Section:
    name = "pruned.onnx"
    result = "prediction.label" if plan.geometry.output == "logits" else "prediction.features"
    shell = ["pip install 'vpruner[cpu]'"]
    # For a caller in Python the words name the method alone, and the code below shows it.
    if name in (typed := progress.words(command("predict", name, "IMAGE.jpg"))):
        shell.append(typed)
    blocks: list[Block] = []
    if not (folder / name).is_file():
        blocks.append(Text(f"This run has exported no {name} yet. With one:"))
    blocks += [
        Code("sh", "\n".join(shell)),
        Code(
            "python",
            "import vpruner as vp\n\n"
            f'with vp.open("{name}") as session:\n'
            '    for prediction in session.predict(["IMAGE.jpg"]):\n'
            f"        print({result})",
        ),
        Text(
            "The file is a plain ONNX graph without custom operators, and any ONNX runtime takes it. Preprocessing and "
            "class names are in its metadata. Nothing above needs PyTorch."
        ),
    ]
    return Section("How to use it", blocks)


def parity_section(results: Results) -> Section:
    if not results.parity:
        text = "Not measured: the exported graph was not compared with the model it came from."
        return Section("Parity checks", [Text(text)])
    text = (
        "Each form of the pruned model is compared with one that was checked before it, on the same inputs. A masked "
        "model computes everything and hides what the plan leaves out; a gathered model does not compute it."
    )
    return Section("Parity checks", [Text(text), parity_table(results.parity)])


def precision_sections(results: Results) -> list[Section]:
    """The pruned model in other precisions, against itself in float32; no section where there are none."""
    table, notes = precision_table(results), precision_notes(results)
    blocks: list[Block] = []
    if table:
        text = "Accuracy is on images that no stage has learned from. Each file is timed in turns with pruned.onnx."
        blocks += [Text(text), table]
    if notes:
        blocks.append(Items(tuple(f"{note}." for note in notes)))
    return [Section("Precision", blocks)] if blocks else []


def provenance_section(folder: Path, plan: TokenPlan, results: Results) -> Section:
    run = results.run
    lines = [("vpruner", __version__), ("plan", plan.digest)]
    names = ("command", "model", "target", "target_kind", "loss")
    lines += [(name, str(run[name])) for name in names if run.get(name) is not None]
    if summary := mapping(run.get("deployment")).get("summary"):
        lines.append(("graphs written for", str(summary)))
    lines += [(f"data.{name}", value) for name, value in facts(run.get("data"))]
    rounds = _rounds_sentence(run.get("rounds")) or _rounds_sentence(plan.provenance.get("rounds"))
    said = {"rounds"} if rounds else set()
    if results.stages(plan):
        said.add("stages")
    origin = {name: value for name, value in plan.provenance.items() if name not in said}
    lines += [(f"plan.{name}", value) for name, value in facts(origin)]
    blocks: list[Block] = [Table(("what", "value"), tuple(lines), words=2)]
    if rounds:
        blocks.append(Text(rounds))
    blocks += [table for table in (timings_table(run), _files_table(folder)) if table]
    if not run:
        blocks.append(Text("How the run was made was not recorded beyond what the plan holds."))
    return Section("Provenance", blocks)


def _files_table(folder: Path) -> Table | None:
    models = ("model.safetensors", "tuned.onnx", "dense.onnx", "pruned.onnx", "model.engine")
    names = ("plan.json", *models, "results.jsonl")
    files = [folder / name for name in names if (folder / name).is_file()]
    files += sorted(folder.glob("pruned.*.onnx"))
    rows = tuple((path.name, size(path.stat().st_size), file_sha256(path)) for path in files)
    return Table(("file", "size", "SHA-256"), rows, words=3) if rows else None


def _rounds_sentence(rounds: Any) -> str:
    """How the search was spread over the images, from its list of rounds; empty where that is not recorded."""
    sizes = [number(step, "images") for step in listed(rounds)]
    if not sizes or None in sizes:
        return ""
    least, most = min(sizes), max(sizes)
    images = counted(int(most), "image")
    if len(sizes) == 1:
        return f"Searched in 1 round on {images}."
    return f"Searched in {len(sizes)} rounds on {images if least == most else f'{least:,.0f} to {images}'} each."
