"""An ONNX graph as a PyTorch module."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches

import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...core.errors import UserError
from ..graph import Graph, open_graph
from ..nodes import copy_model
from ..unfit import refuse_subgraphs
from .lower import HOST_LIKE, LIKE, lower
from .program import Program, compile_calls
from .table import DTYPES, real


class GraphModule(nn.Module):
    """Runs a graph with autograd, on the device and in the floating-point type that the module is moved to.

    Floating-point constants of the graph are parameters, integers are buffers. The graph that it is made of stays as it
    is. A fixed batch of the graph binds nobody: more images run as many times of it in one vectorised pass.

    Args:
        graph: A file, a model in memory, or an opened graph.

    Attributes:
        input_names, output_names: Of the graph, in order.
        batch: What a fixed first axis of the first input counts; None where it is open.

    Raises:
        GraphError: The graph cannot be run: an operator without a function, an opset that is not tested, control flow,
            sequences. Names the node.
    """

    def __init__(self, graph: Graph):
        super().__init__()
        opened = open_graph(graph)
        with opened.naming():
            for node in opened.model.graph:
                refuse_subgraphs(node)
            model = opened.model
            if model.functions:
                model = copy_model(model)
                passes.InlinePass()(model)
            self._lowered = lower(model)
        inputs = [value for value in model.graph.inputs if value.name not in model.graph.initializers]
        self._inputs = {value.name: (value.dtype, _sizes(value)) for value in inputs}
        self.input_names, self.output_names = tuple(self._inputs), tuple(value.name for value in model.graph.outputs)
        self.batch = next((sizes[0] for _, sizes in self._inputs.values() if sizes), None)
        double = any(weight.dtype == torch.float64 for weight in self._lowered.weights.values())
        like = torch.empty(0, dtype=torch.float64 if double else torch.float32)
        self.register_buffer("_like", like, persistent=False)
        self._attributes: dict[str, str] = {}
        for name, weight in self._lowered.weights.items():
            self.register_parameter(self._attribute(name), nn.Parameter(weight.to(self._like.dtype)))
        self._weights = tuple(self._lowered.weights)
        self._lowered.weights.clear()  # They are parameters now, which may move.
        for name in self._lowered.on_device:
            table = self._lowered.tables[name]
            self.register_buffer(self._attribute(f"{name}:device"), table.to(real(table.dtype, self._like)))
        self._placed: dict[tuple[str, str | None], list[tuple[Callable, tuple[Tensor, ...]]]] = {}
        self._programs: dict[tuple, Program] = {}
        self._readers: dict[str, set[str]] = {}
        for call in self._lowered.calls:
            for name in call.inputs:
                self._readers.setdefault(name, set()).add(call.outputs[0])
            for name in call.outputs:
                self._readers.setdefault(name, set())

    def _attribute(self, name: str) -> str:
        """A name that torch takes for one of the graph, which may hold dots and slashes."""
        stem = "graph_" + re.sub(r"\W", "_", name)
        taken = set(self._attributes.values())
        free = next(text for text in (stem, *(f"{stem}_{i}" for i in range(len(taken) + 1))) if text not in taken)
        self._attributes[name] = free
        return free

    def weights(self) -> dict[str, nn.Parameter]:
        """Parameters by the name that they have in the graph."""
        return {name: getattr(self, self._attributes[name]) for name in self._weights}

    def share(self, weights: Mapping[str, nn.Parameter]) -> None:
        """Take weights of another module in the place of those that have their name and shape."""
        for name, own in self.weights().items():
            if name in weights and weights[name].shape == own.shape:
                setattr(self, self._attributes[name], weights[name])

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The output of the graph, or a tuple of its outputs."""
        found = tuple(self.compute(self.output_names, *inputs).values())
        return found[0] if len(found) == 1 else found

    def compute(
        self, names: Sequence[str], *inputs: Tensor | None, given: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """The values called ``names``, and nothing that they do not need.

        With more images than a fixed batch holds, the first axis of a value is that of all passes, one after the other.

        Args:
            names: Of any values; of attention logits as :func:`~vpruner.export.torch_graph.lower.logits_name` says.
            inputs: In the order of :attr:`input_names`, on any device. One may be None where nothing needs it. Of an
                input of which only the shape is needed, any numbers will do.
            given: Values by name, shaped as this gives them: they are not computed, and nothing ahead of them is.

        Raises:
            UserError: There is no such value, or an input does not have the shape that the graph says or is missing.
            GraphError: The graph does not fit its inputs; names the node.
        """
        known = {name: x.to(self._like.device) for name, x in (given or {}).items()}
        key = (tuple(names), frozenset(self._placed), frozenset(known))
        if key not in self._programs:
            for name in (*names, *known):
                self._check_name(name)
            self._programs[key] = compile_calls(self._lowered, *key)
        program, (arrived, times) = self._programs[key], self._arrived(inputs)
        for name in program.reads.intersection(self._inputs).difference(arrived, known):
            raise UserError(f"the graph was not given its input {name!r}, which {names[0]!r} needs")
        arrived.update(known)
        places = [(place, function) for place, stack in self._placed.items() for function, _ in stack]
        tensors = [tensors for stack in self._placed.values() for _, tensors in stack]

        def run(arrived: Mapping[str, Tensor], tensors: Sequence[tuple[Tensor, ...]]) -> list[Tensor]:
            placed: dict = {}
            for (place, function), arguments in zip(places, tensors, strict=True):
                placed.setdefault(place, []).append((function, arguments))
            return program.run(
                {name: arrived[name] if name in arrived else self._constant(name) for name in program.reads}, placed
            )

        if times == 1:
            found = run(arrived, tensors)
        else:
            parts = (
                {name: x.unflatten(0, (times, -1)) for name, x in arrived.items()},
                [[x.unflatten(0, (times, -1)) for x in part] for part in tensors],
            )
            with sdpa_kernel(SDPBackend.MATH):  # The others have no batching rule, and would run one image at a time.
                found = [x.flatten(0, 1) for x in torch.vmap(run)(*parts)]
        return {name: x.to(self._like.device) for name, x in zip(names, found, strict=True)}

    @contextmanager
    def at(self, value: str, function: Callable, *tensors: Tensor, reader: str | None = None) -> Iterator[None]:
        """Put ``function(value, *tensors)`` in the place of ``value``; several at one place act in turn.

        Args:
            value: Its name; :func:`~vpruner.export.torch_graph.lower.logits_name` for a node ``Attention``.
            tensors: What the function needs beside it, one row for each image: gates [image, ...]. Under a fixed
                batch, each pass is given its own rows.
            reader: The (first) output of the node that reads it, where no other reader is to see the change.

        Raises:
            UserError: There is no such value, or nothing of the name reads it.
        """
        self._check_name(value)
        readers = self._readers.get(value, set())
        if reader is not None and reader not in readers:
            raise UserError(f"{reader!r} does not read {value!r}, expected one of {sorted(readers)}")
        place = (value, reader)
        self._placed.setdefault(place, []).append((function, tensors))
        try:
            yield
        finally:
            self._placed[place].pop()
            if not self._placed[place]:
                del self._placed[place]

    def _check_name(self, name: str) -> None:
        if name not in {*self._readers, *self._inputs, *self._weights, *self._lowered.tables}:
            near = ", ".join(map(repr, get_close_matches(name, self._readers, 3)))
            raise UserError(f"the graph has no value {name!r}", f"similar ones are {near}" if near else "")

    def _constant(self, name: str) -> Tensor:
        if name in (LIKE, HOST_LIKE):
            return self._like if name == LIKE else torch.empty(0, dtype=self._like.dtype)
        attribute = self._attributes.get(name)
        return self._lowered.tables[name] if attribute is None else getattr(self, attribute)

    def _arrived(self, inputs: Sequence[Tensor | None]) -> tuple[dict[str, Tensor], int]:
        """The inputs where the module is, by name, and how many passes of the graph's fixed batch they are."""
        if len(inputs) != len(self._inputs):
            names = ", ".join(map(repr, self._inputs))
            raise UserError(f"the graph was given {len(inputs)} inputs, expected {len(self._inputs)}: {names}")
        arrived, times = {}, set()
        for (name, (dtype, sizes)), x in zip(self._inputs.items(), inputs, strict=True):
            if x is None:
                continue
            if sizes:
                fits = [size in (None, own) for size, own in zip(sizes[1:], x.shape[1:], strict=False)]
                rest = x.shape[0] % sizes[0] if x.ndim and sizes[0] else 0
                if x.ndim != len(sizes) or rest or not all(fits) or not x.shape[0]:
                    expected = f"{['any' if size is None else size for size in sizes]}, or a multiple of its batch"
                    raise UserError(f"input {name!r} has shape {list(x.shape)}, expected {expected}")
                times.add(x.shape[0] // sizes[0] if sizes[0] else 1)
            arrived[name] = x.to(self._like.device, real(DTYPES.get(dtype, x.dtype), self._like))
        if len(times) > 1:
            raise UserError(f"the inputs hold {sorted(times)} times the batch of the graph, expected the same of each")
        return arrived, max(times, default=1)


def _sizes(value: ir.Value) -> list[int | None] | None:
    return None if value.shape is None else [size if isinstance(size, int) else None for size in value.shape]
