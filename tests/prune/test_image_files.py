"""Which images a folder or a tar holds: as timm finds them, each file once, and nothing that is not there."""

import io
import os
import random
import struct
import tarfile
import zlib
from typing import NamedTuple

import fuzz
import numpy as np
import pytest
from PIL import Image
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.data.readers.reader_image_in_tar import ReaderImageInTar

from vpruner.core.errors import UserError
from vpruner.core.preprocess import Preprocessing, load_image
from vpruner.prune.data import ImageSet, ImageSource
from vpruner.prune.image_files import ImageFiles
from vpruner.prune.memory import MemorySource

SIZE = (12, 10)


def picture(seed=0, form="PNG", **options) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (*SIZE, 3), np.uint8)
    Image.fromarray(pixels).save(stream, form, **options)
    return stream.getvalue()


def make_folder(root, names=("cat/10.png", "cat/9.png", "dog/a/1.png", "dog/2.png", "0.png")):
    for seed, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(picture(seed))
    return root


class Kind(NamedTuple):
    """Of a member of a tar that is no file."""

    type: bytes


def make_tar(path, members, form=tarfile.GNU_FORMAT):
    with tarfile.open(path, "w", format=form) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            if isinstance(content, Kind):
                member.type, member.linkname = content.type, "/etc/passwd"
                content = b""
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def read(source) -> list[tuple[bytes, int]]:
    return [(image.tobytes(), label) for image, label in map(source.read, range(len(source)))]


def names(source):
    return [os.path.basename(source.file_name(index)) for index in range(len(source))]


def test_a_folder_and_a_tar_read_as_by_timm(tmp_path):
    folder = make_folder(tmp_path / "images")
    files = [(str(path.relative_to(folder)), path.read_bytes()) for path in folder.rglob("*.png")]
    tar = make_tar(tmp_path / "images.tar", files)
    nested = [
        (f"{name}.tar", make_tar(tmp_path / "x.tar", files[i : i + 2]).read_bytes()) for i, name in enumerate("ab")
    ]
    nested = make_tar(tmp_path / "nested.tar", nested)
    for path, timm_reader in ((folder, ReaderImageFolder), (tar, ReaderImageInTar), (nested, ReaderImageInTar)):
        ours, theirs = ImageFiles(path), timm_reader(str(path))
        assert ours.class_to_idx == getattr(theirs, "class_to_idx", None) or theirs.class_name_to_idx
        assert [ours.filename(i) for i in range(len(ours))] == [theirs.filename(i) for i in range(len(theirs))]
        for index in range(len(theirs)):
            (one, label), (other, expected) = ours[index], theirs[index]
            assert one.read() == other.read() and label == expected


def test_what_is_no_regular_file_is_passed_over(tmp_path, reported):
    folder = make_folder(tmp_path / "images")
    os.mkfifo(folder / "cat" / "pipe.png")
    os.mkfifo(folder / "pipe")
    (folder / "dog" / "null.png").symlink_to("/dev/null")
    source = ImageSource(folder)
    assert len(read(source)) == 5
    (note,) = reported.remarks
    assert note.startswith("images: 2 entries are passed over, being no regular file, such as cat/pipe.png (a pipe)")
    os.mkfifo(tmp_path / "pipe.tar")
    with pytest.raises(UserError, match=r"pipe\.tar is a pipe; give a folder"):
        ImageSource(tmp_path / "pipe.tar")
    # Paths in a list are opened too.
    held = MemorySource([folder / "0.png", folder / "cat" / "pipe.png"])
    images = ImageSet(held, range(2))
    assert len(list(images.images())) == 1 and images.skipped == {1: "item 1"}


def test_each_file_counts_once_however_it_is_reached(tmp_path, reported):
    folder = make_folder(tmp_path / "images")
    plain = read(ImageSource(folder))
    assert reported.remarks == []
    # Loops, a link to a folder and to a file, and a second name. Real names win, wherever they are in the alphabet.
    for link, target in (("a", "dog"), ("dog/again", ".."), ("dog/up", "../dog"), ("a.png", "cat/9.png")):
        (folder / link).symlink_to(target)
    os.link(folder / "cat" / "9.png", folder / "dog" / "same.png")
    assert read(ImageSource(folder)) == plain
    assert reported.remarks == ["images: 2 images are the same files as others, and each file counts once"]
    # What lies elsewhere is found through the link, under the link's name.
    make_folder(tmp_path / "pool", ["1.png", "2.png"])
    (tmp_path / "linked").mkdir()
    for name in ("cow", "fox"):
        (tmp_path / "linked" / name).symlink_to(tmp_path / "pool")
    assert ImageSource(tmp_path / "linked").class_names == ("cow",)
    # A link to nowhere is an image that cannot be read.
    (folder / "none.png").symlink_to("nowhere.png")
    images = ImageSet(ImageSource(folder), range(6))
    assert len(list(images.images())) == 5 and list(images.skipped.values()) == ["none.png"]


def test_folders_in_a_circle_of_many_links_end(tmp_path):
    folder = make_folder(tmp_path / "images")
    for place in (folder, folder / "cat", folder / "dog"):
        for number in range(20):
            (place / f"link{number}").symlink_to(folder)
    assert len(ImageSource(folder)) == 5


# -- tar files --------------------------------------------------------------------------------------------------------


def claim(size, name="big.png", form=tarfile.GNU_FORMAT):
    member = tarfile.TarInfo(name)
    member.size = size
    return member.tobuf(form)


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_header_that_claims_more_than_there_is(tmp_path, reported, form):
    path = tmp_path / "claims.tar"
    path.write_bytes(claim(1 << 40, form=form) + picture() + bytes(1024))
    has = f"big.png has {len(picture()) + 1024:,} of 1,099,511,627,776 bytes"
    with pytest.raises(UserError, match=rf"no images found in .*claims\.tar: it is cut off \({has}\)"):
        ImageSource(path)
    # Long names and extended headers are read whole by tarfile: they have a size too.
    for kind in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE):
        member = tarfile.TarInfo("x")
        member.type, member.size = kind, 1 << 36
        path.write_bytes(member.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
        with pytest.raises(UserError, match="no images found in"):
            ImageSource(path)


def test_a_tar_that_is_cut_off_is_said_and_refused_if_strict(tmp_path, reported):
    whole = make_tar(tmp_path / "whole.tar", [(f"{index}.png", picture(index)) for index in range(4)])
    content, member = whole.read_bytes(), 512 + -(-len(picture()) // 512) * 512
    cuts = {
        2 * member + 700: "is cut off (2.png has 188 of {} bytes)",
        2 * member + 100: "is cut off (at byte {})",
        2 * member: "is cut off (at byte {})",
    }
    for size, reason in cuts.items():
        path = tmp_path / f"cut{size}.tar"
        path.write_bytes(content[:size])
        reason = reason.format(f"{len(picture(2)) if '2.png' in reason else 2 * member:,}")
        source = ImageSource(path)
        assert read(source) == read(ImageSource(whole))[:2]
        for _ in range(2):  # It is said once for all sets of a source.
            ImageSet(source, range(2))
        assert reported.remarks == [f"{path.name} {reason}: 2 images before that can be read"]
        reported.remarks.clear()
        with pytest.raises(UserError) as caught:
            ImageSet(source, range(2), strict=True)
        assert f"{path.name} {reason}: 2 images before that can be read" in str(caught.value)
        assert "leave out 'strict' to use those" in str(caught.value)
        assert not reported.remarks  # The error says it.
    # Damage in the middle ends an archive too.
    (tmp_path / "bad.tar").write_bytes(content[:member] + b"\xff" * member + content[2 * member :])
    assert ImageSet(ImageSource(tmp_path / "bad.tar"), range(1)).count == 1
    assert reported.remarks == [f"bad.tar is damaged (at byte {member:,}): 1 image before that can be read"]


def test_links_and_devices_in_a_tar_are_not_followed(tmp_path, reported):
    members = [("cat/1.png", picture())]
    kinds = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE)
    members += [(f"cat/x{number}.png", Kind(kind)) for number, kind in enumerate(kinds)]
    members += [("../../out.png", picture(1)), ("/etc/abs.png", picture(2))]  # Names only: nothing is unpacked.
    before = sorted(os.listdir(tmp_path))
    source = ImageSource(make_tar(tmp_path / "links.tar", members))
    assert len(read(source)) == 3 and sorted(os.listdir(tmp_path)) == [*before, "links.tar"]
    (note,) = reported.remarks
    assert note == "links.tar: 4 entries are passed over, being no regular file, such as cat/x0.png (a link)"


def test_a_file_with_holes_is_passed_over(tmp_path, reported):
    """Sparse members are as long as they claim, whatever the archive holds of them."""
    path = make_tar(tmp_path / "holes.tar", [("1.png", picture())])
    header = bytearray(claim(0, "hole.png"))
    header[156:157] = tarfile.GNUTYPE_SPARSE
    header[483:495] = b"%011o\0" % (1 << 32)
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    path.write_bytes(bytes(header) + path.read_bytes())
    assert len(read(ImageSource(path))) == 1
    assert reported.remarks == [
        "holes.tar: 1 entry is passed over, being no regular file, such as hole.png (a file with holes)"
    ]


# -- pictures ---------------------------------------------------------------------------------------------------------


def test_a_picture_of_too_many_pixels_is_one_line(tmp_path, monkeypatch):
    make_folder(tmp_path / "images", ["1.png", "2.png"])
    header = b"IHDR" + struct.pack(">II", 1 << 16, 1 << 16) + picture()[24:29]
    checked = header + struct.pack(">I", zlib.crc32(header))
    (tmp_path / "images" / "1.png").write_bytes(picture()[:12] + checked + picture()[33:])
    images = ImageSet(ImageSource(tmp_path / "images"), range(2))
    assert len(list(images.images())) == 1 and images.skipped == {0: "1.png"}
    with pytest.raises(UserError, match=r"1\.png: cannot read the image: [^\n]*4294967296 pixels"):
        load_image(tmp_path / "images" / "1.png")


def test_postscript_is_no_picture(tmp_path):
    """Pillow would have Ghostscript run it."""
    path = tmp_path / "figure.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    assert Image.open(path).format == "EPS"
    with pytest.raises(UserError, match=r"figure\.png: not an image that Pillow can read"):
        load_image(path)


def test_turned_pictures_are_counted_and_not_turned(tmp_path, reported):
    turned, upright = Image.Exif(), Image.Exif()
    turned[0x0112], upright[0x0112] = 6, 1
    for name, form, exif in (("a.jpg", "JPEG", turned), ("b.png", "PNG", turned), ("c.jpg", "JPEG", upright)):
        (tmp_path / name).write_bytes(picture(form=form, exif=exif))
    (tmp_path / "d.png").write_bytes(picture())
    images = ImageSet(ImageSource(tmp_path), range(4))
    assert {image.size for image, _ in images.images()} == {SIZE[::-1]} and images.turned == {0, 1}
    list(images.images())
    assert images.remark("evaluation") == (
        "2 evaluation images have a turn in their EXIF data, which is not applied, as in the training of timm and "
        "torchvision"
    )
    Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3, size=SIZE).batch([tmp_path / "a.jpg", tmp_path / "d.png"])
    assert reported.remarks == [
        "1 image has a turn in its EXIF data, which is not applied, as in the training of timm and torchvision"
    ]


# -- anything ---------------------------------------------------------------------------------------------------------

MEMBERS = [
    *(("cat/1.png", picture()), ("cat/2.png", Kind(tarfile.SYMTYPE)), ("inner.tar", b"")),
    (f"d/{'n' * 120}.png", b"x"),
]
#: Fields of a tar header: (start, end).
_FIELDS = ((0, 100), (100, 108), (124, 136), (136, 148), (148, 156), (156, 157), (157, 257), (257, 265), (345, 500))


def mutated_tar(content: bytes, seed: int) -> bytes:
    """Faults in the fields of headers, whose checksum is made right again as a rule; or anywhere."""
    chance, data = random.Random(seed), bytearray(content)
    if chance.random() < 0.3:
        return fuzz.mutated_bytes(content, seed)
    headers = [place for place in range(0, len(data), 512) if data[place + 257 : place + 262] == b"ustar"]
    for place in chance.sample(headers, chance.randint(1, 2)):
        start, end = chance.choice(_FIELDS)
        size = end - start
        values = (b"7" * size, b"\xff" * size, b"\x80" + bytes(size - 1), b"-1", bytes(size), chance.randbytes(size))
        value = chance.choice(
            (*values, b"xgLKSD0123567V"[chance.randrange(14) :][:1], b"%011o" % chance.getrandbits(33))
        )
        data[place + start : place + start + min(len(value), size)] = value[:size]
        if chance.random() < 0.8:
            data[place + 148 : place + 156] = b" " * 8
            data[place + 148 : place + 156] = b"%06o\0 " % sum(data[place : place + 512])
    return bytes(data)


@pytest.mark.parametrize("seeds", fuzz.examples())
def test_any_tar_is_read_or_refused(seeds, tmp_path):
    inner = make_tar(tmp_path / "inner.tar", [("1.png", picture(1)), ("2.png", picture(2))]).read_bytes()
    forms = (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
    members = [(name, inner if name == "inner.tar" else content) for name, content in MEMBERS]
    contents = [make_tar(tmp_path / "whole.tar", members, form).read_bytes() for form in forms]
    path, counts = tmp_path / "images.tar", set()
    for seed in seeds:
        path.write_bytes(mutated_tar(contents[seed % 2], seed))
        with fuzz.survives(seed, tmp_path / "out"):
            source = ImageSource(path)
            images = ImageSet(source, range(len(source)))
            counts.add(sum(image.width > 0 for image, _ in images.images()))
    assert len(counts) > 1


@pytest.mark.parametrize("seeds", fuzz.examples())
def test_any_picture_is_read_or_refused(seeds, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    forms = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "JPEG2000")
    contents = [picture(form=form, **({"exif": exif} if form in ("PNG", "JPEG", "WEBP") else {})) for form in forms]
    path, outcomes = tmp_path / "1.png", set()
    for seed in seeds:
        path.write_bytes(fuzz.mutated_bytes(contents[seed % len(contents)], seed))
        with fuzz.survives(seed, tmp_path / "out"):
            images = ImageSet(ImageSource(tmp_path), [0])
            outcomes.add(len(list(images.images())))
            load_image(path)
    assert outcomes == {0, 1}
