"""Attention and an MLP whose sum is added to the stream are added one after the other, each for tokens of its own.

``x + s (attention + mlp)`` becomes ``(x + s attention) + s mlp``: parallel blocks with one residual.
"""

from __future__ import annotations

import onnx_ir as ir

from ..passes.edit import add_node
from .followed import Branch, Followed
from .known import above

#: What may lie between the sum and the stream: it is done to either part.
_LINEAR = frozenset(("Mul", "Div", "Cast", "Identity", "Dropout"))


def add_apart(followed: Followed) -> bool:
    """Take such sums apart, in place; whether there were any. Where tokens are has to be found anew."""
    changed = [_add_apart(followed, branch) for block in followed.blocks for branch in block.attention]
    return any(changed)


def _add_apart(followed: Followed, branch: Branch) -> bool:
    found = _sum_of_two(followed, branch)
    if branch.reason is not None or found is None:
        return False
    inner, path = found
    mixes = [any(one.producer() in branch.mixers for one in above(value)) for value in inner.inputs]
    if mixes[0] == mixes[1]:
        return False
    add, known = branch.add, followed.tokens.known
    stream = add.inputs[1 - branch.update]
    for number, part in enumerate(sorted(inner.inputs, key=lambda value: value is not inner.inputs[mixes.index(True)])):
        for node, position in reversed(path):
            inputs = [part if at == position else used for at, used in enumerate(node.inputs)]
            name = f"vpruner.{node.outputs[0].name}.{number}"
            part = add_node(add, node.op_type, inputs, name, dict(node.attributes)).outputs[0]
            known.add(part.producer())
        if number == 0:
            stream = add_node(add, "Add", [stream, part], f"vpruner.{add.outputs[0].name}.attention").outputs[0]
            known.add(stream.producer())
    add.replace_input_with(1 - branch.update, stream)
    add.replace_input_with(branch.update, part)
    return True


def _sum_of_two(followed: Followed, branch: Branch) -> tuple[ir.Node, list[tuple[ir.Node, int]]] | None:
    """The ``Add`` of two values that carry tokens, and the (node, input) from the stream up to it."""
    value, path = branch.add.inputs[branch.update], []
    while (node := value.producer()) in branch.nodes and len(value.uses()) == 1 and not value.is_graph_output():
        carrying = [at for at, used in enumerate(node.inputs) if used in followed.tokens.layouts]
        if node.op_type == "Add" and len(carrying) == 2:
            return node, path
        if node.op_type not in _LINEAR or len(carrying) != 1 or (node.op_type == "Div" and carrying != [0]):
            return None
        path.append((node, carrying[0]))
        value = node.inputs[carrying[0]]
    return None
