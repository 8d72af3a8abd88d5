"""Graphs built by hand, node by node."""

import numpy as np
import onnx_ir as ir

RANDOM = np.random.default_rng(0)


class Builder:
    """A small graph, node by node."""

    def __init__(self, *inputs: tuple[str, tuple], opset: int = 17):
        self.inputs = [ir.val(name, ir.DataType.FLOAT, shape) for name, shape in inputs]
        self.nodes, self.constants, self.opset = [], [], opset

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        tensor = ir.Tensor(np.asarray(array), name=name)
        value = ir.Value(name=name, const_value=tensor, shape=tensor.shape, type=ir.TensorType(tensor.dtype))
        self.constants.append(value)
        return value

    def weight(self, name: str, *shape: int) -> ir.Value:
        return self.constant(name, RANDOM.standard_normal(shape).astype(np.float32))

    def number(self, value: float) -> ir.Value:
        return self.constant(f"number{len(self.constants)}", np.float32(value))

    def integers(self, *values: int) -> ir.Value:
        return self.constant(f"integers{len(self.constants)}", np.array(values, np.int64))

    def __call__(
        self, op_type: str, *inputs, name: str | None = None, outputs: int = 1, domain: str = "", **attributes
    ):
        node = ir.node(op_type, inputs, attributes, domain=domain, num_outputs=outputs, name=f"node_{len(self.nodes)}")
        for index, value in enumerate(node.outputs):
            value.name = name or f"{op_type}_{len(self.nodes)}_{index}"
            value.type = ir.TensorType(ir.DataType.FLOAT)
        self.nodes.append(node)
        return node.outputs[0] if outputs == 1 else node.outputs

    def model(self, *outputs: ir.Value) -> ir.Model:
        imports = {"": self.opset, "custom": 1}
        graph = ir.Graph(
            self.inputs, outputs, nodes=self.nodes, initializers=self.constants, opset_imports=imports, name="graph"
        )
        return ir.Model(graph, ir_version=9)
