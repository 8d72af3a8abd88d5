"""A token plan in the vision tower of a vision-language model: what each block reads and updates, for every image."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from ...core.errors import UserError
from ...core.plan import TokenPlan
from ...core.schedule import schedule
from ...core.text import command, option
from ..backbones.forms import Rows, Step, computes_all
from .layout import TowerCounts
from .parts import VLMParts
from .tower_pruning import TowerPruning, attend, forward_name
from .views import split_heads


def tower_plan(plan: TokenPlan, parts: VLMParts) -> TokenPlan:
    """What ``plan`` says of the tower up to its features, as a plan whose head reads what the projector is given.

    A plan that drops patches whole shortens the prompt: what enters the last of these blocks is read. One that freezes
    patches shortens it only where its own head reads patches, and not all of them.

    Raises:
        UserError: The plan is for a tower of another shape, has real-valued gates, or leaves nothing to be read; or the
            projector reads what enters the tower.
    """
    blocks, shape = min(parts.feature_states), parts.geometry
    if not blocks:
        raise UserError(
            "the projector reads what enters the first block of the vision tower, so there is nothing to plan",
            f"use {option('mode')} llm, random or fastv",
        )
    geometry = plan.geometry
    found, expected = ((g.grid, g.prefix_tokens, g.embed_dim) for g in (geometry, shape))
    if found != expected or geometry.depth < blocks:
        raise UserError(
            f"the plan is for {plan.model}: {geometry.grid[0]}x{geometry.grid[1]} patches, {geometry.prefix_tokens} "
            f"prefix tokens, width {geometry.embed_dim}, {geometry.depth} blocks; the vision tower has "
            f"{shape.grid[0]}x{shape.grid[1]}, {shape.prefix_tokens}, {shape.embed_dim} and {blocks} blocks up to its "
            "features",
            f"learn one for it: {command('prune', 'MODEL_FOLDER', data='DIR', output='plan.json')}",
        )
    if plan.gates is not None and any(gate != 1 for gates in plan.gates for gate in gates):
        raise UserError(
            "the plan has real-valued gates, which the tower of transformers has no place for",
            f"use {option('tune', 'weights')}",
        )
    shape = replace(shape, depth=blocks)
    if plan.kept is not None:
        if not plan.kept[blocks - 1]:
            raise UserError(
                f"the plan drops all patches before block {blocks - 1}, whose features the projector reads",
                "use a plan that keeps some",
            )
        return TokenPlan.dropping(plan.model, shape, plan.kept[:blocks])
    updates = [list(sets[:blocks]) for sets in (plan.queries, plan.mlps)]
    if geometry.depth == blocks and not geometry.head_patches:
        # The head of the plan reads no patch, so to update any in its last block was dead work. What the block before
        # updates is updated here too.
        for sets in updates:
            sets[-1] = sets[-2] if blocks > 1 else tuple(range(shape.patches))
    return TokenPlan(plan.model, shape, plan.keys[:blocks], *updates, plan.reads or None)


class PlannedTower(TowerPruning):
    """The tower computes what a plan leaves of it. Behind its last block, what is read stands in the grid's order.

    Args:
        plan: As :func:`tower_plan` makes it.
    """

    def __init__(self, parts: VLMParts, plan: TokenPlan):
        super().__init__(parts)
        self.plan = plan
        self._schedule = schedule(plan)
        every = plan.geometry.tokens
        self._entry = Rows(self._schedule.entry, every)
        self._leaving = Rows(np.argsort(self._schedule.leaving), len(self._schedule.leaving))

    def hooks(self) -> Iterator:
        yield from super().hooks()
        yield self.parts.blocks[0].register_forward_pre_hook(self.before_blocks, with_kwargs=True)

    def replacements(self) -> Iterator[tuple[nn.Module, str, Callable]]:
        *first, last = zip(self.parts.blocks, self._schedule.steps, strict=False)
        for block, step in first:
            if not computes_all(step):
                yield block, forward_name(block), _forward_of(block, Step(step))
        block, step = last
        yield block, forward_name(block), _forward_of(block, Step(step), self._leaving)
        yield from super().replacements()

    def counts(self) -> TowerCounts:
        plan, left = self.plan, self.parts.prefix + len(self.plan.reads)
        behind = (left,) * (len(self.parts.blocks) - plan.geometry.depth)
        return TowerCounts(*(counts + behind for counts in plan.counts), self._leading + len(plan.reads))

    def before_blocks(self, module: nn.Module, args: tuple, kwargs: dict):
        hidden = args[0]
        self._check_grid(hidden)
        self.patches = torch.tensor(self.plan.reads, device=hidden.device).expand(len(hidden), -1)
        return (self._entry.to(hidden.device)(hidden), *args[1:]), kwargs


def _forward_of(block: nn.Module, step: Step, leaving: Rows | None = None) -> Callable[..., Tensor]:
    """Of an encoder layer: [crop, token, channel] as it enters -> as it leaves; then in the order of ``leaving``."""
    attn = block.self_attn

    def attention(x: Tensor) -> Tensor:
        normed = block.layer_norm1(x)
        read = step.keys(normed)
        key, value = (split_heads(project(read), attn.head_dim) for project in (attn.k_proj, attn.v_proj))
        return attend(attn, step.queries(normed), key, value)

    def forward(hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs) -> Tensor:
        # Layers may lie on several devices, or come to one only while they run.
        step.to(hidden_states.device)
        x = step.updated(hidden_states, attention, lambda rows: block.mlp(block.layer_norm2(rows)))
        return x if leaving is None else leaving.to(x.device)(x)

    return forward
