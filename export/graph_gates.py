"""Gates of every patch in every block of any ViT graph, in PyTorch: to mask a plan, and to learn one.

    followed = follow(load_model("model.onnx"))
    gates = GraphGates(followed, GraphModule(followed.model))
    with gates.closed(plan) as module:  # what mask(followed, plan) computes
        outputs = module(images)
    with gates.gated(len(images)) as opened:
        (gradient,) = torch.autograd.grad(loss(gates.model(images)), opened)  # [image, kind, block, patch]

Where :mod:`.follow` finds the tokens of a value, a gate for each token is multiplied with what an ``Add`` of the stream
adds, or added to the attention logits of a key; :mod:`.torch_graph` puts it there.
:func:`~vpruner.prune.fisher.gate_gradients` and what searches with them take this in the place of an adapter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional as F

from ..core.errors import GraphError
from .follow import Followed
from .follow.demand import Plan, sets_of
from .follow.layout import Layout, Part, plain
from .follow.mask import along, apart
from .torch_graph import GraphModule, logits_name

#: Kinds of gates, in the order of :data:`~vpruner.core.plan.KINDS`.
KEYS, QUERIES, MLPS = range(3)


@dataclass(frozen=True, eq=False)
class Place:
    """Where a number for each token changes a value.

    Attributes:
        value: Its name.
        reader: Output of the one node that is to see the change; None: all that read the value.
        function: ``torch.mul`` at updates, ``torch.add`` at logits.
        layout: Where the tokens of the value are.
        group: Which of them have the numbers.
    """

    value: str
    reader: str | None
    function: object
    layout: Layout
    group: int

    @property
    def ids(self) -> np.ndarray:
        return self.layout.ids[self.group]


class GraphGates:
    """The places of all gates of a graph.

    Args:
        followed: The graph.
        module: Made of ``followed.model``, on any device and of any floating-point type.

    Attributes:
        model: The module.
        able: bool [kind 3, block L]: what of each block can be masked. Other gates do nothing: their gradients are 0.
        places: (kind, block) -> of each branch that can be masked.

    Raises:
        GraphError: A value with gates does not say where its images are.
    """

    def __init__(self, followed: Followed, module: GraphModule):
        self.followed, self.model = followed, module
        blocks = followed.blocks
        self.able = np.array([[getattr(block, kind) for block in blocks] for kind in ("keys", "queries", "mlps")])
        self.places: dict[tuple[int, int], list[Place]] = {}
        for block in blocks:
            updates = (self._update(branch) for branch in block.attention if branch.reason is None)
            keys = (self._keys(node) for branch in block.attention for node in branch.keyed)
            mlps = (self._update(branch) for branch in block.mlp if branch.reason is None)
            for kind, found in enumerate((keys, updates, mlps)):
                self.places[kind, block.index] = list(found)
        self._spreads = {place: self._spread(place) for found in self.places.values() for place in found}

    # -- masks ------------------------------------------------------------------------------------------------------

    @contextmanager
    def closed(self, plan: Plan) -> Iterator[GraphModule]:
        """The module computes the masked form of ``plan`` until the context is left: all of it, with 0 in the place of
        updates and ``-inf`` on the logits of keys. A block that is left nothing to read updates nothing by attention.

        Raises:
            PlanError: The plan is for a model of another shape.
        """
        sets = sets_of(self.followed, plan)
        with ExitStack() as placed:
            for block in self.followed.blocks:
                nodes = [node for branch in block.attention for node in branch.keyed]
                biases = [self._logs(sets, node) for node in nodes]
                keys, queries, mlps = (self.places[kind, block.index] for kind in (KEYS, QUERIES, MLPS))
                reads = all(np.isfinite(bias[at.ids]).any() for bias, at in zip(biases, keys, strict=True))
                for place, bias in zip(keys, biases, strict=True):
                    if reads:
                        placed.enter_context(self._fixed(place, bias))
                for branches, places in ((block.attention, queries), (block.mlp, mlps)):
                    keeps = [sets.updates[branch.add][1] for branch in branches if branch.reason is None]
                    for place, keep in zip(places, keeps, strict=True):
                        blind = places is queries and not reads
                        placed.enter_context(self._fixed(place, np.where(blind, 0.0, keep.astype(float))))
            if sets.reads is not None:
                for context in self._head(sets):
                    placed.enter_context(context)
            yield self.model

    @contextmanager
    def gated(self, batch_size: int, plan: Plan | None = None) -> Iterator[Tensor]:
        """Run the module with three differentiable gates on every patch of every block, separately for each image.

        Args:
            batch_size: Images per forward pass, B.
            plan: What is closed meanwhile; its gates get zero gradient. None: nothing.

        Yields:
            gates [batch B, kind 3, block L, patch N], zeros with ``requires_grad``, as those of
            :meth:`~vpruner.prune.backbones.vit.ViTAdapter.gated`: biases on the attention logits of keys, and what is
            added to the 1 by which updates are multiplied. Numbers that are put there count from then on.
        """
        followed, like = self.followed, next(self.model.parameters())
        shape = (batch_size, 3, len(followed.blocks), followed.patches)
        gates = torch.zeros(shape, dtype=like.dtype, device=like.device, requires_grad=True)
        with ExitStack() as placed:
            if plan is not None:
                placed.enter_context(self.closed(plan))
            rows = [kind.unbind(1) for kind in gates.unbind(1)]
            for (kind, block), places in self.places.items():
                for place in places if self.able[kind, block] else ():
                    ids = torch.tensor(place.ids, device=like.device)
                    gate = partial(self._spreads[place], ids=ids)
                    placed.enter_context(self.model.at(place.value, gate, rows[kind][block], reader=place.reader))
            yield gates

    # -- places -----------------------------------------------------------------------------------------------------

    def _update(self, branch) -> Place:
        layout = self.followed.tokens.layouts[branch.add.outputs[0]]
        return Place(branch.add.inputs[branch.update].name, branch.add.outputs[0].name, torch.mul, layout, 0)

    def _keys(self, node: ir.Node) -> Place:
        flow, output = self.followed.flows[node], node.outputs[0].name
        if node.op_type != "Attention":
            return Place(node.inputs[0].name, output, torch.add, flow.outputs[0], flow.normalises)
        (ids,) = flow.ends
        batch = plain(self.followed.tokens.known.shapes[node.inputs[0]][0])
        layout = Layout((batch, (), (), (Part(0, ids.size),)), (ids,))
        return Place(logits_name(output), None, torch.add, layout, 0)

    def _logs(self, sets, node: ir.Node) -> np.ndarray:
        """float64 [id]: the logarithm of the gate of each key."""
        return np.where(sets.keys[node], sets.gates.get(node, 0.0), -np.inf)

    def _head(self, sets) -> Iterator:
        """What a head that pools does not read."""
        inside = {node for block in self.followed.blocks for b in block.attention for node in (*b.mixers, *b.keyed)}
        for node in sets.keys:
            flow = self.followed.flows[node]
            if node in inside:
                continue
            if node.op_type == "Attention" or flow.normalises is not None:
                yield self._fixed(self._keys(node), self._logs(sets, node))
            elif node.op_type.startswith(("Reduce", "Global")):
                layout, value = self.followed.tokens.layouts[node.inputs[0]], node.inputs[0].name
                for group, link in enumerate(flow.links[0]):
                    (axis,) = (axis for axis in range(len(layout.axes)) if group in layout.groups_of(axis))
                    if link >= flow.groups:
                        rows = torch.from_numpy(np.flatnonzero(sets.keys[node][layout.ids[group]]))
                        pick = partial(_pick, axis=axis, rows=rows)
                        yield self.model.at(value, pick, reader=node.outputs[0].name)

    def _fixed(self, place: Place, numbers: np.ndarray):
        """A context with the same numbers [id] for all images; with none where they change nothing."""
        if (numbers[place.ids] == (place.function is torch.mul)).all():
            return ExitStack()
        layout, wide, _ = apart(place.layout, place.group, self.followed)
        tensor = torch.tensor(along(layout, place.group, numbers)).to(next(self.model.parameters()))

        def change(x: Tensor) -> Tensor:
            return place.function(x.reshape(wide) if wide else x, tensor).reshape(x.shape)

        return self.model.at(place.value, change, reader=place.reader)

    def _spread(self, place: Place):
        """``function(value, rows [image, patch], ids=)`` of a place: rows are laid along the axes of the value.

        The images are the first factor that their number divides, and the outer one on an axis with other things.
        """
        counts = [self.model.batch] if self.model.batch else list(self.followed.tokens.known.open_dims)
        axes: list[list[int | None]] = []  # None: the next axis of rows
        own, at = 0, None
        for factors in place.layout.axes:
            axes.append([])
            for factor in factors:
                if isinstance(factor, Part):
                    mine = factor.group == place.group
                    own += mine
                    axes[-1].append(None if mine else factor.size)
                    continue
                images = next((count for count in counts if count > 1 and factor % count == 0), None)
                if images is None or at is not None:
                    axes[-1].append(factor)
                else:
                    axes[-1] += [None, factor // images]
                    at = own
        if at is None and self.model.batch != 1:
            raise GraphError(f"the images of {place.value!r} are on no axis of it", "export it for one image")
        update, count = place.function is torch.mul, self.followed.tokens.count
        return partial(_gate, update=update, at=at, axes=axes, count=count)


def _pick(x: Tensor, axis: int, rows: Tensor) -> Tensor:
    return x.index_select(axis, rows.to(x.device))


def _gate(
    x: Tensor, rows: Tensor, *, update: bool, at: int | None, axes: list[list[int | None]], count: int, ids: Tensor
) -> Tensor:
    """x with the gates ``rows`` [image, patch], which are written out on axes that hold something beside tokens."""
    # Of tokens that are no patches the gate is always open.
    rows = F.pad(rows, (0, count - rows.shape[1])).index_select(1, ids.flatten()).unflatten(1, ids.shape)
    rows = rows[0] if at is None else rows.movedim(0, at)
    sizes, narrow, wide, flat = iter(rows.shape), [], [], []
    for axis in axes:
        full = [next(sizes) if size is None else size for size in axis]
        narrow += [own if size is None else 1 for own, size in zip(full, axis, strict=True)]
        full = full if None in axis else [1] * len(full)
        wide += full
        flat.append(math.prod(full))
    rows = rows.reshape(narrow).expand(wide).reshape(flat)
    return x * (1 + rows) if update else x + rows
