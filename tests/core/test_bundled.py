"""What ships inside the package is what its README says, and learning and reporting never share an image."""

import hashlib
import json
import re
import tarfile
from pathlib import PurePosixPath

import pytest

from vpruner.core import bundled
from vpruner.core.errors import UserError
from vpruner.core.files import file_sha256

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def images_by_class(path):
    classes = {}
    with tarfile.open(path) as archive:
        for member in archive:
            content = archive.extractfile(member).read()
            classes.setdefault(PurePosixPath(member.name).parent.name, []).append(hashlib.sha256(content).hexdigest())
    return classes


def test_images_are_counted_balanced_and_disjoint():
    calibration = images_by_class(bundled.calibration_data())
    evaluation = images_by_class(bundled.evaluation_data())
    assert sorted(calibration) == sorted(evaluation) == CLASSES
    assert sum(map(len, calibration.values())) == 1024
    assert {len(images) for images in calibration.values()} == {102, 103}
    assert {len(images) for images in evaluation.values()} == {200}
    learned = [digest for images in calibration.values() for digest in images]
    reported = [digest for images in evaluation.values() for digest in images]
    assert len(set(learned) | set(reported)) == 1024 + 2000, "an image occurs twice"


def test_tars_tell_nothing_about_where_they_were_made():
    for path in (bundled.calibration_data(), bundled.evaluation_data()):
        with tarfile.open(path) as archive:
            members = archive.getmembers()
        assert [member.name for member in members] == sorted(member.name for member in members)
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}


def test_timm_reads_the_tars_with_their_labels():
    data = pytest.importorskip("timm.data")
    for path, count in ((bundled.calibration_data(), 1024), (bundled.evaluation_data(), 2000)):
        dataset = data.create_dataset("", root=str(path))
        assert len(dataset) == count
        image, label = dataset[count - 1]
        assert image.size == (32, 32) and label == CLASSES.index("truck")


def test_card_names_its_weights_by_hash():
    card = json.loads(bundled.reference_card().read_text(encoding="utf-8"))
    weights = bundled.reference_card().parent / card["weights"]
    assert weights.name == "reference.safetensors"
    assert file_sha256(weights) == card["sha256"]
    assert card["classes"] == CLASSES
    assert card["args"]["num_classes"] == len(CLASSES)
    assert {"mean", "std", "size", "interpolation"} <= set(card["preprocessing"])


def test_assets_are_listed_with_their_hashes_and_stay_small():
    files = {path.name: path for path in bundled.ASSETS.iterdir() if path.name != "README.md"}
    readme = (bundled.ASSETS / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| (\S+) \| .* \| ([\d,]+) \| `([0-9a-f]{64})` \|$", readme, re.M)
    assert {name for name, _, _ in listed} == set(files)
    for name, size, digest in listed:
        assert files[name].stat().st_size == int(size.replace(",", ""))
        assert file_sha256(files[name]) == digest
    assert sum(path.stat().st_size for path in files.values()) < 12_000_000


@pytest.mark.parametrize("get", [bundled.reference_card, bundled.calibration_data, bundled.evaluation_data])
def test_missing_file_is_the_users_to_mend(get, tmp_path, monkeypatch):
    monkeypatch.setattr(bundled, "ASSETS", tmp_path)
    with pytest.raises(UserError, match="lacks the bundled file .*reinstall"):
        get()
