"""The residual streams of a dense and a pruned graph, one sum of the stream after the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property, partial
from typing import Protocol

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from ..core.errors import GraphError
from ..core.geometry import Geometry
from ..core.plan import TokenPlan
from ..prune import ranks
from ..prune.batches import in_batches
from ..prune.calibration import Calibration
from ..prune.device import same_gradients
from ..prune.fisher import Directions, frozen
from ..prune.tune.chunks import Chunks
from ..prune.tune.weights import with_weights
from .follow.demand import Demand, Sets, sets_of
from .graph_gates import GraphGates
from .graph_layers import Rows, Step, shape_for
from .graph_outputs import GraphOutputs


class Refittable(Protocol):
    """What is read of a :class:`~.graph_adapter.GraphAdapter`."""

    gates: GraphGates
    model: GraphOutputs
    geometry: Geometry


@torch.enable_grad()
def token_importance(
    adapter: Refittable, steps: Sequence[Step], batches: Iterable[Tensor], seed: int = 0, before: int = 0
) -> dict[str, np.ndarray]:
    """Mean squared gradient of the unpruned model's outputs at each token, as
    :func:`vpruner.prune.tune.importance.token_importance` has it of a model in PyTorch.

    Returns:
        Name of a value of the stream behind a step, or of the first output of layers that make keys and values (there
        of their keys and values together) -> float64 [id], with mean 1 over its tokens where anything counts at all.
    """
    gates, directions = adapter.gates, Directions(seed, before)
    known, module = gates.followed.tokens.known, gates.model
    parts = {step.stream: ((step.stream, slice(None)),) for step in steps}
    parts |= {
        layers[0].output: tuple((layer.output, layer.columns) for layer in layers)
        for step in steps for layers in step.keyed
    }  # fmt: skip
    values = list(dict.fromkeys(value for part in parts.values() for value, _ in part))
    rows = {value: rows_of(gates, value) for value in values}
    sums = {value: np.zeros(gates.followed.tokens.count) for value in parts}
    with frozen(adapter.model):
        like = next(module.parameters())

        def step(images: Tensor) -> tuple[Tensor | None, ...]:
            # Nothing is added, but to each value of each image by itself: its gradient is that of the value.
            zeros = [
                like.new_zeros(shape_for(known, value, module.batch, len(images))).requires_grad_() for value in values
            ]
            with ExitStack() as placed:
                for value, zero in zip(values, zeros, strict=True):
                    placed.enter_context(module.at(value.name, torch.add, zero))
                with same_gradients(like.device):
                    outputs = adapter.model(images.to(like)).float()
                return torch.autograd.grad(directions.loss(outputs, adapter.geometry.output), zeros, allow_unused=True)

        for gradients in in_batches(module, batches, directions.redrawn(step), backward=True):
            found = dict(zip(values, gradients, strict=True))
            for value, part in parts.items():
                for one, columns in part:
                    if found[one] is not None:
                        squares = rows[one](found[one])[..., columns].float().square().sum((0, 2))
                        sums[value][rows[one].ids] += squares.cpu().double().numpy()
    totals = zip(sums, (one.numpy() for one in ranks.summed(*map(torch.from_numpy, sums.values()))), strict=True)
    return {value.name: total / max(total[rows[value].ids].mean(), 1e-300) for value, total in totals}


def rows_of(gates: GraphGates, value: ir.Value) -> Rows | None:
    return Rows.of(gates.followed.tokens.layouts.get(value), gates.followed.tokens.known, gates.model.batch)


class GraphStreams(Chunks):
    """The residual streams of the dense and the pruned model, for the images of a fit, one step at a time.

    The pruned model is run in its masked form, so that a value has all its tokens, and rows are found by their ids. A
    step is computed from the streams that it reads, and from nothing ahead of them.

    Attributes:
        diverged: Whether pruned and dense stream differ by more than rounding from here on.

    Raises:
        GraphError: The stream has no axis of images.
    """

    def __init__(
        self,
        adapter: Refittable,
        steps: Sequence[Step],
        plans: Sequence[TokenPlan],
        calibration: Calibration,
        indices: Sequence[int] | np.ndarray,
        flip: bool | None,
        ram_bytes: int,
    ):
        layers = [layer for step in steps for layer in (step.writer, *sum(step.keyed, ())) if layer is not None]
        widest = max((layer.width for layer in layers), default=1)
        super().__init__(adapter, plans, calibration, indices, flip, ram_bytes, widest)
        self.gates, self.steps = adapter.gates, steps
        self.followed, self.batch = self.gates.followed, self.model.batch or 1
        for value in (self.followed.stream, *(step.stream for step in steps)):
            if rows_of(self.gates, value) is None:
                raise GraphError(f"the images of {value.name!r} are on no axis of it", "export it for one image")
        self.sets: list[Sets] = [sets_of(self.followed, plan) for plan in self.plans]
        self.wanted: list[Demand] = [Demand(self.followed, sets) for sets in self.sets]
        self.importance: dict[str, np.ndarray] = {}
        self.diverged = False
        self._counts: dict[int, int] = {}
        # Values of which the pruned model has other numbers than the dense one.
        self._own: set[ir.Value] = set()
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        #: Of the constants of the graph, as parameters of the model.
        self.names = {name: names[id(parameter)] for name, parameter in self.model.weights().items()}

    def __enter__(self) -> GraphStreams:
        self.importance = self.on_few(partial(token_importance, self._adapter, self.steps), self.batch)
        first = dict.fromkeys((self.followed.stream, *(value for step in self.steps for value in step.sides)))
        try:
            for chunk in self.chunks:
                images = self.pixels(chunk)
                self._counts[chunk] = len(images)
                names = [value.name for value in first]
                for name, value in self.model.compute(names, *self.model.feeds(images)).items():
                    self.put(("dense", name), chunk, value)
        except BaseException:
            self._store.__exit__()
            raise
        return self

    # -- one step -------------------------------------------------------------------------------------------------

    def exact(self, step: Step) -> bool:
        """Whether no plan leaves anything out of a step that something reads."""
        return all(self.updated(step, at).sum() == self._needed(step, at).sum() and self._reads_all(step, at)
                   for at in range(len(self.plans)))  # fmt: skip

    def _needed(self, step: Step, plan: int) -> np.ndarray:
        needed = self.wanted[plan].needed.get(step.stream)
        return np.zeros(self.followed.tokens.count, bool) if needed is None else needed[0]

    def updated(self, step: Step, plan: int) -> np.ndarray:
        """bool [id]: the tokens that the step updates and something reads."""
        branch, mask = self.sets[plan].updates[step.branch.add]
        needed = self._needed(step, plan)
        return needed if branch.reason is not None else needed & mask

    def read(self, step: Step, plan: int) -> np.ndarray:
        """bool [id]: the tokens whose keys and values the step reads."""
        masks = [self.sets[plan].keys[node] for node in step.branch.keyed]
        live = bool(masks) and self.updated(step, plan).any()
        return masks[0] if live else np.zeros(self.followed.tokens.count, bool)

    def _reads_all(self, step: Step, plan: int) -> bool:
        every = not step.branch.keyed or self.read(step, plan).all() or not self.updated(step, plan).any()
        return every and not any(node in self.sets[plan].gates for node in step.branch.keyed)

    @cached_property
    def chunks_of(self) -> list[list[int]]:
        """Of each plan."""
        return [[c for c in self.chunks if self.plan_index(c) == at] for at in range(len(self.plans))]

    def advance_dense(self, step: Step, more: Sequence[ir.Value] = ()) -> Iterator[tuple[int, dict[ir.Value, Tensor]]]:
        """Take the dense stream through a step; (chunk, ``more`` values of it)."""
        for chunk in self.chunks:
            found = self._compute(step, chunk, [step.stream, *more], pruned=False)
            self.put(("dense", step.stream.name), chunk, found[step.stream])
            yield chunk, found

    def pruned(
        self,
        step: Step,
        values: Sequence[ir.Value],
        weights: Mapping[str, Tensor],
        given: Sequence[ir.Value] = (),
    ) -> Iterator[tuple[int, dict[ir.Value, Tensor]]]:
        """(chunk, values of a step in the pruned model with ``weights``).

        Args:
            given: What was kept of them before.
        """
        own = {self.names[name] for name in step.weights}
        mine = {name: value for name, value in weights.items() if name in own}
        for plan, chunks in zip(self.plans, self.chunks_of, strict=True):
            with self.gates.closed(plan), with_weights(self.model, mine):
                for chunk in chunks:
                    yield chunk, self._compute(step, chunk, values, pruned=True, more=given)

    def _compute(
        self, step: Step, chunk: int, values: Sequence[ir.Value], *, pruned: bool, more: Sequence[ir.Value] = ()
    ) -> dict[ir.Value, Tensor]:
        given = {value.name: self.stream(value, chunk, pruned=pruned) for value in (*step.reads, *step.sides, *more)}
        names = [value.name for value in values]
        whole = -(-self._counts[chunk] // self.batch) * self.batch
        found = self.model.compute(names, *self.model.blank(whole), given=given)
        return {value: found[value.name] for value in values}

    def stream(self, value: ir.Value, chunk: int, *, pruned: bool) -> Tensor:
        """What is kept of a value of the dense or the pruned model."""
        return self.get(("pruned" if pruned and value in self._own else "dense", value.name), chunk)

    def keep(self, value: ir.Value, chunk: int, x: Tensor) -> None:
        """Of the pruned model."""
        self._own.add(value)
        self.put(("pruned", value.name), chunk, x)

    def forget(self, step: Step, *values: ir.Value) -> None:
        """What no step behind ``step`` reads."""
        later = self.steps[self.steps.index(step) + 1 :]
        needed = {value for one in later for value in (*one.reads, *one.sides)}
        for value in {*step.reads, *step.sides, *values} - needed:
            for kind in ("dense", "pruned"):
                for chunk in self.chunks:
                    self.drop((kind, value.name), chunk)

    # -- rows -----------------------------------------------------------------------------------------------------

    def rows(self, value: ir.Value, x: Tensor, chunk: int) -> Tensor:
        """[image, token, channel]"""
        return self._rows(value)(x)[: self._counts[chunk]]

    def _rows(self, value: ir.Value) -> Rows:
        return rows_of(self.gates, value)

    def select(self, value: ir.Value, x: Tensor, chunk: int, mask: np.ndarray) -> Tensor:
        """[image, row, channel]: the tokens of ``mask`` [id], in the order of their ids."""
        return self.rows(value, x, chunk).index_select(1, self._rows(value).at(mask).to(x.device))

    def row_weights(self, value: ir.Value, mask: np.ndarray, *, alike: bool = False) -> Tensor:
        """How much the rows of ``mask`` count in a fit, in the order of their ids.

        Args:
            alike: All that count at all count alike.
        """
        weights = torch.from_numpy(self.importance[value.name])
        weights = (weights > 0).to(weights) if alike else weights
        ids = self._rows(value).ids
        # Apple's GPUs have no float64.
        return weights[np.sort(ids[mask[ids]])].float().to(self.device)

    # -- the last block before a head that pools ------------------------------------------------------------------

    @cached_property
    def pooled(self) -> np.ndarray | None:
        """bool [id]: the tokens whose mean is all that is read of the stream behind the blocks; None: of others."""
        followed = self.followed
        if len(followed.readers) != 1 or followed.readers[0].op_type != "ReduceMean":
            return None
        (flow,) = [followed.flows.get(followed.readers[0])]
        if flow is None or len(flow.ends) != 1 or flow.groups:
            return None
        mask = np.zeros(followed.tokens.count, bool)
        mask[flow.ends[0]] = True
        return mask

    def is_pooled(self, step: Step) -> bool:
        return self.pooled is not None and step.block == len(self.followed.blocks) - 1

    def missing(self, step: Step, chunk: int, dense: Tensor, pruned: Tensor) -> Tensor:
        """[image, row, channel]: what the updated rows lack of what they should become.

        That is the dense stream. Only before a head that pools it is shifted by what makes the mean come out right: the
        head misses what was dropped, it reads frozen patches as they are, and no block follows to make up for either.

        Args:
            dense, pruned: Behind the step.
        """
        value, mask = step.stream, self.updated(step, self.plan_index(chunk))
        lack = self.select(value, dense, chunk, mask) - self.select(value, pruned, chunk, mask)
        if not self.is_pooled(step):
            return lack
        reads = self.sets[self.plan_index(chunk)].reads
        read = self.pooled if reads is None else self.pooled & reads
        ids = np.flatnonzero(mask)
        patches = torch.from_numpy((ids < self.followed.patches) & read[ids]).to(lack.device)
        frozen_rows = self.select(value, pruned, chunk, read & ~mask)
        wanted = self.select(value, dense, chunk, mask & read).sum(1, keepdim=True)
        mean = self.select(value, dense, chunk, self.pooled).mean(1, keepdim=True)
        short = mean * read.sum() - wanted - frozen_rows.sum(1, keepdim=True)
        share = int(patches.sum())
        shift = short / share if share else torch.zeros_like(short)
        is_patch = torch.from_numpy(ids < self.followed.patches).to(lack.device)
        return lack + shift * is_patch[:, None]
