"""benchmarks/shifted.py: what the copies are, and its rows, on a few of the bundled images."""

import tarfile

import numpy as np
import pytest
from commands import call
from PIL import Image

from vpruner.core import bundled
from vpruner.core.rows import read_rows
from vpruner.prune.data import ImageSet, ImageSource


@pytest.fixture
def shifted(script):
    return script("shifted")


@pytest.fixture(scope="module")
def few():
    source = ImageSource(bundled.evaluation_data())
    return ImageSet(source, list(range(0, len(source), 100)))


def pixels(image):
    return np.asarray(image, np.float64)


def distances(shifted, few, kind):
    """[level, image]: root mean square difference from the image."""
    make, strengths = shifted.SHIFTS[kind]
    return np.array(
        [
            [
                np.sqrt(np.square(pixels(make(image, amount, np.random.default_rng(number))) - pixels(image)).mean())
                for number, (image, _) in enumerate(few.images())
            ]
            for amount in strengths
        ]
    )


@pytest.mark.parametrize("kind", ["noise", "blur", "contrast", "jpeg", "shift", "zoom"])
def test_a_stronger_level_is_farther_from_the_image(shifted, few, kind):
    far = distances(shifted, few, kind).mean(1)
    assert 0 < far[0] < far[1] < far[2]


def test_each_kind_does_what_it_says(shifted):
    random = np.random.default_rng(0)
    image = Image.fromarray(random.integers(60, 196, (32, 32, 3), np.uint8))
    rough = pixels(shifted.noise(image, 0.06, random)) - pixels(image)
    assert abs(rough.std() / 255 - 0.06) < 0.004 and abs(rough.mean()) < 1
    grey = pixels(shifted.contrast(image, 0.25, random))
    assert grey.std() == pytest.approx(0.25 * pixels(image).std(), rel=0.05)
    moved = {shifted.shift(image, 1 / 4, np.random.default_rng(seed)).tobytes() for seed in range(60)}
    found = set()
    for y, x in [(y, x) for y in (-8, 0, 8) for x in (-8, 0, 8)]:
        inner = pixels(image)[max(0, y) : 32 + min(0, y), max(0, x) : 32 + min(0, x)]
        for one in moved:
            there = np.frombuffer(one, np.uint8).reshape(32, 32, 3)
            if np.array_equal(there[max(0, -y) : 32 - max(0, y), max(0, -x) : 32 - max(0, x)], inner):
                found.add((y, x))
    assert len(moved) == 8 and len(found) == 8 and (0, 0) not in found
    # A square in the middle grows or shrinks by the factor.
    square = Image.new("RGB", (32, 32))
    square.paste((255, 255, 255), (12, 12, 20, 20))
    areas = {round(pixels(shifted.zoom(square, 1.5, np.random.default_rng(s))).mean() / 255 * 1024) for s in range(20)}
    small, large = min(areas), max(areas)
    assert len(areas) == 2 and small == pytest.approx(64 / 1.5**2, rel=0.1) and large == pytest.approx(144, rel=0.15)


def test_copies_are_the_same_every_time_and_labelled(shifted, few, tmp_path):
    for kind in ("noise", "shift"):
        for name in ("one", "other"):
            shifted.write_shifted(few, kind, 2, tmp_path / f"{name}.tar")
        assert (tmp_path / "one.tar").read_bytes() == (tmp_path / "other.tar").read_bytes()
    shifted.write_shifted(few, "shift", 2, tmp_path / "seed.tar", seed=1)
    assert (tmp_path / "seed.tar").read_bytes() != (tmp_path / "one.tar").read_bytes()
    with tarfile.open(tmp_path / "one.tar") as tar:
        assert [name.partition("/")[0] for name in tar.getnames()] == [
            few.source.class_names[label] for label in (few.source.read(index)[1] for index in few.indices)
        ]


def test_rows_and_table(shifted, script, tmp_path, capsys):
    output, made = tmp_path / "shifted.jsonl", tmp_path / "made"
    options = ["--images", "16", "--eval-images", "12", "--targets", "0.6", "--made", str(made), "-o", str(output)]
    shifted.main([*options, "--methods", "tome", "--shifts", "shift"])
    before = read_rows(output)
    assert [(row["shift"], row["strength"], row["amount"]) for row in before[::4]] == [
        ("none", 0, None), ("shift", 1, 1 / 16), ("shift", 2, 1 / 8), ("shift", 3, 1 / 4),
    ]  # fmt: skip
    assert sorted(path.name for path in made.iterdir()) == ["shift-1.tar", "shift-2.tar", "shift-3.tar"]
    shifted.main([*options, "--methods", "tome", "dropped whole", "--shifts", "shift"])
    rows = read_rows(output)
    # What was there is not made again.
    assert rows[:16] == before and {row["method"] for row in rows[16:]} == {"dropped whole"} and len(rows) == 32
    for row in rows:
        assert (row["benchmark"], row["kind"], row["seed"], row["count"]) == ("shifted", "accuracy", 0, 12)
        assert 0.55 < row["macs_ratio"] <= 0.6 and row["environment"]["packages"]["torch"]
        assert "/" not in str({key: value for key, value in row.items() if key != "environment"})
    # A copy is what a user can evaluate on, and the dense model is the dense model there.
    told = call("evaluate", "--eval-data", f"moved={made / 'shift-3.tar'}", "--json", "-q").stdout
    top1 = {row["metric"]: row["value"] for row in rows if row["strength"] == 3 and row["method"] == "tome"}
    assert f'"value": {top1["top1"] - top1["top1_difference"]}' in told and '"eval_set": "moved"' in told
    text = script("shifted_tables").shifted(rows)
    line = next(line for line in text.splitlines() if line.startswith("| moved, share of the width 0.25 "))
    assert f"{top1['kl']:.4f}" in line and line.count("|") == 6
    kls = [row["value"] for row in before if row["metric"] == "kl"]
    assert f"{np.mean(kls[1:]) / kls[0]:.2f}×" in next(line for line in text.splitlines() if "| moved |" in line)
