"""What each block of a plan still does with each patch: in words, in colours, and drawn on an image.

Needs Pillow and numpy, no plotting library: an edge device can draw its own plan. Pictures are drawn on white, so that
they read the same in a light page, a dark page and a document.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ..core.cost import cost_ratio
from ..core.drawing import INK, PAPER, Colour
from ..core.plan import KINDS, TokenPlan
from ..core.preprocess import to_rgb

if TYPE_CHECKING:
    from PIL import Image, ImageDraw, ImageFont

MUTED, HAIRLINE = (104, 112, 126), (214, 219, 227)
#: Stripes of a hatched cover across the longer side of a picture.
STRIPES = 30


@dataclass(frozen=True)
class State:
    """What a block does with a patch.

    Attributes:
        key: One word.
        name: For a legend.
        cover: Laid over the patch; None: the image shows as it is.
        opacity: Of the cover, 0 to 1.
        stripes: Colour of stripes on the cover; None: it has none.
        slope: Of the stripes: 1 rising, 0 level, -1 falling.
    """

    key: str
    name: str
    cover: Colour | None = None
    opacity: float = 0.0
    stripes: Colour | None = None
    slope: int = 1


#: By number. Covers differ in lightness, and stripes tell the two light ones from a light image and from each other.
STATES = (
    State("updated", "attends and passes the MLP"),
    State("attends", "attends only", (222, 236, 250), 0.6, (70, 118, 180)),
    State("passes", "passes the MLP only", (253, 226, 178), 0.6, (176, 98, 10), 0),
    State("frozen", "read only (frozen)", (124, 131, 146), 0.82),
    State("gone", "not read", (24, 28, 38), 0.92),
)
#: Its stripes lie over the others where a block updates a patch without reading it: only plans that are not nested have
#: any.
UNREAD = State("unread", "updated, but not read", stripes=(196, 40, 60), slope=-1)

#: Sides of a panel that are comfortable to look at, in pixels at density 1.
SMALLEST_PANEL, LARGEST_PANEL = 160, 260


def states_of(plan: TokenPlan) -> np.ndarray:
    """int64 [block L, patch N]: which of :data:`STATES` each patch is in."""
    keys, queries, mlps = plan.masks
    return np.where(queries & mlps, 0, np.where(queries, 1, np.where(mlps, 2, np.where(keys, 3, 4))))


def updated_unread(plan: TokenPlan) -> np.ndarray:
    """bool [block L, patch N]: whether the block updates the patch and does not read it."""
    keys, queries, mlps = plan.masks
    return ~keys & (queries | mlps)


def words_of(plan: TokenPlan, block: int) -> tuple[str, str, str]:
    """``("64 read", "59 attend", "7 pass the MLP")``"""
    read, attend, passing = (len(getattr(plan, kind)[block]) for kind in KINDS)
    return f"{read} read", f"{attend} attend", f"{passing} pass{'es' if passing == 1 else ''} the MLP"


def legend_of(plan: TokenPlan) -> list[State]:
    """The states that occur in the plan."""
    states = [STATES[number] for number in np.unique(states_of(plan))]
    if plan.is_nested and states[-1] is STATES[-1]:
        states[-1] = replace(STATES[-1], name="not read any more")
    return [*states, *([UNREAD] if updated_unread(plan).any() else [])]


def draw_plan(
    image: Image.Image,
    plan: TokenPlan,
    *,
    columns: int | None = None,
    scale: float | None = None,
    title: bool = True,
    density: int = 1,
) -> Image.Image:
    """One panel per block: the image with covers over the patches that the block does not fully update.

    Args:
        image: What the model sees, cropped and resized, before mean and std. Another size is cropped at the centre to
            the model's aspect and resized.
        columns: Panels per row; the default leaves few gaps in the last row.
        scale: Panel pixels per pixel of the model's input (at density 1). The default makes the shorter side
            160 to 260 pixels, in whole multiples where images are enlarged, so that their pixels stay square.
        title: Whether model name, cost ratio and legend stand above the panels.
        density: Device pixels per pixel: 2 gives crisp text on high-resolution screens when shown at half the size.

    Returns:
        An RGB image.
    """
    from PIL import Image, ImageDraw

    geometry = plan.geometry
    height, width = geometry.image_size
    scale = _default_scale(height, width) if scale is None else scale
    panel_w = max(geometry.grid[1], round(width * scale * density))
    panel_h = max(geometry.grid[0], round(height * scale * density))
    enlarge = Image.Resampling.NEAREST if panel_w > width else Image.Resampling.LANCZOS
    pixels = np.asarray(as_model_sees(image, plan).resize((panel_w, panel_h), enlarge), np.float32)

    columns = min(columns or _default_columns(geometry.depth), geometry.depth)
    rows = math.ceil(geometry.depth / columns)
    margin, gap, caption = 24 * density, 18 * density, 44 * density
    # One or two panels are narrower than the text above them.
    total_w = 2 * margin + max(columns * panel_w + (columns - 1) * gap, 520 * density if title else 0)
    header = 0
    if title:
        # Drawn on paper that is thrown away: the legend tells how high it is.
        header = (
            _draw_legend(Image.new("RGB", (1, 1)), plan, margin, 49 * density, total_w - margin, density) + gap // 2
        )
    total_h = 2 * margin + header + rows * (panel_h + caption) + (rows - 1) * gap
    canvas = Image.new("RGB", (total_w, total_h), PAPER)
    draw = ImageDraw.Draw(canvas)
    if title:
        _draw_title(draw, plan, margin, total_w - margin, density)
        _draw_legend(canvas, plan, margin, margin + 47 * density, total_w - margin, density)

    large, small = _font(14 * density), _font(12 * density)
    states, unread = states_of(plan), updated_unread(plan)
    for block in range(geometry.depth):
        row, column = divmod(block, columns)
        left = margin + column * (panel_w + gap)
        top = margin + header + row * (panel_h + caption + gap)
        canvas.paste(_covered(pixels, geometry.grid, states[block], unread[block], density), (left, top))
        draw.rectangle((left, top, left + panel_w - 1, top + panel_h - 1), outline=HAIRLINE, width=density)
        text_top = top + panel_h + 7 * density
        same = (plan.masks[:, block] == plan.masks[:, block - 1]).all() if block else plan.masks[:, block].all()
        ink, (read, *updated) = MUTED if same else INK, words_of(plan, block)
        draw.text((left, text_top), _fitted(draw, f"block {block}: {read}", large, panel_w), fill=ink, font=large)
        below = _fitted(draw, ", ".join(updated), small, panel_w)
        draw.text((left, text_top + 18 * density), below, fill=ink, font=small)
    return canvas


def as_model_sees(image: Image.Image, plan: TokenPlan) -> Image.Image:
    """RGB, of the size that the model takes: cropped at the centre to its aspect and resized where it has another."""
    from PIL import Image, ImageOps

    height, width = plan.geometry.image_size
    picture = to_rgb(image)
    return (
        picture if picture.size == (width, height) else ImageOps.fit(picture, (width, height), Image.Resampling.BICUBIC)
    )


def _default_scale(height: int, width: int) -> float:
    side = min(height, width)
    if side < SMALLEST_PANEL:
        return math.ceil(SMALLEST_PANEL / side)
    return min(1.0, LARGEST_PANEL / side)


def _default_columns(depth: int) -> int:
    """About 1.8 times as many panels across as down, with few empty places in the last row."""
    wanted = math.sqrt(1.8 * depth)
    return min(range(1, depth + 1), key=lambda c: abs(c - wanted) + 0.6 * (math.ceil(depth / c) * c - depth))


def _edges(size: int, cells: int) -> np.ndarray:
    """int64 [cells + 1]: pixel borders of ``cells`` patches, exact to a pixel where ``size`` is no multiple."""
    return np.round(np.linspace(0, size, cells + 1)).astype(np.int64)


def _covered(
    pixels: np.ndarray, grid: tuple[int, int], states: np.ndarray, unread: np.ndarray, density: int
) -> Image.Image:
    """float32 [height, width, 3] in, panel out: covers over the image, hairlines between covered patches.

    Args:
        states, unread: Of the block, [patch N], as :func:`states_of` and :func:`updated_unread` have them.
    """
    from PIL import Image

    height, width = pixels.shape[:2]
    rows, columns = _edges(height, grid[0]), _edges(width, grid[1])
    row_of = np.repeat(np.arange(grid[0]), np.diff(rows))
    column_of = np.repeat(np.arange(grid[1]), np.diff(columns))

    def per_pixel(patches: np.ndarray) -> np.ndarray:
        return patches.reshape(grid)[row_of][:, column_of]

    state, period = per_pixel(states), max(5 * density, round(max(height, width) / STRIPES))
    result = pixels.copy()
    for number, one in enumerate(STATES):
        _cover(result, state == number, one, period)
    # Lines tell how many patches a cover hides; below about 8 pixels a patch they would be all that one sees.
    if min(np.diff(rows).min(), np.diff(columns).min()) >= 8 * density:
        line = np.zeros((height, width), bool)
        for offset in range(density):
            line[rows[1:-1] + offset - density // 2] = True
            line[:, columns[1:-1] + offset - density // 2] = True
        line &= state > 0
        result[line] = 0.8 * result[line] + 0.2 * 255
    _cover(result, per_pixel(unread), UNREAD, period)
    return Image.fromarray(np.clip(np.round(result), 0, 255).astype(np.uint8))


def _cover(pixels: np.ndarray, here: np.ndarray, state: State, period: int) -> None:
    """Lay the cover of ``state`` over float32 [height, width, 3] where ``here``, bool [height, width], in place."""
    if state.cover is not None:
        pixels[here] = (1 - state.opacity) * pixels[here] + state.opacity * np.float32(state.cover)
    if state.stripes is not None:
        y, x = np.indices(here.shape)
        pixels[here & ((y + state.slope * x) % period < 0.2 * period)] = state.stripes


def _draw_title(draw: ImageDraw.ImageDraw, plan: TokenPlan, left: int, right: int, density: int) -> None:
    """Model name; below it the cost, and what is drawn."""
    name, small, top, grid = _font(18 * density), _font(13 * density), left - 2 * density, plan.geometry.grid
    draw.text((left, top), _fitted(draw, plan.model, name, right - left), fill=INK, font=name)
    text = f"{cost_ratio(plan):.1%} of the dense multiply-adds: what blocks do with the {grid[0]} x {grid[1]} patches"
    draw.text((left, top + 25 * density), _fitted(draw, text, small, right - left), fill=MUTED, font=small)


def _draw_legend(canvas: Image.Image, plan: TokenPlan, left: int, top: int, right: int, density: int) -> int:
    """The states that occur, in as many lines as they need; returns the end of the last."""
    from PIL import Image, ImageDraw

    draw, font, swatch, x = ImageDraw.Draw(canvas), _font(12 * density), 13 * density, left
    for state in legend_of(plan):
        end = x + swatch + 6 * density + round(draw.textlength(state.name, font=font))
        if end > right and x > left:
            x, end, top = left, end - x + left, top + 18 * density
        sample = np.full((swatch, swatch, 3), 255.0, np.float32)
        _cover(sample, np.ones((swatch, swatch), bool), state, 5 * density)
        canvas.paste(Image.fromarray(sample.astype(np.uint8)), (x, top))
        draw.rectangle((x, top, x + swatch - 1, top + swatch - 1), outline=MUTED, width=density)
        draw.text((x + swatch + 6 * density, top + swatch / 2), state.name, fill=MUTED, font=font, anchor="lm")
        x = end + 16 * density
    return top + swatch


def _font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own font: the same text on every machine, with no font file to find."""
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _fitted(draw: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont, room: float) -> str:
    """``text``, or as much of it as fits with three dots in the middle: both ends of a model's name tell something."""
    if draw.textlength(text, font=font) <= room:
        return text
    for kept in range(len(text) - 1, 1, -1):
        head = (kept + 1) // 2
        shorter = f"{text[:head]}...{text[len(text) - (kept - head) :]}"
        if draw.textlength(shorter, font=font) <= room:
            return shorter
    return text[:1]
