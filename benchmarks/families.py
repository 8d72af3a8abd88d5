"""What of each family of Vision Transformers can be masked? Tiny models with random weights, exported and pruned.

    python benchmarks/families.py
    python benchmarks/families.py --only Swin --print

Each family of family_models.py is exported by both of PyTorch's exporters, with a fixed and an open batch. Where
onnxruntime runs the file and gives what the model gives, its tokens are followed; a random plan of what can be masked
is folded, and the folded graph is compared with the masked one in onnxruntime. The graph also runs in PyTorch with
gates on its tokens, as learning needs it. Of Keras and JAX there are files that their exporters wrote, and what the
models gave: tests/frameworks. Files that have a row already are left out, unless ``--only`` names them.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import lzma
import signal
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from family_models import FAMILIES, Family
from torch import nn

from vpruner.core.environment import environment
from vpruner.core.files import write_text
from vpruner.core.rows import append_rows, read_rows
from vpruner.export.files import load_model
from vpruner.export.follow import Followed, fold, follow, mask
from vpruner.export.graph_costs import geometry_of
from vpruner.export.graph_gates import GraphGates
from vpruner.export.torch_graph import GraphModule

RESULTS = Path("benchmarks/results/families.jsonl")
RECORDED = Path(__file__).parents[1] / "tests" / "frameworks"
KINDS = ("keys", "queries", "mlps")
#: Images in a batch; more than the exporter saw, so that a batch that is only said to be open shows.
BATCH = 3
#: Largest difference to the model or the masked graph, relative to the largest number of an output.
TOLERANCE = 1e-4
SECONDS = 300


@dataclass(frozen=True)
class Export:
    exporter: str
    opset: int
    open_batch: bool
    recorded: Path | None = None


EXPORTS = tuple(Export(name, opset, batch) for name, opset in (("dynamo", 20), ("torchscript", 17))
                for batch in (False, True))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], help="A family's name; may be given several times.")
    parser.add_argument("--print", action="store_true", dest="shown", help="Write no rows.")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = {key_of(row): row for row in (read_rows(args.output) if args.output.exists() else [])}
    for family in FAMILIES:
        if args.only and family.name not in args.only:
            continue
        before = None if args.only else rows.get((family.name, family.library))
        done = [] if before is None else before["files"]
        exports = [export for export in exports_of(family) if not any(is_of(file, export) for file in done)]
        if not exports:
            continue
        row = row_of(family, exports)
        row["files"] = sorted(done + row["files"], key=lambda file: (file["exporter"] or "", file["open_batch"]))
        print(said(row), flush=True)
        rows[key_of(row)] = row
        if not args.shown:
            # In the order of the list, whichever were tried anew.
            keys = [(one.name, one.library) for one in FAMILIES]
            write_text(args.output, "")
            append_rows(args.output, [rows[key] for key in keys if key in rows])


def exports_of(family: Family) -> list[Export]:
    if family.recorded:
        return sorted(map(_recorded, RECORDED.glob(f"{family.recorded}.*.onnx.xz")), key=_in_order)
    return [export for export in EXPORTS if family.open_batch or not export.open_batch]


def _recorded(path: Path) -> Export:
    """NAME.EXPORTER.onnx.xz, or NAME.EXPORTER.fixed.onnx.xz for one image."""
    exporter, *fixed = path.name.split(".")[1:-2]
    return Export(exporter, opened(path).opset_imports[""], not fixed, path)


def opened(path: Path) -> ir.Model:
    return ir.from_proto(onnx.load_model_from_string(lzma.decompress(path.read_bytes())))


def _in_order(export: Export) -> tuple[str, bool]:
    return export.exporter, export.open_batch


def is_of(file: dict, export: Export) -> bool:
    return (file["exporter"], file["open_batch"]) == (export.exporter, export.open_batch)


def key_of(row: dict) -> tuple[str, str]:
    return row["family"], row["library"]


def row_of(family: Family, exports: Sequence[Export]) -> dict:
    """What became of these files of a family; of none, if the model cannot be made."""
    row = {"schema": 1, "kind": "family", "benchmark": "families", "family": family.name, "library": family.library}
    row |= {"models": family.models, "blocks": family.blocks, "files": []}
    unbuilt: dict = {"exporter": None, "opset": None, "open_batch": False, "problems": {}}
    with stage(unbuilt, "build"):
        module = None if family.recorded else model_of(family)
    if unbuilt["problems"]:
        row["files"].append(unbuilt)
    else:
        row["files"] += [trial(family, module, export) for export in exports]
    return {**row, "tolerance": TOLERANCE, "environment": environment()}


def said(row: dict) -> str:
    """A line for each file."""
    lines = [f"{row['family']} ({row['library']}), {row['blocks']} blocks"]
    for file in row["files"]:
        name = f"{file['exporter']} {file['opset']}, {'open' if file['open_batch'] else 'fixed'} batch"
        masked = "/".join(str(file.get(kind, "-")) for kind in KINDS)
        found = (
            f"{masked} of {file.get('found', '-')}, fold {file.get('folded', '-')}, learns {file.get('learns', '-')}"
        )
        lines.append("  ".join(["", name, found, *(f"| {stage}: {text}" for stage, text in file["problems"].items()),
                                *(f"| {reason}" for reason in file.get("reasons", ()))]))  # fmt: skip
    return "\n".join(lines)


def model_of(family: Family) -> nn.Module:
    """With every parameter moved off its start, so that no bias or scale is trivially 0 or 1."""
    torch.manual_seed(0)
    module = family.build()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return module.eval().requires_grad_(False)


# -- one file ---------------------------------------------------------------------------------------------------------


def trial(family: Family, module: nn.Module | None, export: Export) -> dict:
    """What became of one file, which is there already where there is no module.

    Returns:
        exporter, opset, open_batch; ``problems``, stage -> what was in the way. Where the tokens were followed also
        ``found`` (blocks), how many of them have maskable ``keys``, ``queries`` and ``mlps``, the ``reasons`` of the
        others, ``folded`` (the difference of the folded graph to the masked one) and ``learns``.
    """
    file = {"exporter": export.exporter, "opset": export.opset, "open_batch": export.open_batch, "problems": {}}
    if export.recorded is not None:
        with np.load(RECORDED / f"{family.recorded}.npz") as known:
            images, wanted = torch.from_numpy(known["images"] / np.float32(256)), [known["outputs"][0]]
        with stage(file, "export"):
            dense = run(opened(export.recorded), images, export)
            check("the file", dense, wanted)
        return file if file["problems"] else tried(file, opened(export.recorded), images, wanted, dense, export)
    random = torch.Generator().manual_seed(1)
    images = torch.rand(BATCH if family.open_batch else 1, *family.size, generator=random)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        with stage(file, "export"):
            write(module, images[: 2 if export.open_batch else 1], path, export)
            wanted = as_list(module(images))
            dense = run(load_model(path), images, export)
            check("the file", dense, wanted)
        return file if file["problems"] else tried(file, load_model(path), images, wanted, dense, export)


def tried(file: dict, model: ir.Model, images: torch.Tensor, wanted: list, dense: list, export: Export) -> dict:
    """``file`` with what became of a graph that gives what is wanted: ``dense``."""
    with stage(file, "follow"):
        followed = follow(model)
        file |= described(followed)
    if "found" not in file or not any(file[kind] for kind in KINDS):
        return file
    with stage(file, "geometry"):
        geometry_of(followed)
    plan, masked = random_plan(followed, np.random.default_rng(0)), None
    with stage(file, "mask"):
        masked = run(mask(followed, plan), images, export)
        if all(np.array_equal(one, whole) for one, whole in zip(masked, dense, strict=True)):
            raise ValueError("masks change nothing")
    if masked is not None:
        with stage(file, "fold"):
            file["folded"] = check("the folded graph", run(fold(followed, plan), images, export), masked)
    file["learns"] = False
    with stage(file, "learn"):
        learn(followed, plan, images, wanted, masked)
        file["learns"] = True
    return file


@contextmanager
def stage(file: dict, name: str) -> Iterator[None]:
    """What goes wrong inside is written down as a problem of this stage."""

    def late(*_):
        raise TimeoutError(f"took over {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    except Exception as error:
        while error.__cause__ is not None:  # exporters wrap what went wrong in advice
            error = error.__cause__
        lines = [line for line in str(error).splitlines() if line.strip()] or [""]
        file["problems"][name] = f"{type(error).__name__}: {lines[0].strip()[:300]}"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def described(followed: Followed) -> dict:
    counts = {kind: sum(getattr(block, kind) for block in followed.blocks) for kind in KINDS}
    reasons = list(dict.fromkeys(reason for block in followed.blocks for reason in block.reasons))
    return {"found": len(followed.blocks), "patches": followed.patches, "prefix": followed.prefix, **counts,
            "reasons": reasons}  # fmt: skip


def write(module: nn.Module, images: torch.Tensor, path: Path, export: Export) -> None:
    options = {"input_names": ["pixels"], "opset_version": export.opset}
    quiet, level = logging.getLogger("torch.onnx"), logging.getLogger("torch.onnx").level
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")
        quiet.setLevel(logging.CRITICAL)
        try:
            if export.exporter == "dynamo":
                shapes = ({0: torch.export.Dim("batch")},) if export.open_batch else None
                more = {"dynamic_shapes": shapes, "verbose": False, "external_data": False}
            else:
                more = {"dynamic_axes": {"pixels": {0: "batch"}} if export.open_batch else None}
            torch.onnx.export(module, (images,), str(path), dynamo=export.exporter == "dynamo", **options, **more)
        finally:
            quiet.setLevel(level)


def as_list(found) -> list[np.ndarray]:
    return [value.detach().numpy() for value in (found if isinstance(found, (tuple, list)) else [found])]


def run(model: ir.Model, images: torch.Tensor, export: Export) -> list[np.ndarray]:
    """In onnxruntime; a fixed batch one image after the other."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    # Fused kernels add in another order, and differ between a graph and the same graph with a mask in it.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    text = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(text, options, providers=["CPUExecutionProvider"])
    (fed,) = session.get_inputs()
    parts = [images] if export.open_batch else images.split(1)
    found = [session.run(None, {fed.name: part.numpy()}) for part in parts]
    return [np.concatenate(values) for values in zip(*found, strict=True)]


def check(what: str, found: list[np.ndarray], wanted: list[np.ndarray]) -> float:
    """The largest difference of any output, relative to the largest number of that output.

    Raises:
        ValueError: It is over the tolerance, or there are other outputs.
    """
    shapes, expected = [one.shape for one in found], [one.shape for one in wanted]
    if shapes != expected:
        raise ValueError(f"{what} gives outputs of shapes {shapes}, expected {expected}")
    worst = max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(found, wanted, strict=True))
    if not worst <= TOLERANCE:
        raise ValueError(f"{what} is off by {worst:.1e}, expected at most {TOLERANCE:.0e}")
    return float(f"{worst:.1e}")


def random_plan(followed: Followed, random: np.random.Generator) -> SimpleNamespace:
    """Free sets, each of at least one patch, of what can be masked."""
    every = tuple(range(followed.patches))

    def some(masked: bool) -> tuple[int, ...]:
        if not masked:
            return every
        chosen = random.random(followed.patches) < random.uniform(0.3, 0.9)
        chosen[random.integers(followed.patches)] = True
        return tuple(np.flatnonzero(chosen).tolist())

    return SimpleNamespace(
        **{kind: [some(getattr(block, kind)) for block in followed.blocks] for kind in KINDS}, reads=None
    )


def learn(
    followed: Followed, plan: SimpleNamespace, images: torch.Tensor, wanted: list[np.ndarray], masked: list | None
) -> None:
    """Run the graph in PyTorch: as it is, with the plan's masks, and with gates that get gradients.

    Raises:
        ValueError: It gives something else than the model or the masked graph, or a kind of gates has no gradient.
    """
    gates = GraphGates(followed, GraphModule(followed.model))
    gates.model.requires_grad_(False)
    with torch.no_grad():
        check("the graph in PyTorch", as_list(gates.model(images)), wanted)
        if masked is not None:
            with gates.closed(plan) as closed:
                check("the graph with masks in PyTorch", as_list(closed(images)), masked)
    random = torch.Generator().manual_seed(2)
    with gates.gated(len(images)) as opened:
        found = gates.model(images)
        values = found if isinstance(found, tuple) else (found,)
        loss = sum((value * torch.randn(value.shape, generator=random)).sum() for value in values)
        (gradient,) = torch.autograd.grad(loss, opened)
    if not gradient.isfinite().all():
        raise ValueError("gradients of gates are not finite")
    for number, kind in enumerate(KINDS):
        if gates.able[number].any() and not gradient[:, number].any():
            raise ValueError(f"gates of {kind} have no gradient")


if __name__ == "__main__":
    main()
