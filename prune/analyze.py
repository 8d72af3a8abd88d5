"""What tokens do on their way through a model: how alike they are, how much they change, where attention goes.

SAINT (Jeddi et al. 2025, arXiv 2503.11549) sees three stages in trained Vision Transformers, which it calls aligner,
explorer and aggregator, and drops tokens before the last. Here are the curves that show whether a model has them, the
blocks where they begin, and what follows for the blocks that SAINT should act in.

Everything is measured on the untouched model, image by image, and images are streamed: of the attention there is one
block's matrix of one batch at a time, and of each image a few numbers per block stay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..core.errors import UserError
from ..core.ours import PICTURE_MARKS
from ..core.plan import Geometry
from ..core.text import option
from .backbones.adapter import Adapter, require_blocks
from .backbones.forms import embed_images, query_key_value
from .device import described, device_of
from .methods.saint import Saint, first_blocks, redundancy

if TYPE_CHECKING:
    from .data import ImageSet
    from .loaded import LoadedModel

STAGES = ("aligner", "explorer", "aggregator")
#: The threshold of SAINT's published examples, at which votes are counted.
THRESHOLD = 0.75
#: Share of the patches whose attention is summed up as "the most attended".
TOP_SHARE = 0.1
#: What the stages are found from. The distance from the embedding is left out: it adds up the drift, so it can only
#: rise, and a rising curve has no stages.
STAGE_MEASURES = ("key_similarity", "token_similarity", "drift", "entropy", "distance")
#: A curve takes part where it varies over the blocks by more than this many standard errors of its points.
LEAST_SIGNAL = 3.0

MEASURES = {
    "key_similarity": "mean cosine of two patches' keys (mean over heads) in the block: what SAINT compares",
    "token_similarity": "mean cosine of two patches as they leave the block",
    "votes": f"share of the patches with at least K = {Saint.neighbours} neighbours at {THRESHOLD}: what SAINT would "
    "drop in this block, were it the only one; at most a half",
    "drift": "how far the block moves a patch, as a share of its length when it enters",
    "from_input": "1 - cosine of a patch as it leaves the block and as it entered the first",
    "entropy": "entropy of the attention over patches, as a share of the largest possible; mean over heads",
    "top": f"share of the attention over patches that the most attended {TOP_SHARE:.0%} of them get; mean over heads",
    "distance": "mean distance, in patches, between a patch and what it attends to; mean over heads",
}


@dataclass(frozen=True)
class Segments:
    """A sequence of blocks cut into stages.

    Attributes:
        starts: The first block of each stage; the first is 0.
        explained: Share of the variation of the curves over the blocks that the stages' means explain.
        line: Share that a straight line through each curve explains.
        measures: The curves that took part.
    """

    starts: tuple[int, ...]
    explained: float
    line: float
    measures: tuple[str, ...]

    @property
    def clear(self) -> bool:
        """Whether stages describe the curves better than a steady change from the first block to the last does.

        A straight line cut into three explains 8/9 of itself, so that much alone says nothing.
        """
        return self.explained > self.line

    def stage_of(self, block: int) -> str:
        return STAGES[max(stage for stage, start in enumerate(self.starts) if start <= block)]


@dataclass(frozen=True)
class Analysis:
    """The curves of one model.

    Attributes:
        geometry: Shape of the model.
        values: name of :data:`MEASURES` -> float64 [image, block L].
        attention_from: Whose attention :attr:`values` describe under entropy and top: "class token", or "patches".
    """

    geometry: Geometry
    values: dict[str, np.ndarray]
    attention_from: str

    @property
    def images(self) -> int:
        return len(next(iter(self.values.values())))

    def curve(self, measure: str) -> np.ndarray:
        """float64 [block L]: mean over the images."""
        return self.values[measure].mean(0)

    def error(self, measure: str) -> np.ndarray:
        """float64 [block L]: standard error of that mean; infinite with a single image."""
        if self.images < 2:
            return np.full(self.geometry.depth, math.inf)
        return self.values[measure].std(0, ddof=1) / self.images**0.5

    def stages(self) -> Segments | None:
        """The three stages, or None where the model has too few blocks, or no curve varies beyond chance."""
        if self.geometry.depth < len(STAGES):
            return None
        varying = [
            name
            for name in STAGE_MEASURES
            if self.curve(name).std() > LEAST_SIGNAL * self.error(name).mean() and self.curve(name).std() > 1e-9
        ]
        if not varying:
            return None
        starts, explained, line = find_stages(np.stack([self.curve(name) for name in varying], 1))
        return Segments(starts, explained, line, tuple(varying))

    def saint_blocks(self) -> tuple[tuple[int, ...], str]:
        """The blocks that SAINT should act in, and why.

        Those before the aggregator: from there on, what patches hold is being gathered, so that they differ less in
        what they hold than in what is still taken from them, and a token dropped there saves few blocks. Where stages
        are not clear, the first half, as published.
        """
        depth, stages = self.geometry.depth, self.stages()
        half = tuple(block for block, value in enumerate(first_blocks(self.geometry, THRESHOLD)) if value is not None)
        if stages is None:
            return half, "no stages were found: the first half of the blocks, as published"
        if not stages.clear:
            return half, (
                f"the curves change steadily (a straight line explains {stages.line:.2f} of them, three stages "
                f"{stages.explained:.2f}): the first half of the blocks, as published"
            )
        last = stages.starts[-1]
        return tuple(range(last)), f"the {last} of {depth} blocks before the aggregator, which begins in block {last}"

    def to_json(self) -> dict[str, Any]:
        """JSON-able: the curves with their standard errors by block, stages and SAINT's blocks."""
        stages, (blocks, reason) = self.stages(), self.saint_blocks()
        rows = []
        for block in range(self.geometry.depth):
            row: dict[str, Any] = {"block": block, "stage": None if stages is None else stages.stage_of(block)}
            for name in MEASURES:
                value, error = float(self.curve(name)[block]), float(self.error(name)[block])
                row[name] = value if math.isfinite(value) else None
                row[f"{name}_error"] = error if math.isfinite(error) else None
            rows.append(row)
        found = None
        if stages is not None:
            found = {
                "starts": dict(zip(STAGES, stages.starts, strict=True)),
                "explained": stages.explained,
                "line": stages.line,
                "clear": stages.clear,
                "measures": list(stages.measures),
            }
        return {
            "images": self.images,
            "attention_from": self.attention_from,
            "threshold": THRESHOLD,
            "neighbours": Saint.neighbours,
            "blocks": rows,
            "stages": found,
            "saint": {"blocks": list(blocks), "share": len(blocks) / self.geometry.depth, "why": reason},
        }


def find_stages(curves: np.ndarray, count: int = len(STAGES)) -> tuple[tuple[int, ...], float, float]:
    """Cut a sequence of blocks into ``count`` runs within which the curves stay closest to their means.

    The curves are first brought to mean 0 and variance 1 over the blocks, so that none counts more for its unit. Of all
    cuts the one with the least sum of squares around the runs' means is taken (Fisher 1958, "On grouping for maximum
    homogeneity"): with a dozen blocks all of them can be looked at. Of equal ones the earliest is taken.

    Args:
        curves: float [block, curve], none of them constant.

    Returns:
        The first block of each run; the share of the variation that the means explain; and the share that a straight
        line through each curve explains.

    Raises:
        ValueError: There are fewer blocks than runs.
    """
    depth = len(curves)
    if depth < count:
        raise ValueError(f"{depth} blocks cannot be cut into {count} stages")
    scaled = (curves - curves.mean(0)) / curves.std(0)
    total = float(np.square(scaled).sum())

    def scatter(start: int, end: int) -> float:
        return float(np.square(scaled[start:end] - scaled[start:end].mean(0)).sum())

    known = {(i, j): scatter(i, j) for i in range(depth) for j in range(i + 1, depth + 1)}

    def left(cuts: tuple[int, ...]) -> float:
        return sum(known[pair] for pair in zip((0, *cuts), (*cuts, depth), strict=True))

    # Rounded, so that of cuts that are equal but for rounding the first one is taken.
    best = min(combinations(range(1, depth), count - 1), key=lambda cuts: (round(left(cuts) / total, 9), cuts))
    places = np.arange(depth) - (depth - 1) / 2
    slopes = places @ scaled / np.square(places).sum()
    line = float(np.square(slopes).sum() * np.square(places).sum())
    return (0, *best), 1 - left(best) / total, line / total


@torch.inference_mode()
def analyze(
    adapter: Adapter, batches: Iterable[Tensor], *, on_batch: Callable[[int], None] = lambda count: None
) -> Analysis:
    """Measure the curves.

    Args:
        adapter: The model, in evaluation mode; nothing is changed.
        batches: Each float [batch, channel, height, width].
        on_batch: Called with the number of images after each.

    Raises:
        UserError: There are no images, or the model has fewer than two patches.
    """
    adapter = require_blocks(adapter, "an analysis")
    geometry, model = adapter.geometry, adapter.model
    if geometry.patches < 2:
        raise UserError(f"{adapter.name} has a single patch, so there is nothing to compare", "analyze another model")
    parameter, has_class_token = next(model.parameters()), getattr(model, "cls_token", None) is not None
    grid = torch.cartesian_prod(*(torch.arange(side, device=parameter.device) for side in geometry.grid)).to(parameter)
    apart = torch.cdist(grid, grid)
    rows: list[Tensor] = []
    for images in batches:
        stream = first = embed_images(model, images.to(parameter))
        blocks = []
        for block in model.blocks:
            leaving = block(stream)
            blocks.append(
                torch.stack(
                    [
                        *_key_measures(block.attn, block.norm1(stream), geometry, apart, has_class_token),
                        *_token_measures(*(x[:, geometry.prefix_tokens :] for x in (first, stream, leaving))),
                    ]
                )
            )
            stream = leaving
        rows.append(torch.stack(blocks).cpu().double())
        on_batch(len(images))
    if not rows:
        raise UserError("there are no images to analyze the model on", f"name some with {option('data')}")
    # [block, measure, image]
    found = torch.cat(rows, 2).numpy()
    names = ("key_similarity", "votes", "entropy", "top", "distance", "token_similarity", "drift", "from_input")
    values = {name: found[:, names.index(name)].T.copy() for name in MEASURES}
    return Analysis(geometry, values, "class token" if has_class_token else "patches")


def _key_measures(attn, normed: Tensor, geometry: Geometry, apart: Tensor, has_class_token: bool) -> list[Tensor]:
    """key_similarity, votes, entropy, top, distance: each [image].

    Args:
        normed: [image, token, channel], what the attention reads.
        apart: [patch, patch], distances on the grid.
    """
    prefix = geometry.prefix_tokens
    query, key, _ = query_key_value(attn, normed, normed)
    metric = F.normalize(key.mean(1)[:, prefix:], dim=-1)
    votes = redundancy(metric, THRESHOLD, Saint.neighbours, Saint.gamma).votes.to(metric) / geometry.patches
    # [image, head, query, patch]: of the attention what goes to patches, as shares of that.
    weights = ((query * attn.scale) @ key[:, :, prefix:].transpose(-2, -1)).softmax(-1)
    distance = (weights[:, :, prefix:] * apart).sum(-1).mean((1, 2))
    looking = weights[:, :, :1] if has_class_token else weights[:, :, prefix:]
    entropy = torch.special.entr(looking).sum(-1).mean((1, 2)) / math.log(geometry.patches)
    most = max(1, round(TOP_SHARE * geometry.patches))
    top = looking.topk(most, dim=-1).values.sum(-1).mean((1, 2))
    return [mean_cosine(metric), votes, entropy, top, distance]


def _token_measures(first: Tensor, entering: Tensor, leaving: Tensor) -> list[Tensor]:
    """token_similarity, drift, from_input: each [image], of [image, patch, channel]."""
    length = entering.norm(dim=-1).clamp(min=torch.finfo(entering.dtype).tiny)
    drift = ((leaving - entering).norm(dim=-1) / length).mean(1)
    from_input = 1 - F.cosine_similarity(leaving, first, dim=-1).mean(1)
    return [mean_cosine(F.normalize(leaving, dim=-1)), drift, from_input]


def mean_cosine(unit: Tensor) -> Tensor:
    """[image]: mean over all pairs of different patches of [image, patch, channel], each of length 1.

    The squared length of the sum holds every pair twice and each patch with itself, so no matrix is needed.
    """
    patches = unit.shape[1]
    pairs = unit.sum(1).square().sum(-1) - unit.square().sum((1, 2))
    return pairs / (patches * (patches - 1))


def analysis_row(loaded: LoadedModel, images: ImageSet, analysis: Analysis) -> dict[str, Any]:
    """A row for a results.jsonl: the curves, and what they were measured on."""
    from ..core.environment import environment

    return {
        "schema": 1,
        "kind": "analysis",
        "model": loaded.name,
        "weights_sha256": loaded.sha256,
        "device": described(device_of(loaded.adapter.model)),
        "data": {"name": Path(images.source.spec).name, "sha256": images.sha256, "skipped": len(images.skipped)},
        **analysis.to_json(),
        "environment": environment(),
    }


# -- picture ----------------------------------------------------------------------------------------------------------

_PANELS: Sequence[tuple[str, Sequence[tuple[str, str]]]] = (
    ("how alike patches are", (("key_similarity", "keys"), ("token_similarity", "tokens"), ("votes", "SAINT's votes"))),
    ("how far patches move", (("drift", "by the block"), ("from_input", "from the first embedding"))),
    ("where attention goes", (("entropy", "entropy"), ("top", f"on the top {TOP_SHARE:.0%}"))),
    ("how far patches look", (("distance", "distance, in patches"),)),
)
_COLOURS = ("#0f766e", "#c2500a", "#4f8fcb")
_TINTS = ("#e8f1ef", "#ffffff", "#fbeee5")


def draw_analysis(analysis: Analysis, form: str, title: str) -> bytes:
    """The curves with their 95 % intervals over the blocks, stages shaded, as ``"svg"`` or ``"png"``.

    Raises:
        UserError: matplotlib is missing.
    """
    import io

    from ..core.extras import require

    matplotlib, figures = require("matplotlib"), require("matplotlib.figure")
    require(f"matplotlib.backends.backend_{'svg' if form == 'svg' else 'agg'}")
    blocks, stages = np.arange(analysis.geometry.depth), analysis.stages()
    # A salt and no date: the same numbers give the same file.
    look = {"svg.hashsalt": "vpruner", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(look):
        figure = figures.Figure(figsize=(9.0, 5.4), layout="constrained")
        for axis, (label, curves) in zip(figure.subplots(2, 2, sharex=True).flat, _PANELS, strict=True):
            for colour, (measure, name) in zip(_COLOURS, curves, strict=False):
                mean, error = analysis.curve(measure), analysis.error(measure)
                axis.plot(blocks, mean, color=colour, marker="o", markersize=3.5, linewidth=1.4, label=name)
                if np.isfinite(error).all():
                    axis.fill_between(
                        blocks, mean - 1.96 * error, mean + 1.96 * error, color=colour, alpha=0.2, linewidth=0
                    )
            if stages is not None:
                ends = (*stages.starts[1:], analysis.geometry.depth)
                for tint, start, end in zip(_TINTS, stages.starts, ends, strict=True):
                    axis.axvspan(start - 0.5, end - 0.5, color=tint, zorder=0, linewidth=0)
                for start in stages.starts[1:]:
                    axis.axvline(start - 0.5, color="#687080", linewidth=0.8, linestyle=(0, (4, 3)))
            axis.set_title(label, fontsize=10, loc="left")
            axis.set_xlim(-0.5, analysis.geometry.depth - 0.5)
            axis.grid(axis="y", alpha=0.25, linewidth=0.5)
            if len(curves) > 1:
                axis.legend(frameon=False, fontsize=8)
        for axis in figure.axes[2:]:
            axis.set_xlabel("block")
        figure.suptitle(title, fontsize=10)
        stream = io.BytesIO()
        figure.savefig(stream, format=form, dpi=150, metadata=PICTURE_MARKS[form])
    return stream.getvalue()
