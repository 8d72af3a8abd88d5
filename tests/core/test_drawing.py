"""Maps of a plan are SVG in which every patch is in one shape, of the colour that the key gives to what it does."""

import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from vpruner.core.drawing import DOES, HEAT, cells_path, exits_svg, heat, patch_maps
from vpruner.core.geometry import Geometry
from vpruner.core.plan import TokenPlan

SVG = "{http://www.w3.org/2000/svg}"


def cells(path, width):
    """Patch indices that the rectangles of a path cover, in the order of the path."""
    found = []
    for part in path.split("z")[:-1]:
        start, rest = part.removeprefix("M").split("h", 1)
        (x, y), count = map(int, start.split()), int(rest.split("v")[0])
        assert rest == f"{count}v1h-{count}"
        found += range(y * width + x, y * width + x + count)
    return found


def drawn(svg, width):
    """[map][patch]: fill and title of each patch, and the rows of the key: colour, name, counts."""
    root, maps = ElementTree.fromstring(svg), []
    for group in root.iter(f"{SVG}g"):
        mine = {}
        for path in group:
            if path.get("fill"):
                patches = cells(path.get("d"), width)
                assert not mine.keys() & set(patches)
                mine |= dict.fromkeys(patches, (path.get("fill"), path[0].text))
        maps.append([mine[patch] for patch in sorted(mine)])
    texts = [(float(one.get("x")), float(one.get("y")), one.text) for one in root.iter(f"{SVG}text")]
    key = []
    for rect in root.iter(f"{SVG}rect"):
        middle = float(rect.get("y")) + float(rect.get("height")) / 2
        row = sorted(one for one in texts if one[0] > float(rect.get("x")) and abs(one[1] - 4.5 - middle) < 1)
        key.append((rect.get("fill"), *(text for *_, text in row)))
    return maps, key


@pytest.mark.parametrize("width", [1, 4, 7])
def test_runs_cover_each_patch_once_and_end_with_the_row(width):
    chosen = np.flatnonzero(np.random.default_rng(width).random(5 * width) < 0.6).tolist()
    assert cells(cells_path(chosen, width), width) == chosen
    assert cells_path(range(2 * width), width).count("M") == 2 and cells_path([], width) == ""


@pytest.mark.parametrize("last_update", [3, 4])
def test_exits_have_the_colour_and_the_words_of_the_key(last_update):
    exits = np.array([[4, 4, 3, 0, 4, 4], [3, 2, 2, 0, last_update, 1], [2, 2, 0, 0, last_update, 0]])
    maps, key = drawn(exits_svg(exits.tolist(), (2, 3), 4, last_update), 3)
    assert [row[1] for row in key] == ["to the end", *(f"stops at block {n}" for n in (3, 2, 1, 0))]
    colours = {name: colour for colour, name, *_ in key}
    assert len(set(colours.values())) == 5
    for does, end, mine, kind in zip(DOES, (4, last_update, last_update), maps, exits.tolist(), strict=True):
        names = ["to the end" if one == end else f"stops at block {one}" for one in kind]
        assert [fill for fill, _ in mine] == [colours[name] for name in names]
        assert [title for _, title in mine] == [f"{does}: {n} ({names.count(n)} of 6 patches)" for n in names]
        assert [int(row[2 + DOES.index(does)]) for row in key] == [names.count(row[1]) for row in key]


def test_the_later_the_lighter():
    greys = [np.dot(heat(step / 24), [0.299, 0.587, 0.114]) for step in range(25)]
    assert (np.diff(greys) > 2).all() and heat(0) == HEAT[0] and heat(1) == HEAT[-1] and heat(7.0) == HEAT[-1]


def test_numbers_stand_on_patches_that_have_room_and_stop():
    root = ElementTree.fromstring(exits_svg([[8, 7], [6, 5], [7, 0]], (1, 2), 8, 7))
    assert [one.text for one in root.iter(f"{SVG}text") if one.get("font-size")] == ["7", "6", "5", "0"]
    many = exits_svg([[0] * 1600] * 3, (40, 40), 8, 7)
    assert "font-size=" not in many and len(many) < 20_000


def test_words_are_escaped_and_the_picture_has_a_name():
    svg = patch_maps([[0]] * 3, [((1, 2, 3), "<b> & c")], [["<"]] * 3, (1, 1), 'a "<label>"')
    root = ElementTree.fromstring(svg)
    assert root.get("role") == "img" and root.get("aria-label") == 'a "<label>"'
    assert "<b>" not in svg and "<b> & c" in [one.text for one in root.iter(f"{SVG}text")]


def test_a_notebook_shows_a_plan_as_it_is():
    geometry = Geometry(4, 8, 2, 4, (2, 3), 1, (16, 24), mlp_macs=256)
    nested = TokenPlan.from_exits(
        "one", geometry, np.array([[4, 3, 2, 1, 0, 4], [3, 2, 2, 1, 0, 1], [1, 0, 2, 1, 0, 0]])
    )
    maps, _ = drawn(nested._repr_html_().split("</table>")[1].removesuffix("</div>"), 3)
    assert maps[1][0][1] == "attends: to the end (1 of 6 patches)" and maps[0][2][1].startswith(
        "is read: stops at block 2"
    )
    # Read in blocks 0 and 2 alone: that is no exit.
    masks = np.ones((3, 4, 6), bool)
    masks[0, [1, 3], 0] = False
    free = TokenPlan.from_masks("other", geometry, masks)
    maps, key = drawn(free._repr_html_().split("</table>")[1].removesuffix("</div>"), 3)
    assert maps[0][0][1] == "is read: in 2 blocks (1 of 6 patches)" and "in 1 block" in [row[1] for row in key]
