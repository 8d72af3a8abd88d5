"""The residual stream of a graph, and what its branches do, from where the tokens are alone.

The stream is the longest chain of ``Add`` of which one input is the stream as it was and the other depends on it: the
branch. A branch that sums over tokens is attention, one that does not is an MLP, whatever is in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir

from ...core.errors import GraphError
from ..nodes import called
from .apart import add_apart
from .followed import Block, Branch, Followed
from .known import Known, above, used_by
from .layout import ENDED, Lost, is_split
from .prepare import prepare
from .rules import RULES, Flow, Tokens, grid_of, start

#: What the stream may pass between two blocks: each token by itself, or other tokens put beside it or left out.
_CARRIERS = frozenset(
    ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Cast", "Identity", "Dropout", "Slice", "Concat", "Add",
     "Mul", "Sub", "Div", "LayerNormalization", "RMSNormalization", "BatchNormalization", "Expand", "Split", "Gather",
     "Pad")
)  # fmt: skip
#: What may lie between a softmax and the sum over keys: a weight of 0 stays 0.
_KEEP_ZEROS = frozenset(
    ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Cast", "Identity", "Dropout", "Slice", "Concat",
     "Split", "Gather", "Mul", "Div", "Neg", "MatMul", "Einsum", "Expand", "Tile", "ReduceSum", "ReduceMean", "IsNaN")
)  # fmt: skip


def follow(model: ir.Model, *, joined: bool = False) -> Followed:
    """Follow the tokens of a Vision Transformer from where they begin to where they end; ``model`` stays as it is.

    Args:
        joined: Whether the stream may also pass a ``Concat`` of tokens that a block updates and tokens that it leaves,
            as in a graph with a plan in it.

    Raises:
        GraphError: No tokens begin in the graph, no block adds to them, or the image size is open.
    """
    given, skip = model, set()
    model, known = prepare(given)
    for starts in (("Conv",), ("MatMul", "Gemm")):
        for _ in range(4):
            tokens, flows, lost = follow_tokens(model, known, frozenset(starts), joined)
            sizes = {
                size for layout in tokens.layouts.values() for ids in layout.ids for size in (*ids.shape, ids.size)
            }
            clash = {prime for prime in known.open_dims if any(size and size % prime == 0 for size in sizes)}
            if not clash:
                break
            skip |= clash
            model, known = prepare(given, skip)
        chain = _longest_chain(model.graph, tokens)
        if chain:
            followed = _described(model, tokens, flows, lost, chain)
            if add_apart(followed):
                tokens, flows, lost = follow_tokens(model, known, frozenset(starts), joined)
                followed = _described(model, tokens, flows, lost, _longest_chain(model.graph, tokens))
            return followed
    raise GraphError(
        "no tokens were found that blocks add to, expected a Vision Transformer",
        next((f"the tokens are lost at {called(node)}: {reason}" for node, reason in lost.items()), ""),
    )


def follow_tokens(
    model: ir.Model, known: Known, starts: frozenset[str], joined: bool = False
) -> tuple[Tokens, dict[ir.Node, Flow], dict[ir.Node, str]]:
    """Where the tokens of all values are, what the nodes do to them, and behind which nodes they are lost."""
    tokens, flows, lost = Tokens(known, starts, joined=joined), {}, {}
    # Ids of patches come first; those of other tokens follow the largest grid that may begin.
    sizes = [np.prod(grid) for node in model.graph if (grid := grid_of(node, tokens)) is not None]
    tokens.count = int(max(sizes, default=0))
    for node in model.graph:
        follow_node(node, tokens, flows, lost)
    return tokens, flows, lost


def follow_node(node: ir.Node, tokens: Tokens, flows: dict[ir.Node, Flow], lost: dict[ir.Node, str]) -> None:
    """Say where the tokens of the outputs of ``node`` are, in place."""
    used = used_by(node)
    carrying = [value for value in used if value in tokens.layouts]
    flow = start(node, tokens)
    try:
        if flow is None and carrying and node.op_type not in ("Shape", "Size"):
            if node.op_type not in RULES or len(used) > sum(value is not None for value in node.inputs):
                raise Lost(f"what {node.op_type} does to tokens is not known")
            flow = RULES[node.op_type](node, tokens)
    except Lost as error:
        lost[node] = str(error)
    if flow is not None:
        flows[node] = flow
        for value, layout in zip(node.outputs, flow.outputs, strict=False):
            if layout is not None:
                tokens.layouts[value] = layout
    from_image = sum(value in tokens.known.from_inputs for value in used)
    mixes = from_image > 1 if node.op_type in ("MatMul", "Einsum", "Attention") else node.op_type == "Softmax"
    if (mixes and from_image) or any(value in tokens.mixed for value in used):
        tokens.mixed.update(node.outputs)


# -- the stream -------------------------------------------------------------------------------------------------------


#: Add -> the longest chain that ends there, and the bit of what it begins with.
_Chains = dict[ir.Node, tuple[tuple[tuple[ir.Node, int], ...], int]]


def _carried(value: ir.Value, tokens: Tokens, chains: _Chains) -> ir.Value:
    """The value that ``value`` is but for what the stream may pass between two blocks."""
    while True:
        node = value.producer()
        if node is None or node in chains or node.op_type not in _CARRIERS:
            return value
        carrying = [one for one in node.inputs if one is not None and one in tokens.layouts]
        if tokens.joined and node.op_type == "Concat" and len(carrying) > 1:
            pieces = [_carried(one, tokens, chains) for one in carrying]
            return max(pieces, key=lambda piece: len(chains.get(piece.producer(), ((), 0))[0]))
        if len(carrying) != 1 or any(
            one in tokens.mixed for one in node.inputs if one is not None and one not in carrying
        ):
            return value
        value = carrying[0]


def _longest_chain(graph: ir.Graph, tokens: Tokens) -> tuple[tuple[ir.Node, int], ...]:
    """(Add, which of its inputs is the branch) of the residual stream, in order."""
    bits = {node: 1 << place for place, node in enumerate(graph)}
    reached: dict[ir.Value, int] = {}  # bits of the nodes that a value is computed by
    chains: _Chains = {}
    for node in graph:
        found = bits[node]
        for value in used_by(node):
            found |= reached.get(value, 0)
        reached.update(dict.fromkeys(node.outputs, found))
        layout = tokens.layouts.get(node.outputs[0])
        if node.op_type != "Add" or layout is None:
            continue
        for stream, branch in ((0, 1), (1, 0)):
            value, update = node.inputs[stream], node.inputs[branch]
            if value not in tokens.layouts or not tokens.layouts[value].same_as(layout):
                continue
            source = _carried(value, tokens, chains).producer()
            before, root = chains.get(source, ((), bits.get(source, 0)))
            longest, _ = chains.get(node, ((), 0))
            if update is not value and reached.get(update, 0) & root and len(before) >= len(longest):
                chains[node] = (*before, (node, branch)), root
    return max((chain for chain, _ in chains.values()), key=len, default=())


def _described(model, tokens: Tokens, flows, lost, chain: Sequence[tuple[ir.Node, int]]) -> Followed:
    first, branch = chain[0]
    stream = first.inputs[1 - branch]
    root = stream
    while (node := root.producer()) is not None and node not in tokens.grids:
        root = next(value for value in node.inputs if value is not None and value in tokens.layouts)
    stem = root.producer()
    image = next((value for value in above(root) if value in model.graph.inputs), None)
    for value, axis in tokens.known.open_dims.values():
        if value is image and axis > 0:
            raise GraphError(f"input {value.name!r} leaves axis {axis} open, expected a fixed size",
                             "fix it with onnxruntime.tools.make_dynamic_shape_fixed")  # fmt: skip
    stops = {add.outputs[0] for add, _ in chain} | {stream}
    branches = [_branch(add, position, stops, tokens, flows, lost) for add, position in chain]
    inside = {node for branch in branches for node in branch.nodes}
    readers = [
        node for node in model.graph
        if node not in inside and any(value in tokens.layouts for value in used_by(node))
        and (node in lost or flows[node].ends or (flows[node].is_end and flows[node].how != "start"))
    ]  # fmt: skip
    # What a convolution adds to the patches ahead of the first attention belongs to the stem.
    mixing = (index for index, one in enumerate(branches)
              if one.mixers or one.add.inputs[one.update] in tokens.mixed)  # fmt: skip
    ahead = [index for index, one in enumerate(branches[: next(mixing, 0)]) if one.reason]
    branches = branches[max(ahead, default=-1) + 1 :]
    return Followed(
        model, tokens, flows, lost, stem, tokens.grids[stem], stream, tuple(_blocks(branches)), tuple(readers)
    )


def _branch(add: ir.Node, update: int, stops: set[ir.Value], tokens: Tokens, flows, lost) -> Branch:
    value, layouts = add.inputs[update], tokens.layouts
    made = [one for one in above(value, stops) if one not in stops and one.producer() is not None]
    nodes = {one.producer() for one in made if one in layouts or one in tokens.mixed
             or not layouts.keys().isdisjoint(used_by(one.producer()))}  # fmt: skip
    inside = [node for node in add.graph if node in nodes]
    mixers = tuple(node for node in inside if node in flows and flows[node].is_end)
    unknown = [f"{lost.get(node, 'one token is picked')} at {called(node)}" for node in inside
               if node in lost or (node in mixers and flows[node].how == "pick")]  # fmt: skip
    # An update of a token needs that token alone of what carries tokens up to it, whatever else the branch reads.
    reason, keyed, keys_reason = None, (), next(iter(unknown), None)
    ids, added = layouts[add.outputs[0]].ids, layouts.get(value)
    if added is None or len(added.ids) != len(ids) or not all(map(np.array_equal, added.ids, ids)):
        reason = keys_reason = keys_reason or f"what {called(add)} adds carries no tokens"
    elif len(ids) > 1 or is_split(layouts[add.outputs[0]]):
        reason = keys_reason = keys_reason or f"windows: the token axis is split at {called(add)}"
    elif mixers and keys_reason is None:
        keyed, keys_reason = _keyed(inside, mixers, flows)
    return Branch(add, update, frozenset(nodes), mixers, keyed, reason, keys_reason)


def _keyed(inside: list[ir.Node], mixers: tuple[ir.Node, ...], flows) -> tuple[tuple[ir.Node, ...], str | None]:
    """The softmaxes through which all sums over tokens of a branch go, or why keys cannot be masked.

    A key is left out by leaving it out of a softmax, so every sum over tokens must have one ahead of it, and what the
    softmax gives must end in such sums only.
    """
    weights = Weights(inside, flows)
    sums = [node for node in mixers if node.op_type != "Attention"]
    for node in sums:
        if ENDED in sum(flows[node].links, ()):
            return (), f"tokens are mixed by fixed weights at {called(node)}"
        if node not in weights.sums:
            return (), f"tokens are summed without a softmax at {called(node)}"
    for node in weights.softmaxes:
        if node in weights.apart:
            return (), f"attention weights are used apart from the values, behind {called(node)}"
    return (*weights.softmaxes, *(node for node in mixers if node not in sums)), None


class Weights:
    """Where the weights of tokens go that softmaxes give.

    Args:
        inside: Nodes, in order, through which they are followed.

    Attributes:
        softmaxes: Those over tokens.
        sums: Nodes that sum over tokens which one of them weighs.
        apart: Softmaxes whose weights are read by anything but such sums, and by what keeps a weight of 0.
    """

    def __init__(self, inside: list[ir.Node], flows: dict[ir.Node, Flow]):
        self.flows = {node: flows[node] for node in inside if node in flows}
        self.softmaxes = [node for node, flow in self.flows.items() if flow.normalises is not None]
        self.sums: set[ir.Node] = set()
        self.made_by: dict[tuple[ir.Value, int], set[ir.Node]] = {}  # group of a value -> softmaxes that weigh it
        for node, flow in self.flows.items():
            own: dict[int, set[ir.Node]] = {}
            for value, links in zip(node.inputs, flow.links, strict=True):
                for group, link in enumerate(links):
                    own[link] = own.get(link, set()) | self.made_by.get((value, group), set())
            if flow.normalises is not None:
                own[flow.normalises] = {node}
            if any(softmaxes for link, softmaxes in own.items() if link >= flow.groups):
                self.sums.add(node)
            self.made_by |= {
                (value, group): own.get(group, set()) for value in node.outputs for group in range(flow.groups)
            }
        apart = (made for (value, group), made in self.made_by.items() if made and not self._only_weighs(value, group))
        self.apart = set().union(*apart)

    def _only_weighs(self, value: ir.Value, group: int) -> bool:
        """Whether what reads ``value`` sums over ``group``, or gives a token of the weight 0 the weight 0."""
        for node, position in value.uses():
            flow = self.flows.get(node)
            link = ENDED if flow is None else flow.links[position][group]
            if link == ENDED or flow.how in ("pick", "join") or link == flow.normalises:
                return False
            if link < flow.groups and not self._keeps_zeros(node, position, link):
                return False
        return not value.is_graph_output()

    def _keeps_zeros(self, node: ir.Node, position: int, group: int) -> bool:
        if node.op_type in ("Add", "Sub", "Where"):
            # Exporters put 0 in the place of what is no number (Where of IsNaN).
            summands = list(zip(node.inputs, self.flows[node].links, strict=True))[node.op_type == "Where" :]
            return all(
                (group in links and self.made_by.get((value, links.index(group))))
                or (node.op_type == "Where" and value.const_value is not None and not value.const_value.numpy().any())
                for value, links in summands
            )
        return node.op_type in _KEEP_ZEROS and (node.op_type != "Div" or position == 0)


def _blocks(branches: list[Branch]) -> Iterator[Block]:
    """An MLP belongs to the attention before it; branches of one kind are in one block if none reads the other."""
    blocks: list[tuple[list[Branch], list[Branch]]] = []
    for branch in branches:
        kind = 0 if branch.is_attention else 1
        alike = blocks[-1][kind] if blocks else []
        if not blocks or (kind == 0 and blocks[-1][1]) or (alike and not _parallel(alike[-1], branch)):
            blocks.append(([], []))
        blocks[-1][kind].append(branch)
    for index, (attention, mlp) in enumerate(blocks):
        yield Block(index, tuple(attention), tuple(mlp))


def _parallel(before: Branch, branch: Branch) -> bool:
    """Whether ``branch`` does not read what ``before`` adds."""
    return not any(before.add.outputs[0] in used_by(node) for node in branch.nodes)
