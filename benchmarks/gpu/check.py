"""Does it hold on a GPU? Engines against onnxruntime, and what pruning brings on PyTorch, onnxruntime and TensorRT.

    python benchmarks/gpu/check.py                        all of it, in at most eight minutes (make gpu-check)
    python benchmarks/gpu/check.py --prepare files/       on any machine: write the ONNX files alone
    python benchmarks/gpu/check.py --files files/         measure such files; needs no PyTorch
    python benchmarks/gpu/check.py --models deit_tiny_patch16_224 --batch 1 --budget 120

For each model, batch and runtime these are measured in turns, in FP16: ``dense``, ``dead-token-free`` (the identity
plan, which changes no output), and pruned to ``0.65`` and ``0.5`` of the multiply-adds. Weights are random, since
latency does not depend on them, and tokens leave linearly over the blocks at random positions.

Results come first: FP32 engines (TF32 off) must equal onnxruntime to 1e-3, FP16 ones agree to 2e-2, and every case that
does not is named. Then times, the most important cases first. What does not fit into the budget is dropped from the end
and listed; what is not installed is skipped and listed too.

Exit code: 0; 1 where a result is wrong; 2 where there is no NVIDIA GPU: a check that did not run has not passed.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vpruner.core.environment import environment
from vpruner.core.errors import UserError
from vpruner.core.extras import require
from vpruner.core.files import write_text
from vpruner.core.rows import append_rows
from vpruner.core.text import first_line

#: The most important first.
MODELS = ("vit_large_patch16_224", "deit_base_patch16_224", "deit_small_patch16_224", "deit_tiny_patch16_224")
BATCHES = (1, 8, 32, 128)
VARIANTS = ("dense", "dead-token-free", "0.65", "0.5")
#: What the goals are about.
EXTREMES = ("dense", "0.5")
RUNTIMES = ("tensorrt", "torch", "onnxruntime", "torch compiled")
#: Largest difference over largest output, against onnxruntime on a CPU in FP32.
TOLERANCE = {"fp32": 1e-3, "fp16": 2e-2}
#: Images that results are compared on.
COMPARED = 4
#: Models whose FP32 engines are compared: the smallest, which is the quickest to build, and the widest use.
PARITY_MODELS = ("deit_tiny_patch16_224", "deit_base_patch16_224")
#: pruned / dense on TensorRT at batch 128.
GOAL_RATIO, GOAL_MODELS = 0.60, ("vit_large_patch16_224", "deit_base_patch16_224")
#: First guess of the seconds that a case takes for each of its graphs, until one was timed: (build or compile, model).
GUESS = {"tensorrt": 25.0, "torch": 3.0, "onnxruntime": 6.0, "torch compiled": 25.0}
SIZE = {"vit_large_patch16_224": 2.0, "deit_base_patch16_224": 1.0, "deit_small_patch16_224": 0.7}
OUTPUT = Path("benchmarks/results/gpu.jsonl")
INDEX = "index.json"


@dataclass(frozen=True)
class Case:
    """One measurement: some variants of a model, in turns."""

    runtime: str
    model: str
    batch: int
    variants: tuple[str, ...] = VARIANTS

    def __str__(self) -> str:
        which = "" if self.variants == VARIANTS else f" ({', '.join(self.variants)})"
        return f"{self.runtime}, {self.model}, batch {self.batch}{which}"


def cases_of(models: Sequence[str], batches: Sequence[int], runtimes: Sequence[str]) -> list[Case]:
    """All cases, the most important first.

    The goals on TensorRT with the two variants that they are about; the same on the other runtimes; then everything
    with all variants, large batches and small ones before those between.
    """
    batches = sorted(batches, key=lambda batch: (batch not in (128, 1), -batch))
    goals = [(m, b) for b in batches for m in models if (b == 128 and m in GOAL_MODELS) or b == 1]
    rest = [(m, b) for b in batches for m in models]
    found = [Case(runtime, m, b, EXTREMES) for runtime in runtimes if runtime == "tensorrt" for m, b in goals]
    found += [Case(runtime, m, b) for m, b in goals for runtime in runtimes if runtime != "tensorrt"]
    found += [Case(runtime, m, b) for runtime in runtimes for m, b in rest]
    return list(dict.fromkeys(found))


class Budget:
    """Seconds that are left, and a guess of what a case takes, corrected by those that ran."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic):
        self.seconds, self.clock, self.started = seconds, clock, clock()
        self.factors: dict[str, list[float]] = {}

    @property
    def left(self) -> float:
        return self.seconds - (self.clock() - self.started)

    def estimate(self, case: Case, ready: int = 0) -> float:
        """Seconds; ``ready`` of its graphs are built already."""
        graphs = max(len(case.variants) - ready, 0)
        guess = SIZE.get(case.model, 0.5) * GUESS[case.runtime] * graphs + 6.0
        known = self.factors.get(case.runtime)
        return guess * (float(np.median(known)) if known else 1.0)

    def learn(self, case: Case, seconds: float, ready: int = 0) -> None:
        guess = SIZE.get(case.model, 0.5) * GUESS[case.runtime] * max(len(case.variants) - ready, 0) + 6.0
        self.factors.setdefault(case.runtime, []).append(seconds / guess)

    def fits(self, case: Case, ready: int = 0) -> bool:
        return self.estimate(case, ready) <= self.left


# -- files ------------------------------------------------------------------------------------------------------------


def prepare(model: str, folder: Path, *, target: str | None = None, seed: int = 0) -> None:
    """Write the variants of a model as FP32 and FP16 ONNX files with an open batch, and an index of them."""
    from latency_ort import linear_plan, open_dense

    from vpruner.core.cost import cost_ratio
    from vpruner.core.plan import TokenPlan
    from vpruner.export.dense import export_dense
    from vpruner.export.deploy import deploy_file, plain_opset
    from vpruner.export.fold import fold_file
    from vpruner.export.precision import convert

    folder = folder / model
    folder.mkdir(parents=True, exist_ok=True)
    loaded = open_dense(model, None, seed)
    geometry, files = loaded.adapter.geometry, {name: folder / f"{name}.onnx" for name in VARIANTS}
    export_dense(
        loaded.adapter.model,
        files["dense"],
        name=loaded.name,
        geometry=geometry,
        preprocessing=loaded.preprocessing,
        classes=None,
        weights_sha256=loaded.sha256,
        opset=plain_opset(target, None),
        dynamic_batch=True,
    )
    plans = {name: linear_plan(loaded.name, geometry, float(name), seed) for name in ("0.65", "0.5")}
    plans["dead-token-free"] = TokenPlan.identity(loaded.name, geometry)
    macs = {"dense": 1.0, **{name: cost_ratio(plan) for name, plan in plans.items()}}
    for name, plan in plans.items():
        fold_file(files["dense"], plan, files[name])
        plan.save(folder / f"{name}.plan.json")
    for path in files.values():
        convert(path, half_of(path), "fp16")
        if target:
            deploy_file(path, target, path)
    # Last: what is listed is there.
    write_text(
        folder / INDEX,
        json.dumps(
            {
                "model": loaded.name,
                "macs_ratio": macs,
                "image_size": list(geometry.image_size),
                "seed": seed,
                "target": target,
            }
        ),
    )


def half_of(path: Path) -> Path:
    """``dense.onnx`` -> ``dense.fp16.onnx``."""
    return path.with_suffix(".fp16.onnx")


def fix_batch(source: Path, batch: int, output: Path) -> Path:
    """A copy whose batch is a number; the file as it is where onnx is not installed."""
    try:
        import onnx
    except ImportError:
        return source
    model = onnx.load(source)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = batch
    del model.graph.value_info[:]
    onnx.save(model, output)
    return output


def start_preparing(models: Iterable[str], folder: Path, target: str | None, seed: int) -> dict[str, subprocess.Popen]:
    """A process for each model: exporting takes processors, measuring takes the GPU."""
    words = ["--for", target] if target else []
    return {
        model: subprocess.Popen(
            [sys.executable, __file__, "--prepare", str(folder), "--models", model, "--seed", str(seed), *words],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for model in models
    }


def wait_prepared(model: str, folder: Path, processes: Mapping[str, subprocess.Popen]) -> dict[str, Any]:
    """The index of a model's files, as soon as they are there.

    Raises:
        UserError: They could not be made.
    """
    index, process = folder / model / INDEX, processes.get(model)
    if process is not None:
        _, said = process.communicate()
        if process.returncode:
            raise UserError(
                f"{model} cannot be prepared: {(said or '').strip().splitlines()[-1:] or 'no reason given'}"
            )
    if not index.is_file():
        raise UserError(f"{folder} holds no {model}", f"write it with: python {__file__} --prepare {folder}")
    return json.loads(index.read_text(encoding="utf-8"))


# -- the machine ------------------------------------------------------------------------------------------------------


def find_gpu() -> dict[str, Any] | None:
    """Its name and versions, by whatever can tell; None without a GPU."""
    try:
        from vpruner.runtime import cuda

        device = cuda.device_properties()
        return {"gpu": device.name, "compute_capability": device.compute_capability, "cuda": device.driver,
                "driver": device.driver_release}  # fmt: skip
    except UserError:
        pass
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return {"gpu": torch.cuda.get_device_name(), "compute_capability": f"{major}.{minor}", "cuda": torch.version.cuda,
            "driver": None}  # fmt: skip


def find_runtimes(asked: Sequence[str]) -> tuple[list[str], list[str]]:
    """Those that can be measured here, and for the others a line that says why not."""
    probes = {
        "tensorrt": _find_tensorrt,
        "torch": _find_torch,
        "torch compiled": _find_torch,
        "onnxruntime": _find_onnxruntime,
    }
    found, skipped = [], []
    for name in asked:
        try:
            probes[name]()
            found.append(name)
        except (UserError, ImportError, OSError, RuntimeError) as error:
            skipped.append(f"{name}: {first_line(error)}")
    return found, skipped


def _find_tensorrt() -> None:
    from vpruner.runtime.capabilities import Capabilities

    Capabilities.of(require("tensorrt"))
    require("polygraphy")
    require("cuda.bindings.runtime")


def _find_torch() -> None:
    if not require("torch").cuda.is_available():
        raise UserError("PyTorch is installed without CUDA, or finds no GPU")


def _find_onnxruntime() -> None:
    if "CUDAExecutionProvider" not in require("onnxruntime").get_available_providers():
        raise UserError("onnxruntime is installed without its CUDA provider (pip install 'vpruner[gpu]')")


# -- measuring --------------------------------------------------------------------------------------------------------


class Check:
    """One run of the check.

    Args:
        folder: With the prepared files; engines are built there too.
        seconds: To measure each case for.
        own_tactics: Take TensorRT's own kernels alone, where its libraries are stubs.
    """

    def __init__(self, folder: Path, *, seconds: float, own_tactics: bool, seed: int = 0):
        self.folder, self.seconds, self.own_tactics, self.seed = folder, seconds, own_tactics, seed
        self.indices: dict[str, dict[str, Any]] = {}
        self.engines: dict[tuple[str, str, int, str], Path] = {}
        self.references: dict[tuple[str, str], np.ndarray] = {}
        self.wrong: list[str] = []

    def file(self, model: str, variant: str, precision: str = "fp32") -> Path:
        path = self.folder / model / f"{variant}.onnx"
        return half_of(path) if precision == "fp16" else path

    def images(self, model: str, batch: int) -> np.ndarray:
        """float32 [batch, 3, height, width]; the first ones are the same at every batch size."""
        from vpruner.core.timing import random_images

        shape = (3, *self.indices[model]["image_size"])
        some = random_images(COMPARED, shape, seed=self.seed)
        return np.concatenate([some] * -(-batch // COMPARED))[:batch]

    def reference(self, model: str, variant: str) -> np.ndarray:
        """float32 [image, class]: what onnxruntime gives on a CPU in FP32, for the images that are compared."""
        from vpruner.runtime.ort import OrtSession

        if (model, variant) not in self.references:
            with OrtSession(self.file(model, variant)) as session:
                images = self.images(model, COMPARED)
                (found,) = session.run({session.inputs[0].name: images}).values()
            self.references[model, variant] = found
        return self.references[model, variant]

    def engine(self, model: str, variant: str, batch: int, precision: str) -> Path:
        from vpruner.pipeline.engines import build_engine
        from vpruner.runtime.build import BuildOptions
        from vpruner.runtime.capabilities import Capabilities

        key = (model, variant, batch, precision)
        if key not in self.engines:
            # A release that takes types from the file gets the converted one, an older one its flag.
            typed = Capabilities.of(require("tensorrt")).typed
            source = self.file(model, variant, precision if typed else "fp32")
            onnx = fix_batch(source, batch, self.folder / f"{model}-{variant}-{batch}-{precision}.onnx")
            engine = (
                onnx.with_suffix(".engine") if onnx != source else self.folder / f"{model}-{variant}-{batch}.engine"
            )
            options = BuildOptions(
                precision=precision,
                batch=batch if onnx == source else None,
                tactic_sources=() if self.own_tactics else None,
                layer_details=False,
                check=False,
            )
            build_engine(onnx, engine, options)
            if onnx != source:
                onnx.unlink()
            self.engines[key] = engine
        return self.engines[key]

    def ready(self, case: Case) -> int:
        """How many of its graphs need no building any more."""
        return sum((case.model, variant, case.batch, "fp16") in self.engines for variant in case.variants)

    def parity(self, model: str, variant: str, precision: str, batch: int) -> dict[str, Any]:
        """Compare an engine with onnxruntime; a row of kind ``"parity"``."""
        from vpruner.runtime.trt import TrtSession

        with TrtSession(self.engine(model, variant, batch, precision), batch_size=batch) as session:
            images = self.images(model, batch)
            (found,) = session.run({session.inputs[0].name: images}).values()
        return self.compared(model, variant, precision, batch, found, "tensorrt")

    def compared(
        self, model: str, variant: str, precision: str, batch: int, found: np.ndarray, runtime: str
    ) -> dict[str, Any]:
        reference = self.reference(model, variant)[:batch]
        found = np.asarray(found, np.float32)[: len(reference)]
        finite = bool(np.isfinite(found).all())
        difference = float(np.abs(found - reference).max() / np.abs(reference).max()) if finite else None
        tolerance = TOLERANCE[precision]
        passed = difference is not None and difference <= tolerance
        if not passed:
            said = "not finite" if difference is None else f"{difference:.1e} from onnxruntime, allowed {tolerance:.0e}"
            self.wrong.append(f"{model} {variant}, {runtime} {precision}, batch {batch}: {said}")
        return {
            "schema": 1, "kind": "parity", "rung": f"{runtime} {precision} equals onnxruntime", "model": model,
            "label": variant, "runtime": runtime, "precision": precision, "batch": batch, "difference": difference,
            "tolerance": tolerance, "passed": passed, "images": len(reference),
        }  # fmt: skip

    # -- times --------------------------------------------------------------------------------------------------------

    def measure(self, case: Case) -> list[dict[str, Any]]:
        run = {
            "tensorrt": self._tensorrt,
            "onnxruntime": self._onnxruntime,
            "torch": self._torch,
            "torch compiled": self._torch,
        }[case.runtime]
        rows = run(case)
        for row in rows:
            if row["kind"] == "latency":
                row.update(
                    model=case.model,
                    runtime=case.runtime,
                    precision="fp16",
                    batch=case.batch,
                    macs_ratio=self.indices[case.model]["macs_ratio"][row["label"]],
                    weights="random",
                    schedule="linear",
                )
        return rows

    def _tensorrt(self, case: Case) -> list[dict[str, Any]]:
        from vpruner.runtime.profile_trt import profile_engines

        engines = {v: self.engine(case.model, v, case.batch, "fp16") for v in case.variants}
        rows = profile_engines(engines, batch=case.batch, seconds=self.seconds)
        return rows + [self.parity(case.model, v, "fp16", case.batch) for v in case.variants]

    def _onnxruntime(self, case: Case) -> list[dict[str, Any]]:
        from vpruner.runtime.ort import OrtSession
        from vpruner.runtime.profile import profile_resident

        paths = {}
        for variant in case.variants:
            name = f"ort-{case.model}-{variant}.onnx"
            paths[variant] = fix_batch(self.file(case.model, variant, "fp16"), case.batch, self.folder / name)
        found = profile_resident(paths, batch=case.batch, threads=1, graph=True, seconds=self.seconds / 2)
        rows = []
        for variant, measured in found.items():
            # With a graph where that could be recorded: the comparison with TensorRT is with one, too.
            best = measured.get("resident_cuda_graph") or measured["resident"]
            rows.append(
                {
                    "schema": 1,
                    "kind": "latency",
                    "label": variant,
                    "provider": "cuda",
                    **best,
                    **measured,
                    "cuda_graph": "resident_cuda_graph" in measured,
                    "protocol": {"clock": "time.perf_counter around run_with_iobinding; data on the GPU"},
                }
            )
            with OrtSession(paths[variant], ["cuda"]) as session:
                (outputs,) = session.run({session.inputs[0].name: self.images(case.model, case.batch)}).values()
            rows.append(self.compared(case.model, variant, "fp16", case.batch, outputs, "onnxruntime cuda"))
        return rows

    def _torch(self, case: Case) -> list[dict[str, Any]]:
        from latency_ort import open_dense

        from vpruner.core.plan import TokenPlan
        from vpruner.core.timing import measure
        from vpruner.prune.backbones.vit import ViTAdapter

        torch = require("torch")
        compiled = case.runtime == "torch compiled"
        loaded = open_dense(case.model, None, self.indices[case.model]["seed"])
        images = torch.from_numpy(self.images(case.model, case.batch)).cuda().half()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        rows: list[dict[str, Any]] = []
        with ExitStack() as stack, torch.inference_mode():
            calls = {}
            for variant in case.variants:
                model = copy.deepcopy(loaded.adapter.model).cuda().half().eval()
                if variant != "dense":
                    plan = TokenPlan.load(self.folder / case.model / f"{variant}.plan.json")
                    model = stack.enter_context(ViTAdapter(model, plan.model).applied(plan, "dead"))
                run = torch.compile(model, mode="reduce-overhead") if compiled else model

                def call(run: Any = run) -> float:
                    start.record()
                    run(images)
                    end.record()
                    end.synchronize()
                    return start.elapsed_time(end) / 1e3

                rows.append(
                    self.compared(
                        case.model, variant, "fp16", case.batch, run(images).float().cpu().numpy(), case.runtime
                    )
                )
                calls[variant] = call
            found = measure(calls, own_time=True, seconds=self.seconds, batch=case.batch)
        protocol = {
            **found.protocol,
            "clock": "CUDA events around the module's call; input on the GPU",
            "attention": "SDPA",
        }
        about = {"schema": 1, "kind": "latency", "provider": "cuda", "protocol": protocol, "cuda_graph": compiled}
        rows += [{**about, "label": variant, **found.row(variant)} for variant in calls]
        torch.cuda.empty_cache()
        return rows


# -- what came of it --------------------------------------------------------------------------------------------------


def table_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """One Markdown table: ms of the dense model, and the ratio of each variant to it."""
    newest: dict[tuple[str, int, str], dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        if row.get("kind") == "latency":
            group = newest.setdefault((row["model"], row["batch"], row["runtime"]), {})
            # A case that was measured again counts as a whole, for its ratios are to its own baseline.
            if row["label"] == "dense":
                group.clear()
            group[row["label"]] = row
    heads = ["model", "batch", "runtime", "dense p50", *VARIANTS[1:]]
    lines = [f"| {' | '.join(heads)} |", "| --- | ---: | --- |" + " ---: |" * (len(heads) - 3)]
    order = {name: index for index, name in enumerate((*MODELS, *RUNTIMES))}
    for (model, batch, runtime), group in sorted(
        newest.items(), key=lambda item: (order.get(item[0][0], 99), item[0][1], order.get(item[0][2], 99))
    ):
        cells = []
        for variant in VARIANTS[1:]:
            row = group.get(variant)
            cells.append(f"{row['ratio']:.3f}" if row and row.get("ratio") is not None else "–")
        dense = group.get("dense")
        ms = f"{dense['p50_ms']:.3f} ms" if dense else "–"
        lines.append(f"| {model} | {batch} | {runtime} | {ms} | {' | '.join(cells)} |")
    return lines


def goals(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, bool | None]]:
    """What is aimed at, and whether it was reached; None where it was not measured."""

    def ratio(model: str, batch: int) -> float | None:
        wanted = {"kind": "latency", "label": "0.5", "runtime": "tensorrt", "model": model, "batch": batch}
        found = [row["ratio"] for row in rows if all(row.get(name) == value for name, value in wanted.items())]
        return found[-1] if found else None

    found: list[tuple[str, bool | None]] = []
    for model in GOAL_MODELS:
        value = ratio(model, 128)
        text = f"{model}, TensorRT FP16, batch 128: pruned to 0.5 takes at most {GOAL_RATIO:.2f} of dense"
        found.append(
            (text + ("" if value is None else f" ({value:.3f})"), None if value is None else value <= GOAL_RATIO)
        )
    for model in MODELS:
        value = ratio(model, 1)
        text = f"{model}, TensorRT FP16, batch 1: pruned to 0.5 is not slower than dense"
        found.append((text + ("" if value is None else f" ({value:.3f})"), None if value is None else value <= 1.0))
    parity = [row for row in rows if row.get("kind") == "parity" and row.get("precision") == "fp32"]
    passed = all(row["passed"] for row in parity) if parity else None
    found.append((f"FP32 engines equal onnxruntime to {TOLERANCE['fp32']:.0e}", passed))
    return found


def _say(text: str) -> None:
    click.echo(text, err=True)


def run_cases(check: Check, cases: Sequence[Case], budget: Budget) -> Iterator[list[dict[str, Any]]]:
    """Rows of each case that fits; the others are said at the end, and so is what failed."""
    dropped, failed = [], []
    for case in cases:
        ready = check.ready(case)
        if not budget.fits(case, ready):
            dropped.append(str(case))
            continue
        _say(f"{case} ({budget.left:.0f} s left)")
        started = budget.clock()
        try:
            rows = check.measure(case)
        except Exception as error:  # One runtime's trouble must not take the others' results with it.
            failed.append(f"{case}: {first_line(error)}")
            continue
        budget.learn(case, budget.clock() - started, ready)
        yield rows
    for title, lines in (("dropped, for lack of time", dropped), ("failed", failed)):
        if lines:
            _say(f"{title}:\n" + "\n".join(f"  {line}" for line in lines))


def run_parity(check: Check, models: Iterable[str], budget: Budget) -> Iterator[list[dict[str, Any]]]:
    for model in models:
        for variant in EXTREMES:
            if budget.left < 60:
                _say(f"dropped, for lack of time: FP32 parity of {model} {variant}")
                continue
            try:
                yield [check.parity(model, variant, "fp32", 1)]
            except UserError as error:
                check.wrong.append(f"{model} {variant}, tensorrt fp32: {error}")


@click.command(help=__doc__.split("\n\n")[0])
@click.option("--models", multiple=True, default=MODELS, show_default=True, help="timm names.")
@click.option("--batch", "batches", multiple=True, type=click.IntRange(1), default=BATCHES, show_default=True)
@click.option("--runtime", "runtimes", multiple=True, type=click.Choice(RUNTIMES), default=RUNTIMES, show_default=True)
@click.option("--budget", "limit", default=460.0, show_default=True, help="Seconds for all of it.")
@click.option("--seconds", default=4.0, show_default=True, help="Seconds to measure each case for.")
@click.option(
    "--prepare", "target_folder", type=click.Path(path_type=Path), help="Write the ONNX files there, no more."
)
@click.option("--files", type=click.Path(path_type=Path, exists=True), help="Measure files that --prepare wrote.")
@click.option("--for", "target", help="Write the files for this target, such as trt8.5  [default: what is installed]")
@click.option("--own-tactics", is_flag=True, help="TensorRT's own kernels alone, where cuBLAS and cuDNN are stubs.")
@click.option("--seed", default=0, show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), default=OUTPUT, show_default=True)
def main(models, batches, runtimes, limit, seconds, target_folder, files, target, own_tactics, seed, output):
    if target_folder:
        for model in models:
            prepare(model, target_folder, target=target, seed=seed)
        return
    budget, gpu = Budget(limit), find_gpu()
    if gpu is None:
        _say("no NVIDIA GPU on this machine: nothing was checked")
        sys.exit(2)
    found, skipped = find_runtimes(runtimes)
    _say(f"{gpu['gpu']}, compute capability {gpu['compute_capability']}, CUDA {gpu['cuda']}")
    for line in skipped:
        _say(f"skipped, {line}")
    if not found:
        raise click.ClickException("none of the runtimes is installed")
    surroundings = {**environment(), **gpu}
    if "tensorrt" in found:
        from vpruner.runtime.capabilities import Capabilities

        capabilities = Capabilities.of(require("tensorrt"))
        surroundings["tensorrt"] = capabilities.version
        target = target or (capabilities.check_target if capabilities.check_target == "trt8.5" else None)
    rows: list[dict[str, Any]] = []

    def keep(new: Iterable[list[dict[str, Any]]]) -> None:
        for some in new:
            some = [{**row, "environment": surroundings, "skipped": skipped} for row in some]
            append_rows(output, some)  # At once: an interrupt costs one case.
            rows.extend(some)

    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        folder = files or Path(scratch)
        processes = {} if files else start_preparing(models, folder, target, seed)
        for process in processes.values():
            stack.callback(_end, process)
        check = Check(folder, seconds=seconds, own_tactics=own_tactics, seed=seed)
        # Results first; the larger models are still being exported meanwhile.
        for model in [m for m in PARITY_MODELS if m in models and "tensorrt" in found]:
            check.indices[model] = wait_prepared(model, folder, processes)
            keep(run_parity(check, [model], budget))
        for model in models:
            if model not in check.indices:
                check.indices[model] = wait_prepared(model, folder, processes)
        keep(run_cases(check, cases_of(models, batches, found), budget))
    click.echo("\n".join(table_lines(rows)))
    click.echo()
    for text, passed in goals(rows):
        click.echo(f"{ {True: 'reached', False: 'NOT reached', None: 'not measured'}[passed] }: {text}")
    for line in check.wrong:
        click.echo(f"WRONG: {line}")
    sys.exit(1 if check.wrong else 0)


def _end(process: subprocess.Popen) -> None:
    if process.poll() is None:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    main()
