"""Tiny ViTs in the spellings of other frameworks' exporters, written node by node, and what they give, in numpy.

Keras (tf2onnx): NHWC images, a Conv between Transposes, Einsum projections with kernels of heads, norms written as
``x a + (b - mean a)``. JAX (jax2onnx): patches by reshapes and a Gemm on [image * token, channel], transposed kernels,
norms by the mean of squares, a softmax of Max, Sub, Exp, Sum, Div.
"""

from __future__ import annotations

from itertools import count

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

DEPTH, WIDTH, HEADS, PATCH, GRID, CLASSES = 2, 16, 2, 4, (3, 2), 5
PATCHES, HEAD_DIM, EPS = GRID[0] * GRID[1], WIDTH // HEADS, 1e-3


def random_weights(class_token: bool) -> dict[str, np.ndarray]:
    random = np.random.default_rng(7)

    def weight(*shape):
        return (random.standard_normal(shape) * 0.3).astype(np.float32)

    weights = {"patch": weight(PATCH, PATCH, 3, WIDTH), "patch_bias": weight(WIDTH), "head": weight(WIDTH, CLASSES),
               "head_bias": weight(CLASSES), "position": weight(1, PATCHES + class_token, WIDTH),
               "class": weight(1, 1, WIDTH), "norm_scale": 1 + weight(WIDTH), "norm_shift": weight(WIDTH)}  # fmt: skip
    for block in range(DEPTH):
        for name, shape in (("q", (WIDTH, WIDTH)), ("k", (WIDTH, WIDTH)), ("v", (WIDTH, WIDTH)), ("o", (WIDTH, WIDTH)),
                            ("up", (WIDTH, 24)), ("down", (24, WIDTH))):  # fmt: skip
            weights[f"{block}.{name}"], weights[f"{block}.{name}_bias"] = weight(*shape), weight(shape[1])
        for norm in ("norm1", "norm2"):
            weights[f"{block}.{norm}_scale"], weights[f"{block}.{norm}_shift"] = 1 + weight(WIDTH), weight(WIDTH)
    return weights


def computed(weights, images: np.ndarray, plan, class_token: bool) -> np.ndarray:
    """What the model gives for NHWC ``images`` with the masks of ``plan``, in float64."""
    w = {name: array.astype(np.float64) for name, array in weights.items()}
    prefix, batch = int(class_token), len(images)

    def norm(x, name):
        mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        return (x - mean) / np.sqrt(variance + EPS) * w[f"{name}_scale"] + w[f"{name}_shift"]

    def keep(patches):
        return np.array([i < prefix or i - prefix in patches for i in range(prefix + PATCHES)])

    def heads(x):
        return x.reshape(batch, -1, HEADS, HEAD_DIM).transpose(0, 2, 1, 3)

    cut = images.astype(np.float64).reshape(batch, GRID[0], PATCH, GRID[1], PATCH, 3).transpose(0, 1, 3, 2, 4, 5)
    x = cut.reshape(batch, PATCHES, -1) @ w["patch"].reshape(-1, WIDTH) + w["patch_bias"]
    if class_token:
        x = np.concatenate([np.tile(w["class"], (batch, 1, 1)), x], 1)
    x = x + w["position"]
    for block in range(DEPTH):
        y = norm(x, f"{block}.norm1")
        q, k, v = (heads(y @ w[f"{block}.{n}"] + w[f"{block}.{n}_bias"]) for n in "qkv")
        logits = np.where(keep(plan.keys[block]), q @ k.swapaxes(2, 3) / np.sqrt(HEAD_DIM), -np.inf)
        weight = np.exp(logits - logits.max(-1, keepdims=True))
        attended = (weight / weight.sum(-1, keepdims=True) @ v).transpose(0, 2, 1, 3).reshape(x.shape)
        update = attended @ w[f"{block}.o"] + w[f"{block}.o_bias"]
        x = x + update * keep(plan.queries[block])[:, None]
        y = norm(x, f"{block}.norm2") @ w[f"{block}.up"] + w[f"{block}.up_bias"]
        update = np.maximum(y, 0) @ w[f"{block}.down"] + w[f"{block}.down_bias"]
        x = x + update * keep(plan.mlps[block])[:, None]
    x = norm(x, "norm")
    return (x[:, 0] if class_token else x.mean(1)) @ w["head"] + w["head_bias"]


class Spelled:
    """A graph that is written node by node; its batch is open or 1."""

    def __init__(self, weights: dict[str, np.ndarray], dynamic: bool, opset: int):
        self.weights, self.dynamic, self.opset = weights, dynamic, opset
        self.nodes, self.constants, self.names = [], {}, count()
        self.batch = -1 if dynamic else 1

    def constant(self, array) -> str:
        array = np.asarray(array)
        name = f"c{next(self.names)}"
        self.constants[name] = array.astype(np.float32) if array.dtype == np.float64 else array
        return name

    def op(self, op_type: str, *inputs, **attributes) -> str:
        names = [one if isinstance(one, str) else self.constant(one) for one in inputs]
        name = f"{op_type}_{next(self.names)}"
        self.nodes.append(helper.make_node(op_type, names, [name], name=name, **attributes))
        return name

    def reduce(self, op_type: str, x: str, axes: list[int], keepdims: int = 1) -> str:
        if self.opset >= 18 or op_type == "ReduceSum":
            return self.op(op_type, x, np.array(axes), keepdims=keepdims)
        return self.op(op_type, x, axes=axes, keepdims=keepdims)

    def reshape(self, x: str, *shape) -> str:
        return self.op("Reshape", x, np.array(shape, np.int64))

    def model(self, output: str) -> ir.Model:
        size = ["batch" if self.dynamic else 1]
        image = [GRID[0] * PATCH, GRID[1] * PATCH, 3]
        graph = helper.make_graph(
            self.nodes, "spelled",
            [helper.make_tensor_value_info("images", TensorProto.FLOAT, size + image)],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, [*size, CLASSES])],
            [numpy_helper.from_array(array, name) for name, array in self.constants.items()],
        )  # fmt: skip
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=9)
        onnx.checker.check_model(model)
        return ir.from_proto(model)


class Keras(Spelled):
    def norm(self, x: str, name: str) -> str:
        mean = self.reduce("ReduceMean", x, [-1])
        off = self.op("Sub", x, mean)
        variance = self.reduce("ReduceMean", self.op("Mul", off, off), [-1])
        root = self.op("Reciprocal", self.op("Sqrt", self.op("Add", variance, np.float32(EPS))))
        scale = self.op("Mul", root, self.weights[f"{name}_scale"])
        shift = self.op("Sub", self.weights[f"{name}_shift"], self.op("Mul", mean, scale))
        return self.op("Add", self.op("Mul", x, scale), shift)

    def stem(self) -> str:
        x = self.op("Transpose", "images", perm=[0, 3, 1, 2])
        kernel = self.weights["patch"].transpose(3, 2, 0, 1)
        x = self.op("Conv", x, kernel, strides=[PATCH, PATCH], auto_pad="VALID")
        x = self.op("Add", self.op("Transpose", x, perm=[0, 2, 3, 1]), self.weights["patch_bias"])
        return self.reshape(x, self.batch, PATCHES, WIDTH)

    def with_class(self, x: str) -> str:
        size = self.op("Gather", self.op("Shape", x), np.array(0), axis=0)
        times = self.op("Concat", self.op("Unsqueeze", size, np.array([0])), np.array([1, 1]), axis=0)
        return self.op("Concat", self.op("Tile", self.weights["class"], times), x, axis=1)

    def attention(self, x: str, block: int) -> str:
        w = self.weights
        parts = []
        for name in "qkv":
            kernel = w[f"{block}.{name}"].reshape(WIDTH, HEADS, HEAD_DIM)
            y = self.op("Einsum", x, kernel, equation="abc,cde->abde")
            parts.append(self.op("Add", y, w[f"{block}.{name}_bias"].reshape(HEADS, HEAD_DIM)))
        query = self.op("Mul", parts[0], np.float32(HEAD_DIM**-0.5))
        logits = self.op("Einsum", parts[1], query, equation="aecd,abcd->acbe")
        y = self.op("Einsum", self.softmax(logits), parts[2], equation="acbe,aecd->abcd")
        kernel = w[f"{block}.o"].reshape(HEADS, HEAD_DIM, WIDTH)
        return self.op("Add", self.op("Einsum", y, kernel, equation="abcd,cde->abe"), w[f"{block}.o_bias"])

    def softmax(self, logits: str) -> str:
        return self.op("Softmax", logits, axis=-1)

    def dense(self, x: str, name: str) -> str:
        return self.op("Add", self.op("MatMul", x, self.weights[name]), self.weights[f"{name}_bias"])

    def pooled(self, x: str) -> str:
        x = self.op("GlobalAveragePool", self.op("Transpose", x, perm=[0, 2, 1]))
        return self.op("Squeeze", x, np.array([2]))

    def write(self, class_token: bool) -> ir.Model:
        x = self.stem()
        x = self.with_class(x) if class_token else x
        x = self.op("Add", x, self.weights["position"])
        for block in range(DEPTH):
            x = self.op("Add", self.attention(self.norm(x, f"{block}.norm1"), block), x)
            y = self.op("Relu", self.dense(self.norm(x, f"{block}.norm2"), f"{block}.up"))
            x = self.op("Add", x, self.dense(y, f"{block}.down"))
        x = self.norm(x, "norm")
        x = self.op("Gather", x, np.array(0), axis=1) if class_token else self.pooled(x)
        return self.model(self.dense(x, "head"))


class Jax(Keras):
    def norm(self, x: str, name: str) -> str:
        mean = self.reduce("ReduceMean", x, [2])
        squares = self.reduce("ReduceMean", self.op("Mul", x, x), [2])
        variance = self.op("Max", self.op("Sub", squares, self.op("Mul", mean, mean)), np.float32(0))
        root = self.op("Reciprocal", self.op("Sqrt", self.op("Add", variance, np.float32(EPS))))
        y = self.op("Mul", self.op("Sub", x, mean), self.op("Mul", root, self.weights[f"{name}_scale"]))
        return self.op("Add", y, self.weights[f"{name}_shift"])

    def stem(self) -> str:
        x = self.reshape("images", self.batch, GRID[0], PATCH, GRID[1], PATCH, 3)
        x = self.op("Transpose", x, perm=[0, 1, 3, 2, 4, 5])
        x = self.reshape(x, self.batch, PATCHES, PATCH * PATCH * 3)
        x = self.op("Gemm", self.reshape(x, -1, PATCH * PATCH * 3), self.weights["patch"].reshape(-1, WIDTH),
                    self.weights["patch_bias"])  # fmt: skip
        return self.reshape(x, self.batch, PATCHES, WIDTH)

    def with_class(self, x: str) -> str:
        shape = self.op("Concat", self.op("Shape", x, start=0, end=1), np.array([1, WIDTH]), axis=0)
        return self.op("Concat", self.op("Expand", self.weights["class"], shape), x, axis=1)

    def attention(self, x: str, block: int) -> str:
        tokens = self.weights["position"].shape[1]
        q, k, v = (self.reshape(self.dense(x, f"{block}.{n}"), self.batch, tokens, HEADS, HEAD_DIM) for n in "qkv")
        q, v = (self.op("Transpose", one, perm=[0, 2, 1, 3]) for one in (q, v))
        logits = self.op("MatMul", q, self.op("Transpose", k, perm=[0, 2, 3, 1]))
        y = self.op("MatMul", self.softmax(self.op("Div", logits, np.float32(HEAD_DIM**0.5))), v)
        y = self.op("Transpose", y, perm=[0, 2, 1, 3])
        y = self.op("Gemm", self.reshape(y, -1, WIDTH), self.weights[f"{block}.o"].T, self.weights[f"{block}.o_bias"],
                    transB=1)  # fmt: skip
        return self.reshape(y, self.batch, tokens, WIDTH)

    def softmax(self, logits: str) -> str:
        power = self.op("Exp", self.op("Sub", logits, self.reduce("ReduceMax", logits, [-1])))
        return self.op("Div", power, self.reduce("ReduceSum", power, [3]))

    def pooled(self, x: str) -> str:
        return self.reduce("ReduceMean", x, [1], keepdims=0)


class Bare(Jax):
    """Flax with nothing subtracted, patches by a convolution of NHWC images, and a mean written as a sum."""

    stem = Keras.stem

    def softmax(self, logits: str) -> str:
        power = self.op("Exp", logits)
        return self.op("Mul", power, self.op("Reciprocal", self.reduce("ReduceSum", power, [-1])))

    def pooled(self, x: str) -> str:
        return self.op("Div", self.reduce("ReduceSum", x, [1], keepdims=0), np.float32(PATCHES))


SPELLINGS = {"Keras": Keras, "JAX": Jax, "bare softmax": Bare}
