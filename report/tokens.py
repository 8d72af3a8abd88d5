"""Pictures of a token plan: what each block still sees of an image, and where each patch leaves.

Needs Pillow and numpy, no plotting library: an edge device can draw its own plan. Everything is drawn on white, so that
a picture reads the same in a light page, a dark page and a document.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from ..core.cost import cost_ratio
from ..core.plan import TokenPlan
from ..core.preprocess import to_rgb

if TYPE_CHECKING:
    from PIL import Image, ImageDraw, ImageFont

PAPER, INK, MUTED, FAINT, HAIRLINE = (255,) * 3, (24, 28, 36), (104, 112, 126), (172, 179, 190), (214, 219, 227)
#: Dropped before this block, and dropped right here; a trace of the image stays visible under both.
LEFT_EARLIER, LEAVES_HERE = (45, 51, 65), (226, 104, 46)
#: A patch in comparison with another plan.
STAYED, LEAVES_LATER, LEAVES_EARLIER = (226, 230, 236), (36, 134, 142), LEAVES_HERE
#: Early exit to never: dark to light, ordered by lightness so that it survives greyscale printing and colour blindness.
HEAT = ((46, 24, 82), (59, 76, 144), (36, 134, 142), (74, 184, 126), (190, 215, 82), (250, 229, 128))

#: Sides of a panel that are comfortable to look at, in pixels at density 1.
SMALLEST_PANEL, LARGEST_PANEL = 160, 260


def draw_kept_tokens(
    image: Image.Image,
    plan: TokenPlan,
    *,
    columns: int | None = None,
    scale: float | None = None,
    title: bool = True,
    density: int = 1,
) -> Image.Image:
    """One panel per block: the image with the patches that do not enter the block covered.

    Patches that leave at this very block are orange, those that left earlier are dark; a block where nothing
    changes says so.

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
    from PIL import Image, ImageDraw, ImageOps

    geometry = plan.geometry
    height, width = geometry.image_size
    scale = _default_scale(height, width) if scale is None else scale
    panel_w = max(geometry.grid[1], round(width * scale * density))
    panel_h = max(geometry.grid[0], round(height * scale * density))
    picture = to_rgb(image)
    if picture.size != (width, height):
        picture = ImageOps.fit(picture, (width, height), Image.Resampling.BICUBIC)
    enlarge = Image.Resampling.NEAREST if panel_w > width else Image.Resampling.LANCZOS
    pixels = np.asarray(picture.resize((panel_w, panel_h), enlarge), np.float32)

    columns = min(columns or _default_columns(geometry.depth), geometry.depth)
    rows = math.ceil(geometry.depth / columns)
    margin, gap, caption = 24 * density, 18 * density, 44 * density
    header = (74 if title else 0) * density
    # One or two panels are narrower than the text above them.
    total_w = 2 * margin + max(columns * panel_w + (columns - 1) * gap, 470 * density if title else 0)
    total_h = 2 * margin + header + rows * (panel_h + caption) + (rows - 1) * gap
    canvas = Image.new("RGB", (total_w, total_h), PAPER)
    draw = ImageDraw.Draw(canvas)
    if title:
        _draw_title(draw, plan, margin, total_w - margin, density)

    large, small = _font(14 * density), _font(12 * density)
    entering = np.ones(geometry.patches, bool)
    for block, mask in enumerate(plan.mask):
        row, column = divmod(block, columns)
        left = margin + column * (panel_w + gap)
        top = margin + header + row * (panel_h + caption + gap)
        leaving = entering & ~mask
        canvas.paste(_covered(pixels, geometry.grid, mask, leaving, density), (left, top))
        draw.rectangle((left, top, left + panel_w - 1, top + panel_h - 1), outline=HAIRLINE, width=density)
        text_top = top + panel_h + 7 * density
        change = -int(leaving.sum())
        quiet = "every patch" if mask.all() else "no change"
        count = f"block {block}: {int(mask.sum())} of {geometry.patches}"
        draw.text((left, text_top), _fitted(draw, count, large, panel_w), fill=INK if change else MUTED, font=large)
        draw.text(
            (left, text_top + 18 * density),
            _fitted(draw, f"{-change} leave here" if change else quiet, small, panel_w),
            fill=LEAVES_HERE if change else MUTED,
            font=small,
        )
        entering = mask
    return canvas


def exit_map(plan: TokenPlan, *, scale: float | None = None, title: bool = True, density: int = 1) -> Image.Image:
    """A heat map over the patch grid: the first block that each patch does not enter, with the colour scale.

    Args:
        scale: Pixels per patch (at density 1); the default makes the longer side about 384 pixels.
        title: Whether model name and cost ratio stand above the map.
        density: As in :func:`draw_kept_tokens`.
    """
    from PIL import Image, ImageDraw

    geometry, depth = plan.geometry, plan.geometry.depth
    grid_h, grid_w = geometry.grid
    cell = max(3, round((384 / max(grid_h, grid_w) if scale is None else scale) * density))
    margin, key_gap = 24 * density, 28 * density
    header = (52 if title else 0) * density
    map_w, map_h = grid_w * cell, grid_h * cell
    # The scale is as high as the map where its labels have room, and taller where the map is flat or the model deep.
    step = max(round(18 * density), map_h // (depth + 1))
    body_h = max(map_h, step * (depth + 1))
    label = _font(12 * density)
    probe = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    names = [f"leaves at block {exit_}" for exit_ in range(depth)] + ["stays to the end"]
    counts = np.bincount(plan.exits, minlength=depth + 1)
    names_w = max(probe.textlength(name, font=label) for name in names)
    counts_w = max(probe.textlength(str(count), font=label) for count in counts)
    key_w = round(22 * density + 10 * density + names_w + 14 * density + counts_w)
    total_w = 2 * margin + map_w + key_gap + key_w
    canvas = Image.new("RGB", (total_w, 2 * margin + header + body_h), PAPER)
    draw = ImageDraw.Draw(canvas)
    if title:
        _draw_heading(draw, plan, margin, total_w - margin, density, "the block at which each patch leaves")

    top = margin + header
    map_top = top + (body_h - map_h) // 2
    number = _font(max(9 * density, min(15 * density, round(cell * 0.36))))
    for patch, exit_ in enumerate(plan.exits.tolist()):
        row, column = divmod(patch, grid_w)
        x, y, fill = margin + column * cell, map_top + row * cell, _heat(exit_ / depth)
        line = density if cell >= 12 * density else 0
        draw.rectangle((x, y, x + cell - 1 - line, y + cell - 1 - line), fill=fill)
        if cell >= 24 * density:
            # Patches that never leave carry no number: the blank shape in the middle is what one looks for.
            text = str(exit_) if exit_ < depth else ""
            middle = (cell - line) / 2
            draw.text((x + middle, y + middle), text, fill=_readable_on(fill), font=number, anchor="mm")

    left = margin + map_w + key_gap
    key_top = top + (body_h - step * (depth + 1)) // 2
    for exit_, name in enumerate(names):
        # Never at the top, block 0 at the bottom: up means longer, as the lightness does.
        y = key_top + (depth - exit_) * step
        ink = INK if counts[exit_] else FAINT
        draw.rectangle((left, y, left + 22 * density - 1, y + step - 1 - density), fill=_heat(exit_ / depth))
        middle = y + (step - density) / 2
        draw.text((left + 32 * density, middle), name, fill=ink, font=label, anchor="lm")
        draw.text((left + key_w, middle), str(counts[exit_]), fill=ink, font=label, anchor="rm")
    return canvas


def moved_map(plan: TokenPlan, before: np.ndarray, *, scale: float | None = None, density: int = 1) -> Image.Image:
    """The patch grid with the patches that leave at another block than they did: by how many blocks later or earlier.

    Args:
        before: int [patch N]: the exits that they had, as :attr:`TokenPlan.exits`.
        scale: Pixels per patch (at density 1); the default makes the longer side about 384 pixels.
        density: As in :func:`draw_kept_tokens`.
    """
    from PIL import Image, ImageDraw

    grid_h, grid_w = plan.geometry.grid
    cell = max(3, round((384 / max(grid_h, grid_w) if scale is None else scale) * density))
    margin = 24 * density
    canvas = Image.new("RGB", (2 * margin + grid_w * cell, 2 * margin + grid_h * cell), PAPER)
    draw = ImageDraw.Draw(canvas)
    number = _font(max(9 * density, min(15 * density, round(cell * 0.36))))
    line = density if cell >= 12 * density else 0
    for patch, moved in enumerate((plan.exits - np.asarray(before)).tolist()):
        row, column = divmod(patch, grid_w)
        x, y = margin + column * cell, margin + row * cell
        fill = STAYED if not moved else LEAVES_LATER if moved > 0 else LEAVES_EARLIER
        draw.rectangle((x, y, x + cell - 1 - line, y + cell - 1 - line), fill=fill)
        if moved and cell >= 24 * density:
            middle = (cell - line) / 2
            draw.text((x + middle, y + middle), f"{moved:+d}", fill=_readable_on(fill), font=number, anchor="mm")
    return canvas


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
    pixels: np.ndarray, grid: tuple[int, int], kept: np.ndarray, leaving: np.ndarray, density: int
) -> Image.Image:
    """float32 [height, width, 3] in, panel out: covers blended over grey, hairlines between covered patches."""
    from PIL import Image

    height, width = pixels.shape[:2]
    rows, columns = _edges(height, grid[0]), _edges(width, grid[1])
    row_of = np.repeat(np.arange(grid[0]), np.diff(rows))
    column_of = np.repeat(np.arange(grid[1]), np.diff(columns))

    def per_pixel(patches: np.ndarray) -> np.ndarray:
        return patches.reshape(grid)[row_of][:, column_of][..., None]

    grey = pixels @ np.array([0.299, 0.587, 0.114], np.float32)
    grey = grey[..., None]
    result = np.where(per_pixel(kept), pixels, 0.16 * grey + 0.84 * np.float32(LEFT_EARLIER))
    result = np.where(per_pixel(leaving), 0.24 * grey + 0.76 * np.float32(LEAVES_HERE), result)
    # Lines tell how many patches a cover hides; below about 8 pixels a patch they would be all that one sees.
    if min(np.diff(rows).min(), np.diff(columns).min()) >= 8 * density:
        line = np.zeros((height, width), bool)
        for offset in range(density):
            line[rows[1:-1] + offset - density // 2] = True
            line[:, columns[1:-1] + offset - density // 2] = True
        covered = per_pixel(~kept)
        result = np.where(line[..., None] & covered, 0.8 * result + 0.2 * 255, result)
    return Image.fromarray(np.clip(np.round(result), 0, 255).astype(np.uint8))


def _draw_heading(draw: ImageDraw.ImageDraw, plan: TokenPlan, left: int, right: int, density: int, text: str) -> int:
    """Model name, and below it ``text`` with the cost; returns the line below."""
    name, small = _font(18 * density), _font(13 * density)
    top = left - 2 * density
    draw.text((left, top), _fitted(draw, plan.model, name, right - left), fill=INK, font=name)
    cost = f"{cost_ratio(plan):.1%} of the dense multiply-adds"
    line = _fitted(draw, f"{cost}: {text}" if text else cost, small, right - left)
    draw.text((left, top + 25 * density), line, fill=MUTED, font=small)
    return top + 44 * density


def _draw_title(draw: ImageDraw.ImageDraw, plan: TokenPlan, left: int, right: int, density: int) -> None:
    grid = plan.geometry.grid
    y = _draw_heading(draw, plan, left, right, density, f"what each block sees of its {grid[0]} x {grid[1]} patches")
    font, x, swatch = _font(12 * density), left, 12 * density
    y += 5 * density
    for colour, name in ((None, "kept"), (LEAVES_HERE, "leaves at this block"), (LEFT_EARLIER, "left earlier")):
        end = x + swatch + 6 * density + draw.textlength(name, font=font)
        if end > right:
            break
        draw.rectangle((x, y, x + swatch - 1, y + swatch - 1), fill=colour, outline=colour or MUTED, width=density)
        draw.text((x + swatch + 6 * density, y + swatch / 2), name, fill=MUTED, font=font, anchor="lm")
        x = round(end + 18 * density)


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


def _heat(position: float) -> tuple[int, int, int]:
    """Colour at 0 (leaves at once) to 1 (never leaves), linear between the anchors."""
    place = min(max(position, 0.0), 1.0) * (len(HEAT) - 1)
    low = min(int(place), len(HEAT) - 2)
    share = place - low
    return tuple(round(a + (b - a) * share) for a, b in zip(HEAT[low], HEAT[low + 1], strict=True))


def _readable_on(fill: tuple[int, int, int]) -> tuple[int, int, int]:
    return INK if 0.299 * fill[0] + 0.587 * fill[1] + 0.114 * fill[2] > 140 else PAPER
