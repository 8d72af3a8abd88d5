"""Closed-form ridge refit of any followed graph: what its blocks read of a stream that is no longer the dense one, and
what they write into it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.plan import TokenPlan
from ..prune.calibration import Calibration
from ..prune.tune.ridge import FIRST_RIDGE, NormalEquations, added, unscaled
from ..prune.tune.store import RAM_BYTES
from .graph_layers import Layer, Step, steps_of
from .graph_streams import GraphStreams, Refittable


@torch.no_grad()
def refit_graph(
    adapter: Refittable,
    plans: TokenPlan | Sequence[TokenPlan],
    calibration: Calibration,
    indices: Sequence[int] | np.ndarray,
    *,
    start: Mapping[str, Tensor] | None = None,
    flip: bool | None = None,
    ram_bytes: int = RAM_BYTES,
    on_step: Callable[[int], None] = lambda count: None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """As :func:`~vpruner.prune.tune.weights.refit_weights`, of a graph: there it is said what is minimised.

    Sum by sum of the stream: the products that make keys and values get the dense model's keys and values as target;
    then the product that a branch ends in gets the dense stream behind the sum, at the tokens that the plan updates. A
    branch that ends in something else stays as it is, and so does a matrix that several nodes read.

    Args:
        adapter: The dense model.
        plans: One, or several that are each in force for an equal share of the images.
        indices, start, flip, ram_bytes, on_step: As there.

    Returns:
        (weights, details): state-dict name in ``adapter.model`` -> tensor of the parameter's shape, dtype and device,
        ``start`` included; and JSON values as there, by the name that a matrix has in the graph.

    Raises:
        PlanError: A plan does not fit the graph.
        GraphError: The images are on no axis of the stream.
    """
    plans = list(plans) if isinstance(plans, Sequence) else [plans]
    steps = steps_of(adapter.gates)
    with GraphStreams(adapter, steps, plans, calibration, indices, flip, ram_bytes) as streams:
        refit = _Refit(streams, dict(start or {}))
        for at, step in enumerate(steps):
            refit.blocks += [{} for _ in range(step.block + 1 - len(refit.blocks))]
            refit.step(step)
            if at + 1 == len(steps) or steps[at + 1].block != step.block:
                on_step(1)
        details = {"images": streams.images, "flip": streams.flip, "folds": streams.folds, "blocks": refit.blocks}
    return refit.weights, details


class _Refit:
    """The layers of one graph, refitted sum by sum.

    Attributes:
        weights: State-dict name -> tensor, of what has changed so far.
        blocks: JSON values of each block so far.
    """

    def __init__(self, streams: GraphStreams, weights: dict[str, Tensor]):
        self.streams, self.weights = streams, weights
        self.blocks: list[dict[str, Any]] = []
        self._ridges: dict[str, float] = {}

    def step(self, step: Step) -> None:
        streams = self.streams
        keyed = step.keyed if streams.diverged else ()
        self._advance_dense(step, keyed)
        for number, layers in enumerate(keyed):
            self._keys_values(step, number, layers)
        if not streams.diverged and streams.exact(step) and not self._changed(step):
            # Nothing has been left out yet: what a fit would find is rounding.
            streams.forget(step)
            return
        streams.diverged = True
        self._output(step)

    def _changed(self, step: Step) -> bool:
        return any(self.streams.names[name] in self.weights for name in step.weights)

    def _advance_dense(self, step: Step, keyed: tuple[tuple[Layer, ...], ...]) -> None:
        """And keep the keys and values that the dense model has."""
        streams = self.streams
        for chunk, found in streams.advance_dense(step, [layer.output for layers in keyed for layer in layers]):
            mask = streams.read(step, streams.plan_index(chunk))
            for number, layers in enumerate(keyed):
                streams.put(("keys", number), chunk, self._columns(layers, found, chunk, mask))

    def _columns(self, layers: Sequence[Layer], found: Mapping, chunk: int, mask: np.ndarray) -> Tensor:
        """[image, row, column]: keys and values of the tokens of ``mask``."""
        parts = (
            self.streams.select(layer.output, found[layer.output], chunk, mask)[
                ..., torch.from_numpy(layer.columns).to(self.streams.device)
            ]
            for layer in layers
        )
        return torch.cat(list(parts), -1)

    def _keys_values(self, step: Step, number: int, layers: Sequence[Layer]) -> None:
        """Refit columns that make keys and values; those that make queries stay."""
        streams, first = self.streams, layers[0]
        columns = sum(len(layer.columns) for layer in layers)
        equations = self._equations(first, columns)
        values = [first.inputs, *(layer.output for layer in layers)]
        for chunk, found in streams.pruned(step, values, self.weights):
            mask = streams.read(step, streams.plan_index(chunk))
            inputs = streams.select(first.inputs, found[first.inputs], chunk, mask)
            lack = streams.get(("keys", number), chunk) - self._columns(layers, found, chunk, mask)
            equations.add(streams.fold(chunk), inputs, lack, streams.row_weights(first.output, mask))
        self._solve("keys", layers, equations)
        for chunk in streams.chunks:
            streams.drop(("keys", number), chunk)

    def _output(self, step: Step) -> None:
        """Refit what the branch ends in, and take the pruned stream through the step."""
        streams, layer = self.streams, step.writer
        if layer is None:
            for chunk, found in streams.pruned(step, [step.stream], self.weights):
                streams.keep(step.stream, chunk, found[step.stream])
            streams.forget(step)
            return
        # What is no wider than the stream is kept; to compute it again is less work than to write and read the rest.
        kept = [layer.inputs] if layer.width <= len(layer.columns) else []
        equations = self._equations(layer, len(layer.columns))
        for chunk, found in streams.pruned(step, [step.stream, layer.inputs], self.weights):
            mask = streams.updated(step, streams.plan_index(chunk))
            if mask.any():
                lack = streams.missing(
                    step, chunk, streams.stream(step.stream, chunk, pruned=False), found[step.stream]
                )
                weights = streams.row_weights(step.stream, mask, alike=streams.is_pooled(step))
                inputs = streams.select(layer.inputs, found[layer.inputs], chunk, mask)
                equations.add(streams.fold(chunk), inputs, lack, weights)
            for value in (step.stream, *kept):
                streams.keep(value, chunk, found[value])
        if self._solve("attention" if step.branch.is_attention else "mlp", [layer], equations):
            for chunk, found in streams.pruned(step, [step.stream], self.weights, kept):
                streams.keep(step.stream, chunk, found[step.stream])
        streams.forget(step, *kept)

    def _equations(self, layer: Layer, columns: int) -> NormalEquations:
        streams = self.streams
        return NormalEquations(layer.width, columns, streams.folds, bias=layer.bias is not None, device=streams.device)

    def _solve(self, kind: str, layers: Sequence[Layer], equations: NormalEquations) -> bool:
        """Whether anything changed."""
        solution = equations.sum_up().solve(self._ridges.get(kind, FIRST_RIDGE))
        self.blocks[-1].update({layer.weight: solution.to_json() for layer in layers})
        if solution.coefficients is None:
            return False
        self._ridges[kind] = solution.ridge
        parts = solution.coefficients.split([len(layer.columns) for layer in layers], 1)
        for layer, part in zip(layers, parts, strict=True):
            update = unscaled(part[: layer.width], _tensor(layer.scale))
            shape = (-1, layer.width) if layer.turned else (layer.width, -1)
            self._add(layer.weight, layer.columns, update.T if layer.turned else update, shape)
            if layer.bias is not None:
                self._add(layer.bias, layer.columns, unscaled(part[-1], _tensor(layer.bias_scale)), (-1,))
        return True

    def _add(self, name: str, columns: np.ndarray, update: Tensor, shape: tuple[int, ...]) -> None:
        """To columns of a constant of the graph, seen in ``shape``, in which they lie along the axis of size -1."""
        own, parameter = self.streams.names[name], self.streams.model.weights()[name]
        tensor = self.weights.get(own, parameter).detach()
        axis, places = shape.index(-1), torch.from_numpy(columns).to(tensor.device)
        changed = tensor.reshape(shape).clone()
        changed.index_copy_(axis, places, added(changed.index_select(axis, places), update))
        self.weights[own] = changed.reshape(tensor.shape)


def _tensor(array: np.ndarray | None) -> Tensor | None:
    return None if array is None else torch.from_numpy(array)
