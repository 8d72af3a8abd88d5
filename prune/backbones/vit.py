"""timm Vision Transformers as vpruner sees them: their geometry, and their pruned forms, applied and undone.

Three forms of one :class:`~vpruner.core.plan.TokenPlan` on one model, each equal to the next up to rounding:

* *masked*: every block computes every token; dropped tokens get ``-inf`` attention logits as keys.
* *gathered*: dropped tokens are selected away before the block they leave at.
* *dead*: gathered, and tokens that nothing reads later give keys and values only. This is what export folds.

Everything goes through timm's own seams: forward hooks, ``Block.forward(x, attn_mask=)``, and an instance-level
``forward`` on blocks with dead tokens. No class is replaced, and leaving the context restores the model.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from timm.layers import AttentionPoolLatent, PatchEmbed
from timm.layers.attention import Attention
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from ...core.errors import UserError
from ...core.plan import Geometry, TokenPlan

NAME = "timm VisionTransformer"
SUPPORTED = f"{NAME} with standard blocks, such as deit_small_patch16_224"
FORMS = ("masked", "gathered", "dead")
#: The gate of a token that has left, where its gradient is wanted: small enough that a thousand such tokens change
#: nothing, large enough for float32 to resolve (a softmax weight of 1e-7 has all its digits).
ALMOST_CLOSED = 1e-7


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
            for block_index, block in enumerate(self.model.blocks):
                bias = key_bias(plan, block_index, masked=form == "masked")
                # In the dead form the block before has selected already.
                if plan.drops_before(block_index) and (form == "gathered" or (form == "dead" and block_index == 0)):
                    rows = plan.entry_rows(block_index)
                    undo.callback(block.register_forward_pre_hook(_select_input(block, rows)).remove)
                queries = plan.query_rows(block_index)
                if form == "dead" and len(queries) < plan.key_counts[block_index]:
                    block.forward = forward_without_dead_tokens(block, queries, bias)
                    undo.callback(delattr, block, "forward")
                elif bias is not None:
                    undo.callback(block.register_forward_pre_hook(_add_key_bias(bias), with_kwargs=True).remove)
            if form == "masked" and len(plan.kept[-1]) < plan.geometry.patches:
                # Pooling heads average over the tokens that are left; the class token stays where it is.
                left, last = plan.token_positions(plan.geometry.depth - 1), self.model.blocks[-1]
                undo.callback(last.register_forward_hook(_select_output(last, left)).remove)
            yield self.model

    @contextmanager
    def gated(self, batch_size: int, plan: TokenPlan | None = None, *, reopen: bool = False) -> Iterator[Tensor]:
        """Run the model with a differentiable gate on every patch as a key, separately for each image.

        Args:
            batch_size: Images per forward pass, B.
            plan: Tokens that have left already: they are gathered out, and their gates get zero gradient. None: all
                gates are open.
            reopen: Keep those tokens as masked ones instead, so that closed gates get gradients too: with respect to m
                at m = 0, what letting the token back in would change. :data:`ALMOST_CLOSED` stands for 0.

        Yields:
            gates [batch B, gate G, patch N], zeros with ``requires_grad``: additive biases on the attention logits, the
            same for all heads and queries. G is the number of blocks L, plus one for the head where it reads patches
            (average pooling is attention with equal logits, so its gate is a bias too). At zero, the gradient with
            respect to the bias equals the one with respect to the mask m = exp(bias) = 1.
        """
        geometry = self.geometry
        plan = TokenPlan.identity(self.name, geometry) if plan is None else plan
        parameter = next(self.model.parameters())
        gates = torch.zeros(
            batch_size,
            geometry.depth + geometry.head_patches,
            geometry.patches,
            dtype=parameter.dtype,
            device=parameter.device,
            requires_grad=True,
        )
        kept = [torch.tensor(indices, dtype=torch.int64, device=parameter.device) for indices in plan.kept]
        closed = torch.from_numpy(~plan.mask).to(gates)

        def gate_bias(index: int, prefix: int) -> Tensor:
            """[batch, 1, 1, key] of gate ``index``; the head's gate, the last, is on what the last block kept."""
            row = min(index, geometry.depth - 1)
            if reopen:
                # Scaled so that the gradient is the one with respect to m = exp(bias), at m = ALMOST_CLOSED.
                scale = 1 + closed[row] * (1 / ALMOST_CLOSED - 1)
                chosen = gates[:, index] * scale + closed[row] * math.log(ALMOST_CLOSED)
            else:
                chosen = gates[:, index].index_select(1, kept[row])
            return F.pad(chosen, (prefix, 0))[:, None, None, :]

        def block_hook(index: int):
            def hook(module, args, kwargs):
                return args, {**kwargs, "attn_mask": gate_bias(index, geometry.prefix_tokens)}

            return hook

        with self.exclusive() as undo:
            for index, block in enumerate(self.model.blocks):
                if plan.drops_before(index) and not reopen:
                    undo.callback(block.register_forward_pre_hook(_select_input(block, plan.entry_rows(index))).remove)
                undo.callback(block.register_forward_pre_hook(block_hook(index), with_kwargs=True).remove)
            if geometry.head_patches:
                head_prefix = geometry.prefix_tokens if self.model.pool_include_prefix else 0
                if self.model.attn_pool is not None:

                    def pool_hook(module, args, kwargs):
                        return args, {**kwargs, "attn_mask": gate_bias(geometry.depth, head_prefix)}

                    undo.callback(self.model.attn_pool.register_forward_pre_hook(pool_hook, with_kwargs=True).remove)
                else:

                    def mean_hook(module, args, output):
                        weights = gate_bias(geometry.depth, head_prefix)[:, 0, 0].softmax(-1)
                        weights = F.pad(
                            weights * weights.shape[-1], (geometry.prefix_tokens - head_prefix, 0), value=1.0
                        )
                        return output * weights[..., None]

                    undo.callback(self.model.norm.register_forward_hook(mean_hook).remove)
            yield gates

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

    def refuse(reason: str) -> UserError:
        return UserError(
            f"{name} cannot be pruned: {reason}",
            f"models that can: {SUPPORTED}",
        )

    if not detect(model):
        raise refuse(f"it is a {type(model).__name__}, not a {NAME}")
    if type(model).forward_features is not VisionTransformer.forward_features:
        raise refuse(f"{type(model).__name__} has its own forward_features")
    distilled = isinstance(model, VisionTransformerDistilled)
    if type(model).forward_head is not VisionTransformer.forward_head and not distilled:
        raise refuse(f"{type(model).__name__} has its own forward_head")
    if type(model.patch_embed) is not PatchEmbed:
        raise refuse(f"its patch embedding is a {type(model.patch_embed).__name__}, not a plain PatchEmbed")
    if model.patch_embed.img_size is None or model.patch_embed.grid_size is None:
        raise refuse("its image size is not fixed")
    if model.dynamic_img_size:
        raise refuse("dynamic_img_size lets the image size vary, and a plan is for one; build it without")

    shapes = set()
    for index, block in enumerate(model.blocks):
        if type(block) is not Block:
            raise refuse(f"block {index} is a {type(block).__name__}, not the pre-norm Block")
        if type(block.attn) is not Attention:
            raise refuse(f"the attention of block {index} is a {type(block.attn).__name__}, not the plain Attention")
        if block.attn.gate is not None:
            raise refuse(f"the attention of block {index} is gated")
        for part in ("norm1", "norm2"):
            if not isinstance(getattr(block, part), nn.LayerNorm):
                kind = type(getattr(block, part)).__name__
                raise refuse(f"{part} of block {index} is a {kind}, not a LayerNorm")
        mlp = sum(m.in_features * m.out_features for m in block.mlp.modules() if isinstance(m, nn.Linear))
        shapes.add((block.attn.num_heads, block.attn.head_dim, mlp))
    if not shapes:
        raise refuse("it has no blocks")
    if len(shapes) > 1:
        raise refuse("its blocks differ in shape")
    ((num_heads, head_dim, mlp_macs),) = shapes

    # timm puts the norm behind the pooling, or leaves it out, by an Identity here.
    if not isinstance(model.norm, (nn.LayerNorm, nn.Identity)):
        raise refuse(f"its final norm is a {type(model.norm).__name__}, not a LayerNorm")

    pool = "map" if model.attn_pool is not None else model.global_pool
    if pool not in ("token", "avg", "map"):
        reason = "it returns unpooled tokens, so dropping any changes the output's shape" if not pool else "not linear"
        raise refuse(f"global_pool is {model.global_pool!r} ({reason})")
    pooled_prefix = model.num_prefix_tokens if model.pool_include_prefix else 0
    head_macs = head_macs_per_token = 0
    if pool == "map":
        head_macs, head_macs_per_token = _attention_pool_macs(model.attn_pool, pooled_prefix, refuse)
    for head in (model.head, getattr(model, "head_dist", None)):
        if isinstance(head, nn.Linear):
            head_macs += head.in_features * head.out_features
    classifies = isinstance(model.head, nn.Linear)

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
        head_prefix=(2 if distilled else 1) if pool == "token" else model.num_prefix_tokens,
        head_patches=pool != "token",
        outputs=model.head.out_features if classifies else model.head_hidden_size,
        output="logits" if classifies else "features",
    )


def _attention_pool_macs(pool: nn.Module, prefix: int, refuse) -> tuple[int, int]:
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


# -- pieces, for walking the blocks one by one ------------------------------------------------------------------------


def embed_images(model: VisionTransformer, images: Tensor) -> Tensor:
    """What enters block 0: [image, channel, height, width] -> [image, token, embed_dim]; as ``forward_features``."""
    return model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))


def block_outputs(block: Block, stream: Tensor, rows: np.ndarray) -> Tensor:
    """Run one block on [image, key, channel] and return its output [image, query, channel] for ``rows`` only."""
    if len(rows) == stream.shape[1]:
        return block(stream)
    return forward_without_dead_tokens(block, rows, None)(stream)


# -- hooks ------------------------------------------------------------------------------------------------------------


def key_bias(plan: TokenPlan, block: int, *, masked: bool) -> Tensor | None:
    """Additive attention bias [1, 1, 1, key] of a block, or None when it would be all zeros."""
    prefix = plan.geometry.prefix_tokens
    gates = plan.gates[block] if plan.gates is not None else None
    dropped = masked and len(plan.kept[block]) < plan.geometry.patches
    if not dropped and (gates is None or all(gate == 1 for gate in gates)):
        return None
    log_gates = torch.zeros(len(plan.kept[block]), dtype=torch.float64)
    if gates is not None:
        log_gates = torch.tensor(gates, dtype=torch.float64).log()
    if not masked:
        return F.pad(log_gates, (prefix, 0))[None, None, None]
    bias = torch.full((plan.geometry.tokens,), -torch.inf, dtype=torch.float64)
    bias[:prefix] = 0
    bias[prefix + torch.tensor(plan.kept[block], dtype=torch.int64)] = log_gates
    return bias[None, None, None]


def _add_key_bias(bias: Tensor):
    def hook(module, args, kwargs):
        return args, {**kwargs, "attn_mask": bias.to(args[0])}

    return hook


def _beside(module: nn.Module, rows: np.ndarray) -> Tensor:
    """Where the weights are: a copy to the GPU in every run would wait for it, and keep the run out of CUDA graphs."""
    return torch.from_numpy(rows).to(next(module.parameters()).device)


def _select_input(block, rows):
    rows = _beside(block, rows)

    def hook(module, args):
        return (args[0].index_select(1, rows.to(args[0].device)), *args[1:])

    return hook


def _select_output(block, rows):
    rows = _beside(block, rows)

    def hook(module, args, output):
        return output.index_select(1, rows.to(output.device))

    return hook


def forward_without_dead_tokens(block: Block, rows, bias: Tensor | None):
    """``Block.forward`` for ``x`` [batch, key, channel] that returns [batch, query, channel]: only ``rows`` of it."""
    rows = _beside(block, rows)

    def forward(x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        index = rows.to(x.device)
        normed = block.norm1(x)
        attended = _cross_attention(
            block.attn, normed.index_select(1, index), normed, None if bias is None else bias.to(x)
        )
        x = x.index_select(1, index) + block.drop_path1(block.ls1(attended))
        return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))

    return forward


def _cross_attention(attn: Attention, queries: Tensor, keys: Tensor, bias: Tensor | None) -> Tensor:
    """timm's ``Attention`` with queries from a subset of the tokens: [batch, query, channel] -> the same shape."""
    return attn.proj_drop(attn.proj(attended_values(attn, queries, keys, bias)))


def attended_values(attn: Attention, queries: Tensor, keys: Tensor, bias: Tensor | None) -> Tensor:
    """What the projection of ``attn`` reads: [batch, query, head * head_dim]; arguments as in the forward pass."""
    return attend(attn, *query_key_value(attn, queries, keys), bias)


def attend(attn: Attention, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    """The same from queries [batch, head, query, head_dim], and keys and values [batch, head, key, head_dim]."""
    if attn.fused_attn:
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    else:
        logits = (query * attn.scale) @ key.transpose(-2, -1)
        out = (logits if bias is None else logits + bias).softmax(-1) @ value
    return attn.norm(out.transpose(1, 2).flatten(2))


def query_key_value(attn: Attention, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[batch, query, channel] and [batch, key, channel] -> [batch, head, query, head_dim], and twice with keys."""
    return (project_queries(attn, queries), *project_keys_values(attn, keys))


def project_queries(attn: Attention, tokens: Tensor) -> Tensor:
    """[batch, query, channel] -> [batch, head, query, head_dim]."""
    weight, bias = attn.qkv.weight[: attn.attn_dim], attn.qkv.bias
    query = F.linear(tokens, weight, None if bias is None else bias[: attn.attn_dim])
    return attn.q_norm(query.unflatten(-1, (attn.num_heads, attn.head_dim)).transpose(1, 2))


def project_keys_values(attn: Attention, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """[batch, key, channel] -> keys and values, each [batch, head, key, head_dim]."""
    weight, bias = attn.qkv.weight[attn.attn_dim :], attn.qkv.bias
    key_value = F.linear(tokens, weight, None if bias is None else bias[attn.attn_dim :])
    key, value = key_value.unflatten(-1, (2, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
    return attn.k_norm(key), value
