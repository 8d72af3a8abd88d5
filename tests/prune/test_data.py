import io
import sys
import tarfile
import threading
import warnings

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch.utils.data import IterableDataset

from vpruner.core.errors import UserError
from vpruner.core.preprocess import Preprocessing
from vpruner.core.specs import eval_sets
from vpruner.prune.choose_images import choose_images, choose_indices, map_labels, overlap
from vpruner.prune.data import ImageSet, ImageSource
from vpruner.prune.memory import MemorySource

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
    calibration, (evaluation,), remarks = choose_images(data, eval_sets(eval_data), **{**options, **changes})
    return calibration, evaluation, remarks


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
    with pytest.raises(UserError, match=r"1\.png .* is not a readable image .* leave out 'strict'"):
        list(strict.images())


def test_no_readable_image_at_all(tmp_path):
    make_folder(tmp_path, per_class=1)
    for path in tmp_path.rglob("*.png"):
        path.write_bytes(b"")
    images = ImageSet(ImageSource(tmp_path), range(2), None)
    assert list(images.images()) == []
    with pytest.raises(
        UserError, match=r"none of the 2 images of .* can be read: cat/0\.png \(not an image that Pillow can read\)"
    ):
        images.require_any()
    alone = ImageSet(images.source, [1], None)
    assert list(alone.images()) == []
    with pytest.raises(
        UserError, match=r"the one image taken of .* cannot be read: dog/\d\.png \(.+\); check the files"
    ):
        alone.require_any()


def test_what_is_not_there_names_no_option(tmp_path):
    """Commands take images by --data or by --eval-data."""
    with pytest.raises(
        UserError, match=r"no folder or tar file .*nope; give a folder of images, a \.tar, or"
    ) as caught:
        ImageSource(tmp_path / "nope")
    assert str(caught.value) == caught.value.marked


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: path / "nowhere", "there is no folder or tar file"),
        (lambda path: path, "no images found"),
        (lambda path: path / "note.txt", "neither a folder nor a .tar"),
        (lambda path: path / "broken.tar", "no images found"),
        (lambda path: "torch/cifar10", "torch/ data sets are not supported.*download it and give the folder"),
    ],
)
def test_a_source_that_is_none(tmp_path, make, reason):
    (tmp_path / "note.txt").write_text("x")
    (tmp_path / "broken.tar").write_bytes(b"x" * 100)
    with pytest.raises(UserError, match=reason):
        ImageSource(make(tmp_path))


@pytest.mark.parametrize(
    ("spec", "module", "package"),
    [
        ("hfds/cifar10", "datasets", "datasets"),
        ("HFIDS/cifar10", "datasets", "datasets"),
        ("tfds/cifar10", "tensorflow_datasets", "tensorflow-datasets"),
        ("wds/shards", "webdataset", "webdataset"),
    ],
)
def test_a_package_that_is_missing_is_named(monkeypatch, capsys, spec, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError) as caught:
        ImageSource(spec)
    assert str(caught.value) == f"this needs the package '{package}', which is not installed; pip install {package}"
    assert capsys.readouterr().out == ""  # timm prints a line of its own there, into the JSON of a command


def test_images_of_every_common_kind_are_read(tmp_path):
    folder, kinds = tmp_path / "images", ("png", "JPG", "jpeg", "webp", "bmp", "gif", "tif", "tiff")
    before = timm.data.get_img_extensions()
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for index, kind in enumerate(kinds):
            Image.new("RGB", (8, 8), (index * 20, 0, 0)).save(folder / name / f"{index}.{kind}")
        (folder / name / "notes.txt").write_text("no image")
    with tarfile.open(tmp_path / "images.tar", "w") as archive:
        archive.add(folder, ".")
    for path in (folder, tmp_path / "images.tar"):
        source = ImageSource(path)
        images = ImageSet(source, range(len(source)), {0: 0, 1: 1})
        assert len(list(images.images())) == 2 * len(kinds) and not images.skipped
        assert images.sha256
    assert timm.data.get_img_extensions() == before


def test_deep_and_float_images(tmp_path):
    (tmp_path / "a").mkdir()
    Image.fromarray(np.full((8, 8), 32768, np.uint16)).save(tmp_path / "a" / "deep.png")
    Image.new("F", (8, 8), 0.5).save(tmp_path / "a" / "float.tiff")
    images = ImageSet(ImageSource(tmp_path), range(2))
    assert [image.getpixel((0, 0)) for image, _ in images.images()] == [(128,) * 3]
    assert images.count == 1 and "float.tiff" in images.skipped[1]
    with pytest.raises(UserError, match=r"float\.tiff .*float image"):
        list(ImageSet(images.source, range(2), strict=True).images())


def test_large_images_are_read_without_a_warning(tmp_path, monkeypatch):
    make_folder(tmp_path, per_class=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20 * 24 - 1)
        images = ImageSet(ImageSource(tmp_path), range(2))
        assert len(list(images.images())) == 2
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        assert list(images.images()) == [] and images.count == 0


def test_one_source_is_split_without_overlap(tmp_path):
    make_folder(tmp_path, per_class=10)
    calibration, evaluation, remarks = pick(tmp_path)
    assert len(evaluation.indices) == 5 and len(calibration.indices) == 15
    assert not set(calibration.indices) & set(evaluation.indices)
    assert remarks == [f"no 'eval_data': 5 images of {tmp_path.name} were put aside for evaluation"]
    assert overlap(calibration, evaluation) == 0
    again, _, _ = pick(tmp_path)
    other, _, _ = pick(tmp_path, seed=1)
    assert again.indices == calibration.indices != other.indices
    same, held, remarks = pick(tmp_path, tmp_path / ".")
    assert not set(same.indices) & set(held.indices)
    place = tmp_path.name
    assert remarks == [f"'data' and 'eval_data' are both {place}: 5 images were put aside for evaluation"]
    assert pick(tmp_path, evaluation=1)[2] == [f"no 'eval_data': 1 image of {place} was put aside for evaluation"]


def test_the_current_folder_has_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(make_folder(tmp_path / "pets"))
    assert pick(".")[2] == ["no 'eval_data': 2 images of pets were put aside for evaluation"]


def test_a_folder_inside_the_other_is_refused(tmp_path):
    make_folder(tmp_path / "all"), make_folder(tmp_path / "all" / "held")
    with pytest.raises(UserError, match="^eval_data=.*held. lies inside data=.*all.: .*calibrated on; give separate"):
        pick(tmp_path / "all", tmp_path / "all" / "held")
    with pytest.raises(UserError, match="^data=.*held. lies inside eval_data=.*all.: .*evaluated on; give separate"):
        pick(tmp_path / "all" / "held", tmp_path / "all")
    (tmp_path / "link").symlink_to(tmp_path / "all" / "held")
    with pytest.raises(UserError, match="lies inside"):
        pick(tmp_path / "all", tmp_path / "link")
    make_folder(tmp_path / "imagenet" / "train"), make_folder(tmp_path / "imagenet" / "val", seed=1)
    # Of imagenet/ the calibration images are those in train/.
    calibration, evaluation, remarks = pick(tmp_path / "imagenet", tmp_path / "imagenet" / "val")
    assert (len(calibration.indices), len(evaluation.indices), remarks) == (8, 8, [])
    _, _, remarks = pick(tmp_path / "imagenet", tmp_path / "imagenet" / "train")
    assert "are both imagenet: 2 images were put aside" in remarks[0]


def test_copies_in_both_sets_are_counted(tmp_path):
    make_folder(tmp_path / "a"), make_folder(tmp_path / "b", seed=1)
    for index in range(3):
        copy = tmp_path / "b" / "dog" / f"copy{index}.bmp"  # other bytes, the same pixels
        Image.open(tmp_path / "a" / "cat" / f"{index}.png").save(copy)
    calibration, evaluation, _ = pick(tmp_path / "a", tmp_path / "b")
    assert overlap(calibration, evaluation) == 3
    assert len(calibration.image_hashes) == 8 and len(evaluation.image_hashes) == 11


def test_hashes_come_with_the_first_pass(tmp_path, monkeypatch):
    images = ImageSet(ImageSource(make_folder(tmp_path)), range(8))
    stream = images.images()
    for _ in range(8):  # as the rounds of the search do: exactly as many as there are
        next(stream)
    monkeypatch.setattr(images, "_read", lambda *_: pytest.fail("a second pass"))
    assert len(images.image_hashes) == 8 and images.sha256


def test_two_sources(tmp_path):
    make_folder(tmp_path / "a"), make_folder(tmp_path / "b", seed=1)
    calibration, evaluation, remarks = pick(tmp_path / "a", tmp_path / "b", calibration=3)
    assert (len(calibration.indices), len(evaluation.indices), remarks) == (3, 8, [])
    with pytest.raises(UserError, match="'eval_data' without 'data'"):
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


def test_remarks_name_what_does_not_fit(tmp_path):
    def remark(source, classes, outputs=9):
        remarks = []
        assert map_labels(source, classes, outputs, remarks) is None
        return remarks[0].removesuffix(": its images are used without labels")

    three = ImageSource(make_folder(tmp_path / "pets", classes=("cat", "dog", "weird")))
    assert remark(three, ("ant", "bee")) == (
        "the 3 folder names of pets (cat, dog, weird) are not classes of the model"
    )
    assert remark(three, ("cat", "dog")) == "1 of the 3 folder names of pets (weird) is not a class of the model"
    assert remark(three, None) == "pets has 3 classes (cat, dog, weird), the model 9 without names"
    five = ImageSource(make_folder(tmp_path / "zoo", classes=tuple("abcde")))
    assert "of zoo (a, b, c and 2 more) are not classes" in remark(five, ("ant",))
    Image.new("RGB", (8, 8)).save(tmp_path / "pets" / "stray.png")
    stray = ImageSource(tmp_path / "pets")
    assert "1 of the 4 folder names of pets (images in no folder) is not a class" in remark(
        stray, ("cat", "dog", "weird")
    )


def test_a_name_that_two_classes_bear_is_no_label(tmp_path):
    classes = ("crane", "heron", "crane", "tractor")
    remarks = []
    birds = ImageSource(make_folder(tmp_path / "birds", classes=("crane", "heron")))
    assert map_labels(birds, classes, 4, remarks) is None
    assert remarks == [
        "2 classes of the model are called 'crane', like a folder of birds: its images are used without labels"
    ]
    others = ImageSource(make_folder(tmp_path / "others", classes=("heron", "tractor")))
    assert map_labels(others, classes, 4, []) == {0: 1, 1: 3}


def stream_source(root, items) -> ImageSource:
    """A source that streams what ``items()`` gives."""

    class Stream(IterableDataset):
        def __iter__(self):
            return iter(items())

    source = ImageSource(make_folder(root))
    source.dataset, source.streams, source.class_names = Stream(), True, None
    return source


def test_a_stream_shorter_than_asked_counts_what_was_read(tmp_path):
    source = stream_source(tmp_path, lambda: ((Image.new("RGB", (4, 4), (i, 0, 0)), None) for i in range(3)))
    images = ImageSet(source, choose_indices(source, 10, 0))
    assert len(list(images.images())) == images.count == len(images.image_hashes) == 3
    images.require_any()


def test_an_empty_stream_is_refused(tmp_path):
    images = ImageSet(stream_source(tmp_path, list), range(10))
    assert list(images.images()) == [] and images.count == 0
    with pytest.raises(UserError, match="holds no images"):
        images.require_any()


def test_bad_items_of_a_stream_are_skipped_or_refused(tmp_path):
    def items():
        whole = io.BytesIO()
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)).save(whole, "PNG")
        yield {"bytes": whole.getvalue(), "path": None}, 0
        yield Image.open(io.BytesIO(whole.getvalue()[:900])), 1
        yield {"bytes": b"no image", "path": None}, 1
        yield Image.new("F", (8, 8)), 0
        yield Image.fromarray(np.full((8, 8), 65535, np.uint16)), 1

    source = stream_source(tmp_path, items)
    images = ImageSet(source, range(10), {0: 0, 1: 1})
    for _ in range(2):
        assert [label for _, label in images.images()] == [0, 1]
        assert images.count == 2 and list(images.skipped) == [1, 2, 3]
    with pytest.raises(UserError, match="item 1 in .* is not a readable image .* leave out 'strict'"):
        list(ImageSet(source, range(10), strict=True).images())


def test_a_stream_that_raises_goes_on_or_breaks_off(tmp_path):
    class Survives:
        def __init__(self):
            self.left = iter([1, 0, 1])

        def __iter__(self):
            return self

        def __next__(self):
            if not next(self.left):
                raise OSError("bad shard")
            return Image.new("RGB", (4, 4)), 0

    images = ImageSet(stream_source(tmp_path, Survives), range(3))
    assert len(list(images.images())) == images.count == 2

    def breaks():
        yield Image.new("RGB", (4, 4)), 0
        raise ConnectionError("the line is down")

    with pytest.raises(UserError, match=r"breaks off after 1 items \(the line is down\)"):
        list(ImageSet(stream_source(tmp_path, breaks), range(3)).images())


def test_labels_that_are_no_numbers(tmp_path):
    source = stream_source(tmp_path, lambda: [(Image.new("RGB", (4, 4)), "cat")])
    with pytest.raises(UserError, match="a label is 'cat', expected a class number"):
        list(ImageSet(source, range(3)).images())


def test_a_stream_is_read_from_its_start(tmp_path):
    source = stream_source(tmp_path, lambda: ((Image.new("RGB", (16, 16), (i, 0, 0)), i % 2) for i in range(10)))
    assert list(choose_indices(source, 4, 0)) == [0, 1, 2, 3]
    images = ImageSet(source, choose_indices(source, 4, 0), {0: 0, 1: 1})
    assert [label for _, label in images.images()] == [0, 1, 0, 1]
    with pytest.raises(TypeError):
        len(source)
    wrong = ImageSet(source, choose_indices(source, 4, 0), {0: 0})
    with pytest.raises(UserError, match=r"an image with label 1, the model's classes are 0\.\.0"):
        list(wrong.images())


# -- threads ----------------------------------------------------------------------------------------------------------


def mixed_folder(root):
    """Photos of many sizes, one of them turned, one of 16 bits, some that cannot be read, and a float image."""
    random = np.random.default_rng(3)
    for index in range(24):
        name = root / ("cat", "dog")[index % 2] / f"{index:02}.png"
        name.parent.mkdir(parents=True, exist_ok=True)
        size = tuple(random.integers(8, 60, 2))
        exif = Image.Exif()
        if index == 5:
            exif[0x0112] = 6
        Image.fromarray(random.integers(0, 255, (*size, 3), np.uint8)).save(name, exif=exif)
    Image.fromarray(np.full((8, 8), 32768, np.uint16)).save(root / "cat" / "10.png")
    (root / "dog" / "03.png").write_bytes(b"broken")
    (root / "dog" / "17.png").write_bytes((root / "dog" / "19.png").read_bytes()[:90])
    Image.new("F", (8, 8), 0.5).save(root / "dog" / "24.tiff")
    return root


def everything(source, workers) -> tuple:
    """What two passes over a source give, and all that is noted about it."""
    images = ImageSet(source, range(25), {0: 1, 1: 0, -1: 0}, workers=workers)
    first = [(image.tobytes(), label) for image, label in images.images()]
    noted = dict(images.skipped), set(images.turned), images.count, images.sha256, images.image_hashes
    batches = list(images.batches(PREPROCESSING, 4))
    pixels, labels = (torch.cat(part) for part in zip(*batches, strict=True))
    strict = ImageSet(source, range(25), strict=True, workers=workers)
    seen = []
    with pytest.raises(UserError) as caught:
        seen.extend(image.size for image, _ in strict.images())
    wrong = ImageSet(source, range(25), {0: 0}, workers=workers)
    with pytest.raises(UserError) as unknown:
        list(wrong.images())
    return first, noted, pixels.numpy().tobytes(), labels.tolist(), images.remark("x"), seen, str(caught.value), str(
        unknown.value
    )  # fmt: skip


def test_threads_change_nothing(tmp_path):
    folder = mixed_folder(tmp_path / "images")
    with tarfile.open(tmp_path / "images.tar", "w") as archive:
        archive.add(folder, ".")
    paths = [(path, int(path.parent.name == "dog")) for path in sorted(folder.rglob("*.*"), key=lambda p: p.name)]

    readers = set()

    class Pictures(torch.utils.data.Dataset):
        def __len__(self):
            return len(paths)

        def __getitem__(self, index):
            readers.add(threading.current_thread().name)
            return paths[index]

    def items():
        for path, label in paths:
            yield {"bytes": path.read_bytes(), "path": None}, label

    sources = [ImageSource(folder), ImageSource(tmp_path / "images.tar"), MemorySource(paths), MemorySource(Pictures())]
    sources.append(stream_source(tmp_path / "other", items))
    assert [source.shared for source in sources[:4]] == [True, True, True, False]
    for source in sources:
        expected = everything(source, 0)
        assert len(expected[1][0]) == 3 and expected[1][1] and expected[1][2] == 22
        assert everything(source, 3 if source.shared else None) == expected, source.spec
    # A program's own data set is read by the thread that asks, unless it says that several may.
    assert readers == {threading.current_thread().name}
    everything(sources[3], 4)
    assert "vpruner-ahead" in readers


def test_few_images_are_read_by_the_caller_and_many_by_threads(tmp_path, monkeypatch):
    source = ImageSource(make_folder(tmp_path, per_class=4))
    who = set()
    read = source.read
    monkeypatch.setattr(source, "read", lambda index: who.add(threading.current_thread().name) or read(index))
    assert len(list(ImageSet(source, range(8)).images())) == 8 and who == {threading.current_thread().name}
    who.clear()
    monkeypatch.setattr("vpruner.prune.data.FEW_IMAGES", 8)
    assert len(list(ImageSet(source, range(8)).images())) == 8 and who == {"vpruner-ahead"}


def test_who_looks_at_the_first_image_reads_few(tmp_path, monkeypatch):
    source = ImageSource(make_folder(tmp_path, per_class=30))
    count, read = [], source.read
    monkeypatch.setattr(source, "read", lambda index: count.append(index) or read(index))
    images = ImageSet(source, range(60), workers=4)
    next(images.images())
    assert len(count) <= 4


def test_threads_leave_the_warnings_of_the_program_as_they_are(tmp_path, monkeypatch):
    source = ImageSource(make_folder(tmp_path, per_class=16))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20 * 24 - 1)  # Pillow warns of each.
    before = list(warnings.filters)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in ImageSet(source, range(32), workers=4).images():
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                warnings.warn("of the program", UserWarning, stacklevel=1)
            assert [str(one.message) for one in caught] == ["of the program"]
    assert warnings.filters == before
