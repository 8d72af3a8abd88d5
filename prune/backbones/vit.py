"""timm Vision Transformers as vpruner sees them: their geometry, and their pruned forms, applied and undone.

Three forms of one :class:`~vpruner.core.plan.TokenPlan` on one model, each equal to the next up to rounding:

* *masked*: every block computes every token; what is no key gets ``-inf`` attention logits, and updates of what is no
  query, or passes no MLP, are multiplied by 0.
* *gathered*: blocks compute what the plan leaves of them, on a stream that holds all tokens.
* *dead*: the stream holds only what is read later. This is what export folds.

Blocks get a ``forward`` of their own, on the instance. No class is replaced, and leaving the context restores the
model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from timm.layers import AttentionPoolLatent, PatchEmbed, RmsNorm
from timm.layers.attention import Attention
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from ...core.errors import UserError
from ...core.geometry import Geometry
from ...core.plan import TokenPlan
from ...core.schedule import schedule
from ..tune.store import RAM_BYTES
from .adapter import Images
from .forms import (
    StepGates,
    beside,
    computes_all,
    gathered_forward,
    leaving_positions,
    log_gates,
    masked_forward,
    reopened_forward,
    replace_forward,
    step_forward,
)

NAME = "timm VisionTransformer"
SUPPORTED = f"{NAME} with standard blocks, such as deit_small_patch16_224"
FORMS = ("masked", "gathered", "dead")
#: Norms of each token alone.
NORMS = (nn.LayerNorm, RmsNorm, nn.RMSNorm)
#: Makes the error that says why a model cannot be pruned.
Refuse: TypeAlias = Callable[[str], UserError]


class ViTAdapter:
    """A timm ``VisionTransformer`` with the handles that pruning needs.

    Args:
        model: The unpruned model; its weights are never changed here.
        name: What to call it in plans and messages.
        geometry: Its shape where that is known better than from the module; None: as :func:`read_geometry` has it.

    Attributes:
        model: The module itself. Inside :meth:`applied`, calling it runs the pruned form.
        geometry: Its shape.

    Raises:
        UserError: The model is not one this adapter handles; the message says which part and why.
    """

    plans_together = True
    plain = True

    def __init__(self, model: nn.Module, name: str, geometry: Geometry | None = None):
        self.model = model
        self.name = name
        self.geometry = read_geometry(model, name) if geometry is None else geometry
        self._active = False

    # -- pruned forms ---------------------------------------------------------------------------------------------

    @contextmanager
    def applied(self, plan: TokenPlan, form: str = "dead") -> Iterator[nn.Module]:
        """Make ``self.model`` compute ``plan`` until the context is left.

        Args:
            plan: A plan for this geometry.
            form: ``"masked"``, ``"gathered"`` or ``"dead"``.

        Raises:
            PlanError: The plan is for another geometry.
        """
        if form not in FORMS:
            raise ValueError(f"form is {form!r}, expected one of {', '.join(FORMS)}")
        plan.check_fits(self.name, self.geometry)
        with self.exclusive() as undo:
            if form == "dead":
                self._apply_steps(plan, undo)
            else:
                for index, (block, rope) in enumerate(zip(self.model.blocks, self.ropes(), strict=True)):
                    masked = form == "masked"
                    forward = (
                        masked_forward(block, plan, index) if masked else gathered_forward(block, plan, index, rope)
                    )
                    replace_forward(block, forward, undo)
                left, last = leaving_positions(plan), self.model.blocks[-1]
                if len(left) < plan.geometry.tokens and plan.geometry.head_patches:
                    # Pooling heads read what the plan says; the class token stays where it is.
                    undo.callback(last.register_forward_hook(_select_output(last, left)).remove)
            yield self.model

    def _apply_steps(self, plan: TokenPlan, undo: ExitStack) -> None:
        steps = schedule(plan)
        first = self.model.blocks[0]
        if not steps.keeps_order(plan.geometry.tokens):
            undo.callback(first.register_forward_pre_hook(_select_input(first, steps.entry)).remove)
        for block, step, rope in zip(self.model.blocks, steps.steps, self.ropes(), strict=True):
            # The model's own rope belongs to all patches in their order.
            if rope is not None or not computes_all(step):
                replace_forward(block, step_forward(block, step, rope=rope), undo)
            elif step.gates is not None:
                undo.callback(block.register_forward_pre_hook(_add_key_bias(log_gates(step)), with_kwargs=True).remove)

    @contextmanager
    def gated(self, batch_size: int, plan: TokenPlan | None = None, *, reopen: bool = False) -> Iterator[Tensor]:
        """Run the model with three differentiable gates on every patch of every block, separately for each image.

        Args:
            batch_size: Images per forward pass, B.
            plan: What has been closed already: it is not computed, and its gates get zero gradient. None: all gates are
                open.
            reopen: Compute that too, so that closed gates get gradients: with respect to m at m = 0, what letting the
                patch back in would change. For keys :data:`ALMOST_CLOSED` stands for 0.

        Yields:
            gates [batch B, kind 3, block L, patch N], zeros with ``requires_grad``, kinds as in
            :data:`~vpruner.core.plan.KINDS`. Those of keys are biases on the attention logits, the same for all heads
            and queries; at zero, the gradient with respect to the bias equals the one with respect to the mask
            m = exp(bias) = 1. Those of queries and MLPs are added to the mask that multiplies the update of the patch.
        """
        geometry = self.geometry
        plan = TokenPlan.identity(self.name, geometry) if plan is None else plan
        parameter = next(self.model.parameters())
        gates = torch.zeros(
            (batch_size, 3, geometry.depth, geometry.patches),
            dtype=parameter.dtype,
            device=parameter.device,
            requires_grad=True,
        )
        with self.exclusive() as undo:
            if reopen:
                for index, block in enumerate(self.model.blocks):
                    replace_forward(block, reopened_forward(block, plan, index, gates), undo)
            else:
                steps = schedule(plan)
                first, every = self.model.blocks[0], plan.geometry.tokens
                if not steps.keeps_order(every):
                    undo.callback(first.register_forward_pre_hook(_select_input(first, steps.entry)).remove)
                for index, (block, rope) in enumerate(zip(self.model.blocks, self.ropes(), strict=True)):
                    step = steps.steps[index]
                    form = step_forward(block, step, StepGates(gates, index, step, geometry), rope)
                    replace_forward(block, form, undo)
            yield gates

    # -- learning -------------------------------------------------------------------------------------------------

    def evaluate_plans(self, plans: Sequence[TokenPlan], images: Tensor, total: int | None = None) -> Tensor:
        """Outputs of the model pruned by each plan, see :func:`~vpruner.prune.rollouts.evaluate_plans`."""
        from ..rollouts import evaluate_plans

        return evaluate_plans(self, plans, images)

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
        """Weights refitted to what plans leave, see :func:`~vpruner.prune.tune.weights.refit_weights`."""
        from ..tune.weights import refit_weights

        options = dict(start=start, flip=flip, ram_bytes=ram_bytes, on_step=on_step)
        return refit_weights(self, plans, calibration, indices, **options)

    def moved(self, where: Mapping[int, Tensor]) -> None:
        """Nothing: a form is made for where the model is when it is applied."""

    def look_at(self, images: Tensor) -> None:
        """Nothing: logits and features are compared as they are."""

    def ropes(self) -> Sequence[Tensor | None]:
        """One for each block, see :mod:`~vpruner.prune.backbones.forms`."""
        return [None] * self.geometry.depth

    @contextmanager
    def exclusive(self) -> Iterator[ExitStack]:
        """Claim the model for one pruned form; what is called back on leaving undoes it.

        Raises:
            RuntimeError: Another form is applied already.
        """
        if self._active:
            raise RuntimeError("another plan is applied to this model already; leave that context first")
        self._active = True
        try:
            with ExitStack() as undo:
                yield undo
        finally:
            self._active = False


# -- geometry ---------------------------------------------------------------------------------------------------------


def detect(module: nn.Module) -> bool:
    """Whether it is a timm VisionTransformer; :func:`read_geometry` says whether all of its parts can be pruned."""
    return isinstance(module, VisionTransformer)


def read_geometry(model: nn.Module, name: str) -> Geometry:
    """Read the shape of a timm ViT, or refuse it by name with the reason."""
    refuse = partial(refusal, name, SUPPORTED)
    if not detect(model):
        raise refuse(f"it is a {type(model).__name__}, not a {NAME}")
    distilled = isinstance(model, VisionTransformerDistilled)
    own = ("forward_features",) if distilled else ("forward_features", "forward_head")
    check_own(model, VisionTransformer, own, refuse)
    if model.dynamic_img_size:
        raise refuse("dynamic_img_size lets the image size vary, and a plan is for one; build it without")
    shape = block_shape(model, Block, (Attention,), refuse)
    return geometry_of(model, shape, 1 + distilled, model.pool_include_prefix, refuse)


def refusal(name: str, supported: str, reason: str) -> UserError:
    return UserError(f"{name} cannot be pruned: {reason}", f"models that can: {supported}")


def check_own(model: nn.Module, known: type, methods: Sequence[str], refuse: Refuse) -> None:
    """Refuse a class made from ``known`` that runs otherwise."""
    for method in methods:
        if getattr(type(model), method) is not getattr(known, method):
            raise refuse(f"{type(model).__name__} has its own {method}")


def block_shape(
    model: nn.Module, block_class: type, attentions: Sequence[type], refuse: Refuse
) -> tuple[int, int, int]:
    """(num_heads, head_dim, mlp_macs) of each block of ``model``, which are all of ``block_class``."""
    shapes = set()
    for index, block in enumerate(model.blocks):
        if type(block) is not block_class:
            raise refuse(f"block {index} is a {type(block).__name__}, not the pre-norm {block_class.__name__}")
        attention = type(block.attn)
        if attention not in attentions:
            plain = " or ".join(known.__name__ for known in attentions)
            raise refuse(f"the attention of block {index} is a {attention.__name__}, not the plain {plain}")
        if block.attn.gate is not None:
            raise refuse(f"the attention of block {index} is gated")
        for part in ("norm1", "norm2"):
            if not isinstance(getattr(block, part), NORMS):
                kind = type(getattr(block, part)).__name__
                raise refuse(f"{part} of block {index} is a {kind}, not a LayerNorm or RMSNorm")
        mlp = sum(m.in_features * m.out_features for m in block.mlp.modules() if isinstance(m, nn.Linear))
        shapes.add((block.attn.num_heads, block.attn.head_dim, mlp))
    if not shapes:
        raise refuse("it has no blocks")
    if len(shapes) > 1:
        raise refuse("its blocks differ in shape")
    return shapes.pop()


def geometry_of(
    model: nn.Module, shape: tuple[int, int, int], class_tokens: int, pools_prefix: bool, refuse: Refuse
) -> Geometry:
    """The geometry of a model whose embedding, norm and head are as those of timm's ``VisionTransformer``.

    Args:
        shape: From :func:`block_shape`.
        class_tokens: How many tokens a head reads that reads no patches.
        pools_prefix: Whether pooling reads prefix tokens too.
    """
    if type(model.patch_embed) is not PatchEmbed:
        raise refuse(f"its patch embedding is a {type(model.patch_embed).__name__}, not a plain PatchEmbed")
    if model.patch_embed.img_size is None or model.patch_embed.grid_size is None:
        raise refuse("its image size is not fixed")
    # timm puts the norm behind the pooling, or leaves it out, by an Identity here.
    if not isinstance(model.norm, (*NORMS, nn.Identity)):
        raise refuse(f"its final norm is a {type(model.norm).__name__}, not a LayerNorm or RMSNorm")

    pool = "map" if model.attn_pool is not None else model.global_pool
    if pool not in ("token", "avg", "map"):
        reason = "it returns unpooled tokens, so dropping any changes the output's shape" if not pool else "not linear"
        raise refuse(f"global_pool is {model.global_pool!r} ({reason})")
    head_macs = head_macs_per_token = 0
    if pool == "map":
        pooled_prefix = model.num_prefix_tokens if pools_prefix else 0
        head_macs, head_macs_per_token = _attention_pool_macs(model.attn_pool, pooled_prefix, refuse)
    for head in (model.head, getattr(model, "head_dist", None)):
        if isinstance(head, nn.Linear):
            head_macs += head.in_features * head.out_features
    classifies = isinstance(model.head, nn.Linear)

    num_heads, head_dim, mlp_macs = shape
    patch_height, patch_width = model.patch_embed.patch_size
    grid = model.patch_embed.grid_size
    in_chans = model.patch_embed.proj.in_channels
    return Geometry(
        depth=len(model.blocks),
        embed_dim=model.embed_dim,
        num_heads=num_heads,
        head_dim=head_dim,
        grid=grid,
        prefix_tokens=model.num_prefix_tokens,
        image_size=model.patch_embed.img_size,
        in_chans=in_chans,
        mlp_macs=mlp_macs,
        stem_macs=grid[0] * grid[1] * in_chans * patch_height * patch_width * model.embed_dim,
        head_macs=head_macs,
        head_macs_per_token=head_macs_per_token,
        head_prefix=class_tokens if pool == "token" else model.num_prefix_tokens,
        head_patches=pool != "token",
        outputs=model.head.out_features if classifies else model.head_hidden_size,
        output="logits" if classifies else "features",
    )


def _attention_pool_macs(pool: nn.Module, prefix: int, refuse: Refuse) -> tuple[int, int]:
    """MACs of attention pooling: the part that does not depend on the patch count, and the part per patch."""
    if type(pool) is not AttentionPoolLatent:
        raise refuse(f"its attention pooling is a {type(pool).__name__}")
    if pool.pos_embed is not None:
        raise refuse("its attention pooling adds position embeddings of its own")
    per_token = pool.kv.in_features * pool.kv.out_features + 2 * pool.latent_len * pool.num_heads * pool.head_dim
    linears = [m for part in (pool.q, pool.proj, pool.mlp) if part is not None for m in part.modules()]
    fixed = sum(m.in_features * m.out_features for m in linears if isinstance(m, nn.Linear)) * pool.latent_len
    return fixed + prefix * per_token, per_token


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of the state dict: the identity of the trained weights."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(memoryview(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


# -- hooks ------------------------------------------------------------------------------------------------------------


def _add_key_bias(bias: Tensor):
    def hook(module, args, kwargs):
        return args, {**kwargs, "attn_mask": bias.to(args[0])}

    return hook


def _select_input(block, rows):
    rows = beside(block, rows)

    def hook(module, args):
        return (args[0].index_select(1, rows.to(args[0].device)), *args[1:])

    return hook


def _select_output(block, rows):
    rows = beside(block, rows)

    def hook(module, args, output):
        return output.index_select(1, rows.to(output.device))

    return hook
