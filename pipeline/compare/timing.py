"""Timing methods in turns with the dense model."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ...core.plan import TokenPlan
from ..graphs import model_bytes
from .made import Made, Point

if TYPE_CHECKING:
    from torch import Tensor

    from ...prune.loaded import LoadedModel

#: Graphs that are timed in turns lie in memory together, weights and all: beyond this they are timed in groups.
GROUP_BYTES = 4 << 30
#: Images that a rule in PyTorch is timed on, one batch after the other: how many tokens it drops depends on them.
TIMED_IMAGES = 64


@contextmanager
def _reduced_copy(loaded: LoadedModel, made: Made) -> Iterator[Callable[[Tensor], Tensor]]:
    """A copy of the model with the reduction applied: one model can follow one rule at a time."""
    from ...prune.backbones.vit import ViTAdapter
    from ...prune.tune.weights import with_weights

    adapter = ViTAdapter(copy.deepcopy(loaded.adapter.model), loaded.name)
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
