"""Pictures of a plan, checked by their pixels: the right patch is covered in the right panel."""

import numpy as np
import pytest
from PIL import Image

from vpruner.core.plan import Geometry, TokenPlan
from vpruner.report.tokens import (
    LEAVES_EARLIER,
    LEAVES_HERE,
    LEAVES_LATER,
    LEFT_EARLIER,
    PAPER,
    STAYED,
    _default_columns,
    _fitted,
    _font,
    draw_kept_tokens,
    exit_map,
    moved_map,
)

#: What no cover and no caption has: a bright green that shows wherever the image itself is visible.
GREEN = (40, 220, 60)


def make_plan(grid=(2, 3), exits=(3, 0, 1, 3, 3, 2), depth=3, patch=8, model="tiny"):
    geometry = Geometry(
        depth=depth, embed_dim=8, num_heads=2, head_dim=4, grid=grid, prefix_tokens=1, mlp_macs=256,
        image_size=(grid[0] * patch, grid[1] * patch),
    )  # fmt: skip
    return TokenPlan.from_exits(model, geometry, np.asarray(exits))


def green_panels(picture):
    """Where the picture holds the image's green, exactly."""
    return (np.asarray(picture) == GREEN).all(-1)


def panel_cells(picture, plan, scale, columns, density=1):
    """{block: [height, width] sampled colour at the centre of each patch}, by the documented layout without a title."""
    pixels, grid = np.asarray(picture), plan.geometry.grid
    height, width = (round(side * scale * density) for side in plan.geometry.image_size)
    margin, gap, caption = 24 * density, 18 * density, 44 * density
    cells = {}
    for block in range(plan.geometry.depth):
        row, column = divmod(block, columns)
        top, left = margin + row * (height + caption + gap), margin + column * (width + gap)
        ys = top + ((np.arange(grid[0]) + 0.5) * height / grid[0]).astype(int)
        xs = left + ((np.arange(grid[1]) + 0.5) * width / grid[1]).astype(int)
        cells[block] = pixels[np.ix_(ys, xs)]
    return cells


@pytest.mark.parametrize("density", [1, 2])
def test_each_panel_covers_exactly_the_patches_that_do_not_enter(density):
    plan = make_plan()
    image = Image.new("RGB", (24, 16), GREEN)
    picture = draw_kept_tokens(image, plan, columns=2, scale=10, title=False, density=density)
    assert picture.mode == "RGB" and picture.getpixel((0, 0)) == PAPER
    cells = panel_cells(picture, plan, 10, 2, density)
    for block in range(3):
        seen = (cells[block] == GREEN).all(-1).ravel()
        assert seen.tolist() == plan.mask[block].tolist(), f"block {block}"


@pytest.mark.parametrize("density", [1, 2])
def test_moved_patches_are_told_apart(density):
    plan = make_plan()  # exits 3, 0, 1, 3, 3, 2
    pixels = np.asarray(moved_map(plan, np.array([3, 1, 0, 3, 2, 2]), scale=10, density=density))
    rows, columns = (24 * density + (np.arange(n) * 10 + 2) * density for n in (2, 3))
    colours = pixels[np.ix_(rows, columns)].reshape(-1, 3).tolist()
    same, later, earlier = map(list, (STAYED, LEAVES_LATER, LEAVES_EARLIER))
    assert colours == [same, earlier, later, same, later, same]
    assert (pixels[0, 0] == PAPER).all()


def test_what_leaves_here_is_told_from_what_left_earlier():
    plan = make_plan()
    picture = draw_kept_tokens(Image.new("RGB", (24, 16), "black"), plan, columns=3, scale=10, title=False)
    cells = panel_cells(picture, plan, 10, 3)

    def cover(block, patch):
        return cells[block].reshape(-1, 3)[patch].astype(int)

    # Patch 1 never enters block 0 (orange there, dark later); patch 2 leaves at block 1, patch 5 at block 2.
    for block, patch, colour in ((0, 1, LEAVES_HERE), (1, 1, LEFT_EARLIER), (1, 2, LEAVES_HERE), (2, 5, LEAVES_HERE)):
        distance = {name: np.abs(cover(block, patch) - name).sum() for name in (LEAVES_HERE, LEFT_EARLIER)}
        assert min(distance, key=distance.get) == colour, (block, patch)


@pytest.mark.parametrize(
    ("grid", "patch", "depth", "shorter"), [((8, 8), 4, 8, 160), ((14, 10), 16, 12, 160), ((37, 37), 14, 4, 260)]
)
def test_panels_have_a_comfortable_size_by_default(grid, patch, depth, shorter):
    plan = make_plan(grid, np.full(grid[0] * grid[1], depth), depth, patch)
    height, width = plan.geometry.image_size
    picture = draw_kept_tokens(Image.new("RGB", (width, height), GREEN), plan, title=False, columns=1)
    visible = green_panels(picture)
    columns = np.flatnonzero(visible.any(0))
    # A border of one pixel on each side belongs to the panel.
    assert abs(columns[-1] - columns[0] + 3 - shorter * (width / min(height, width))) <= 1


def test_other_image_sizes_and_modes_are_brought_to_the_model():
    plan = make_plan()
    for image in (Image.new("L", (100, 100), 200), Image.new("RGBA", (5, 9), (1, 2, 3, 255)), Image.new("P", (24, 16))):
        picture = draw_kept_tokens(image, plan)
        assert picture.size == draw_kept_tokens(Image.new("RGB", (24, 16)), plan).size


def test_a_grid_that_does_not_divide_the_panel_loses_no_pixel():
    plan = make_plan((3, 3), [1, 0, 1, 0, 1, 0, 1, 0, 1], 1, 5)
    picture = draw_kept_tokens(Image.new("RGB", (15, 15), GREEN), plan, scale=100 / 15, title=False)
    share = green_panels(picture).sum() / 100**2
    assert share == pytest.approx(5 / 9, abs=0.05)


def test_title_never_runs_over_the_edge():
    plan = make_plan(model="a_model_with_a_name_that_is_far_too_long_for_any_page" * 4, depth=3)
    for picture in (draw_kept_tokens(Image.new("RGB", (24, 16)), plan), exit_map(plan)):
        edge = np.asarray(picture)[:, -20:]
        assert (edge == 255).all(), "ink in the right margin"


def test_shortened_text_keeps_both_ends():
    from PIL import ImageDraw

    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    text = _fitted(draw, "vit_small_patch16_224.augreg_in21k_ft_in1k", _font(14), 120)
    assert draw.textlength(text, font=_font(14)) <= 120
    assert text.startswith("vit_") and text.endswith("1k") and "..." in text


@pytest.mark.parametrize(("depth", "columns"), [(1, 1), (2, 2), (8, 4), (12, 4), (24, 6)])
def test_default_columns_leave_no_gaps_for_common_depths(depth, columns):
    assert _default_columns(depth) == columns


def test_exit_map_shows_one_colour_per_exit():
    plan = make_plan()
    picture = np.asarray(exit_map(plan, scale=40, title=False))
    # Sample beside the number, at a quarter of each cell.
    cells = {}
    key = 18 * 4
    top = 24 + (max(80, key) - 80) // 2
    for patch, exit_ in enumerate(plan.exits.tolist()):
        row, column = divmod(patch, 3)
        cells.setdefault(exit_, set()).add(tuple(picture[top + row * 40 + 6, 24 + column * 40 + 6].tolist()))
    assert all(len(colours) == 1 for colours in cells.values())
    assert len(set.union(*cells.values())) == 4
    lightness = [sum(next(iter(cells[exit_]))) for exit_ in sorted(cells)]
    assert lightness == sorted(lightness), "later exits must be lighter"


def test_deep_models_and_large_grids_can_be_mapped():
    plan = make_plan((37, 37), np.arange(37 * 37) % 25, 24, 14)
    picture = exit_map(plan)
    assert max(picture.size) < 1000
