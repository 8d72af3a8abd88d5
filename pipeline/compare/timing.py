"""Timing methods in turns with the dense model."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core import progress
from ...core.errors import UserError
from ...core.plan import TokenPlan
from ..graphs import model_bytes
from .comparison import Comparison
from .made import SCHEMA, Made, Point

if TYPE_CHECKING:
    from torch import Tensor

    from ...prune.loaded import LoadedModel

#: Graphs that are timed in turns lie in memory together, weights and all: beyond this they are timed in groups.
GROUP_BYTES = 4 << 30
#: Images that a rule in PyTorch is timed on, one batch after the other: how many tokens it drops depends on them.
TIMED_IMAGES = 64


def time_graphs(comparison: Comparison, points: Sequence[Point]) -> None:
    """Every graph of the first seed that has no latency yet, in turns with the dense graph and those of its target.

    Within a group all share one baseline, and that is what ratios are to: groups can be made on different days.
    """
    from ...runtime.measure import profile_onnx

    for batch, target in itertools.product(comparison.options.batches, dict.fromkeys(comparison.options.targets)):
        waiting = {}
        for point in points:
            row = comparison.graph(point, batch) if point.target == target else None
            if row is None or row["failure"] is not None or point.seed != comparison.options.learn.seed:
                continue
            if comparison.latency(point, batch, "onnxruntime") is None:
                waiting[point.contender.name] = point, comparison.output / "graphs" / row["file"]
        for number, group in enumerate(_groups(waiting)):
            again = f", group {number + 1}" if number else ""
            names = {name: point for name, (point, _) in group.items()}
            with progress.stage(f"Timing {len(group)} graphs at {target:g}, batch {batch}{again}"):
                try:
                    timed = profile_onnx(
                        {"dense": comparison.dense_graph(batch), **{name: path for name, (_, path) in group.items()}},
                        batch=batch,
                        threads=comparison.options.timing.threads,
                        seconds=comparison.options.timing.seconds,
                    )
                except UserError as error:  # The batch of a model that came as an ONNX file is its own.
                    progress.remark(f"not timed at {target:g}, batch {batch}: {progress.words_of(error)}")
                    continue
            _add_latencies(comparison, timed, names, target)


def time_rules(comparison: Comparison, points: Sequence[Point]) -> None:
    """What has no graph, in PyTorch, in turns with the dense model there; of an ONNX file everything has one."""
    from ...prune.backbones.adapter import has_blocks

    if not has_blocks(comparison.loaded.adapter, plain=False):
        return
    for batch, target in itertools.product(comparison.options.batches, dict.fromkeys(comparison.options.targets)):
        waiting = {}
        for point in points:
            row = comparison.graph(point, batch)
            if (
                point.target != target
                or point.seed != comparison.options.learn.seed
                or row is None
                or row["failure"] is None
            ):
                continue
            if comparison.latency(point, batch, "pytorch") is None:
                waiting[point.contender.name] = point
        if waiting:
            with progress.stage(f"Timing {len(waiting)} methods in PyTorch at {target:g}, batch {batch}"):
                timed = _time_in_torch(
                    comparison, {name: comparison.made(point) for name, point in waiting.items()}, batch
                )
            _add_latencies(comparison, timed, waiting, target)


def _add_latencies(
    comparison: Comparison, timed: Sequence[dict[str, Any]], points: Mapping[str, Point], target: float
) -> None:
    common = {"schema": SCHEMA, "kind": "latency", "key": comparison.dense_key, "method": "dense", "target": target}
    rows = []
    for row in timed:
        about = points[row["label"]].row("latency") if row["label"] in points else {**common, "seed": None}
        opset = comparison.options.opset if row["runtime"] == "onnxruntime" else None
        rows.append({**row, **about, "opset": opset, "dense_p50_ms": timed[0]["p50_ms"]})
    comparison.add(*rows)


def _time_in_torch(comparison: Comparison, made: Mapping[str, Made], batch: int) -> list[dict[str, Any]]:
    """Rows as :func:`~vpruner.runtime.measure.profile_onnx` gives them, of PyTorch on real images."""
    import torch

    from ...core.environment import environment
    from ...core.timing import measure
    from ...prune.device import on_cpu

    threads, here = comparison.options.timing.threads, environment()
    images = comparison.judge.images
    count = max(batch, min(TIMED_IMAGES, len(images)) // batch * batch)
    chosen = [index % len(images) for index in range(count)]
    inputs = [images.images(chosen[start : start + batch]) for start in range(0, count, batch)]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        with ExitStack() as stack, torch.inference_mode():
            # Beside graphs that onnxruntime runs on the CPU.
            opened = (comparison.loaded, *(one.instead for one in made.values() if one.instead is not None))
            for loaded in opened:
                stack.enter_context(on_cpu(loaded.adapter))
            candidates = {"dense": _caller(comparison.loaded.adapter.model, inputs)}
            for name, one in made.items():
                candidates[name] = _caller(stack.enter_context(_reduced_copy(comparison.loaded, one)), inputs)
            compared = measure(
                candidates,
                seconds=comparison.options.timing.seconds,
                batch=batch,
                protocol={
                    "clock": "time.perf_counter around the PyTorch module; no preprocessing",
                    "input": f"{len(inputs)} batches of evaluation images one after the other, the same in a round",
                    "intra_op_threads": threads,
                    "device": str(next(comparison.loaded.adapter.model.parameters()).device),
                },
            )
    finally:
        torch.set_num_threads(before)
    return [
        {
            "label": label,
            "model": comparison.loaded.name,
            "runtime": "pytorch",
            "provider": compared.protocol["device"],
            "precision": "fp32",
            "batch": batch,
            "threads": threads,
            **compared.row(label),
            "protocol": compared.protocol,
            "environment": here,
        }
        for label in candidates
    ]


@contextmanager
def _reduced_copy(loaded: LoadedModel, made: Made) -> Iterator[Callable[[Tensor], Tensor]]:
    """A copy of the model with the reduction applied: one model can follow one rule at a time."""
    from ...prune.tune.weights import with_weights

    if made.instead is not None:
        yield made.instead.adapter.model
        return
    adapter = type(loaded.adapter)(copy.deepcopy(loaded.adapter.model), loaded.name)
    with with_weights(adapter.model, made.weights):
        if isinstance(made.reduction, TokenPlan):
            with adapter.applied(made.reduction, "dead"):
                yield adapter.model
        else:
            with made.reduction.applied(adapter) as run:

                def following(images: Tensor) -> Tensor:
                    run.clear()  # What it records of each image would pile up.
                    return run(images)

                yield following


def _caller(model: Callable[[Tensor], Tensor], inputs: Sequence[Tensor]) -> Callable[[], object]:
    """Each call takes the next input. Every candidate is called once a round, so all take the same one."""
    following = itertools.cycle(inputs)
    return lambda: model(next(following))


def _groups(waiting: Mapping[str, tuple[Point, Path]]) -> Iterator[dict[str, tuple[Point, Path]]]:
    """``waiting`` in parts whose files are at most :data:`GROUP_BYTES` together."""
    group: dict[str, tuple[Point, Path]] = {}
    size = 0
    for name, (point, path) in waiting.items():
        if group and size + model_bytes(path) > GROUP_BYTES:
            yield group
            group, size = {}, 0
        group[name] = point, path
        size += model_bytes(path)
    if group:
        yield group
