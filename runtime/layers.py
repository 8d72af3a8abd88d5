"""Where the time goes: times of single layers, folded back onto the blocks of the Vision Transformer.

A runtime fuses, splits and renames what the ONNX file holds, so its layers are not the model's. What ties them together
are the names of ONNX nodes: TensorRT repeats them in the name of a layer or in the layer's ``Metadata``, onnxruntime in
the name of an event. Which block a node belongs to is read from the graph itself where the file is there
(:meth:`BlockMap.from_onnx`), because exporters number nodes as they please; else from the numbers in their names
(``/blocks.3/attn/qkv/MatMul``).

A layer that covers nodes of two neighbouring blocks (the residual sum of one fused into the norm of the next) is shared
out by how many nodes of each it covers. One that covers more is *several*: nobody can say what belongs where, and a
guess would look like a measurement. What names no node takes the place of its neighbours where both agree, and is
*other* where they do not.
"""

from __future__ import annotations

import re
import statistics
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any

from ..core import json_file
from ..core.errors import UserError
from ..core.metadata import ModelMetadata
from ..core.plan import KINDS
from ..core.progress import words
from ..core.text import command
from .onnx_file import GraphNode, read_nodes, read_onnx

#: A block by its number, or what is not a block.
Place = int | str
STEM, HEAD, SEVERAL, OTHER = "stem", "head", "several", "other"
#: A layer over more blocks than this is shared out to none of them.
MOST_BLOCKS = 2

# -- which block a node is of -----------------------------------------------------------------------------------------

_MIXING = ("Softmax", "Attention", "MultiHeadAttention", "PackedMultiHeadAttention", "GroupQueryAttention")
_PRODUCTS = ("MatMul", "Gemm", "FusedMatMul", "FusedGemm", "QLinearMatMul", "MatMulInteger", "QGemm", "Einsum", "Conv",
             "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "MatMulNBits", "Attention", "QAttention")  # fmt: skip
#: Of what these give, sizes are computed and no features: the batch of an open graph reaches into every block.
_SIZES = ("Shape", "Size")
#: ``/blocks.3/attn``, ``vpruner.block.7.q``, ``/vit/encoder/layer.3/``, ``encoder_layer_3``, ``/resblocks.11/``.
_NUMBERED = re.compile(r"(?:^|[/._])(?:res|encoder_)?(?:blocks?|layers?|h)[./_](\d+)(?=[/._]|$)")
_STEM_WORDS = re.compile(
    r"patch_embed|pos_embed|embeddings?\b|conv_proj|cls_token|norm_pre|pre_?layrnorm", re.IGNORECASE
)
_HEAD_WORDS = re.compile(r"(?:^|[/._])(?:head|fc_norm|classifier|pooler|post_?layernorm|attn_pool)", re.IGNORECASE)


@dataclass(frozen=True)
class BlockMap:
    """Which block the nodes of a graph belong to.

    Attributes:
        places: Node name -> block number, ``"stem"`` or ``"head"``.
        order: Names in the order of the graph; empty where it is not known.
        depth: Number of blocks; 0 where nothing says it.
    """

    places: Mapping[str, Place] = field(default_factory=dict)
    order: tuple[str, ...] = ()
    depth: int = 0

    @classmethod
    def from_onnx(cls, path: str | PathLike, depth: int | None = None) -> BlockMap:
        """Read it off the structure of a graph, whatever its nodes are called.

        All of a pre-norm transformer passes through its residual stream, so the values of the stream are those through
        which *every* path from input to output leads. Between two of them lies an attention (it holds a softmax and
        products with weights), an MLP (products alone), or a single node. A block is an attention and the MLP behind
        it. An attention that pools has no residual around it and is not taken for one.

        Args:
            path: ONNX file.
            depth: Number of blocks, where that is known; more than so many are the head's.

        Returns:
            A map without places where the graph is none of that kind: names alone tell then.

        Raises:
            UserError: No ONNX file.
        """
        nodes = _live_nodes(read_nodes(path), {one.name for one in read_onnx(path).inputs})
        places = _places(nodes, depth)
        found = 1 + max((place for place in places if isinstance(place, int)), default=-1)
        names = [node.name for node, _ in nodes]
        return cls(
            {name: place for name, place in zip(names, places, strict=True) if name} if found else {},
            tuple(names),
            found,
        )

    def place(self, name: str) -> Place | None:
        """Of one node; None where neither the graph nor its name tells."""
        for known in (name, name.partition("/")[0] if not name.startswith("/") else name):
            # onnxruntime adds what it did: "node_MatMul_11/MatMulAddFusion".
            if known in self.places:
                return self.places[known]
        if found := _NUMBERED.search(name):
            number = int(found[1])
            if not self.depth or number < self.depth:
                return number
        if _STEM_WORDS.search(name):
            return STEM
        return HEAD if _HEAD_WORDS.search(name) else None

    def between(self, first: str, last: str) -> list[str]:
        """Names of the nodes from ``first`` to ``last`` in the order of the graph; these two where that is unknown."""
        if first in self.places and last in self.places:
            start, end = sorted((self.order.index(first), self.order.index(last)))
            return [name for name in self.order[start : end + 1] if name]
        return [first, last]


def _live_nodes(nodes: Sequence[GraphNode], inputs: set[str]) -> list[tuple[GraphNode, tuple[str, ...]]]:
    """The nodes on a way from an input to an output, each with those of its inputs that depend on the image."""
    alive, forward = set(inputs), []
    for node in nodes:
        live = tuple(name for name in node.inputs if name in alive)
        if live and node.operator not in _SIZES:
            alive.update(name for name in node.outputs if name)
            forward.append((node, live))
    read = {name for _, live in forward for name in live}
    # Outputs of the graph are what nobody reads; of a node that nobody reads only the last one is its output.
    needed: set[str] = set()
    kept = []
    for number, (node, live) in enumerate(reversed(forward)):
        if number == 0 or any(name in needed for name in node.outputs) or not any(n in read for n in node.outputs):
            needed.update(live)
            kept.append((node, live))
    return kept[::-1]


def _places(nodes: Sequence[tuple[GraphNode, tuple[str, ...]]], depth: int | None) -> list[Place]:
    """Place of each node; no numbers where no blocks are found."""
    maker = {name: index for index, (node, _) in enumerate(nodes) for name in node.outputs}
    reach = list(range(len(nodes)))
    start_reach = 0
    for index, (_, live) in enumerate(nodes):
        for name in live:
            if name in maker:
                reach[maker[name]] = max(reach[maker[name]], index)
            else:
                start_reach = max(start_reach, index)
    # A node that no edge jumps over is on every way: what it gives is all that is left of the image.
    segments, first, furthest = [], 0, start_reach
    for index in range(len(nodes)):
        if furthest <= index:
            segments.append(range(first, index + 1))
            first = index + 1
        furthest = max(furthest, reach[index])

    def has_residual(segment: range) -> bool:
        """Whether the image passes by the products too, as it does around an attention but not through a pooling."""
        past = set(nodes[segment.start - 1][0].outputs) if segment.start else set()
        for index in segment:
            node, live = nodes[index]
            if past.intersection(live) and node.operator not in (*_PRODUCTS, *_MIXING):
                if index == segment.stop - 1:
                    return len(live) > 1
                past.update(node.outputs)
        return False

    def kind(segment: range) -> str:
        if len(segment) < 2:
            return "."
        inside = [nodes[index] for index in segment]
        # With weights: of the first two operands one is a constant. Scales of a quantized product may not be.
        weighted = (node.operator in _PRODUCTS and not {*node.inputs[:2]} <= {*live} for node, live in inside)
        if not any(weighted) or not has_residual(segment):
            return "-"
        return "A" if any(node.operator in _MIXING for node, _ in inside) else "M"

    kinds = "".join(map(kind, segments))
    # Single nodes (gathers, casts) may lie between the two halves, and belong to the block that they lead into.
    blocks = [match.span() for match in re.finditer(r"A(?:\.*M)?", kinds)][:depth]
    places: list[Place] = []
    for number, segment in enumerate(segments):
        after = next((index for index, (_, end) in enumerate(blocks) if number < end), None)
        before_first = bool(blocks) and number < blocks[0][0]
        place: Place = STEM if before_first or not blocks else HEAD if after is None else after
        places += [place] * len(segment)
    return places


# -- layers -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """A layer of an engine, or an event of onnxruntime.

    Attributes:
        name: As the runtime calls it.
        nodes: Names of the ONNX nodes that it says it computes; empty where its name must tell.
        kind: Its type, where known.
    """

    name: str
    nodes: tuple[str, ...] = ()
    kind: str = ""


@dataclass(frozen=True)
class LayerInformation:
    """What an engine says about itself.

    Attributes:
        layers: In the order of execution.
        tensors: Names of its inputs and outputs.
        detailed: Whether it was built with detailed layers; without, layers are names alone.
    """

    layers: tuple[Layer, ...]
    tensors: tuple[str, ...] = ()
    detailed: bool = False


def parse_layer_information(text: str, source: str = "layer information") -> LayerInformation:
    """Read what ``IEngineInspector`` and ``trtexec --exportLayerInfo`` give, of any release.

    ``{"Layers": [...], "Bindings": ["image", ...]}`` up to TensorRT 10; from 11 on ``"I/O Tensors"`` with an object for
    each tensor. A layer is an object, or only its name where the engine was not built with detailed layers.

    Raises:
        UserError: It is something else.
    """
    content = parse_json(text, source)
    if isinstance(content, list) and len(content) == 1:
        content = content[0]
    if not isinstance(content, Mapping) or not isinstance(content.get("Layers"), list):
        raise UserError(
            f"{source} holds no layers", "expected what trtexec --exportLayerInfo=FILE wrote (a JSON object, Layers)"
        )
    layers, detailed = [], False
    for item in content["Layers"]:
        if isinstance(item, str):
            layers.append(Layer(item))
        elif isinstance(item, Mapping) and isinstance(item.get("Name"), str):
            detailed = True
            nodes = tuple(re.findall(r"\[ONNX Layer: ([^\]]+)\]", str(item.get("Metadata") or "")))
            layers.append(Layer(item["Name"], tuple(dict.fromkeys(nodes)), str(item.get("LayerType") or "")))
        else:
            raise UserError(f"{source} holds the layer {item!r:.60}, expected a name or an object with Name")
    tensors = content.get("I/O Tensors", content.get("Bindings")) or []
    names = [item.get("Name", item.get("name", "")) if isinstance(item, Mapping) else str(item) for item in tensors]
    return LayerInformation(tuple(layers), tuple(filter(None, names)), detailed)


def parse_layer_times(text: str, source: str = "layer times") -> list[tuple[str, float]]:
    """Read what ``trtexec --exportProfile`` writes: [(layer, average ms of a run)], in the order of execution.

    The file is a list: ``{"count": runs}``, then ``{"name", "timeMs", "averageMs", "percentage"}`` for each layer, with
    ``"medianMs"`` from TensorRT 8.5 on.

    Raises:
        UserError: It is something else.
    """
    content = parse_json(text, source)
    if not isinstance(content, list) or not all(isinstance(item, Mapping) for item in content):
        raise UserError(f"{source} is no list of layers", "expected what trtexec --exportProfile=FILE wrote")
    count = next((item["count"] for item in content if "name" not in item and "count" in item), None)
    times = []
    for item in content:
        if "name" not in item:
            continue
        value = item.get("averageMs")
        if value is None and isinstance(item.get("timeMs"), (int, float)) and count:
            value = item["timeMs"] / count
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e9:
            raise UserError(
                f"{source} gives no time for layer {item['name']!r:.80}", "expected averageMs in each layer"
            )
        times.append((str(item["name"]), float(value)))
    if not times:
        raise UserError(f"{source} holds no layer", "expected what trtexec --exportProfile=FILE wrote")
    return times


def parse_ort_profile(text: str, skip: int = 0, source: str = "onnxruntime's profile") -> list[tuple[str, float]]:
    """Read what onnxruntime's profiling writes: [(node, ms of a run)], in the order of execution.

    The ms are the median over the runs: single runs are disturbed by whatever else the processor does.

    Args:
        skip: Runs at the beginning that do not count.

    Raises:
        UserError: It is something else, or holds no run.
    """
    content = parse_json(text, source)
    events = [item for item in content if isinstance(item, Mapping)] if isinstance(content, list) else []
    events = sorted((one for one in events if {"name", "ts", "dur"} <= one.keys()), key=lambda one: one["ts"])
    starts = [one["ts"] for one in events if one["name"] == "model_run"]
    if len(starts) <= skip:
        raise UserError(f"{source} holds {len(starts)} runs, expected more than {skip}")
    times: dict[str, list[float]] = {}
    for one in events:
        run = bisect_right(starts, one["ts"]) - 1 - skip
        name = str(one["name"])
        if run >= 0 and one.get("cat") == "Node" and name.endswith("_kernel_time"):
            runs = times.setdefault(name.removesuffix("_kernel_time"), [0.0] * (len(starts) - skip))
            runs[run] += one["dur"] / 1e3
    return [(name, statistics.median(runs)) for name, runs in times.items()]


def parse_json(text: str, source: str) -> Any:
    """What a tool of NVIDIA's wrote.

    Raises:
        UserError: It is no JSON.
    """
    # TensorRT separates the nodes of a layer with control characters and does not escape them.
    return json_file.parse_json(
        text, source, "export it again; an interrupted trtexec leaves half a file", strict=False
    )


# -- folding ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BlockTimes:
    """Milliseconds of one run by block.

    Attributes:
        blocks: ms of each block.
        stem_ms, head_ms: Before and after them.
        several_ms: Layers that cover more than two blocks.
        other_ms: Layers that name no node, between different places: copies and reformatting, mostly.
        layers: How many layers there were.
        several: Names of the layers over several blocks.
    """

    blocks: tuple[float, ...]
    stem_ms: float = 0.0
    head_ms: float = 0.0
    several_ms: float = 0.0
    other_ms: float = 0.0
    layers: int = 0
    several: tuple[str, ...] = ()

    @property
    def total_ms(self) -> float:
        return sum(self.blocks) + self.stem_ms + self.head_ms + self.several_ms + self.other_ms

    def scaled(self, total_ms: float) -> BlockTimes:
        """The same shares of another total; as they are where nothing took any time."""
        if self.total_ms == 0:
            return self
        factor = total_ms / self.total_ms
        return replace(
            self,
            blocks=tuple(factor * ms for ms in self.blocks),
            stem_ms=factor * self.stem_ms,
            head_ms=factor * self.head_ms,
            several_ms=factor * self.several_ms,
            other_ms=factor * self.other_ms,
        )

    @property
    def explained(self) -> float:
        """Share of the time that has a place, 0 to 1."""
        total = self.total_ms
        return 1.0 if total == 0 else 1 - (self.several_ms + self.other_ms) / total

    def remarks(self) -> list[str]:
        """What a reader of the table must know."""
        total = self.total_ms
        if total and self.several_ms > 0.05 * total:
            return [
                f"{100 * self.several_ms / total:.0f} % of the time is in layers over several blocks, which TensorRT "
                "fused and does not tell apart: build the engine with detailed layers (the default of "
                f"{words(command('build'))}; trtexec --profilingVerbosity=detailed)"
            ]
        if total and self.other_ms > 0.1 * total:
            return [f"{100 * self.other_ms / total:.0f} % of the time is in layers that name no node of the graph"]
        return []


def fold_layers(
    times: Iterable[tuple[str, float]], blocks: BlockMap, information: LayerInformation | None = None
) -> BlockTimes:
    """Sum the times of layers by block.

    Args:
        times: (layer, ms) in the order of execution.
        blocks: Where the nodes belong.
        information: Of the engine, where its layers name their nodes.
    """
    nodes = {layer.name: layer.nodes for layer in information.layers} if information else {}
    timed = list(times)
    shares = [_shares(name, nodes.get(name, ()), blocks) for name, _ in timed]
    _fill_gaps(shares)
    totals: Counter[Place] = Counter()
    several = []
    for (name, ms), share in zip(timed, shares, strict=True):
        if sum(isinstance(place, int) for place in share) > MOST_BLOCKS:
            totals[SEVERAL] += ms
            several.append(name)
            continue
        count = sum(share.values())
        for place, weight in share.items():
            totals[place] += ms * weight / count
        if not share:
            totals[OTHER] += ms
    depth = max(blocks.depth, 1 + max((place for place in totals if isinstance(place, int)), default=-1))
    return BlockTimes(
        tuple(totals[block] for block in range(depth)),
        *(totals[place] for place in (STEM, HEAD, SEVERAL, OTHER)),
        layers=len(timed),
        several=tuple(several),
    )


_RANGE = re.compile(r"ForeignNode\[(.+?)\.\.\.(.+?)\]")
#: What joins the names of fused layers, and what is written around them.
_JOINTS = re.compile(r"\s*\+\s*|\|\||,\s*|[(){}\[\]\x1e\x1f]|\s+")


def _shares(name: str, nodes: Sequence[str], blocks: BlockMap) -> Counter[Place]:
    """How many nodes of each place a layer covers."""
    if not nodes:
        rest, listed = name, []
        for found in _RANGE.finditer(name):
            listed += blocks.between(found[1], found[2])
            rest = rest.replace(found[0], " ")
        nodes = [*listed, *_JOINTS.split(rest)]
        places = [blocks.place(node) for node in nodes if node]
        ends = [place for place in places if isinstance(place, int)]
        if listed and ends and len(set(ends)) > 1 and not blocks.order:
            # Only the ends of a range are known; what lies between belongs to it.
            places += list(range(min(ends), max(ends) + 1))
    else:
        places = [blocks.place(node) for node in nodes]
    return Counter(place for place in places if place is not None)


def _fill_gaps(shares: list[Counter[Place]]) -> None:
    """Layers without a place take that of the layers around them where both are of the same one."""
    # What runs before all else prepares the image, what runs last gives the outputs.
    ends: list[tuple[int, Place]] = [(-1, STEM)]
    ends += [(index, share.most_common(1)[0][0]) for index, share in enumerate(shares) if share]
    ends.append((len(shares), HEAD))
    if len(ends) == 2:
        return
    for (left, before), (right, after) in zip(ends, ends[1:], strict=False):
        if before == after:
            for index in range(left + 1, right):
                shares[index] = Counter([before])


# -- rows -------------------------------------------------------------------------------------------------------------


def block_map(onnx: str | PathLike | None, metadata: ModelMetadata) -> BlockMap:
    """From the ONNX file where it is there, else for names alone."""
    depth = metadata.geometry.depth if metadata.geometry else None
    if onnx is not None and Path(onnx).is_file():
        return BlockMap.from_onnx(onnx, depth)
    return BlockMap(depth=depth or 0)


def blocks_row(times: BlockTimes, metadata: ModelMetadata, source: str, **about: Any) -> dict[str, Any]:
    """A row of kind ``"blocks"`` for a ``results.jsonl``.

    Args:
        source: Who measured the layers.
        about: What else to say: label, runtime, precision, batch.
    """
    tokens = metadata.token_counts
    lines = []
    for block, ms in enumerate(times.blocks):
        counts = {}
        if tokens and block < len(tokens[0]):
            counts = {kind: of_block[block] for kind, of_block in zip(KINDS, tokens, strict=True)}
        lines.append({"block": block, "ms": ms, **counts})
    return {
        "schema": 1,
        "kind": "blocks",
        **about,
        "model": metadata.model,
        "plan": metadata.plan,
        "source": source,
        "blocks": lines,
        "stem_ms": times.stem_ms,
        "head_ms": times.head_ms,
        "several_ms": times.several_ms,
        "other_ms": times.other_ms,
        "total_ms": times.total_ms,
        "layers": times.layers,
        "remarks": times.remarks(),
    }
