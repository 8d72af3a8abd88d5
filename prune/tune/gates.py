"""Tuning gates instead of weights: by least squares or by distillation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ...core.plan import TokenPlan
from ...core.schedule import schedule
from .. import ranks
from ..backbones.adapter import BlockAdapter
from ..backbones.forms import Step, embed_images
from ..batches import batch_size_for
from ..calibration import Calibration, divergence
from ..device import same_gradients
from ..fisher import frozen
from .ridge import FIRST_RIDGE, NormalEquations
from .store import RAM_BYTES
from .streams import Streams

#: Kwon et al. clamp their tuned masks to [-10, 10]; gates are positive.
MOST_LOG_GATE = math.log(10)
#: Gauss-Newton steps per block, and images for them: a block has at most as many unknowns as patches.
GATE_STEPS, GATE_IMAGES = 2, 256
#: Distillation of gates.
EPOCHS, LEARNING_RATE, DISTILL_BATCH, PATIENCE = 6, 0.02, 32, 2


@torch.no_grad()
def tune_gates_least_squares(
    adapter: BlockAdapter,
    plan: TokenPlan,
    calibration: Calibration,
    indices: Sequence[int] | np.ndarray,
    *,
    ram_bytes: int = RAM_BYTES,
    on_step: Callable[[int], None] = lambda count: None,
) -> tuple[TokenPlan, dict[str, Any]]:
    """Tune the gates block by block so that the residual stream after attention equals the dense model's.

    Gauss-Newton in the log-gates, with the pruned model's own activations as input; the damping is a ridge chosen by
    cross-validation over images. A step that turns out worse than where it came from is taken back.

    Args:
        indices: int [image] of ``calibration``; the first :data:`GATE_IMAGES` of them are looked at.
        ram_bytes, on_step: As in :func:`~vpruner.prune.tune.weights.refit_weights`.

    Returns:
        (plan, details): the plan with gates, each within 1/10 and 10 (``plan`` itself when none changed); and JSON
        values: images, and per block the ridge of each step and the share of the squared error explained.
    """
    depth, prefix = plan.geometry.depth, plan.geometry.prefix_tokens
    log_gates = _log_gates(plan)
    blocks: list[dict[str, Any]] = []
    changed = False
    with Streams(adapter, [plan], calibration, indices[:GATE_IMAGES], False, ram_bytes) as streams:
        for index in range(depth):
            blocks.append({"ridges": [], "errors": []})
            streams.choose(index)
            streams.advance_dense(index)
            if streams.exact_so_far(index):
                streams.follow_dense(index)
                on_step(1)
                continue
            streams.diverged = True
            best, least = log_gates[index], math.inf
            steps = GATE_STEPS + 1 if len(best) and plan.query_counts[index] else 0
            for step in range(steps):
                bias = F.pad(log_gates[index], (prefix, 0))[None, None, None]
                last = step == GATE_STEPS
                equations = NormalEquations(len(best), 1, streams.folds, bias=False, device=streams.device)
                for chunk in streams.chunks:
                    streams.add_gate_equations(equations, chunk, index, bias, with_jacobian=not last)
                error = float(equations.sum_up().squares.sum())
                blocks[-1]["errors"].append(error)
                if not error < least:
                    log_gates[index] = best
                    break
                best, least = log_gates[index], error
                if last:
                    break
                solution = equations.solve(FIRST_RIDGE)
                blocks[-1]["ridges"].append(solution.ridge)
                if solution.coefficients is None:
                    break
                step_taken = solution.coefficients[:, 0].to(best)
                log_gates[index] = (best + step_taken).clamp(-MOST_LOG_GATE, MOST_LOG_GATE)
            changed = changed or bool((best != _log_gates(plan)[index].to(best)).any())
            streams.advance_pruned(index, log_gates[index])
            on_step(1)
        details = {"images": streams.images, "folds": streams.folds, "blocks": blocks}
    return (_with_log_gates(plan, log_gates) if changed else plan), details


def tune_gates_by_distillation(
    adapter: BlockAdapter,
    plan: TokenPlan,
    calibration: Calibration,
    *,
    epochs: int = EPOCHS,
    learning_rate: float = LEARNING_RATE,
    seed: int = 0,
    on_step: Callable[[int], None] = lambda count: None,
) -> tuple[TokenPlan, dict[str, Any]]:
    """Tune all gates together: Adam on the log-gates, with the divergence from the dense model as the loss.

    Fits to ``calibration.fit``; after each epoch the divergence on ``calibration.held_out`` decides whether it is the
    best so far, and :data:`PATIENCE` epochs without a better one end it. Choosing among a few epochs is all that the
    held-out images do.

    Args:
        seed: Order of the images.
        on_step: Called with 1 after each epoch.

    Returns:
        (plan, details): the plan with the gates of the best epoch (``plan`` itself when none was better than the
        start); and JSON values: epochs run, best epoch (0: the start), the divergence after each.
    """
    model, geometry = adapter.model, plan.geometry
    parameter = next(model.parameters())
    calibration.dense_outputs(adapter, calibration.fit)
    random = np.random.default_rng(seed)
    log_gates = [gates.to(parameter).requires_grad_() for gates in _log_gates(plan)]
    optimizer = torch.optim.Adam(log_gates, lr=learning_rate)
    best = plan
    history = [float(calibration.divergence(adapter, plan, calibration.held_out).mean())]
    steps = schedule(replace(plan, gates=None))
    pairs = zip(steps.steps, adapter.ropes(), strict=True)
    forms = [Step.at(step, parameter.device, rope) for step, rope in pairs]
    entry = torch.from_numpy(steps.entry).to(parameter.device)
    size = min(DISTILL_BATCH, batch_size_for(geometry, backward=True))

    def gradients(batch: np.ndarray) -> Sequence[Tensor | None]:
        """Of the mean over the images of ``batch``, of which this process runs its share."""
        chosen, found = ranks.share(batch), [None] * len(log_gates)
        if len(chosen):
            with torch.no_grad():
                x = embed_images(model, calibration.images(chosen).to(parameter)).index_select(1, entry)
            with torch.enable_grad(), same_gradients(parameter.device):
                for block, form, gates in zip(model.blocks, forms, log_gates, strict=True):
                    x = form(block, x, _KeyGates(gates, geometry.prefix_tokens))
                output = model.forward_head(model.norm(x))
                target = calibration.dense_outputs(adapter, chosen).to(output.device)
                loss = divergence(target, output, geometry.output).mean() * (len(chosen) / len(batch))
                found = torch.autograd.grad(loss, log_gates, allow_unused=True)
        if ranks.world().size == 1:
            return found
        return ranks.summed(
            *(torch.zeros_like(gates) if one is None else one for gates, one in zip(log_gates, found, strict=True))
        )

    with frozen(model):
        for _ in range(epochs):
            order = random.permutation(calibration.fit)
            for start in range(0, len(order), size):
                for gates, gradient in zip(log_gates, gradients(order[start : start + size]), strict=True):
                    gates.grad = gradient
                optimizer.step()
                with torch.no_grad():
                    for gates in log_gates:
                        gates.clamp_(-MOST_LOG_GATE, MOST_LOG_GATE)
            on_step(1)
            if not all(torch.isfinite(gates).all() for gates in log_gates):
                break
            tuned = _with_log_gates(plan, [gates.detach() for gates in log_gates])
            history.append(float(calibration.divergence(adapter, tuned, calibration.held_out).mean()))
            if history[-1] < min(history[:-1]):
                best = tuned
            elif len(history) - 1 - int(np.argmin(history)) >= PATIENCE:
                break
    details = {"epochs": len(history) - 1, "best_epoch": int(np.argmin(history)), "held_out_divergence": history}
    return best, details


class _KeyGates:
    """Log-gates [patch] of the keys of one block, as a step takes them; updates have none."""

    def __init__(self, log_gates: Tensor, prefix: int):
        self._log_gates, self._prefix = log_gates, prefix

    def key_bias(self) -> Tensor:
        return F.pad(self._log_gates, (self._prefix, 0))[None, None, None]

    def updates(self, kind: int) -> float:
        return 1.0


def _log_gates(plan: TokenPlan) -> list[Tensor]:
    """float64 [patch] per block, of the keys in the order of the plan's schedule."""
    prefix = plan.geometry.prefix_tokens
    result = []
    for step in schedule(plan).steps:
        gates = np.ones(len(step.keys)) if step.gates is None else step.gates
        result.append(torch.from_numpy(gates[prefix:]).log())
    return result


def _with_log_gates(plan: TokenPlan, log_gates: Sequence[Tensor]) -> TokenPlan:
    prefix, gates = plan.geometry.prefix_tokens, []
    for step, values in zip(schedule(plan).steps, log_gates, strict=True):
        order = np.argsort(step.entering[step.keys][prefix:])
        gates.append(tuple(values.cpu().double().exp().numpy()[order].tolist()))
    return replace(plan, gates=tuple(gates))
