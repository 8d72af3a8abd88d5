"""Weights that were changed in the module, back into the user's model."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from ...core.errors import UserError
from .lower import constants
from .module import GraphModule


def write_back(module: GraphModule, model: ir.Model, names: Collection[str] | None = None) -> tuple[str, ...]:
    """Put the weights of ``module`` that are not those of ``model`` into it, in place; return their names.

    A weight keeps its type and layout: it is the same initializer, or ``Constant``, and its readers stay as they are.
    One that several nodes read is changed once, for all of them, as it was in the module. Numbers that did not change
    stay where they lie, such as in a file beside the graph; those that did are held in memory until they are saved.

    Args:
        model: The one that the module was made of, or a copy of it.
        names: Of the weights that may have changed; None: all.

    Raises:
        UserError: It lacks a weight, or has it in another shape; it is left as it was.
    """
    stored, changed = dict(constants(model)), {}
    for name, parameter in module.weights().items():
        if names is not None and name not in names:
            continue
        tensor, shape = stored.get(name), tuple(parameter.shape)
        if tensor is None or tuple(tensor.shape.numpy()) != shape:
            found = "no such weight" if tensor is None else f"one of shape {tuple(tensor.shape.numpy())}"
            raise UserError(f"the weight {name!r} has shape {shape}, and the model has {found}")
        before, after = tensor.numpy(), parameter.detach().cpu().double().numpy()
        if not np.array_equal(before, after.astype(before.dtype), equal_nan=True):
            changed[name] = ir.Tensor(after.astype(before.dtype), dtype=tensor.dtype, name=name)
    for node in model.graph:
        if node.op_type == "Constant" and (tensor := changed.get(node.outputs[0].name)) is not None:
            node.attributes.clear()
            node.attributes["value"] = ir.AttrTensor("value", tensor)
    for name in changed.keys() & model.graph.initializers.keys():
        model.graph.initializers[name].const_value = changed[name]
    return tuple(changed)
