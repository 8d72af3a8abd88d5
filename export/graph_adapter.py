"""The user's own graph as learning takes a model: gates, pruned forms and outputs of any ViT that is followed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from ..core.cost import dense_macs, plan_macs
from ..core.geometry import Geometry
from ..core.plan import TokenPlan
from ..prune.backbones.adapter import Images
from ..prune.tune.store import RAM_BYTES
from .follow import Followed, fold
from .graph import OpenedGraph
from .graph_gates import GraphGates
from .graph_outputs import GraphOutputs
from .torch_graph import GraphModule

#: Folding a plan and lowering the result takes as long as so many multiply-adds for each node of the graph, where it
#: runs. On one CPU thread: 0.09 s for the 339 nodes of the bundled reference, whose dense form does 31 G a second, and
#: 0.21 s for the 499 of DeiT-S, which does 65 G. Of GPUs this is a guess.
FOLD_MACS = {"cpu": 8_000_000, "cuda": 2_000_000_000}


class GraphAdapter:
    """An :class:`~vpruner.prune.backbones.adapter.Adapter` of an ONNX graph.

    Args:
        followed: The graph; it stays as it is.
        model: The module of it that is judged.
        name: What to call it in plans and messages.
        geometry: Its shape.
        opened: The graph as it was read.

    Attributes:
        gates: Where the masks of a plan stand in the module.
    """

    #: Plans are run one after the other, each on many images: a folded graph shares nothing with another.
    plans_together: ClassVar[bool] = False

    def __init__(
        self, followed: Followed, model: GraphOutputs, name: str, geometry: Geometry, opened: OpenedGraph | None = None
    ):
        self.followed, self.model, self.name, self.geometry = followed, model, name, geometry
        self.opened = opened
        self.gates = GraphGates(followed, model)
        self._active = False
        #: Tensors that the weights are as the graph has them.
        self._own = {name: weight.data for name, weight in model.weights().items()}
        self._folded: tuple[str, Mapping[str, Tensor], GraphModule] | None = None
        self._exchanged: tuple[Mapping[str, Tensor], Followed] | None = None

    @contextmanager
    def gated(self, batch_size: int, plan: TokenPlan | None = None) -> Iterator[Tensor]:
        """Gates of every patch, see :class:`~vpruner.prune.backbones.adapter.Adapter`."""
        rows = batch_size + -batch_size % (self.model.batch or 1)
        with self._alone(), self.gates.gated(rows, plan) as gates:
            yield gates

    @contextmanager
    def applied(self, plan: TokenPlan, form: str = "dead") -> Iterator[GraphOutputs]:
        """Let :attr:`model` compute ``plan`` until the context is left.

        Args:
            form: ``"masked"``: everything is computed, and masked. Otherwise what is left alone, by the folded graph.
        """
        plan.check_fits(self.name, self.geometry)
        with self._alone():
            if form == "masked":
                with self.gates.closed(plan):
                    yield self.model
            else:
                with self.model.instead(self.folded(plan)):
                    yield self.model

    @torch.no_grad()
    def evaluate_plans(self, plans: Sequence[TokenPlan], images: Tensor, total: int | None = None) -> Tensor:
        """Outputs of the model pruned by each of ``plans``; masked where folding would take longer than it saves."""
        like, found = next(self.model.parameters()), []
        for plan in plans:
            with self.applied(plan, "dead" if self._pays(plan, total or len(images)) else "masked"):
                found.append(self.model(images.to(like)).float().cpu())
        return torch.stack(found)

    def refit(
        self,
        plans: TokenPlan | Sequence[TokenPlan],
        calibration: Images,
        indices: Sequence[int] | np.ndarray,
        *,
        start: Mapping[str, Tensor] | None = None,
        flip: bool | None = None,
        ram_bytes: int = RAM_BYTES,
        on_step: Callable[[int], None] = lambda count: None,
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Weights refitted to what plans leave, see :func:`~vpruner.export.graph_refit.refit_graph`."""
        from .graph_refit import refit_graph

        options = dict(start=start, flip=flip, ram_bytes=ram_bytes, on_step=on_step)
        return refit_graph(self, plans, calibration, indices, **options)

    def moved(self, where: Mapping[int, Tensor]) -> None:
        """Know the weights of the graph again, and fold anew, where they are now."""
        self._own = {name: where.get(weight.data_ptr(), weight) for name, weight in self._own.items()}
        self._folded = self._exchanged = None

    def look_at(self, images: Tensor) -> None:
        """Scale values by what the graph gives for these images."""
        self.model.look_at(images)

    def folded(self, plan: TokenPlan) -> GraphModule:
        """The graph that computes only what ``plan`` leaves, with the present weights of :attr:`model`.

        Weights that folding does not cut are those of the model, not copies. The last one is remembered.
        """
        weights = self.model.weights()
        present = {name: weight.data for name, weight in weights.items()}
        if self._folded is None or self._folded[0] != plan.digest or not _same(self._folded[1], present):
            self._folded = None
            followed = self._with_present(present)
            like = next(self.model.parameters())
            module = GraphModule(fold(followed, plan, shapes=False)).to(like.device, like.dtype)
            module.share(weights)
            self._folded = (plan.digest, present, module)
        return self._folded[2]

    def changed(self) -> dict[str, np.ndarray]:
        """Weights that are not those of the graph now: name -> array of the type that the graph has them in."""
        stored = self.followed.model.graph.initializers
        return {
            name: weight.detach().cpu().double().numpy().astype(stored[name].const_value.dtype.numpy())
            for name, weight in self.model.weights().items()
            if weight.data_ptr() != self._own[name].data_ptr()
        }

    def _with_present(self, present: Mapping[str, Tensor]) -> Followed:
        """The graph with the weights ``present``; many plans in a row are folded with the same ones."""
        if self._exchanged is not None and _same(self._exchanged[0], present):
            return self._exchanged[1]
        self._exchanged, changed = None, self.changed()
        if not changed:
            return self.followed
        followed = self.followed.copy()
        for name, array in changed.items():
            followed.model.graph.initializers[name].const_value = ir.tensor(array, name=name)
        followed.tokens.known.forget_floats()
        self._exchanged = present, followed
        return followed

    def _pays(self, plan: TokenPlan, images: int) -> bool:
        if self._folded is not None and self._folded[0] == plan.digest:
            return True
        device = next(self.model.parameters()).device.type
        saved = (dense_macs(self.geometry) - plan_macs(plan)) * images
        return saved > FOLD_MACS.get(device, FOLD_MACS["cuda"]) * len(self.followed.model.graph)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if self._active:
            raise RuntimeError("another plan is applied to this model already; leave that context first")
        self._active = True
        try:
            yield
        finally:
            self._active = False


def _same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return all(a.data_ptr() == other[name].data_ptr() and a.dtype == other[name].dtype for name, a in one.items())
