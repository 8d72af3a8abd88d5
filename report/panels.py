"""A plan block by block, on example images, as one picture in HTML: a slider moves through the blocks.

The slider is made by ``slider.js``. Where that does not run, and on paper, all blocks are there. An image is stored
once, and so is what covers it in each block.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..core.drawing import cells_path
from ..core.plan import TokenPlan
from .blocks import Figure
from .tokens import STATES, STRIPES, UNREAD, State, as_model_sees, legend_of, states_of, updated_unread, words_of

if TYPE_CHECKING:
    from PIL import Image

#: A picture larger than this as PNG is stored as JPEG.
LARGEST_PNG = 300_000
#: Of images with fewer pixels to a side, pixels are shown as squares.
SMALL = 160


def steps_figure(plans: Sequence[TokenPlan], images: Sequence[Image.Image]) -> Figure:
    """What each block does with the patches, on each of some images.

    Args:
        plans: One for all images, or one for each where each image has its own patches; their counts are the same.
        images: As the model sees them; none: the patches are drawn on white.
    """
    plan = plans[0]
    (height, width), (pixel_rows, pixel_columns) = plan.geometry.grid, plan.geometry.image_size
    shared = [_pattern(state, max(1, round(STRIPES / max(height, width)))) for state in (*STATES, UNREAD)]
    small = ' style="image-rendering:pixelated"' if min(pixel_rows, pixel_columns) < SMALL else ""
    for number, image in enumerate(images):
        size = f'width="{width}" height="{height}" preserveAspectRatio="none"{small}'
        shared.append(f'<image id="example-{number}" {size} href="{_address(as_model_sees(image, plan))}"/>')
    for number, one in enumerate(plans):
        shared += [f'<g id="plan-{number}-{block}">{cover}</g>' for block, cover in enumerate(_covers(one))]
    box = f'viewBox="0 0 {width} {height}" preserveAspectRatio="none" style="aspect-ratio:{pixel_columns}/{pixel_rows}"'
    steps = []
    for block in range(plan.geometry.depth):
        words, panels = f"block {block}: {', '.join(words_of(plan, block))}", []
        for number in range(max(1, len(images))):
            back = f'<use href="#example-{number}"/>' if images else ""
            label = f"example {number + 1}, {words}" if images else words
            cover = f'<use href="#plan-{min(number, len(plans) - 1)}-{block}"/>'
            panels.append(f'<svg role="img" aria-label="{label}" {box}>{back}{cover}</svg>')
        steps.append(f'<div class="step"><p>{words}</p><div class="panels">{"".join(panels)}</div></div>')
    varied = [len(np.unique(states)) for states in states_of(plan)]
    start = varied.index(max(varied))  # Where there is most to see.
    markup = (
        f'<svg class="shared" width="0" height="0" aria-hidden="true"><defs>{"".join(shared)}</defs></svg>'
        f'{_key(plans)}<div class="steps" data-start="{start}">{"".join(steps)}</div>'
    )
    caption = f"What each block does with the {plan.geometry.patches} patches, and how many of them."
    return Figure(markup, caption, moving=True)


def _pattern(state: State, stripes: int) -> str:
    """What fills a patch in that state: it is one unit wide and high, and has so many stripes."""
    parts, slope = [], state.slope
    if state.cover is not None:
        parts.append(f'<rect width="1" height="1" fill="rgb{state.cover}" fill-opacity="{state.opacity}"/>')
        parts.append('<path d="M0 0h1M0 0v1" stroke="#fff" stroke-opacity=".4" stroke-width=".05"/>')
    if state.stripes is not None:
        starts = (np.arange(stripes * min(0, slope), stripes * (1 + max(0, slope))) + 0.5) / stripes
        lines = "".join(f"M-.1 {start + 0.1 * slope:.3g}l1.2 {-1.2 * slope:g}" for start in starts)
        parts.append(f'<path d="{lines}" stroke="rgb{state.stripes}" stroke-width="{0.2 / stripes:.3g}"/>')
    return f'<pattern id="{state.key}" width="1" height="1" patternUnits="userSpaceOnUse">{"".join(parts)}</pattern>'


def _covers(plan: TokenPlan) -> list[str]:
    """For each block what lies over the image; a patch is one unit wide and high."""
    found = []
    for states, unread in zip(states_of(plan), updated_unread(plan), strict=True):
        where = {state.key: states == number for number, state in enumerate(STATES) if state.cover is not None}
        paths = (
            f'<path d="{cells_path(np.flatnonzero(here).tolist(), plan.geometry.grid[1])}" fill="url(#{key})"/>'
            for key, here in {**where, UNREAD.key: unread}.items()
            if here.any()
        )
        found.append("".join(paths))
    return found


def _key(plans: Sequence[TokenPlan]) -> str:
    """Samples of the states that occur, with what they mean."""
    names = {state.key: state.name for plan in plans for state in legend_of(plan)}
    items = (
        f'<li><svg viewBox="0 0 1 1" aria-hidden="true"><rect width="1" height="1" fill="url(#{state.key})"/></svg>'
        f"{names[state.key]}</li>"
        for state in (*STATES, UNREAD)
        if state.key in names
    )
    return f'<ul class="key">{"".join(items)}</ul>'


def _address(image: Image.Image) -> str:
    """A picture as the address of itself."""
    stream, kind = io.BytesIO(), "png"
    image.save(stream, "PNG", optimize=True)
    if stream.tell() > LARGEST_PNG:
        stream, kind = io.BytesIO(), "jpeg"
        image.save(stream, "JPEG", quality=88, subsampling=0)
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"
