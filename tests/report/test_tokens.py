"""Pictures of a plan, checked by their pixels: each patch has the cover of its state in the right panel."""

import numpy as np
import pytest
from PIL import Image
from shown_plans import free_plan, geometry_of, nested_plan

from vpruner.core.plan import TokenPlan
from vpruner.report.tokens import (
    HAIRLINE,
    PAPER,
    STATES,
    UNREAD,
    _default_columns,
    _fitted,
    _font,
    draw_plan,
    legend_of,
    states_of,
    updated_unread,
    words_of,
)

#: What no cover and no caption has: a bright green that shows wherever the image itself is visible.
GREEN = (40, 220, 60)


def panel_cells(picture, plan, scale, columns, density=1):
    """{block: uint8 [patch, y, x, colour]}: the pixels of each patch, by the documented layout without a title."""
    pixels, grid = np.asarray(picture), plan.geometry.grid
    height, width = (round(side * scale * density) for side in plan.geometry.image_size)
    margin, gap, caption = 24 * density, 18 * density, 44 * density
    cells = {}
    for block in range(plan.geometry.depth):
        row, column = divmod(block, columns)
        top, left = margin + row * (height + caption + gap), margin + column * (width + gap)
        panel = pixels[top : top + height, left : left + width]
        panel = panel.reshape(grid[0], height // grid[0], grid[1], width // grid[1], 3)
        cells[block] = panel.swapaxes(1, 2).reshape(-1, height // grid[0], width // grid[1], 3)
    return cells


def state_in(cell):
    """Number of the state, and whether the patch is read, by what covers a bright green."""
    inner = cell[4:-4, 4:-4].reshape(-1, 3).astype(float)
    striped = {state.key: (inner == state.stripes).all(1).mean() for state in (*STATES, UNREAD) if state.stripes}
    # Stripes of one colour in about a fifth of the patch; those of what is not read lie over the others.
    assert all(share == 0 or 0.1 < share < 0.35 for share in striped.values()), striped
    covers = [(1 - one.opacity) * np.array(GREEN) + one.opacity * np.array(one.cover or GREEN) for one in STATES]
    found = [number for number, cover in enumerate(covers) if (np.abs(inner - cover) <= 1).all(1).mean() > 0.4]
    (number,) = found
    assert [key for key, share in striped.items() if share and key != "unread"] == (
        [STATES[number].key] if STATES[number].stripes else []
    )
    return number, striped["unread"] == 0


@pytest.mark.parametrize("density", [1, 2])
@pytest.mark.parametrize("plan", [nested_plan(), free_plan()], ids=["nested", "free"])
def test_each_patch_has_the_cover_of_its_state_in_each_panel(plan, density):
    grid = plan.geometry.grid
    image = Image.new("RGB", (8 * grid[1], 8 * grid[0]), GREEN)
    picture = draw_plan(image, plan, columns=2, scale=5, title=False, density=density)
    assert picture.mode == "RGB" and picture.getpixel((0, 0)) == PAPER
    states, unread, seen = states_of(plan), updated_unread(plan), set()
    for block, cells in panel_cells(picture, plan, 5, 2, density).items():
        for patch, cell in enumerate(cells):
            told = state_in(cell)
            assert told == (states[block, patch], not unread[block, patch]), (block, patch)
            seen.add(told)
    assert len(seen) == (4 if plan.is_nested else 8)


def test_states_are_what_the_three_masks_say():
    plan = free_plan()
    keys, queries, mlps = plan.masks
    does = {"updated": (True, True), "attends": (True, False), "passes": (False, True)}
    for block, patch in np.ndindex(states_of(plan).shape):
        state = STATES[states_of(plan)[block, patch]]
        updated = does.get(state.key, (False, False))
        assert (queries[block, patch], mlps[block, patch]) == updated
        assert updated_unread(plan)[block, patch] == (not keys[block, patch] and any(updated))
        if state.key in ("frozen", "gone"):
            assert keys[block, patch] == (state.key == "frozen")
    assert words_of(nested_plan(), 1) == ("5 read", "3 attend", "1 passes the MLP")
    assert words_of(nested_plan(), 0) == ("5 read", "4 attend", "3 pass the MLP")


def test_the_legend_has_what_occurs_and_says_of_a_nested_plan_that_it_is_for_good():
    names = [state.name for state in legend_of(nested_plan())]
    assert names == ["attends and passes the MLP", "attends only", "read only (frozen)", "not read any more"]
    names = [state.name for state in legend_of(free_plan())]
    assert names == [*(state.name for state in STATES), UNREAD.name]
    (only,) = legend_of(TokenPlan.identity("all", geometry_of(head_patches=True)))
    assert only.key == "updated"


def test_states_can_be_told_apart_in_grey():
    """Covers on any image, as printed without colour: at least a seventh of the range between two of them."""

    def ends(state):
        grey = np.dot(state.cover, [0.299, 0.587, 0.114])
        return [(1 - state.opacity) * pixel + state.opacity * grey for pixel in (0, 255)]

    attends, passes, frozen, gone = STATES[1:]
    assert ends(frozen)[0] > ends(gone)[1] + 36
    # The two light covers let the image through; what tells them apart, and from frozen patches, is their stripes.
    assert attends.stripes and passes.stripes and not frozen.stripes and attends.slope != passes.slope != UNREAD.slope
    assert np.mean(ends(attends)) > np.mean(ends(frozen)) + 36 and np.mean(ends(passes)) > np.mean(ends(frozen)) + 36


@pytest.mark.parametrize(
    ("grid", "patch", "depth", "shorter"), [((8, 8), 4, 8, 160), ((14, 10), 16, 12, 160), ((37, 37), 14, 4, 260)]
)
def test_panels_have_a_comfortable_size_by_default(grid, patch, depth, shorter):
    plan = TokenPlan.identity("tiny", geometry_of(grid, depth, patch, head_patches=True))
    height, width = plan.geometry.image_size
    picture = draw_plan(Image.new("RGB", (width, height), GREEN), plan, title=False, columns=1)
    columns = np.flatnonzero((np.asarray(picture) == GREEN).all(-1).any(0))
    # A border of one pixel on each side belongs to the panel.
    assert abs(columns[-1] - columns[0] + 3 - shorter * (width / min(height, width))) <= 1


def test_other_image_sizes_and_modes_are_brought_to_the_model():
    plan = nested_plan()
    for image in (Image.new("L", (100, 100), 200), Image.new("RGBA", (5, 9), (1, 2, 3, 255)), Image.new("P", (24, 16))):
        assert draw_plan(image, plan).size == draw_plan(Image.new("RGB", (24, 16)), plan).size


def test_a_grid_that_does_not_divide_the_panel_loses_no_pixel():
    every = [1, 0, 1, 0, 1, 0, 1, 0, 1]
    plan = nested_plan([every] * 3, grid=(3, 3), depth=1, patch=5, head_patches=True)
    picture = draw_plan(Image.new("RGB", (15, 15), GREEN), plan, scale=100 / 15, title=False)
    assert (np.asarray(picture) == GREEN).all(-1).sum() / 100**2 == pytest.approx(5 / 9, abs=0.05)


@pytest.mark.parametrize("plan", [nested_plan(model="a_model_with_a_name_far_too_long_for_a_page" * 4), free_plan()])
def test_title_and_legend_never_run_over_the_edge_or_into_the_panels(plan):
    image = Image.new("RGB", plan.geometry.image_size[::-1], "black")
    picture = np.asarray(draw_plan(image, plan, columns=1))
    assert (picture[:, -20:] == 255).all(), "ink in the right margin"
    first = np.flatnonzero((picture[:, 26:126] == HAIRLINE).all((1, 2)))[0]
    assert (picture[first - 5 : first - 1] == 255).all(), "ink right above the first panel"


def test_shortened_text_keeps_both_ends():
    from PIL import ImageDraw

    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    text = _fitted(draw, "vit_small_patch16_224.augreg_in21k_ft_in1k", _font(14), 120)
    assert draw.textlength(text, font=_font(14)) <= 120
    assert text.startswith("vit_") and text.endswith("1k") and "..." in text


@pytest.mark.parametrize(("depth", "columns"), [(1, 1), (2, 2), (8, 4), (12, 4), (24, 6)])
def test_default_columns_leave_no_gaps_for_common_depths(depth, columns):
    assert _default_columns(depth) == columns
