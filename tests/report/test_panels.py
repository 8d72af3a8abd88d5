"""The picture of a plan block by block: what covers each patch, what is said of each block, and that all of it is there
without a script."""

import base64
import hashlib
import io
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from shown_plans import free_plan, geometry_of, nested_plan

from vpruner.core.plan import TokenPlan
from vpruner.report import panels
from vpruner.report.blocks import Section, Text
from vpruner.report.render import to_html
from vpruner.report.tokens import STATES, states_of, updated_unread


def parsed(figure):
    """The picture's elements, without the namespaces that HTML does not need."""
    return ElementTree.fromstring(f"<div>{figure.markup}</div>")


def covered(root, name, plan):
    """For each patch the keys of what covers it, in a part of the picture."""
    width, found = plan.geometry.grid[1], [set() for _ in range(plan.geometry.patches)]
    (group,) = (one for one in root.iter("g") if one.get("id") == name)
    for path in group:
        key = re.fullmatch(r"url\(#(\w+)\)", path.get("fill"))[1]
        for x, y, count in re.findall(r"M(\d+) (\d+)h(\d+)v1h-\d+z", path.get("d")):
            for patch in range(int(y) * width + int(x), int(y) * width + int(x) + int(count)):
                found[patch].add(key)
    return found


@pytest.mark.parametrize("plan", [nested_plan(), free_plan(), free_plan((1, 3), 1)], ids=["nested", "free", "small"])
def test_each_patch_is_covered_by_its_state_in_each_block(plan):
    root = parsed(panels.steps_figure([plan], []))
    patterns = {one.get("id") for one in root.iter("pattern")}
    for block, (states, unread) in enumerate(zip(states_of(plan), updated_unread(plan), strict=True)):
        expected = [
            ({STATES[state].key} if STATES[state].cover else set()) | ({"unread"} if apart else set())
            for state, apart in zip(states, unread, strict=True)
        ]
        cover = covered(root, f"plan-0-{block}", plan)
        assert cover == expected and set().union(*cover) <= patterns


def test_every_block_is_said_in_words_and_shown_on_every_image():
    plan = nested_plan()
    root = parsed(panels.steps_figure([plan], [Image.new("RGB", (24, 16), colour) for colour in ("teal", "red")]))
    steps = [one for one in root.iter("div") if one.get("class") == "step"]
    words = [step.find("p").text for step in steps]
    assert words == [
        "block 0: 5 read, 4 attend, 3 pass the MLP",
        "block 1: 5 read, 3 attend, 1 passes the MLP",
        "block 2: 4 read, 0 attend, 0 pass the MLP",
    ]
    known = {one.get("id") for one in root.iter() if one.get("id")}
    for block, step in enumerate(steps):
        shown = [[use.get("href") for use in svg] for svg in step.iter("svg")]
        assert shown == [["#example-0", f"#plan-0-{block}"], ["#example-1", f"#plan-0-{block}"]]
        assert {name.removeprefix("#") for names in shown for name in names} <= known
        assert [svg.get("aria-label") for svg in step.iter("svg")] == [f"example {n}, {words[block]}" for n in (1, 2)]
    key = next(one for one in root.iter("ul"))
    assert [item[0].tail for item in key] == [
        "attends and passes the MLP", "attends only", "read only (frozen)", "not read any more",
    ]  # fmt: skip


def test_images_that_choose_their_own_patches_have_their_own_covers():
    kept = [[[0, 1, 2, 3, 4, 5], [a, b], [b]] for a, b in ((0, 1), (3, 4))]
    plans = [TokenPlan.dropping("tiny", geometry_of(), one) for one in kept]
    root = parsed(panels.steps_figure(plans, [Image.new("RGB", (24, 16))] * 2))
    first = next(one for one in root.iter("div") if one.get("class") == "step")
    assert [[use.get("href") for use in svg][1] for svg in first.iter("svg")] == ["#plan-0-0", "#plan-1-0"]
    for number, plan in enumerate(plans):
        gone = {patch for patch, keys in enumerate(covered(root, f"plan-{number}-2", plan)) if "gone" in keys}
        assert gone == set(range(6)) - set(kept[number][2])


def test_an_image_is_stored_once_and_as_the_model_sees_it():
    figure = panels.steps_figure([nested_plan()], [Image.new("RGB", (240, 160), "teal")])
    (stored,) = re.findall(r'href="data:image/png;base64,([^"]+)"', figure.markup)
    assert Image.open(io.BytesIO(base64.b64decode(stored))).size == (24, 16)


def test_the_slider_starts_where_there_is_most_to_see():
    exits = [[4] * 4, [2, 2, 1, 3], [2, 1, 1, 3]]
    figure = panels.steps_figure([TokenPlan.from_exits("tiny", geometry_of((2, 2), 4), np.array(exits))], [])
    assert 'data-start="1"' in figure.markup


def page_of(*blocks):
    return to_html("title", "lead", [], [Section("one", [Text("text"), *blocks])])


def test_a_page_runs_its_own_script_and_no_other():
    page = page_of(panels.steps_figure([nested_plan()], []))
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = re.findall(r'<meta http-equiv="Content-Security-Policy" content="([^"]+)">', page)
    assert f"script-src 'sha256-{digest}'" in policy and policy.startswith("default-src 'none'")
    assert "<script" not in page_of(), "a page without such a picture has no script"


#: Reads the page as a person with a keyboard would: what is shown at first, and after the slider has moved.
PROBE = """<script>
const slider = document.querySelector(".slider input"), said = [];
const look = () => said.push([...document.querySelectorAll(".step")].map((one) => +!one.hidden).join("") + " "
  + slider.type + " " + slider.min + " " + slider.max + " " + slider.getAttribute("aria-valuetext"));
look(); slider.value = 2; slider.dispatchEvent(new Event("input")); look();
document.body.append(Object.assign(document.createElement("pre"), { id: "said", textContent: said.join("|") }));
</script>"""
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome here")
def test_a_browser_shows_one_block_at_a_time(tmp_path):
    page = re.sub(r"<meta http-equiv.*?>", "", page_of(panels.steps_figure([nested_plan()], [])))
    (tmp_path / "page.html").write_text(page.replace("</body>", f"{PROBE}</body>"), encoding="utf-8")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--dump-dom", (tmp_path / "page.html").as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False).stdout
    if not shown:
        pytest.skip("the browser does not run here")
    first, second = re.search(r'<pre id="said">(.*?)</pre>', shown)[1].split("|")
    assert first == "100 range 0 2 block 0: 5 read, 4 attend, 3 pass the MLP"
    assert second == "001 range 0 2 block 2: 4 read, 0 attend, 0 pass the MLP"


def test_without_a_script_nothing_is_hidden():
    markup = panels.steps_figure([nested_plan()], []).markup
    assert "hidden" not in markup.replace('aria-hidden="true"', "") and 'type="range"' not in markup
    style = (Path(panels.__file__).parent / "style.css").read_text(encoding="utf-8")
    assert ".step[hidden] { display: block; }" in style.split("@media print")[1]
