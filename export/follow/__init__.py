"""Prune any Vision Transformer by following its token axis through the graph; no architecture is named.

:func:`follow` says where the tokens of each value are, what the blocks are, and what of them can be masked;
:func:`mask` writes a plan's masks into the graph; :func:`fold` computes only what the plan leaves.
"""

from .blocks import follow
from .demand import BlockCounts, counts
from .fold import fold
from .followed import Block, Branch, Followed
from .mask import mask

__all__ = ["Block", "BlockCounts", "Branch", "Followed", "counts", "fold", "follow", "mask"]
