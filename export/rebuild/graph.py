"""The ONNX graph of a Vision Transformer -> the timm model that computes the same: what learning a plan needs.

Gradients, rollouts and refits work on a PyTorch model. Here one is made from the graph that recognition understood: the
weights are read from the places where a ViT has them, what depends on no pixel (positions, prefix tokens, a learned
query) is computed by running that part of the graph, and an activation is known by what it computes, not by how it is
spelled. The result is compared with the file in onnxruntime before anyone gets it; a part that the timm model has no
place for is refused by the name of its node.

Shapes below: batch B, prefix tokens P, patches N, width d, heads H, head width D, inner width a = H D.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from timm.layers import AttentionPoolLatent, GluMlp, LayerScale, Mlp, get_act_layer
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from ...core.errors import GraphError, ParityError, UserError
from ...core.extras import require
from ...core.files import scratch_beside
from ...core.finite import check_finite
from ...core.metadata import ModelMetadata
from ...core.plan import Geometry
from ...core.preprocess import resolve_preprocessing
from ...core.text import command
from ...prune.backbones.vit import ViTAdapter, weights_sha256
from ...prune.loaded import LoadedModel
from ..files import save_model
from ..fold import check_shape
from ..graph import Graph, OpenedGraph, open_graph
from ..nodes import attribute_int, constant, copy_model, integers, is_constant, readers_of
from ..parity import compare_float32, run_graph, run_onnx
from ..passes.edit import add_constant
from ..recognise.graph import BlockSite, HeadSite, VitSite, is_norm, refuse, sole_reader
from ..recognise.normalise import VIEWS
from ..yardstick import Yardstick

#: timm's names of the activations that are tried, the usual ones first.
ACTIVATIONS = (
    "gelu", "gelu_tanh", "quick_gelu", "silu", "relu", "identity", "hard_swish", "mish", "elu", "leaky_relu", "relu6",
    "tanh", "sigmoid",
)  # fmt: skip
#: How close an activation must come, relative to the largest value: the two GELUs are 5e-4 apart at their worst.
_SAME_ACTIVATION = 1e-5
#: What the head may do besides views: functions whose sum is again one matrix and one bias.
_AFFINE = {"Add", "Sub", "Neg", "Mul", "Div", "MatMul", "Gemm", "Concat", "ReduceMean", "ReduceSum", "Sum"}


@dataclass(frozen=True)
class Rebuilt:
    """What :func:`rebuild` made of a file.

    Attributes:
        loaded: The model, ready for pruning. Its ``graph`` is what was opened.
        softmax: Whether the graph ends in a ``Softmax``, which the model leaves out: it returns the logits.
    """

    loaded: LoadedModel
    softmax: bool


class SideBySide(VisionTransformer):
    """A ViT whose head reads several vectors side by side: prefix tokens, and the mean of the patches where it pools.

    Modifications:
        pool: [B, T, d] -> [B, k d], ``tokens`` in their order, the mean last.
    """

    tokens: tuple[int, ...] = ()

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        parts = [x[:, token] for token in self.tokens]
        if self.global_pool == "avg":
            parts.append(super().pool(x, pool_type))
        return torch.cat(parts, -1)


def rebuild(
    graph: Graph, *, preprocessing: Mapping[str, object] | None = None, features: bool | None = None
) -> Rebuilt:
    """Read the ViT in a dense ONNX file of any exporter as a timm model, and prove that the two agree.

    Args:
        graph: A file, a model in memory, or an opened graph.
        preprocessing: What the user said of it, see :func:`~vpruner.core.preprocess.resolve_preprocessing`; needed
            where the file does not say it.
        features: Whether the output is an embedding rather than logits. None: as the file says; where it does not, a
            last layer with a bias gives logits, and one without (or none) an embedding.

    Returns:
        The model under the name and weights hash of the file's metadata; without any, under the file's name and the
        hash of its own state dict. Its classes are those of the metadata.

    Raises:
        GraphError: The graph is not understood, has a part that no timm ViT has (the message names the node), or
            computes something else than the model that was made of it.
        UserError: No ONNX file, pruned already, no three channels, or no preprocessing.
    """
    opened = open_graph(graph)
    about, recognised = opened.dense_metadata, opened.recognised()
    geometry, name = recognised.geometry, opened.stem
    if about is not None:
        check_shape(about.geometry, geometry, f"{about.model}, as its metadata says", opened.source)
        geometry, name = about.geometry, about.model
    if geometry.in_chans != 3:
        found = f"{opened.source} takes {geometry.in_chans} channels"
        raise UserError(f"{found}, expected 3 (RGB)", "only RGB models are supported")
    given = dict(preprocessing or {})
    resolved = resolve_preprocessing(opened.preprocessing, given, size=geometry.image_size, source=opened.source)

    with opened.naming():
        module, softmax = _Reader(recognised.model, recognised.site, recognised.geometry).read()
    if about is None:
        head = module.head
        if features is None:
            features = not isinstance(head, nn.Linear) or head.bias is None
        geometry = replace(geometry, output="features" if features else "logits")
    _check_equal(module, opened, geometry, softmax)
    loaded = LoadedModel(
        ViTAdapter(module, name, geometry),
        resolved,
        None if about is None else about.classes,
        weights_sha256(module) if about is None else about.weights_sha256,
        opened,
    )
    return Rebuilt(loaded, softmax)


def write_graph(loaded: LoadedModel, path: str | os.PathLike, props: Mapping[str, str] | None = None) -> Path:
    """Write the file that ``loaded`` was rebuilt from, with what ``loaded`` knows of itself as metadata.

    Where attention projections or second MLP layers of the model are no longer those of the file, as tuning leaves
    them, the graph gets the model's, in the form that folding works on; otherwise it is written as it was.

    Args:
        loaded: From :func:`rebuild`; ``sha256`` is written as the identity of the weights.
        props: More metadata.

    Raises:
        ParityError: Weights were changed, and the graph with them does not compute what the model does.
    """
    geometry = loaded.adapter.geometry
    # Copies: the graph may be written again, with other weights.
    tuned = loaded.graph.recognised(geometry).copy()
    changed = _put_weights(tuned.model, tuned.site, loaded.adapter.model)
    model = tuned.model if changed else copy_model(loaded.graph.model)
    about = ModelMetadata(loaded.name, loaded.sha256, geometry, loaded.preprocessing, loaded.classes)
    model.metadata_props.update({**about.to_props(), **(props or {})})
    if changed:
        images, softmax = probe_images(geometry), _strip_softmax(model.graph.outputs[0])[1]
        yardstick = _yardstick(loaded.adapter.model, images, softmax)
        expected = _run(loaded.adapter.model, torch.from_numpy(images), softmax)
        with scratch_beside(path) as folder:
            found = run_onnx(save_model(model, folder / "tuned.onnx"), images).reshape(len(images), -1)
        compare_float32("the tuned graph equals the tuned model", expected, found, yardstick, top1=False)
    return save_model(model, path)


def probe_images(geometry: Geometry, seed: int = 0) -> np.ndarray:
    """Inputs to compare models on: noise of several strengths, fine and coarse, and a constant.

    Returns:
        float32 [7, channel, height, width], about the range of normalised pixels.
    """
    random = np.random.default_rng(seed)
    height, width = geometry.image_size
    fine = random.standard_normal((4, geometry.in_chans, height, width), np.float32)
    fine *= np.float32([0.1, 0.5, 1, 2])[:, None, None, None]
    coarse = random.uniform(-2, 2, (2, geometry.in_chans, 4, 4)).astype(np.float32)
    coarse = coarse.repeat(-(-height // 4), 2).repeat(-(-width // 4), 3)[:, :, :height, :width]
    return np.concatenate([fine, coarse, np.full_like(fine[:1], 0.5)])


# -- comparing --------------------------------------------------------------------------------------------------------


def read_module(graph: OpenedGraph) -> tuple[nn.Module, Callable[[Tensor], np.ndarray]]:
    """The timm model in a graph, not compared with it, and how images [image, ...] are run through it to the output.

    Raises:
        GraphError: As for :func:`rebuild`.
    """
    recognised = graph.recognised()
    module, softmax = _Reader(recognised.model, recognised.site, recognised.geometry).read()
    return module, partial(_run, module, softmax=softmax)


@torch.no_grad()
def _run(module: nn.Module, images: Tensor, softmax: bool) -> np.ndarray:
    output = torch.cat([module(chunk) for chunk in images.split(4)])
    return (output.softmax(-1) if softmax else output).numpy()


def _yardstick(module: nn.Module, images: np.ndarray, softmax: bool) -> Yardstick:
    return Yardstick(module, torch.from_numpy(images), partial(_run, module, softmax=softmax))


def _check_equal(module: nn.Module, graph: OpenedGraph, geometry: Geometry, softmax: bool) -> None:
    images = probe_images(geometry)
    reference = run_graph(graph, images)
    check_finite(reference, graph.source, file=graph.path)
    found = _run(module, torch.from_numpy(images), softmax)
    try:
        yardstick = _yardstick(module, images, softmax)
        compare_float32("rebuilt", reference.reshape(len(images), -1), found, yardstick, top1=False)
    except ParityError as error:
        found = str(error).partition("rebuilt: ")[2]
        raise GraphError(
            f"the model rebuilt from {graph.source} does not compute what the graph does ({found})",
            f"learn the plan from the PyTorch model, then: {command('fold', 'FILE', plan='plan.json')}",
        ) from None


# -- reading the graph ------------------------------------------------------------------------------------------------


class _Reader:
    """Reads a recognised graph part by part; :meth:`read` puts the parts together."""

    def __init__(self, model: ir.Model, site: VitSite, geometry: Geometry):
        self.model, self.site, self.geometry = model, site, geometry
        (self.image,) = (value for value in model.graph.inputs if not is_constant(value))
        batch = self.image.shape[0]
        #: Rows of a static batch are all fed the same, and the first is looked at.
        self.batch = batch if isinstance(batch, int) else 1

    def read(self) -> tuple[VisionTransformer, bool]:
        """The model in evaluation mode, and whether the graph's final ``Softmax`` was left out of it."""
        geometry, site = self.geometry, self.site
        head = _HeadParts(self)
        plain = head.attention is not None or (head.tokens, head.averages) in (((0,), False), ((), True))
        height, width = (size // cells for size, cells in zip(geometry.image_size, geometry.grid, strict=True))
        # Nothing is allocated until it is read: what were left out would still be on the meta device at the end.
        module = (VisionTransformer if plain else SideBySide)(
            img_size=geometry.image_size,
            patch_size=(height, width),
            in_chans=geometry.in_chans,
            num_classes=0,
            global_pool="map" if head.attention is not None else "avg" if head.averages else "token",
            embed_dim=geometry.embed_dim,
            depth=0,
            num_heads=1,
            class_token=geometry.prefix_tokens > 0,
            reg_tokens=max(0, geometry.prefix_tokens - 1),
            no_embed_class=True,
            fc_norm=False,
            final_norm=False,
            pool_include_prefix=head.pools_prefix,
            weight_init="skip",
            device="meta",
        )
        if not plain:
            module.tokens = head.tokens
        self._read_stem(module)
        module.blocks = nn.Sequential(*(self._read_block(block) for block in site.blocks))
        module.norm = _layer_norm(head.norm)
        module.fc_norm = _layer_norm(head.pooled_norm)
        module.attn_pool = head.attention
        module.head = head.linear
        module.num_classes = geometry.outputs
        unread = [name for name, parameter in module.named_parameters() if parameter.is_meta]
        if unread:
            raise RuntimeError(f"nothing was read for {', '.join(unread)}")
        return module.eval(), head.softmax

    def evaluate(self, feeds: Mapping[ir.Value, np.ndarray], wanted: ir.Value) -> np.ndarray:
        """What ``wanted`` is where the values of ``feeds`` are given; only the nodes between run, in onnxruntime."""
        return self.function(list(feeds), wanted)(*feeds.values())

    def function(self, inputs: Sequence[ir.Value], wanted: ir.Value):
        """The part of the graph from ``inputs`` to ``wanted`` as a function of float32 arrays."""
        if is_constant(wanted):
            return lambda *arrays: constant(wanted)
        if any(wanted is value for value in inputs):
            return lambda *arrays: arrays[next(i for i, value in enumerate(inputs) if value is wanted)]
        needed, constants, pending = set(), {}, [wanted]
        while pending:
            value = pending.pop()
            if value is None or any(value is given for given in inputs):
                continue
            if is_constant(value):
                constants[value.name] = value
                continue
            node = value.producer()
            if node is None:
                given = ", ".join(repr(given.name) for given in inputs)
                raise refuse(wanted, f"its output to depend on {given} alone, not on {value.name!r}")
            if node not in needed:
                needed.add(node)
                pending.extend(node.inputs)
        graph = onnx.helper.make_graph(
            [ir.to_proto(node) for node in self.model.graph if node in needed],
            "part",
            [onnx.helper.make_tensor_value_info(value.name, onnx.TensorProto.FLOAT, None) for value in inputs],
            [onnx.helper.make_tensor_value_info(wanted.name, onnx.TensorProto.FLOAT, None)],
            [onnx.numpy_helper.from_array(constant(value), name) for name, value in constants.items()],
        )
        opsets = [onnx.helper.make_opsetid(domain, number) for domain, number in self.model.opset_imports.items()]
        proto = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=self.model.ir_version)
        onnxruntime = require("onnxruntime")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        # An input that nothing reads is no input for onnxruntime's graph optimiser, but may still be given.
        names = [value.name for value in inputs]
        return lambda *arrays: session.run(None, dict(zip(names, arrays, strict=True)))[0]

    # -- stem ---------------------------------------------------------------------------------------------------------

    def _read_stem(self, module: VisionTransformer) -> None:
        geometry, width = self.geometry, self.geometry.embed_dim
        conv = next(node for node in readers_of(self.image) if node.op_type == "Conv")
        weight, bias = constant(conv.inputs[1]), constant(conv.inputs[2]) if len(conv.inputs) > 2 else None
        projection = nn.Conv2d(
            geometry.in_chans, width, weight.shape[2:], weight.shape[2:], bias=bias is not None, device="meta"
        )
        _set(projection, weight=weight, bias=bias)
        module.patch_embed.proj = projection

        end, start = self.site.stream, conv.outputs[0]
        for op_type in ("Reshape", "Transpose"):
            start = sole_reader(start, op_type, "the tokens of the patches").outputs[0]
        if end is not start and is_norm(end.producer(), 3):
            module.norm_pre = _layer_norm(end.producer())
            end = end.producer().inputs[0]
        readers = readers_of(start)
        if end is not start and len(readers) == 1 and is_norm(readers[0], 3):
            module.patch_embed.norm = _layer_norm(readers[0])
            start = readers[0].outputs[0]
        for node in _nodes_behind(end, start):
            if node.op_type == "LayerNormalization":
                raise refuse(node, "one norm of the patches and one ahead of block 0 at most")
        patches = np.zeros((self.batch, geometry.patches, width), np.float32)
        image = np.zeros((self.batch, geometry.in_chans, *geometry.image_size), np.float32)
        # Only constants are added and joined from here on, so that zeros show all of them.
        tokens = self.evaluate({start: patches, self.image: image}, end)[:1]
        prefix = geometry.prefix_tokens
        _set(module, pos_embed=tokens[:, prefix:])
        if prefix:
            _set(module, cls_token=tokens[:, :1])
        if prefix > 1:
            _set(module, reg_token=tokens[:, 1:prefix])

    # -- blocks -------------------------------------------------------------------------------------------------------

    def _read_block(self, site: BlockSite) -> Block:
        width, where = self.geometry.embed_dim, f"of block {site.index}"
        block = Block(width, num_heads=1, mlp_ratio=1 / width, device="meta")
        block.norm1, block.attn, block.ls1 = _layer_norm(site.norm1), *self._read_attention(site, where)
        block.norm2 = _layer_norm(_norm2(site))
        last = _last_linear(site.residual2, site.residual1.outputs[0], f"the MLP {where}")
        block.mlp = self._read_mlp(block_start=_norm2(site).outputs[0], last=last, what=f"the MLP {where}")
        block.ls2 = _layer_scale(last.scale, width)
        return block

    def _read_attention(self, site: BlockSite, where: str) -> tuple[Attention, nn.Module]:
        heads, head_dim, width = site.heads.heads, site.heads.head_dim, self.geometry.embed_dim
        inner = heads * head_dim
        weight, bias = constant(site.qkv.weight).T, constant(site.qkv.bias)
        query, key = (_scaling(part, f"queries and keys {where}") for part in site.heads.parts[:2])
        # timm scales by D^-1/2 behind the norms; what the graph does besides goes into the weights of the queries.
        factor = query.after * key.after * _logits_of(site.softmax)[1] * head_dim**0.5
        rows = np.ones((3, inner), np.float64)
        rows[0], rows[1] = query.before, key.before
        if query.norm is None:
            rows[0] *= _exactly_one(factor)
        if (rows != 1).any():
            weight = weight * rows.reshape(-1, 1)
            bias = None if bias is None else bias * rows.reshape(-1)
        last = _last_linear(site.residual1, site.stream, f"the attention projection {where}")
        attention = Attention(width, num_heads=heads, attn_head_dim=head_dim, qkv_bias=bias is not None, device="meta")
        attention.qkv = _linear(weight, bias)
        attention.q_norm = _layer_norm(query.norm, 1.0 if query.norm is None else _exactly_one(factor))
        attention.k_norm = _layer_norm(key.norm)
        attention.proj = last.module()
        source = last.matmul.inputs[0]
        if source is not site.merge.outputs[0]:
            norm = source.producer()
            if not is_norm(norm, 3) or norm.inputs[0] is not site.merge.outputs[0]:
                raise refuse(norm, f"the attention projection {where} (MatMul), or a norm ahead of it")
            attention.norm = _layer_norm(norm)
        return attention, _layer_scale(last.scale, width)

    def _read_mlp(self, block_start: ir.Value, last: _LastLinear, what: str) -> nn.Module:
        """An MLP from its input to ``last``, gated or not, as timm's ``Mlp`` or ``GluMlp``."""
        weights, biases, outputs = [], [], []
        for node in readers_of(block_start):
            if node.op_type != "MatMul" or not is_constant(node.inputs[1]):
                raise refuse(node, f"the first layer of {what} (MatMul with a constant matrix)")
            output, bias = _with_bias(node)
            weights.append(constant(node.inputs[1]).T)
            biases.append(bias)
            outputs.append(output)
        hidden, norm = last.matmul.inputs[0], None
        if is_norm(hidden.producer(), 3):
            norm = hidden.producer()
            hidden = norm.inputs[0]
        sizes = [len(weight) for weight in weights]
        if any(bias is not None for bias in biases):
            biases = [np.zeros(size, np.float32) if b is None else b for size, b in zip(sizes, biases, strict=True)]
            bias = np.concatenate(biases)
        else:
            bias = None
        activation, gate_last = self._activation(outputs, sizes, hidden, len(last.weight), what)
        common = {"act_layer": get_act_layer(activation), "device": "meta"}
        if gate_last is None:
            mlp = Mlp(weights[0].shape[1], sum(sizes), **common)
        else:
            mlp = GluMlp(weights[0].shape[1], sum(sizes), gate_last=gate_last, **common)
        mlp.fc1, mlp.norm, mlp.fc2 = _linear(np.concatenate(weights), bias), _layer_norm(norm), last.module()
        return mlp

    def _activation(
        self, inputs: Sequence[ir.Value], sizes: Sequence[int], output: ir.Value, width: int, what: str
    ) -> tuple[str, bool | None]:
        """The name of f where ``output`` [.., width] is f(x), f(x1) x2 or x1 f(x2); for the latter two, if it is x2's.

        x are the ``inputs`` side by side, x1 and x2 its halves.
        """
        random = np.random.default_rng(0)
        x = random.uniform(-6, 6, (self.batch, min(16, self.geometry.tokens), sum(sizes))).astype(np.float32)
        parts = np.split(x, np.cumsum(sizes)[:-1], -1)
        found = self.evaluate(dict(zip(inputs, parts, strict=True)), output)
        halves = [torch.from_numpy(half) for half in np.split(x, 2, -1)] if sum(sizes) % 2 == 0 else []
        for name in ACTIVATIONS:
            f = nn.Identity() if name == "identity" else get_act_layer(name)()
            tries = [(None, lambda f=f: f(torch.from_numpy(x)))]
            if halves:
                tries += [(False, lambda f=f: f(halves[0]) * halves[1]), (True, lambda f=f: halves[0] * f(halves[1]))]
            for gate_last, compute in tries:
                expected = compute().numpy()
                if expected.shape == found.shape and _close(found, expected):
                    return name, gate_last
        raise refuse(
            output,
            f"{what}: an activation that is known ({', '.join(ACTIVATIONS)}), of all channels or as the gate of half",
        )


class _HeadParts:
    """What stands behind the last block.

    Attributes:
        norm: Of all tokens, or None.
        tokens: Prefix tokens that are read, each by itself.
        averages: Whether the mean of tokens is read; with ``pools_prefix``, prefix tokens are in it, or in the
            attention.
        attention: Pooling by attention with its MLP, or None.
        pooled_norm: Of the one vector that is read, or None.
        linear: ``nn.Linear`` from those vectors, side by side, to the output, or ``nn.Identity``.
        softmax: Whether the graph's last node is a ``Softmax``; ``linear`` stops short of it.
    """

    def __init__(self, reader: _Reader):
        self.reader, site = reader, reader.site.head
        self.norm = self._token_norm(site)
        selects = sorted(site.selects, key=lambda node: integers(node, 1)[0])
        self.tokens = tuple(integers(node, 1)[0] for node in selects)
        sources = [node.outputs[0] for node in selects]
        self.attention, self.averages = None, False
        self.pools_prefix = site.pools and site.slice is None and reader.geometry.prefix_tokens > 0
        if site.reshape is not None:
            if selects:
                raise refuse(selects[0], "no prefix token with attention pooling")
            self.attention, source = self._read_attention_pool(site)
            sources.append(source)
        elif site.pool is not None:
            if site.pool.op_type != "ReduceMean":
                raise refuse(site.pool, "the mean over tokens (ReduceMean): others have no gradient for every token")
            self.averages = True
            sources.append(site.pool.outputs[0])
        self.pooled_norm = None
        if len(sources) == 1:
            readers = _readers_past_views(sources[0])
            if len(readers) == 1 and _is_vector_norm(readers[0], reader.geometry.embed_dim):
                self.pooled_norm = readers[0]
                sources = [readers[0].outputs[0]]
        output, self.softmax = _strip_softmax(reader.model.graph.outputs[0])
        self.linear = self._read_linear(sources, output)

    def _token_norm(self, site: HeadSite) -> ir.Node | None:
        norms, value = [], site.stream
        while value is not None:
            readers = readers_of(value)
            if len(readers) == 1 and is_norm(readers[0], 3) and readers[0] not in norms:
                norms.append(readers[0])
                value = readers[0].outputs[0]
            else:
                value = site.slice.outputs[0] if site.slice in readers and site.slice.inputs[0] is value else None
        if len(norms) > 1:
            raise refuse(norms[1], "one norm between the last block and the head")
        if norms and site.slice is not None and norms[0].inputs[0] is site.slice.outputs[0] and site.selects:
            raise refuse(norms[0], "a norm of all tokens or of what is pooled, not of the patches alone")
        return norms[0] if norms else None

    def _read_linear(self, sources: Sequence[ir.Value], output: ir.Value) -> nn.Module:
        """From the vectors that are read, each [B, d] up to axes of size 1, to the graph's output: y = W x + b."""
        nodes = _nodes_ahead(sources, output)
        for node in nodes:
            others = [value for value in node.inputs if value is not None and not is_constant(value)]
            computed = node.op_type in ("Mul", "Div", "MatMul", "Gemm")
            known = node.op_type in _AFFINE or node.op_type in VIEWS
            inverse = node.op_type == "Div" and is_constant(node.inputs[0])
            if not known or (computed and len(others) > 1) or inverse:
                raise refuse(node, "the head to be one norm and one linear layer on what is read", cut=others[0])
        if all(node.op_type in VIEWS for node in nodes) and len(sources) == 1:
            return nn.Identity()
        if len(sources) == 1:
            found = _vector_linear(sources[0])
            if found is not None and _past_views(found[2]) is output:
                return _linear(*found[:2])
        return self._probe(sources, output)

    def _probe(self, sources: Sequence[ir.Value], output: ir.Value) -> nn.Linear:
        """The matrix of an affine function, from what it makes of zeros and of the unit vectors."""
        width, function = self.reader.geometry.embed_dim, self.reader.function(list(sources), output)
        shapes = [[self.reader.batch, *(int(dim) for dim in value.shape[1:])] for value in sources]
        zeros = [np.zeros(shape, np.float32) for shape in shapes]
        bias = function(*zeros)[0].reshape(-1)
        columns = []
        for index, zero in enumerate(zeros):
            for channel in range(width):
                unit = np.zeros_like(zero).reshape(self.reader.batch, width)
                unit[:, channel] = 1
                columns.append(function(*zeros[:index], unit.reshape(zero.shape), *zeros[index + 1 :])[0].reshape(-1))
        return _linear(np.stack(columns, 1).astype(np.float64) - bias[:, None], bias if bias.any() else None)

    # -- attention pooling --------------------------------------------------------------------------------------------

    def _read_attention_pool(self, site: HeadSite) -> tuple[AttentionPoolLatent, ir.Value]:
        reader, width = self.reader, self.reader.geometry.embed_dim
        transpose = sole_reader(site.reshape.outputs[0], "Transpose", "the heads of attention pooling")
        split = sole_reader(transpose.outputs[0], "Split", "keys and values of attention pooling")
        heads, head_dim = integers(site.reshape, 1)[2] // 2, integers(site.reshape, 1)[3]
        if heads * head_dim != width:
            raise refuse(site.reshape, f"keys and values of attention pooling of width {width}")
        product = site.reshape.inputs[0].producer()
        bias = None
        if product.op_type == "Add":
            bias = next(constant(value) for value in product.inputs if is_constant(value))
            product = next(value.producer() for value in product.inputs if not is_constant(value))
        weight = constant(product.inputs[1]).T
        key = _scaling(split.outputs[0], "keys of attention pooling")
        if key.before != 1:
            rows = np.concatenate([np.full(width, key.before), np.ones(width)])
            weight, bias = weight * rows[:, None], None if bias is None else bias * rows
        softmax = site.pool.inputs[0].producer()
        logits, scale = _logits_of(softmax)
        image = np.zeros((reader.batch, reader.geometry.in_chans, *reader.geometry.image_size), np.float32)
        query = reader.evaluate({reader.image: image}, logits.inputs[0])
        query = query.reshape(-1, *query.shape[-3:])[0]
        if query.shape != (heads, 1, head_dim):
            raise refuse(logits, f"one learned query of attention pooling, found {query.shape[1]}")
        factor = _exactly_one(key.after * scale * head_dim**0.5)

        projection = _vector_linear(site.pool.outputs[0])
        if projection is None:
            raise refuse(site.pool, "the projection of attention pooling behind it")
        middle = _past_views(projection[2])
        readers = _readers_past_views(middle)
        norms = [node for node in readers if _is_vector_norm(node, width)]
        adds = [node for node in readers if node.op_type == "Add"]
        if len(readers) != 2 or len(norms) != 1 or len(adds) != 1:
            raise refuse(readers[0] if readers else middle, "a norm with an MLP next to a residual Add, as SigLIP has")
        first = _vector_linear(norms[0].outputs[0])
        second = self._second_layer(adds[0], middle)
        if first is None or second is None:
            raise refuse(norms[0] if first is None else adds[0], "the MLP of attention pooling: two linear layers")
        name = self._vector_activation(first, second)

        pool = AttentionPoolLatent(
            width, num_heads=heads, q_proj=False, act_layer=get_act_layer(name), norm_layer=nn.LayerNorm, device="meta"
        )
        _set(pool, latent=(query.reshape(1, 1, width) * factor))
        pool.kv, pool.k_norm, pool.proj = _linear(weight, bias), _layer_norm(key.norm), _linear(*projection[:2])
        pool.norm, pool.mlp.fc1, pool.mlp.fc2 = _layer_norm(norms[0]), _linear(*first[:2]), _linear(*second[:2])
        return pool, adds[0].outputs[0]

    def _second_layer(
        self, residual: ir.Node, middle: ir.Value
    ) -> tuple[np.ndarray, np.ndarray | None, ir.Value] | None:
        """(W, b, its input) of the linear layer whose output ``residual`` adds."""
        for value in residual.inputs:
            node, bias = _before_views(value), None
            if node is _before_views(middle):
                continue
            if node is not None and node.op_type == "Add" and any(map(is_constant, node.inputs)):
                bias = next(constant(other) for other in node.inputs if is_constant(other)).reshape(-1)
                node = _before_views(next(other for other in node.inputs if not is_constant(other)))
            if node is None or node.op_type not in ("MatMul", "Gemm") or not is_constant(node.inputs[1]):
                continue
            weight, own = _matrix(node)
            return weight, own if bias is None else bias, node.inputs[0]
        return None

    def _vector_activation(self, first, second) -> str:
        value, hidden = first[2], second[2]
        dims = [dim if isinstance(dim, int) else self.reader.batch for dim in value.shape]
        x = np.random.default_rng(0).uniform(-6, 6, dims).astype(np.float32)
        found = self.reader.evaluate({value: x}, hidden).reshape(-1)
        for name in ACTIVATIONS:
            f = nn.Identity() if name == "identity" else get_act_layer(name)()
            if found.shape == (x.size,) and _close(found, f(torch.from_numpy(x)).numpy().reshape(-1)):
                return name
        raise refuse(hidden, f"the MLP of attention pooling: an activation that is known ({', '.join(ACTIVATIONS)})")


# -- pieces of the graph ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _LastLinear:
    """The layer that a residual ``Add`` ends: y = (x W + b) scale.

    Attributes:
        matmul, add: Its nodes; ``add`` is None without a bias.
        weight: [out, in], as PyTorch has it.
        bias: [out] or None.
        scale: Of LayerScale, [out] or [1]; or None.
    """

    matmul: ir.Node
    add: ir.Node | None
    weight: np.ndarray
    bias: np.ndarray | None
    scale: np.ndarray | None

    def module(self) -> nn.Linear:
        return _linear(self.weight, self.bias)


def _last_linear(residual: ir.Node, stream: ir.Value, what: str) -> _LastLinear:
    """Read the layer ahead of ``residual`` backwards, up to its product."""
    value = next(value for value in residual.inputs if value is not stream)
    scale, add, node = None, None, value.producer()
    if node.op_type == "Mul" and any(map(is_constant, node.inputs)):
        scale = next(constant(other) for other in node.inputs if is_constant(other)).reshape(-1)
        node = next(other for other in node.inputs if not is_constant(other)).producer()
    if node.op_type == "Add" and any(map(is_constant, node.inputs)):
        add = node
        node = next(other for other in node.inputs if not is_constant(other)).producer()
    if node is None or node.op_type != "MatMul" or not is_constant(node.inputs[1]):
        raise refuse(node, f"{what} to end in a linear layer (MatMul, Add) and a scale per channel (Mul) at most")
    weight = constant(node.inputs[1]).T
    bias = None
    if add is not None:
        bias = next(constant(other) for other in add.inputs if is_constant(other)).reshape(-1)
        bias = np.broadcast_to(bias, len(weight))
    return _LastLinear(node, add, weight, bias, scale)


def _norm2(site: BlockSite) -> ir.Node:
    return next(node for node in readers_of(site.residual1.outputs[0]) if node is not site.residual2)


def _with_bias(product: ir.Node) -> tuple[ir.Value, np.ndarray | None]:
    """The output of a product, or that of the ``Add`` of its bias, and the bias."""
    width = product.inputs[1].const_value.shape[1]
    readers = readers_of(product.outputs[0])
    if len(readers) == 1 and readers[0].op_type == "Add":
        others = [value for value in readers[0].inputs if is_constant(value)]
        if len(others) == 1 and others[0].const_value.size in (1, width):
            bias = np.broadcast_to(constant(others[0]).reshape(-1), width)
            return readers[0].outputs[0], bias
    return product.outputs[0], None


@dataclass(frozen=True)
class _Scaling:
    """What is done to queries or keys on the way to their product: a factor, a norm, a factor.

    Attributes:
        before: Ahead of the norm; 1 without one.
        norm: ``LayerNormalization`` of each head, or None.
        after: Behind it; all of it without one.
    """

    before: float
    norm: ir.Node | None
    after: float


def _scaling(value: ir.Value, what: str) -> _Scaling:
    before, norm, after = 1.0, None, 1.0
    while (node := readers_of(value)[0]).op_type != "MatMul":
        if is_norm(node, 4):
            if norm is not None:
                raise refuse(node, f"one norm of {what} at most")
            norm, before, after = node, after, 1.0
        elif node.op_type != "Transpose":
            after *= _scalar(node)
        value = node.outputs[0]
    return _Scaling(before, norm, after)


def _scalar(node: ir.Node) -> float:
    """The factor of a product with (or division by) a constant scalar."""
    number = float(next(constant(value) for value in node.inputs if is_constant(value)).reshape(()))
    return 1 / number if node.op_type == "Div" else number


def _logits_of(softmax: ir.Node) -> tuple[ir.Node, float]:
    """The product of queries and keys that ``softmax`` is of, and what it is multiplied by on the way."""
    node, factor = softmax.inputs[0].producer(), 1.0
    while node.op_type != "MatMul":
        factor *= _scalar(node)
        node = next(value for value in node.inputs if not is_constant(value)).producer()
    return node, factor


def _exactly_one(factor: float) -> float:
    """``factor``, but 1 where it is that up to the rounding of a float32 scale: weights then stay bit for bit."""
    return 1.0 if abs(factor - 1) < 1e-6 else factor


def _strip_softmax(output: ir.Value) -> tuple[ir.Value, bool]:
    node = output.producer()
    last = output.shape is not None and attribute_int(node, "axis", -1) in (-1, len(output.shape) - 1)
    if node.op_type == "Softmax" and last:
        return node.inputs[0], True
    return output, False


def _nodes_behind(end: ir.Value, start: ir.Value) -> list[ir.Node]:
    """The nodes that ``end`` is computed by, up to ``start``."""
    found: dict[ir.Node, None] = {}
    pending = [end]
    while pending:
        value = pending.pop()
        node = None if value is None or value is start else value.producer()
        if node is not None and node not in found:
            found[node] = None
            pending.extend(node.inputs)
    return list(found)


def _nodes_ahead(starts: Sequence[ir.Value], end: ir.Value) -> list[ir.Node]:
    """The nodes that ``starts`` have a part in, up to ``end``."""
    found: dict[ir.Node, None] = {}
    pending = [value for value in starts if value is not end]
    while pending:
        for node in readers_of(pending.pop()):
            if node not in found:
                found[node] = None
                pending.extend(value for value in node.outputs if value is not end)
    return list(found)


# One vector per image stays that vector through views, whatever axes of size 1 come and go.


def _is_view(node: ir.Node, value: ir.Value) -> bool:
    return node.op_type in VIEWS and node.op_type != "Split" and node.inputs[0] is value


def _past_views(value: ir.Value) -> ir.Value:
    while len(readers := readers_of(value)) == 1 and _is_view(readers[0], value):
        value = readers[0].outputs[0]
    return value


def _readers_past_views(value: ir.Value) -> list[ir.Node]:
    found: list[ir.Node] = []
    for node in readers_of(value):
        found.extend(_readers_past_views(node.outputs[0]) if _is_view(node, value) else [node])
    return found


def _before_views(value: ir.Value) -> ir.Node | None:
    """The node that makes what ``value`` is a view of."""
    node = value.producer()
    while node is not None and _is_view(node, node.inputs[0]):
        node = node.inputs[0].producer()
    return node


def _is_vector_norm(node: ir.Node, width: int) -> bool:
    if node.op_type != "LayerNormalization" or not all(is_constant(value) for value in node.inputs[1:]):
        return False
    shape = node.inputs[0].shape
    last = attribute_int(node, "axis", -1) in (-1, None if shape is None else len(shape) - 1)
    return last and node.inputs[1].const_value.size == width


def _matrix(node: ir.Node) -> tuple[np.ndarray, np.ndarray | None]:
    """(W [out, in], b) of a ``MatMul`` or ``Gemm`` with a constant matrix."""
    weight = constant(node.inputs[1])
    if node.op_type == "MatMul":
        return weight.T, None
    alpha, beta = (node.attributes[name].as_float() if name in node.attributes else 1.0 for name in ("alpha", "beta"))
    weight = weight if attribute_int(node, "transB", 0) else weight.T
    bias = constant(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else None
    bias = None if bias is None else np.broadcast_to(bias.reshape(-1) * np.float32(beta), len(weight))
    return weight * np.float32(alpha), bias


def _vector_linear(value: ir.Value) -> tuple[np.ndarray, np.ndarray | None, ir.Value] | None:
    """(W [out, in], b, output) of the linear layer that alone reads a vector, or None."""
    readers = _readers_past_views(value)
    if len(readers) != 1 or readers[0].op_type not in ("MatMul", "Gemm") or not is_constant(readers[0].inputs[1]):
        return None
    node = readers[0]
    if len(node.inputs[1].const_value.shape) != 2 or attribute_int(node, "transA", 0):
        return None
    weight, bias = _matrix(node)
    output = node.outputs[0]
    following = _readers_past_views(output)
    if bias is None and len(following) == 1 and following[0].op_type == "Add":
        others = [other for other in following[0].inputs if is_constant(other)]
        if len(others) == 1 and others[0].const_value.size in (1, len(weight)):
            bias = np.broadcast_to(constant(others[0]).reshape(-1), len(weight))
            output = following[0].outputs[0]
    return weight, bias, output


def _close(found: np.ndarray, expected: np.ndarray) -> bool:
    return float(np.abs(found - expected).max()) <= _SAME_ACTIVATION * max(1.0, float(np.abs(expected).max()))


# -- modules ----------------------------------------------------------------------------------------------------------


def _set(module: nn.Module, **values: np.ndarray | None) -> None:
    """Give ``module`` parameters with these contents; None where it has none."""
    for name, value in values.items():
        # A copy: what the file holds may be mapped read-only, and goes when the graph does.
        tensor = None if value is None else nn.Parameter(torch.from_numpy(np.array(value, np.float32, order="C")))
        setattr(module, name, tensor)


def _linear(weight: np.ndarray, bias: np.ndarray | None) -> nn.Linear:
    """From W [out, in] and b [out]."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    _set(linear, weight=weight, bias=bias)
    return linear


def _layer_norm(node: ir.Node | None, factor: float = 1.0) -> nn.Module:
    """``nn.LayerNorm`` of a node, its result times ``factor``; the identity without a node."""
    if node is None:
        return nn.Identity()
    weight = constant(node.inputs[1]).reshape(-1)
    bias = constant(node.inputs[2]).reshape(-1) if len(node.inputs) > 2 and node.inputs[2] is not None else None
    epsilon = node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else 1e-5
    norm = nn.LayerNorm(len(weight), eps=epsilon, bias=bias is not None, device="meta")
    factor = np.float32(factor)
    _set(norm, weight=weight * factor, bias=None if bias is None else bias * factor)
    return norm


def _layer_scale(scale: np.ndarray | None, width: int) -> nn.Module:
    if scale is None:
        return nn.Identity()
    module = LayerScale(width, device="meta")
    _set(module, gamma=np.broadcast_to(scale, width))
    return module


# -- writing tuned weights back ---------------------------------------------------------------------------------------


def _put_weights(model: ir.Model, site: VitSite, module: nn.Module) -> bool:
    """Give the graph what tuning refits, as ``module`` has it; returns whether any was another."""
    changed = False
    for block, trained in zip(site.blocks, module.blocks, strict=True):
        qkv, (proj, fc2) = (
            block.qkv,
            (
                _last_linear(residual, stream, f"{name} of block {block.index}")
                for name, residual, stream in (
                    ("proj", block.residual1, block.stream),
                    ("fc2", block.residual2, block.residual1.outputs[0]),
                )
            ),
        )
        bias = None if qkv.bias is None else constant(qkv.bias).reshape(-1)
        for name, last, linear in (
            ("qkv", _LastLinear(qkv.matmul, qkv.add, constant(qkv.weight).T, bias, None), trained.attn.qkv),
            ("proj", proj, trained.attn.proj),
            ("fc2", fc2, trained.mlp.fc2),
        ):
            weight = linear.weight.detach().cpu().numpy()
            bias = None if linear.bias is None else linear.bias.detach().cpu().numpy()
            if np.array_equal(weight, last.weight) and (bias is None or np.array_equal(bias, last.bias)):
                continue
            changed = True
            label = f"vpruner.tuned.{block.index}.{name}"
            new = add_constant(model.graph, f"{label}.weight", np.ascontiguousarray(weight.T))
            last.matmul.replace_input_with(1, new)
            if last.add is not None:
                position = next(index for index, value in enumerate(last.add.inputs) if is_constant(value))
                last.add.replace_input_with(position, add_constant(model.graph, f"{label}.bias", bias.copy()))
    passes.RemoveUnusedNodesPass()(model)
    return changed
