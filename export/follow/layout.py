"""Where the tokens of a value stand: its axes as ordered factors, of which some are tokens.

An axis of a value is an ordered list of factors whose product is its size. A factor is *plain* (a number: batch, heads,
channels), or a *part* of a group of tokens. A group has one array of ids: what token stands at each index. Its
dimensions are the parts of the group, in the order in which they occur in the value. A sequence has one part; a grid
has two, rows and columns; attention logits have two groups, queries and keys::

    [B, T, d]        axes (B), (t), (d)            ids of t: [T]
    [B, d, h, w]     axes (B), (d), (t), (t)       ids of t: [h, w]
    [B H, Tq, Tk]    axes (B H), (q), (k)          ids of q: [Tq], ids of k: [Tk]

Reshape, Transpose and the like only cut and permute factors, so these few functions say what they do to tokens. A batch
of any size is a plain factor that no other size divides (:mod:`.known`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np


class Lost(Exception):
    """What a node does to the token axis cannot be followed; the text says what that is."""


class Part(NamedTuple):
    """A factor of the token group ``group``."""

    group: int
    size: int


Factor: TypeAlias = "int | Part"
Axis: TypeAlias = "tuple[Factor, ...]"


def size_of(factor: Factor) -> int:
    return factor.size if isinstance(factor, Part) else factor


def group_of(factor: Factor) -> int | None:
    return factor.group if isinstance(factor, Part) else None


@dataclass(frozen=True, eq=False)
class Layout:
    """Axes of a value that carries tokens.

    Attributes:
        axes: One for each axis; factors of size 1 are left out, but for parts.
        ids: One int64 array for each group, dimensions as above.
    """

    axes: tuple[Axis, ...]
    ids: tuple[np.ndarray, ...]

    def __deepcopy__(self, memo: dict) -> Layout:
        return self

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(math.prod(map(size_of, axis)) for axis in self.axes)

    def groups_of(self, axis: int) -> list[int]:
        """Groups that have parts on ``axis``."""
        return [factor.group for factor in self.axes[axis] if isinstance(factor, Part)]

    def same_as(self, other: Layout) -> bool:
        return self.axes == other.axes and all(map(np.array_equal, self.ids, other.ids))

    def with_axes(self, axes: Sequence[Axis | list[Factor]]) -> Layout:
        """The same factors in the same order on other axes."""
        return tidy(axes, self.ids)


def is_split(layout: Layout) -> bool:
    """Whether parts of one group have something between them, so that no reshape gives all its tokens one axis."""
    groups = [group_of(factor) for axis in layout.axes for factor in axis]
    runs = [group for at, group in enumerate(groups) if group is not None and (at == 0 or groups[at - 1] != group)]
    return len(set(runs)) < len(runs)


def plain(size: int) -> Axis:
    """An axis without tokens."""
    return () if size == 1 else (size,)


def plain_axes(shape: Sequence[int]) -> tuple[Axis, ...]:
    return tuple(map(plain, shape))


def groups_in(axes: Sequence[Axis]) -> set[int]:
    """Groups that have parts on any of these axes."""
    return {factor.group for axis in axes for factor in axis if isinstance(factor, Part)}


def renamed(axes: Sequence[Axis], groups: Sequence[int]) -> list[Axis]:
    """Axes with ``groups[g]`` in the place of the group g."""
    return [tuple(Part(groups[f.group], f.size) if isinstance(f, Part) else f for f in axis) for axis in axes]


def tidy(axes: Sequence[Sequence[Factor]], ids: Sequence[np.ndarray]) -> Layout:
    """Join neighbours of one kind on an axis, and give ``ids`` the dimensions of the parts that are left."""
    joined: list[Axis] = []
    for axis in axes:
        factors: list[Factor] = []
        for factor in axis:
            group = group_of(factor)
            if factors and group_of(factors[-1]) == group:
                size = size_of(factors.pop()) * size_of(factor)
                factor = size if group is None else Part(group, size)
            if factor != 1:
                factors.append(factor)
        joined.append(tuple(factors))
    sizes = [[size_of(factor) for axis in joined for factor in axis if group_of(factor) == group]
             for group in range(len(ids))]  # fmt: skip
    return Layout(tuple(joined), tuple(array.reshape(dims) for array, dims in zip(ids, sizes, strict=True)))


def regroup(layout: Layout, shape: Sequence[int], *, stays: bool = False) -> Layout:
    """What ``Reshape`` to ``shape`` does.

    Args:
        stays: Whether one token stays on its axis, also if one image stands on an axis of size 1 ahead of it.

    Raises:
        Lost: A new axis would cut a factor in a way that is none of its parts.
    """
    whole = tidy([[factor for axis in layout.axes for factor in axis]], layout.ids)
    queue = list(whole.axes[0])
    alone = {group: axis for axis in range(len(layout.axes)) for group in layout.groups_of(axis)
             if stays and layout.ids[group].size == 1}  # fmt: skip
    axes: list[list[Factor]] = []
    for size in shape:
        axis, left = [], size
        if size == 1 and queue and size_of(queue[0]) == 1:
            home = alone.get(group_of(queue[0]), 0)
            if home <= len(axes) or any(one != 1 for one in shape[len(axes) : home + 1]):
                axis.append(queue.pop(0))
        while left > 1:
            if not queue:
                raise Lost(f"the token axis is cut by a reshape to {list(shape)}")
            factor = queue.pop(0)
            have = size_of(factor)
            if left % have == 0:
                axis.append(factor)
                left //= have
            elif have % left == 0:
                first, second = left, have // left
                part = isinstance(factor, Part)
                axis.append(Part(factor.group, first) if part else first)
                queue.insert(0, Part(factor.group, second) if part else second)
                left = 1
            else:
                raise Lost(f"the token axis is cut by a reshape to {list(shape)}")
        axes.append(axis)
    if any(size_of(factor) != 1 for factor in queue) or (queue and not axes):
        raise Lost(f"the token axis is cut by a reshape to {list(shape)}")
    for factor in queue:
        axes[-1].append(factor)
    return tidy(axes, layout.ids)


def permute(layout: Layout, order: Sequence[int]) -> Layout:
    """What ``Transpose`` with ``order`` does."""
    count = [itertools.count() for _ in layout.ids]  # dimensions of the ids of a group
    numbered = [[(group_of(f), next(count[f.group]) if isinstance(f, Part) else 0) for f in axis]
                for axis in layout.axes]  # fmt: skip
    moved = [part for axis in order for part in numbered[axis]]
    ids = [own.transpose([dimension for of, dimension in moved if of == group]) for group, own in enumerate(layout.ids)]
    return tidy([layout.axes[axis] for axis in order], ids)


def select(layout: Layout, axis: int, indices: np.ndarray) -> Layout:
    """What picking ``indices`` (one-dimensional) on ``axis`` does.

    Raises:
        Lost: The axis holds tokens and something else.
    """
    factors = layout.axes[axis]
    axes = list(layout.axes)
    if not layout.groups_of(axis):
        axes[axis] = plain(len(indices))
        return tidy(axes, layout.ids)
    if len(factors) > 1:
        raise Lost("tokens are picked on an axis that holds something else too")
    if len(np.unique(indices)) < len(indices):
        raise Lost("a token is picked twice")
    group, ids = factors[0].group, list(layout.ids)
    ids[group] = np.take(ids[group], indices, dimension_of(layout, axis))
    axes[axis] = (Part(group, len(indices)),)
    return Layout(tuple(axes), tuple(ids))


def left(layout: Layout, rows: Sequence[np.ndarray | None]) -> Layout:
    """With the tokens ``rows`` of each group, None: all; of all of its parts but the last, one is left."""
    parts, axes = [ids.ndim for ids in layout.ids], []
    for axis in layout.axes:
        factors = []
        for factor in axis:
            if isinstance(factor, Part) and rows[factor.group] is not None:
                parts[factor.group] -= 1
                factor = Part(factor.group, 1 if parts[factor.group] else len(rows[factor.group]))
            factors.append(factor)
        axes.append(factors)
    return tidy(axes, [ids if own is None else own for ids, own in zip(layout.ids, rows, strict=True)])


def dimension_of(layout: Layout, axis: int) -> int:
    """Dimension of the ids of its group that the part on ``axis``, which holds nothing else, is."""
    ((group, _),) = layout.axes[axis]
    return sum(layout.groups_of(before).count(group) for before in range(axis))


def arrange(layout: Layout, names: Sequence, order: Sequence) -> Layout:
    """The axes called ``order``, empty where there is none of that name; tokens on other axes have no axis left."""
    places = [names.index(name) for name in order if name in names]
    moved = permute(layout, [*places, *(axis for axis in range(len(names)) if axis not in places)])
    return Layout(tuple(layout.axes[names.index(name)] if name in names else () for name in order), moved.ids)


#: In place of a group of a result, in the links of :func:`unify`: the group ends here, at its only token.
ENDED = -1


def unify(inputs: Sequence[Layout | None], shape: Sequence[int]) -> tuple[Layout | None, list[list[int]]]:
    """What an operation with broadcasting gives, of inputs that carry tokens and have as many axes as ``shape``.

    An axis without tokens may lie along one with tokens, as a bias of each query does along keys.

    Returns:
        The layout, None without tokens; and for each input the group of the result that each of its own becomes, or
        :data:`ENDED`.

    Raises:
        Lost: Two inputs have other tokens at one place.
    """
    parent: dict[tuple[int, int], tuple[int, int]] = {}

    def root(group: tuple[int, int]) -> tuple[int, int]:
        while group in parent:
            group = parent[group]
        return group

    axes: list[list[tuple[Factor, int]]] = []  # each factor with the input whose group it names
    for axis, size in enumerate(shape):
        found: list[tuple[Factor, int]] = []
        for number, layout in enumerate(inputs):
            if layout is None:
                continue
            factors, of_tokens = layout.axes[axis], any(isinstance(factor, Part) for factor, _ in found)
            if math.prod(map(size_of, factors)) == 1 != size or (of_tokens and not layout.groups_of(axis)):
                continue
            if not of_tokens:
                found = [(factor, number) for factor in factors] or found
                continue
            kinds = [[(size_of(f), isinstance(f, Part)) for f in row] for row in (factors, [f for f, _ in found])]
            if kinds[0] != kinds[1]:
                raise Lost("its inputs have tokens on other axes")
            for (mine, owner), factor in zip(found, factors, strict=True):
                if isinstance(factor, Part):
                    a, b = root((owner, mine.group)), root((number, factor.group))
                    if a != b:
                        parent[b] = a
        axes.append(found or [(factor, 0) for factor in plain(size)])
    seen = {(owner, factor.group) for axis in axes for factor, owner in axis if isinstance(factor, Part)}
    roots = list(dict.fromkeys(root(group) for group in sorted(seen)))
    result = [[Part(roots.index(root((owner, f.group))), f.size) if isinstance(f, Part) else f for f, owner in axis]
              for axis in axes]  # fmt: skip
    ids = [inputs[number].ids[group] for number, group in roots]
    for number, own in enumerate(ids):
        if list(own.shape) != [f.size for axis in result for f in axis if isinstance(f, Part) and f.group == number]:
            raise Lost("windows: tokens are mixed along a part of the token axis")
    links: list[list[int]] = [[] for _ in inputs]
    for number, layout in enumerate(inputs):
        for group, own in enumerate(() if layout is None else layout.ids):
            key = root((number, group))
            links[number].append(roots.index(key) if key in roots else ENDED)
            if key in roots and not np.array_equal(own, ids[roots.index(key)]):
                raise Lost("its inputs have other tokens at the same place")
    return (tidy(result, ids) if ids else None), links
