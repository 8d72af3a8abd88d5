"""Stage 3: token mask tuning, which restores the dense model's behaviour once the mask stands.

Two things can be tuned, with unlabeled images and the dense model as the target:

* *weights*: the attention projection and the second MLP layer of each block, refitted in closed form to the tokens that
  are left (as least-squares reconstruction in channel pruning, He et al. 2017, arXiv 1707.06168). Free at run time.
* *gates*: a positive number for each kept patch as an attention key, by least squares block by block (Kwon et al. 2022,
  arXiv 2204.09656, there for heads and filters), or by a short distillation of the whole model.

Whatever is tuned is judged on images that it was not fitted to, and undone when it does not help there.
"""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .calibration import Calibration, Judgement, divergence
from .fisher import batch_size_for
from .methods.rule import BlockView, Keep, TokenRule, enter, select_rows, with_prefix
from .plan import TokenPlan
from .vit import (
    ViTAdapter,
    _forward_without_dead_tokens,
    _key_bias,
    attended_values,
    embed_images,
    project_keys_values,
    query_key_value,
)

#: What can be tuned.
TUNINGS = ("weights", "gates", "gates-distill", "none")

#: Ridges to choose from, relative to the mean square of an input: half decades.
RIDGES = tuple(10 ** (power / 2) for power in range(-8, 5))
#: Where the first search for a ridge starts.
FIRST_RIDGE = 0.1
#: Cross-validation folds; from so many inputs on two, because each fold keeps inputs^2 float64 (134 MB at 4,096).
FOLDS, WIDE, WIDE_FOLDS = 4, 2048, 2
#: How much more than another token a prefix token that the head reads counts in the fit. On the bundled model at 0.35,
#: the KL divergence on unseen images is 0.140 with 1, 0.138 with 4, 0.136 with 10 and 0.137 with 30.
PREFIX_WEIGHT = 10.0
#: Below this many images, their mirror images are fitted to as well.
FLIP_BELOW = 4096
#: Activations up to this size stay in memory, others go to disk.
RAM_BYTES = 512 << 20
#: Channels that LayerScale multiplies by less than this, relative to the largest, are left alone: their weights would
#: have to be as many times larger.
LEAST_SCALE = 1e-3
#: Kwon et al. clamp their tuned masks to [-10, 10]; gates are positive.
MOST_LOG_GATE = math.log(10)
#: Gauss-Newton steps per block, and images for them: a block has at most as many unknowns as patches.
GATE_STEPS, GATE_IMAGES = 2, 256
#: Jacobians are made for so many bytes at a time.
JACOBIAN_BYTES = 64 << 20
#: Distillation of gates.
EPOCHS, LEARNING_RATE, DISTILL_BATCH, PATIENCE = 6, 0.02, 32, 2


@dataclass(frozen=True)
class Tuned:
    """What tuning made of a plan.

    Attributes:
        plan: With gates where gates were tuned and kept; otherwise the plan, or the rule, as it was given.
        weights: State-dict name -> tensor (shape, dtype and device of the model's), only what changed; None when no
            weight did. For :func:`with_weights`.
        judgement: Divergence from the dense model on the held-out images, before and after. None when nothing was
            tuned, or when the result was not finite.
        kept: False: plan and weights are the untuned ones.
        note: One sentence for the report when tuning was undone or could not be done, else "".
        details: How it came about: JSON values only.
    """

    plan: TokenPlan | TokenRule
    weights: dict[str, Tensor] | None = None
    judgement: Judgement | None = None
    kept: bool = False
    note: str = ""
    details: dict[str, Any] = field(default_factory=dict)


def tuning_steps(plan: TokenPlan | TokenRule, kind: str) -> int:
    """How many times :func:`tune` calls ``on_step`` at most: once per block, or per epoch of distillation."""
    return {"weights": plan.geometry.depth, "gates": plan.geometry.depth, "gates-distill": EPOCHS, "none": 0}[kind]


def tune(
    adapter: ViTAdapter,
    plan: TokenPlan | TokenRule,
    calibration: Calibration,
    kind: str = "weights",
    *,
    seed: int = 0,
    on_step: Callable[[int], None] = lambda count: None,
) -> Tuned:
    """Tune ``plan`` on ``calibration.fit``, judge on ``calibration.held_out``, and undo what does not help there.

    Args:
        adapter: The dense model. Its weights are what they were when this returns, also after an exception.
        plan: The mask; gates that it has already stay in force while weights are refitted. Or a rule that keeps tokens
            with static counts, whose weights alone can be tuned.
        calibration: Images; labels are not used.
        kind: One of :data:`TUNINGS`.
        seed: Order of the images in the distillation; the closed forms draw nothing.
        on_step: Called with 1 after each block (or epoch); see :func:`tuning_steps`.

    Raises:
        ValueError: An unknown kind, or one that a rule cannot be tuned in.
        PlanError: The plan is for another geometry.
    """
    if kind not in TUNINGS:
        raise ValueError(f"kind is {kind!r}, expected one of {', '.join(TUNINGS)}")
    if isinstance(plan, TokenRule):
        if kind not in ("weights", "none"):
            raise ValueError(f"kind is {kind!r}, but gates belong to places, and the rule {plan.name} chooses by image")
        drops = min(plan.static_counts()) < plan.geometry.tokens
    else:
        plan.check_fits(adapter.name, adapter.geometry)
        drops = not plan.is_identity
    if kind == "none":
        return Tuned(plan)
    if not drops:
        return Tuned(plan, note="Nothing was tuned: the plan drops no token.")
    if len(calibration.fit) < 2 or len(calibration.held_out) < 2:
        return Tuned(
            plan,
            note=f"Nothing was tuned: {len(calibration.fit)} images to fit to and {len(calibration.held_out)} to judge "
            "on are too few.",
        )
    with _evaluating(adapter.model):
        calibration.dense_outputs(adapter, calibration.held_out)
        tuned, weights = plan, {}
        if kind == "weights":
            weights, details = refit_weights(adapter, plan, calibration, calibration.fit, on_step=on_step)
        elif kind == "gates":
            tuned, details = tune_gates_least_squares(adapter, plan, calibration, calibration.fit, on_step=on_step)
        else:
            tuned, details = tune_gates_by_distillation(adapter, plan, calibration, seed=seed, on_step=on_step)
        details = {"kind": kind, **details}
        if tuned is plan and not weights:
            note = (
                f"Tuning of {kind} changed nothing: whatever was tried did worse on images that it was not fitted to."
            )
            return Tuned(plan, note=note, details=details)
        before = calibration.divergence(adapter, plan, calibration.held_out)
        with with_weights(adapter.model, weights):
            after = calibration.divergence(adapter, tuned, calibration.held_out)
    if not np.isfinite(after).all():
        return Tuned(plan, note=f"Tuning of {kind} was undone: the tuned model is not finite.", details=details)
    judgement = Judgement.of(before, after)
    if not judgement.better:
        note = (
            f"Tuning of {kind} was undone: on {judgement.images} held-out images the divergence from the dense model "
            f"was {judgement.before:.4g} before and {judgement.after:.4g} after (standard error {judgement.error:.2g})."
        )
        return Tuned(plan, None, judgement, False, note, details)
    return Tuned(tuned, weights or None, judgement, True, "", details)


@contextmanager
def with_weights(model: nn.Module, weights: Mapping[str, Tensor] | None) -> Iterator[nn.Module]:
    """Let ``model`` compute with ``weights`` until the context is left; then its own tensors are back, bit for bit.

    Args:
        model: Anything with those parameters.
        weights: State-dict name of a parameter -> tensor of the same shape; cast to its dtype and device. Contents are
            copied. None or empty changes nothing.

    Raises:
        ValueError: No parameter of that name, or another shape; the model is unchanged.
    """
    parameters, own, changed = dict(model.named_parameters()), {}, {}
    for name, value in (weights or {}).items():
        if name not in parameters:
            raise ValueError(f"the model has no parameter {name!r}")
        own[name] = parameters[name].data
        if value.shape != own[name].shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, the model's has {tuple(own[name].shape)}")
        changed[name] = value.detach().to(own[name], copy=True)
    try:
        # Tensors are exchanged, not copied into: exact, and a tensor that someone holds keeps its values.
        for name, value in changed.items():
            parameters[name].data = value
        yield model
    finally:
        for name, value in own.items():
            parameters[name].data = value


# -- weights ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def refit_weights(
    adapter: ViTAdapter,
    plan: TokenPlan | TokenRule | Sequence[TokenPlan | TokenRule],
    calibration: Calibration,
    indices: Sequence[int] | np.ndarray,
    *,
    start: Mapping[str, Tensor] | None = None,
    flip: bool | None = None,
    prefix_weight: float = PREFIX_WEIGHT,
    ram_bytes: int = RAM_BYTES,
    on_step: Callable[[int], None] = lambda count: None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Refit attention projections and second MLP layers so that kept tokens get back the dense model's residual stream.

    Block by block, with the pruned model's own activations (refitted up to there) as input x. With target t (the dense
    stream at the same positions) and the layer's present output W x + b, it solves in closed form

        minimise  |t - (W + V) x - (b + c)|^2 + ridge |V|^2

    so that the ridge draws toward the trained weights, not toward zero. Each ridge is chosen by cross-validation over
    images; a layer for which no ridge beats V = 0 stays as it is. Small calibration sets overfit otherwise, above all
    in the last block of a class-token model, which has one row per image for thousands of unknowns.

    Args:
        plan: The mask. Of several, each is in force for an equal share of the images, and the weights suit all of them
            in the mean, none in particular. Under a rule the rows are those that it keeps of each image, chosen in the
            refitted model as it will be.
        indices: int [image] of ``calibration``; no other image is looked at.
        start: Weights of the pruned model where they are not the dense model's: state-dict name -> tensor.
        flip: Fit to mirror images as well; None: below :data:`FLIP_BELOW` images.
        prefix_weight: How much more a prefix token that the head reads counts, where the head reads no patches.
        ram_bytes: Activations beyond this lie in a temporary folder.
        on_step: Called with 1 after each block.

    Returns:
        (weights, details): state-dict name -> tensor of the parameter's shape, dtype and device, ``start`` included;
        and JSON values: images, flip, and per block and layer the ridge (None: unchanged) and the share of the squared
        error that it explains in cross-validation.
    """
    weights = dict(start or {})
    blocks: list[dict[str, Any]] = []
    ridges = {"attn.proj": FIRST_RIDGE, "mlp.fc2": FIRST_RIDGE}
    plans = [plan] if isinstance(plan, (TokenPlan, TokenRule)) else plan
    with _Streams(adapter, plans, calibration, indices, flip, prefix_weight, ram_bytes) as streams:

        def refit(index: int, name: str, linear: nn.Linear, scale: nn.Module, equations: NormalEquations) -> None:
            solution = equations.solve(ridges[name])
            blocks[-1][name] = solution.to_json()
            if solution.coefficients is None:
                return
            ridges[name] = solution.ridge
            update = _unscaled(solution.coefficients, scale)
            full_name = f"blocks.{index}.{name}"
            weight = weights.get(f"{full_name}.weight", linear.weight)
            weights[f"{full_name}.weight"] = _added(weight, update[: linear.in_features].T)
            if linear.bias is not None:
                bias = weights.get(f"{full_name}.bias", linear.bias)
                weights[f"{full_name}.bias"] = _added(bias, update[-1])

        def linear_output(index: int, name: str, linear: nn.Linear, inputs: Tensor) -> Tensor:
            full_name = f"blocks.{index}.{name}"
            weight, bias = weights.get(f"{full_name}.weight"), weights.get(f"{full_name}.bias")
            return F.linear(
                inputs,
                linear.weight if weight is None else weight.to(linear.weight),
                linear.bias if bias is None else bias.to(linear.weight),
            )

        for index, block in enumerate(adapter.model.blocks):
            blocks.append({})
            streams.choose(index)
            streams.advance_dense(index)
            if streams.exact_so_far(index) and not any(name.startswith(f"blocks.{index}.") for name in weights):
                # Nothing has been dropped yet: what a fit would find is rounding.
                streams.follow_dense(index)
                on_step(1)
                continue
            streams.diverged = True
            proj, fc2 = block.attn.proj, getattr(block.mlp, "fc2", None)
            equations = streams.equations(proj)
            for chunk in streams.chunks:
                inputs, heads = streams.attend(chunk, index)
                output = linear_output(index, "attn.proj", proj, heads)
                target = streams.get("middle", chunk) - inputs
                weights_of_rows = streams.row_weights(chunk, index)
                equations.add(streams.fold(chunk), heads, target - block.ls1(output), weights_of_rows)
                streams.put("heads", chunk, heads)
                streams.put("pruned", chunk, inputs)
            refit(index, "attn.proj", proj, block.ls1, equations)

            equations = streams.equations(fc2) if isinstance(fc2, nn.Linear) else None
            for chunk in streams.chunks:
                heads = streams.get("heads", chunk)
                middle = streams.get("pruned", chunk) + block.ls1(linear_output(index, "attn.proj", proj, heads))
                streams.put("pruned", chunk, middle)
                if equations is not None:
                    hidden = _input_of(fc2, block.mlp, block.norm2(middle))
                    output = linear_output(index, "mlp.fc2", fc2, hidden)
                    target = streams.get("target", chunk) - middle
                    weights_of_rows = streams.row_weights(chunk, index)
                    equations.add(streams.fold(chunk), hidden, target - block.ls2(output), weights_of_rows)
            if equations is not None:
                refit(index, "mlp.fc2", fc2, block.ls2, equations)
            for chunk in streams.chunks:
                middle = streams.get("pruned", chunk)
                if equations is not None:
                    hidden = _input_of(fc2, block.mlp, block.norm2(middle))
                    output = linear_output(index, "mlp.fc2", fc2, hidden)
                else:
                    output = block.mlp(block.norm2(middle))
                streams.put("pruned", chunk, middle + block.ls2(output))
            on_step(1)
        details = {"images": streams.images, "flip": streams.flip, "folds": streams.folds, "blocks": blocks}
    return weights, details


def _added(tensor: Tensor, update: Tensor) -> Tensor:
    """The sum in float64, rounded once to the tensor's dtype, on its device."""
    return (tensor.to(update.device).to(update.dtype) + update).to(tensor.dtype).to(tensor.device)


def _unscaled(coefficients: Tensor, scale: nn.Module) -> Tensor:
    """Change of the residual stream [input, output] -> change of the layer before LayerScale; 0 where that is tiny."""
    gamma = getattr(scale, "gamma", None)
    if gamma is None:
        return coefficients
    gamma = gamma.to(coefficients)
    usable = gamma.abs() > LEAST_SCALE * gamma.abs().max()
    return torch.where(usable, coefficients / torch.where(usable, gamma, 1), 0)


def _input_of(linear: nn.Linear, module: nn.Module, x: Tensor) -> Tensor:
    """What ``linear`` gets inside ``module(x)``: so any MLP that ends in ``fc2`` will do, gated ones too."""
    caught = []
    handle = linear.register_forward_pre_hook(lambda module, args: caught.append(args[0]))
    try:
        module(x)
    finally:
        handle.remove()
    return caught[0]


# -- gates ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def tune_gates_least_squares(
    adapter: ViTAdapter,
    plan: TokenPlan,
    calibration: Calibration,
    indices: Sequence[int] | np.ndarray,
    *,
    prefix_weight: float = PREFIX_WEIGHT,
    ram_bytes: int = RAM_BYTES,
    on_step: Callable[[int], None] = lambda count: None,
) -> tuple[TokenPlan, dict[str, Any]]:
    """Tune the gates block by block so that the residual stream after attention equals the dense model's.

    Gauss-Newton in the log-gates, with the pruned model's own activations as input; the damping is a ridge chosen by
    cross-validation over images. A step that turns out worse than where it came from is taken back.

    Args:
        indices: int [image] of ``calibration``; the first :data:`GATE_IMAGES` of them are looked at.
        prefix_weight, ram_bytes, on_step: As in :func:`refit_weights`.

    Returns:
        (plan, details): the plan with gates, each within 1/10 and 10 (``plan`` itself when none changed); and JSON
        values: images, and per block the ridge of each step and the share of the squared error explained.
    """
    depth, prefix = plan.geometry.depth, plan.geometry.prefix_tokens
    log_gates = _log_gates(plan)
    blocks: list[dict[str, Any]] = []
    changed = False
    with _Streams(adapter, [plan], calibration, indices[:GATE_IMAGES], False, prefix_weight, ram_bytes) as streams:
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
            for step in range(GATE_STEPS + 1 if len(best) else 0):
                bias = F.pad(log_gates[index], (prefix, 0))[None, None, None]
                last = step == GATE_STEPS
                equations = NormalEquations(len(best), 1, streams.folds, bias=False, device=streams.device)
                for chunk in streams.chunks:
                    streams.add_gate_equations(equations, chunk, index, bias, with_jacobian=not last)
                error = float(equations.squares.sum())
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
            streams.advance_pruned(index, F.pad(log_gates[index], (prefix, 0))[None, None, None])
            on_step(1)
        details = {"images": streams.images, "folds": streams.folds, "blocks": blocks}
    return (_with_log_gates(plan, log_gates) if changed else plan), details


def gate_jacobian(attn: nn.Module, queries: Tensor, keys: Tensor, bias: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
    """Attended values and their derivative with respect to the log-gate of each patch.

    With attention a and values v, out_q = sum over j of a_qj v_j and log-gates added to the logits,

        d out_q / d log m_j = a_qj (v_j - out_q)      in each head.

    Args:
        queries: [batch, query, channel], normed.
        keys: [batch, key, channel], normed; ``prefix`` of them come before the patches.
        bias: [1, 1, 1, key], the present log-gates.

    Returns:
        (out [batch, query, inner], jacobian [batch, query, patch, inner]), before the attention's norm and projection;
        inner = head * head_dim.
    """
    query, key, value = query_key_value(attn, queries, keys)
    attention = ((query * attn.scale) @ key.transpose(-2, -1) + bias.to(query)).softmax(-1)
    out = attention @ value
    # [batch, head, query, patch, head_dim]
    jacobian = attention[..., prefix:, None] * (value[:, :, None, prefix:] - out[:, :, :, None])
    return out.transpose(1, 2).flatten(2), jacobian.permute(0, 2, 3, 1, 4).flatten(3)


def tune_gates_by_distillation(
    adapter: ViTAdapter,
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
    rows = [plan.query_rows(index) for index in range(geometry.depth)]
    entry = torch.from_numpy(plan.token_positions(0)).to(parameter.device)
    size = min(DISTILL_BATCH, batch_size_for(geometry, backward=True))
    with frozen(model):
        for _ in range(epochs):
            order = random.permutation(calibration.fit)
            for start in range(0, len(order), size):
                chosen = order[start : start + size]
                with torch.no_grad():
                    x = embed_images(model, calibration.images(chosen).to(parameter)).index_select(1, entry)
                with torch.enable_grad():
                    for index, block in enumerate(model.blocks):
                        bias = F.pad(log_gates[index], (geometry.prefix_tokens, 0))[None, None, None]
                        x = _forward_without_dead_tokens(block, rows[index], bias)(x)
                    output = model.forward_head(model.norm(x))
                    target = calibration.dense_outputs(adapter, chosen).to(output.device)
                    loss = divergence(target, output, geometry.output).mean()
                    gradients = torch.autograd.grad(loss, log_gates, allow_unused=True)
                for gates, gradient in zip(log_gates, gradients, strict=True):
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


def _log_gates(plan: TokenPlan) -> list[Tensor]:
    """float64 [patch] per block, of the kept patches."""
    gates = plan.gates or [[1.0] * len(kept) for kept in plan.kept]
    return [torch.tensor(values, dtype=torch.float64).log() for values in gates]


def _with_log_gates(plan: TokenPlan, log_gates: Sequence[Tensor]) -> TokenPlan:
    return replace(plan, gates=tuple(tuple(values.double().exp().tolist()) for values in log_gates))


# -- least squares ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RidgeSolution:
    """Attributes:
    coefficients: float64 [input, output], the constant's row last where there is one; None: leave all at zero.
    ridge: Relative to the mean diagonal; None with no coefficients.
    explained: Share of the squared error that goes away in cross-validation.
    """

    coefficients: Tensor | None = None
    ridge: float | None = None
    explained: float = 0.0

    def to_json(self) -> dict[str, float | None]:
        return {"ridge": self.ridge, "explained": round(self.explained, 6)}


class NormalEquations:
    """Ridge regression from rows that come in chunks, with the ridge chosen by cross-validation in closed form.

    The equations of every fold are kept apart. From their sums follow the solution without a fold and its squared error
    on that fold, without another look at the rows.

    Args:
        inputs, outputs: Columns of both sides.
        folds: How many; one alone cannot be cross-validated, and :meth:`solve` then leaves everything at zero.
        bias: Whether to fit a constant too, which the ridge does not draw toward zero.

    Attributes:
        grams: float64 [fold, input, input].
        crosses: float64 [fold, input, output].
        squares: float64 [fold], of the targets.
    """

    def __init__(self, inputs: int, outputs: int, folds: int, *, bias: bool = True, device: Any = "cpu"):
        # Apple's GPUs have no float64.
        device = "cpu" if torch.device(device).type == "mps" else device
        size = inputs + bias
        self.bias = bias
        self.grams = torch.zeros(folds, size, size, dtype=torch.float64, device=device)
        self.crosses = torch.zeros(folds, size, outputs, dtype=torch.float64, device=device)
        self.squares = torch.zeros(folds, dtype=torch.float64, device=device)

    def add(self, fold: int, inputs: Tensor, targets: Tensor, row_weights: Tensor | None = None) -> None:
        """Products are taken in the dtype of the rows, at least float32, and summed in float64.

        Args:
            inputs: [..., row, input].
            targets: [..., row, output].
            row_weights: [row]: how often each counts; None: once.
        """
        if inputs.dtype not in (torch.float32, torch.float64):
            inputs, targets = inputs.float(), targets.float()
        targets = targets.to(inputs)
        if self.bias:
            inputs = F.pad(inputs, (0, 1), value=1.0)
        if row_weights is not None:
            root = row_weights.to(inputs).sqrt()[:, None]
            inputs, targets = inputs * root, targets * root
        inputs, targets = inputs.flatten(0, -2), targets.flatten(0, -2)
        for sums, product in (
            (self.grams, inputs.T @ inputs),
            (self.crosses, inputs.T @ targets),
            (self.squares, targets.square().sum()),
        ):
            sums[fold] += product.to(sums.device).to(sums.dtype)

    def solve(self, start: float = FIRST_RIDGE) -> RidgeSolution:
        """Walk downhill through :data:`RIDGES` from ``start``: the error over the ridge has one valley."""
        if len(self.grams) < 2:
            return RidgeSolution()
        gram, cross, total = self.grams.sum(0), self.crosses.sum(0), float(self.squares.sum())
        errors: dict[int, float] = {}

        def error(at: int) -> float:
            if not 0 <= at < len(RIDGES):
                return math.inf
            if at not in errors:
                errors[at] = self._cross_validated_error(gram, cross, RIDGES[at])
            return errors[at]

        at = min(range(len(RIDGES)), key=lambda index: abs(math.log(RIDGES[index] / start)))
        while error(min((at - 1, at + 1), key=error)) < error(at):
            at = min((at - 1, at + 1), key=error)
        # Also refuses errors that are not numbers.
        if not error(at) < total:
            return RidgeSolution()
        coefficients = self._solved(gram, cross, RIDGES[at])
        if coefficients is None:
            return RidgeSolution()
        return RidgeSolution(coefficients, RIDGES[at], 1 - error(at) / total)

    def _cross_validated_error(self, gram: Tensor, cross: Tensor, ridge: float) -> float:
        error = 0.0
        for fold_gram, fold_cross, squares in zip(self.grams, self.crosses, self.squares, strict=True):
            coefficients = self._solved(gram - fold_gram, cross - fold_cross, ridge)
            if coefficients is None:
                return math.inf
            error += float(squares + (coefficients * (fold_gram @ coefficients - 2 * fold_cross)).sum())
        return error if math.isfinite(error) else math.inf

    def _solved(self, gram: Tensor, cross: Tensor, ridge: float) -> Tensor | None:
        """Cholesky, not an eigendecomposition for all ridges at once: at 1,536 inputs one takes as long as eighty."""
        penalised = gram.diagonal()[: len(gram) - self.bias]
        regular = gram.clone()
        regular.diagonal()[: len(gram) - self.bias] += ridge * penalised.mean()
        factor, failed = torch.linalg.cholesky_ex(regular)
        if failed:
            return None
        coefficients = torch.cholesky_solve(cross, factor)
        return coefficients if torch.isfinite(coefficients).all() else None


# -- activations ------------------------------------------------------------------------------------------------------


class ActivationStore:
    """Tensors by key, in memory up to a limit and in a temporary folder beyond it. A context manager.

    Args:
        ram_bytes: The limit.
    """

    def __init__(self, ram_bytes: int = RAM_BYTES):
        self._limit = ram_bytes
        self._held: dict[Hashable, Tensor] = {}
        self._files: dict[Hashable, Path] = {}
        self._bytes = self._written = 0
        self._folder: tempfile.TemporaryDirectory | None = None

    def __enter__(self) -> ActivationStore:
        return self

    def __exit__(self, *error: object) -> None:
        self._held.clear()
        if self._folder is not None:
            self._folder.cleanup()

    @property
    def bytes_in_memory(self) -> int:
        return self._bytes

    def put(self, key: Hashable, value: Tensor) -> None:
        """Keep ``value`` (float32 or float64, of any device) under ``key``, in place of what was there."""
        value = value.detach().cpu()
        previous = self._held.pop(key, None)
        if previous is not None:
            self._bytes -= previous.nbytes
        if self._bytes + value.nbytes <= self._limit:
            if key in self._files:
                self._files.pop(key).unlink()
            # A view would hold all that it is a view of.
            self._held[key] = value.clone() if value.untyped_storage().nbytes() > value.nbytes else value
            self._bytes += value.nbytes
            return
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="vpruner-")
        if key not in self._files:
            self._files[key] = Path(self._folder.name) / f"{self._written}.npy"
            self._written += 1
        # Written and read whole, not mapped: pages of a mapped file count as memory of the process.
        np.save(self._files[key], value.numpy())

    def get(self, key: Hashable) -> Tensor:
        """On the CPU.

        Raises:
            KeyError: Nothing was put there.
        """
        if key in self._held:
            return self._held[key]
        return torch.from_numpy(np.load(self._files[key]))


class _Streams:
    """The residual streams of the dense and the pruned model, for the images of a fit, one block at a time.

    Memory does not grow with the number of images: a chunk of them is read, advanced and written back.

    Attributes:
        images: How many.
        flip: Whether each chunk holds the mirror images too; they share the fold of the originals.
        chunks: int [chunk].
        plans: Chunks take them in turns; each plan (or rule) meets all folds.
        folds: How many folds the chunks are dealt to.
        diverged: Whether pruned and dense stream differ by more than rounding from here on.
    """

    def __init__(
        self,
        adapter: ViTAdapter,
        plans: Sequence[TokenPlan | TokenRule],
        calibration: Calibration,
        indices: Sequence[int] | np.ndarray,
        flip: bool | None,
        prefix_weight: float,
        ram_bytes: int,
    ):
        self.model, self.plans, self.geometry = adapter.model, tuple(plans), adapter.geometry
        for plan in self.plans:
            if isinstance(plan, TokenRule) and (plan.merges or plan.static_counts() is None):
                raise ValueError(f"the rule {plan.name} does not keep a fixed number of tokens in every block")
        parameter = next(self.model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self._calibration, self._indices = calibration, np.asarray(indices)
        self.images = len(self._indices)
        self.flip = self.images < FLIP_BELOW if flip is None else flip
        widths = [m.in_features for m in self.model.blocks.modules() if isinstance(m, nn.Linear)]
        self.folds = min(self.images, WIDE_FOLDS if max(widths) > WIDE else FOLDS)
        size = batch_size_for(self.geometry, memory_bytes=1 << 29) // (1 + self.flip)
        self._size = max(1, min(size, math.ceil(self.images / max(1, self.folds * len(self.plans)))))
        self.chunks = range(math.ceil(self.images / self._size))
        self.folds = min(self.folds, len(self.chunks))
        self._prefix_weight = prefix_weight
        self._store = ActivationStore(ram_bytes)
        self.diverged = False
        # Of the block that was last chosen for: rows by chunk, and by (chunk, block) where in the sequence they lie.
        self._rows: dict[int, Tensor] = {}
        self._positions: dict[tuple[int, int], Tensor] = {}

    def __enter__(self) -> _Streams:
        try:
            for chunk in self.chunks:
                chosen = self._indices[chunk * self._size : (chunk + 1) * self._size]
                images = self._calibration.images(chosen).to(self.device, self.dtype)
                if self.flip:
                    images = torch.cat([images, images.flip(-1)])
                tokens = embed_images(self.model, images)
                self.put("dense", chunk, tokens)
                plan = self.plan(chunk)
                if isinstance(plan, TokenRule):
                    tokens, patches = enter(tokens, plan)
                    self._positions[chunk, 0] = with_prefix(patches, self.geometry.prefix_tokens)
                else:
                    tokens = tokens.index_select(1, self.positions(chunk, 0))
                self.put("pruned", chunk, tokens)
        except BaseException:
            self._store.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._store.__exit__(*error)

    def put(self, name: str, chunk: int, value: Tensor) -> None:
        # numpy has no bfloat16.
        self._store.put((name, chunk), value if value.dtype in (torch.float32, torch.float64) else value.float())

    def get(self, name: str, chunk: int) -> Tensor:
        return self._store.get((name, chunk)).to(self.device, self.dtype)

    def fold(self, chunk: int) -> int:
        return chunk % self.folds

    def plan(self, chunk: int) -> TokenPlan | TokenRule:
        return self.plans[chunk // self.folds % len(self.plans)]

    def choose(self, block: int) -> None:
        """Let rules decide, from the pruned stream, which tokens stay after ``block``; the first call of each block."""
        for chunk in self.chunks:
            rule = self.plan(chunk)
            if not isinstance(rule, TokenRule):
                continue
            here, prefix = self._positions.pop((chunk, block)), self.geometry.prefix_tokens
            rows = torch.arange(here.shape[1], device=self.device).expand_as(here)
            if block == self.geometry.depth - 1 and not self.geometry.head_patches:
                rows = rows[:, : self.geometry.head_prefix]
            elif rule.acts_in(block):
                attn = self.model.blocks[block].attn
                normed = self.model.blocks[block].norm1(self.get("pruned", chunk))
                patches = here[:, prefix:] - prefix
                view = BlockView(attn, normed, project_keys_values(attn, normed)[0], None, prefix, None, patches)
                change = rule.step(block)(view)
                if isinstance(change, Keep):
                    rows = change.rows
            self._rows[chunk] = rows
            self._positions[chunk, block + 1] = here.gather(1, rows)

    def positions(self, chunk: int, block: int) -> Tensor:
        """Where the tokens entering ``block`` lie in the whole sequence: int64 [token], or [batch, token] of a rule."""
        if (chunk, block) in self._positions:
            return self._positions[chunk, block]
        return torch.from_numpy(self.plan(chunk).token_positions(block)).to(self.device)

    def rows(self, chunk: int, block: int) -> Tensor:
        """Which tokens entering ``block`` are read after it: int64 [query], or [batch, query] of a rule."""
        if chunk in self._rows:
            return self._rows[chunk]
        return torch.from_numpy(self.plan(chunk).query_rows(block)).to(self.device)

    def equations(self, linear: nn.Linear) -> NormalEquations:
        return NormalEquations(
            linear.in_features, linear.out_features, self.folds, bias=linear.bias is not None, device=self.device
        )

    def row_weights(self, chunk: int, block: int) -> Tensor | None:
        """[query] of ``block``: prefix tokens that the head reads count more, unless it reads patches too."""
        if self.geometry.head_patches or self._prefix_weight == 1:
            return None
        weights = torch.ones(self.rows(chunk, block).shape[-1], device=self.device)
        weights[: self.geometry.head_prefix] = self._prefix_weight
        return weights

    def exact_so_far(self, block: int) -> bool:
        """Whether the pruned stream after ``block`` equals the dense one at its positions, up to rounding."""
        if self.diverged:
            return False

        def exact(plan: TokenPlan | TokenRule) -> bool:
            if isinstance(plan, TokenRule):
                return plan.static_counts()[block] == self.geometry.tokens
            gates = () if plan.gates is None else plan.gates[block]
            return len(plan.kept[block]) == self.geometry.patches and all(gate == 1 for gate in gates)

        return all(exact(plan) for plan in self.plans)

    def advance_dense(self, block: int) -> None:
        """Take the dense stream through the block.

        Keeps what the pruned stream should be at the block's queries: "middle", after attention, and "target", after
        the block. That is the dense stream; only before a head that pools over patches it is shifted by what makes the
        pooled token come out right, because the head will miss the dropped patches and no block follows to make up.
        """
        module = self.model.blocks[block]
        pooled = self.geometry.head_patches and block == self.geometry.depth - 1
        for chunk in self.chunks:
            tokens = self.get("dense", chunk)
            middle = tokens + module.ls1(module.attn(module.norm1(tokens)))
            tokens = middle + module.ls2(module.mlp(module.norm2(middle)))
            weights = pooling_weights(self.model, tokens) if pooled else None
            positions = self.positions(chunk, block + 1)
            for name, stream in (("middle", middle), ("target", tokens)):
                wanted = _selected(stream, positions)
                if pooled:
                    own, prefix = _selected(weights, positions), self.geometry.prefix_tokens
                    own = own / own.sum(1, keepdim=True)
                    missing = (weights[..., None] * stream).sum(1) - (own[..., None] * wanted).sum(1)
                    wanted[:, prefix:] += (missing / own[:, prefix:].sum(1, keepdim=True))[:, None]
                self.put(name, chunk, wanted)
            self.put("dense", chunk, tokens)

    def follow_dense(self, block: int) -> None:
        """Set the pruned stream after ``block`` to the dense one."""
        for chunk in self.chunks:
            positions = self.positions(chunk, block + 1)
            self.put("pruned", chunk, _selected(self.get("dense", chunk), positions))

    def attend(self, chunk: int, block: int) -> tuple[Tensor, Tensor]:
        """[batch, query, ...]: the pruned stream entering ``block``, and what the projection reads."""
        module, rows = self.model.blocks[block], self.rows(chunk, block)
        tokens = self.get("pruned", chunk)
        normed = module.norm1(tokens)
        plan = self.plan(chunk)
        bias = None if isinstance(plan, TokenRule) else _key_bias(plan, block, masked=False)
        heads = attended_values(module.attn, _selected(normed, rows), normed, None if bias is None else bias.to(tokens))
        return _selected(tokens, rows), heads

    def advance_pruned(self, block: int, bias: Tensor) -> None:
        """Take the pruned stream through the block with its own weights and the attention bias [1, 1, 1, key]."""
        for chunk in self.chunks:
            rows = self.plan(chunk).query_rows(block)
            forward = _forward_without_dead_tokens(self.model.blocks[block], rows, bias)
            self.put("pruned", chunk, forward(self.get("pruned", chunk)))

    def add_gate_equations(
        self, equations: NormalEquations, chunk: int, block: int, bias: Tensor, *, with_jacobian: bool
    ) -> None:
        """Add the equations of the log-gates of ``block`` at ``bias``; without Jacobian only their squared error."""
        module = self.model.blocks[block]
        rows, weights = self.rows(chunk, block), self.row_weights(chunk, block)
        attn, prefix = module.attn, self.geometry.prefix_tokens
        tokens, middle = self.get("pruned", chunk), self.get("middle", chunk)
        normed = module.norm1(tokens)
        targets = middle - tokens.index_select(1, rows)

        def project(out: Tensor) -> Tensor:
            return module.ls1(attn.proj(attn.norm(out)))

        if not with_jacobian:
            out = attended_values(attn, normed.index_select(1, rows), normed, bias.to(normed))
            error = (targets - module.ls1(attn.proj(out))).square()
            error = error if weights is None else error * weights.to(error)[:, None]
            equations.squares[self.fold(chunk)] += error.sum().to(equations.squares)
            return
        patches, inner = normed.shape[1] - prefix, attn.attn_dim
        queries_at_once = max(1, min(len(rows), JACOBIAN_BYTES // (4 * patches * inner)))
        images_at_once = max(1, JACOBIAN_BYTES // (4 * patches * inner * queries_at_once))
        for keys, target in zip(normed.split(images_at_once), targets.split(images_at_once), strict=True):
            for start in range(0, len(rows), queries_at_once):
                part = slice(start, start + queries_at_once)
                out, jacobian = gate_jacobian(attn, keys.index_select(1, rows[part]), keys, bias, prefix)
                residual = target[:, part] - project(out)
                # Through norm, projection and LayerScale, patch by patch: [patch, batch, query, channel].
                with warnings.catch_warnings():
                    # Of PyTorch's own code, about a compiler of its own that it uses there.
                    warnings.simplefilter("ignore", FutureWarning)
                    warnings.simplefilter("ignore", DeprecationWarning)
                    derivative = torch.func.vmap(lambda tangent, at=out: torch.func.jvp(project, (at,), (tangent,))[1])(
                        jacobian.permute(2, 0, 1, 3)
                    )
                if weights is not None:
                    root = weights[part].to(residual).sqrt()[:, None]
                    residual, derivative = residual * root, derivative * root
                equations.add(self.fold(chunk), derivative.flatten(1).T, residual.flatten()[:, None])


def _selected(x: Tensor, rows: Tensor) -> Tensor:
    """Tokens of ``x`` [batch, token, ...]: the same ``rows`` [row] of each image, or each its own [batch, row]."""
    return x.index_select(1, rows) if rows.dim() == 1 else select_rows(x, rows)


def pooling_weights(model: nn.Module, tokens: Tensor) -> Tensor:
    """How much each token counts in a head that pools over patches: [batch, token], each row sums to 1.

    Equal shares for average pooling; for attention pooling its attention, the mean over heads and latents.

    Args:
        tokens: [batch, token, channel], as the last block leaves them.
    """
    first = 0 if model.pool_include_prefix else model.num_prefix_tokens
    pool = model.attn_pool
    if pool is None:
        shares = tokens.new_ones(tokens.shape[:2])[:, first:]
    else:
        heads = (pool.num_heads, pool.head_dim)
        query = pool.q_norm(pool.q(pool.latent).unflatten(-1, heads).transpose(1, 2))
        key = pool.kv(model.norm(tokens[:, first:])).unflatten(-1, (2, *heads))[:, :, 0].transpose(1, 2)
        shares = ((query * pool.scale) @ pool.k_norm(key).transpose(-2, -1)).softmax(-1).mean((1, 2))
    return F.pad(shares / shares.sum(1, keepdim=True), (first, 0))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, then each module's own again."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No gradients for the model's parameters: autograd then need not keep the inputs of its layers."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
