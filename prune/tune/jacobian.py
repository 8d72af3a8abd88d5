"""How attention moves with its gates."""

from __future__ import annotations

from torch import Tensor, nn

from ..backbones.forms import Ropes, query_key_value

#: Jacobians are made for so many bytes at a time.
JACOBIAN_BYTES = 64 << 20


def gate_jacobian(
    attn: nn.Module, queries: Tensor, keys: Tensor, bias: Tensor, prefix: int, ropes: Ropes = (None, None)
) -> tuple[Tensor, Tensor]:
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
    query, key, value = query_key_value(attn, queries, keys, ropes)
    attention = ((query * attn.scale) @ key.transpose(-2, -1) + bias.to(query)).softmax(-1)
    out = attention @ value
    # [batch, head, query, patch, head_dim]
    jacobian = attention[..., prefix:, None] * (value[:, :, None, prefix:] - out[:, :, :, None])
    return out.transpose(1, 2).flatten(2), jacobian.permute(0, 2, 3, 1, 4).flatten(3)
