"""ImageNet's layouts: as Kaggle, Caffe and the development kit have them."""

import sys
import tarfile

import pytest
import timm.data
from PIL import Image

from vpruner.core import progress
from vpruner.prune.choose_images import map_labels
from vpruner.prune.data import ImageSet, ImageSource

SYNSETS = timm.data.ImageNetInfo().label_names()
#: Of the validation images 1 to 4.
CLASSES = (SYNSETS[65], SYNSETS[970], SYNSETS[0], SYNSETS[65])


def write(path, colour=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), (colour, 0, 0)).save(path, "PNG")


def validation(folder):
    for number in range(1, 5):
        write(folder / f"ILSVRC2012_val_{number:08}.JPEG", number)
    return folder


def opened(place, split="validation") -> tuple[ImageSource, list[str]]:
    with progress.reporting() as record:
        return ImageSource(place, split=split), record.remarks


def labels_of(source, classes=None, outputs=1000) -> list[int]:
    mapping = map_labels(source, classes, outputs, [])
    return [label for _, label in ImageSet(source, range(len(source)), mapping).images()]


def kaggle(root):
    """LOC_val_solution.csv is in no order."""
    rows = [f"ILSVRC2012_val_{number:08},{CLASSES[number - 1]} 1 2 3 4 " for number in (3, 1, 4, 2)]
    (root / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *rows, ""]))


def test_what_kaggle_gives(tmp_path):
    images = tmp_path / "ILSVRC" / "Data" / "CLS-LOC"
    validation(images / "val"), kaggle(tmp_path)
    for synset in (SYNSETS[3], SYNSETS[1]):
        write(images / "train" / synset / f"{synset}_18.JPEG")
    write(images / "test" / "ILSVRC2012_test_00000001.JPEG")
    (tmp_path / "ILSVRC" / "ImageSets").mkdir()
    for place in (tmp_path, tmp_path / "ILSVRC", images):
        for split, expected in (("train", [1, 3]), ("validation", [65, 970, 0, 65])):
            source, remarks = opened(place, split)
            assert labels_of(source) == expected and remarks == []
    source, _ = opened(images / "val")
    assert labels_of(source) == [65, 970, 0, 65] and source.class_names == (SYNSETS[0], SYNSETS[65], SYNSETS[970])


@pytest.mark.parametrize(
    "lines",
    [
        [f"ILSVRC2012_val_{number:08}.JPEG {SYNSETS.index(CLASSES[number - 1])}" for number in (2, 1, 3, 4)],
        [f"val/ILSVRC2012_val_{number:08}.JPEG {CLASSES[number - 1]}" for number in (2, 1, 3, 4)],
    ],
)
def test_a_list_of_names_and_classes(tmp_path, lines):
    validation(tmp_path / "val")
    (tmp_path / "val.txt").write_text("\n".join(lines))
    assert labels_of(opened(tmp_path / "val")[0]) == [65, 970, 0, 65]


def test_a_tar_of_the_validation_images(tmp_path):
    folder = validation(tmp_path / "val")
    kaggle(tmp_path)
    with tarfile.open(tmp_path / "ILSVRC2012_img_val.tar", "w") as archive:
        for path in sorted(folder.iterdir()):
            archive.add(path, path.name)
    assert labels_of(opened(tmp_path / "ILSVRC2012_img_val.tar")[0]) == [65, 970, 0, 65]


def test_the_development_kit(tmp_path, monkeypatch):
    kit = tmp_path / "ILSVRC2012_devkit_t12" / "data"
    kit.mkdir(parents=True)
    truth = kit / "ILSVRC2012_validation_ground_truth.txt"
    validation(tmp_path / "val"), truth.write_text("2\n3\n1\n2\n")
    source, remarks = opened(tmp_path)
    assert source.class_names is None and "stands in meta.mat, which is not beside it" in remarks[0]
    (kit / "meta.mat").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    assert "needs the package 'scipy'; pip install scipy" in opened(tmp_path)[1][0]
    monkeypatch.undo()
    scipy_io = pytest.importorskip("scipy.io")
    import numpy as np

    kind = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("num_children", "O")]
    rows = [(1, SYNSETS[0], 0), (2, SYNSETS[65], 0), (3, SYNSETS[970], 0), (1001, "n00001740", 3)]
    scipy_io.savemat(kit / "meta.mat", {"synsets": np.array(rows, kind).reshape(-1, 1)})
    assert labels_of(opened(tmp_path)[0]) == [65, 970, 0, 65]


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        (None, "", "there is no LOC_val_solution.csv, val.txt, ILSVRC2012_validation_ground_truth.txt beside or above"),
        ("val.txt", "ILSVRC2012_val_00000001 1\n", "no label of ILSVRC2012_val_00000002 and others"),
        ("val.txt", "".join(f"ILSVRC2012_val_{n:08} {999 + n}\n" for n in range(1, 5)), "numbers up to 1,003"),
        ("val.txt", "ILSVRC2012_val_00000001\n", "cannot be read"),
        ("LOC_val_solution.csv", "ILSVRC2012_val_00000001,\n", "cannot be read"),
        ("LOC_val_solution.csv", "ILSVRC2012_val_00000001,cat 1 2 3 4\n", "'cat' is no class such as n01440764"),
        ("val.txt", "", "no label of ILSVRC2012_val_00000001 and others"),
    ],
)
def test_without_labels_they_are_used_and_it_is_said(tmp_path, name, text, says):
    validation(tmp_path / "val")
    if name:
        (tmp_path / name).write_text(text)
    source, remarks = opened(tmp_path / "val")
    assert len(remarks) == 1 and says in remarks[0] and remarks[0].startswith("val: ")
    assert source.class_names is None and labels_of(source) == [None] * 4


def test_other_flat_folders_have_no_labels_of_imagenet(tmp_path):
    validation(tmp_path / "val"), kaggle(tmp_path)
    write(tmp_path / "val" / "holiday.png")
    assert opened(tmp_path / "val")[0].class_names is None and opened(tmp_path / "val")[1] == []


def test_classes_are_known_by_what_they_are_called(tmp_path):
    for synset in SYNSETS[:3]:
        write(tmp_path / "images" / synset / "a.png")
    source, _ = opened(tmp_path / "images")
    assert source.class_words[0] == "tench, Tinca tinca"
    described = [timm.data.ImageNetInfo().index_to_description(index) for index in (2, 1, 0)]
    assert labels_of(source, ("cat", *described), 4) == [3, 2, 1]
    assert labels_of(source, ("tench", "goldfish", "great white shark"), 3) == [0, 1, 2]
    # What the file beside the images says goes first.
    words = zip(SYNSETS, ("a fish", "a gold one", "a big one"), strict=False)
    (tmp_path / "LOC_synset_mapping.txt").write_text("".join(f"{synset} {one}\n" for synset, one in words))
    source, _ = opened(tmp_path / "images")
    assert source.class_words == ("a fish", "a gold one", "a big one")
    assert labels_of(source, ("a big one", "a fish", "a gold one"), 3) == [1, 2, 0]
    assert map_labels(source, ("tench", "goldfish", "great white shark"), 3, remarks := []) is None and remarks
