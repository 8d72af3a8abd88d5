"""A token plan as the steps of a forward pass: which rows of the stream each block reads, updates and passes on.

Everything that really removes work goes by this one schedule: the gathered PyTorch module, the refit of weights, and
folding into an ONNX graph. Tokens are put in an order in which, as far as the plan allows, what a block updates comes
first; then a slice takes the place of a gather.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .plan import TokenPlan


@dataclass(frozen=True)
class BlockStep:
    """One block. Rows are int64 and ascending.

    Attributes:
        keys: [key] rows of the stream that enters: what the block reads.
        queries: [query] rows of it that attend.
        passed: [...] rows of it that do not attend, and are needed later. The stream behind the attention holds the
            queries, then these.
        mlps: [mlp] rows of the stream behind the attention that pass the MLP.
        mlp_passed: [...] rows of it that do not, and are needed later. The stream that leaves the block holds the
            former, then these.
        gates: float64 [key] in the order of ``keys``, 1 for prefix tokens; None where all are 1.
        entering: [token] positions in the unpruned sequence (prefix + patches) of the stream that enters.
        query_positions, mlp_positions: The same, of ``queries`` and ``mlps``.
    """

    keys: np.ndarray
    queries: np.ndarray
    passed: np.ndarray
    mlps: np.ndarray
    mlp_passed: np.ndarray
    gates: np.ndarray | None
    entering: np.ndarray
    query_positions: np.ndarray
    mlp_positions: np.ndarray


@dataclass(frozen=True)
class Schedule:
    """What :func:`schedule` makes of a plan.

    Attributes:
        entry: int64 [token]: positions in the unpruned sequence of the tokens that enter block 0, in their order.
        steps: One for each block.
        leaving: int64 [token]: positions of the tokens that leave the last block: what the head reads.
    """

    entry: np.ndarray
    steps: tuple[BlockStep, ...]
    leaving: np.ndarray

    def keeps_order(self, tokens: int) -> bool:
        """Whether all ``tokens`` enter block 0, in the model's own order."""
        return len(self.entry) == tokens and is_range(self.entry)


def schedule(plan: TokenPlan, *, ordered: bool = True) -> Schedule:
    """The steps of ``plan``.

    Args:
        ordered: Put the patches that are updated longest first, which makes slices of gathers. False: they enter in
            the order of the grid.
    """
    prefix, depth = plan.geometry.prefix_tokens, plan.geometry.depth
    carried = [{*range(prefix), *(prefix + np.asarray(patches, np.int64)).tolist()} for patches in plan.carried]
    carried[depth] = {*range(plan.geometry.head_prefix), *(carried[depth] - set(range(prefix)))}
    patches = np.asarray(plan.carried[0], np.int64)
    if ordered:
        patches = patches[longest_first(plan.masks[..., patches])]
    stream = entry = np.concatenate([np.arange(prefix), prefix + patches]).astype(np.int64)
    steps = []
    for block in range(depth):
        updated = range(plan.updated_prefix(block))
        queries = _rows(stream, {*updated, *_positions(plan.queries[block], prefix)})
        keys = _rows(
            stream, {*range(prefix), *_positions(plan.keys[block], prefix)} if plan.keys[block] or prefix else ()
        )
        # What attention leaves: all that is needed behind the block.
        needed = carried[block + 1]
        passed = np.setdiff1d(_rows(stream, needed), queries)
        middle = np.concatenate([stream[queries], stream[passed]])
        mlps = _rows(middle, {*updated, *_positions(plan.mlps[block], prefix)})
        mlp_passed = np.setdiff1d(_rows(middle, needed), mlps)
        steps.append(
            BlockStep(
                keys,
                queries,
                passed,
                mlps,
                mlp_passed,
                _gates(plan, block, stream[keys]),
                stream,
                stream[queries],
                middle[mlps],
            )
        )
        stream = np.concatenate([middle[mlps], middle[mlp_passed]])
    return Schedule(entry, tuple(steps), stream)


def longest_first(masks: np.ndarray) -> np.ndarray:
    """int64 [patch]: the order in which a stream holds its patches, so that a block reads and updates the first ones.

    Args:
        masks: bool [kind, block, patch]: keys, queries, MLPs; ties stay in the order of the patches.
    """
    reads, attends, passes = masks.sum(1)
    return np.lexsort((-reads, -passes, -attends))


def is_range(rows: np.ndarray, start: int = 0) -> bool:
    """Whether the rows are ``start``, ``start + 1`` and so on."""
    return bool((rows == np.arange(start, start + len(rows))).all())


def _positions(patches: tuple[int, ...], prefix: int) -> list[int]:
    return [prefix + patch for patch in patches]


def _rows(stream: np.ndarray, wanted) -> np.ndarray:
    """int64 [row], ascending: where the tokens at the ``wanted`` positions are in the stream."""
    return np.flatnonzero(np.isin(stream, np.fromiter(wanted, np.int64))).astype(np.int64)


def _gates(plan: TokenPlan, block: int, positions: np.ndarray) -> np.ndarray | None:
    if plan.gates is None or all(gate == 1 for gate in plan.gates[block]):
        return None
    prefix = plan.geometry.prefix_tokens
    values = np.ones(plan.geometry.tokens)
    values[prefix + np.asarray(plan.keys[block], np.int64)] = plan.gates[block]
    return values[positions]
