import tarfile

import numpy as np
import pytest
import timm
from PIL import Image
from torch.utils.data import IterableDataset

from vpruner.errors import UserError
from vpruner.prune.data import ImageSet, ImageSource, choose_images, choose_indices, map_labels
from vpruner.runtime.preprocess import Preprocessing

PREPROCESSING = Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3, size=(16, 16))


def make_folder(root, classes=("cat", "dog"), per_class=4, seed=0):
    random = np.random.default_rng(seed)
    for name in classes:
        (root / name).mkdir(parents=True, exist_ok=True)
        for index in range(per_class):
            pixels = random.integers(0, 255, (20, 24, 3), np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index}.png")
    return root


def pick(data, eval_data=None, **changes):
    options = dict(calibration=100, evaluation=100, classes=("cat", "dog"), outputs=2)
    return choose_images(data, eval_data, **{**options, **changes})


def test_folder_tar_and_flat_folder_read_the_same(tmp_path):
    folder = make_folder(tmp_path / "images")
    with tarfile.open(tmp_path / "images.tar", "w") as archive:
        for path in sorted(folder.rglob("*.png")):
            archive.add(path, path.relative_to(folder))
    sets = [ImageSet(ImageSource(path), range(8), {0: 0, 1: 1}) for path in (folder, tmp_path / "images.tar")]
    for one, other in zip(sets[0].images(), sets[1].images(), strict=True):
        assert one[0].tobytes() == other[0].tobytes() and one[1] == other[1]
    assert sets[0].sha256 == sets[1].sha256
    flat = tmp_path / "flat"
    make_folder(flat, classes=("",))
    assert ImageSource(flat).class_names is None
    assert map_labels(ImageSource(flat), None, 1, []) is None


def test_batches_are_streamed_and_labelled(tmp_path):
    images = ImageSet(ImageSource(make_folder(tmp_path)), range(8), {0: 1, 1: 0})
    batches = list(images.batches(PREPROCESSING, 3))
    assert [tuple(x.shape) for x, _ in batches] == [(3, 3, 16, 16), (3, 3, 16, 16), (2, 3, 16, 16)]
    assert np.concatenate([y for _, y in batches]).tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    unlabelled = ImageSet(images.source, range(8), None)
    assert next(unlabelled.batches(PREPROCESSING, 8))[1] is None


def test_corrupt_images_are_skipped_and_counted_or_refused(tmp_path):
    make_folder(tmp_path)
    (tmp_path / "cat" / "1.png").write_bytes(b"not an image")
    whole = (tmp_path / "dog" / "2.png").read_bytes()
    (tmp_path / "dog" / "2.png").write_bytes(whole[: len(whole) // 2])
    images = ImageSet(ImageSource(tmp_path), range(8), {0: 0, 1: 1})
    labels = np.concatenate([y for _, y in images.batches(PREPROCESSING, 3)])
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert len(images.skipped) == 2 and images.count == 6
    assert any("1.png" in name for name in images.skipped.values())
    strict = ImageSet(ImageSource(tmp_path), range(8), None, strict=True)
    with pytest.raises(UserError, match=r"1\.png .* is not a readable image .* leave out --strict"):
        list(strict.images())


def test_no_readable_image_at_all(tmp_path):
    make_folder(tmp_path, per_class=1)
    for path in tmp_path.rglob("*.png"):
        path.write_bytes(b"")
    images = ImageSet(ImageSource(tmp_path), range(2), None)
    assert list(images.images()) == []
    with pytest.raises(UserError, match="none of the 2 images"):
        images.require_any()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: path / "nowhere", "there is no folder or tar file"),
        (lambda path: path, "no images found"),
        (lambda path: path / "note.txt", "neither a folder nor a .tar"),
        (lambda path: path / "broken.tar", "no images found"),
        (lambda path: "hfds/no-such-data-set-anywhere", "could not be opened"),
    ],
)
def test_a_source_that_is_none(tmp_path, make, reason):
    (tmp_path / "note.txt").write_text("x")
    (tmp_path / "broken.tar").write_bytes(b"x" * 100)
    with pytest.raises(UserError, match=reason):
        ImageSource(make(tmp_path))


def test_one_source_is_split_without_overlap(tmp_path):
    make_folder(tmp_path, per_class=10)
    calibration, evaluation, remarks = pick(tmp_path)
    assert len(evaluation.indices) == 5 and len(calibration.indices) == 15
    assert not set(calibration.indices) & set(evaluation.indices)
    assert "put aside for evaluation" in remarks[0]
    again, _, _ = pick(tmp_path)
    other, _, _ = pick(tmp_path, seed=1)
    assert again.indices == calibration.indices != other.indices
    same, held, _ = pick(tmp_path, tmp_path / ".")
    assert not set(same.indices) & set(held.indices)


def test_two_sources(tmp_path):
    make_folder(tmp_path / "a"), make_folder(tmp_path / "b", seed=1)
    calibration, evaluation, remarks = pick(tmp_path / "a", tmp_path / "b", calibration=3)
    assert (len(calibration.indices), len(evaluation.indices), remarks) == (3, 8, [])
    with pytest.raises(UserError, match="--eval-data without --data"):
        pick(None, tmp_path / "b")


def test_split_folders_are_found_and_classes_are_not_taken_for_them(tmp_path):
    make_folder(tmp_path / "imagenet" / "train", per_class=3), make_folder(tmp_path / "imagenet" / "val", per_class=2)
    assert len(ImageSource(tmp_path / "imagenet", split="train")) == 6
    assert len(ImageSource(tmp_path / "imagenet", split="validation")) == 4
    make_folder(tmp_path / "vehicles", classes=("plane", "train"))
    source = ImageSource(tmp_path / "vehicles", split="train")
    assert len(source) == 8 and source.class_names == ("plane", "train")


def test_bundled_images_when_none_are_given():
    classes = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    calibration, evaluation, remarks = pick(None, classes=classes, outputs=10, calibration=5000, evaluation=5000)
    assert (len(calibration.indices), len(evaluation.indices), remarks) == (1024, 2000, [])
    assert calibration.labelled


def test_labels_are_mapped_by_name_or_not_used(tmp_path):
    source = ImageSource(make_folder(tmp_path / "pets"))
    assert map_labels(source, ("dog", "bird", "cat"), 3, []) == {0: 2, 1: 0}
    assert map_labels(source, None, 2, []) == {0: 0, 1: 1}
    assert map_labels(source, None, None, []) is None
    remarks = []
    assert map_labels(source, ("hammer", "nail"), 2, remarks) is None
    assert "cat, dog" in remarks[0] and "without labels" in remarks[0]
    synsets = timm.data.ImageNetInfo().label_names()
    some = ImageSource(make_folder(tmp_path / "imagenet", classes=(synsets[7], synsets[300])))
    assert map_labels(some, None, 1000, []) == {0: 7, 1: 300}


def test_a_stream_is_read_from_its_start(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            for index in range(10):
                yield Image.new("RGB", (16, 16), (index, 0, 0)), index % 2

    source = ImageSource(make_folder(tmp_path))
    source.dataset, source.streams, source.class_names = Stream(), True, None
    assert list(choose_indices(source, 4, 0)) == [0, 1, 2, 3]
    images = ImageSet(source, choose_indices(source, 4, 0), {0: 0, 1: 1})
    assert [label for _, label in images.images()] == [0, 1, 0, 1]
    with pytest.raises(TypeError):
        len(source)
    wrong = ImageSet(source, choose_indices(source, 4, 0), {0: 0})
    with pytest.raises(UserError, match=r"an image with label 1, the model's classes are 0\.\.0"):
        list(wrong.images())
