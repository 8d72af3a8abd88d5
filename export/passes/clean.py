"""The passes that every exported graph goes through."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common as passes

from .drop_bare_outputs import DropBareOutputs
from .split_heads_once import SplitHeadsOnce


def clean(model: ir.Model) -> bool:
    """Bring ``model`` into the one form that recognition knows; returns whether anything changed."""
    modified = False
    for step in (
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.IdentityEliminationPass(),
        SplitHeadsOnce(),
        DropBareOutputs(),
        passes.RemoveUnusedNodesPass(),
    ):
        modified |= step(model).modified
    return modified
