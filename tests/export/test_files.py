"""Files that are written whole or not at all, with weights inside or beside."""

import onnx
import onnx_ir as ir
import pytest
from export_tools import random_plan, relative_difference, run

from vpruner.errors import UserError
from vpruner.export import files
from vpruner.export.fold import fold_file


@pytest.fixture
def small_limit(monkeypatch):
    monkeypatch.setattr(files, "INLINE_LIMIT", 10_000)


def test_large_weights_go_to_one_file_beside(exported, tmp_path, small_limit):
    dense = exported("class token")
    path = tmp_path / "large.onnx"
    files.save_model(files.load_model(dense.path), path)
    (data,) = (other for other in tmp_path.iterdir() if other != path)
    assert data.name.startswith("large.onnx.") and data.suffix == ".data"
    assert path.stat().st_size < 100_000 < data.stat().st_size
    onnx.checker.check_model(path, full_check=True)
    images = dense.images()
    assert relative_difference(run(path, images), run(dense.path, images)) == 0


def test_folding_a_large_file_gives_a_large_file(exported, tmp_path, small_limit):
    dense = exported("class token")
    large, pruned = tmp_path / "large.onnx", tmp_path / "pruned.onnx"
    files.save_model(files.load_model(dense.path), large)
    plan = random_plan(dense.geometry, 2)
    fold_file(large, plan, pruned)
    fold_file(dense.path, plan, tmp_path / "reference.onnx")
    images = dense.images()
    assert relative_difference(run(pruned, images), run(tmp_path / "reference.onnx", images)) == 0


def test_stale_weights_are_removed_and_others_are_not(exported, tmp_path, small_limit, monkeypatch):
    dense = exported("class token")
    path = tmp_path / "model.onnx"
    other = tmp_path / "other.onnx.0123456789ab.data"
    mine = tmp_path / "model.onnx.data"
    other.write_text("another model's")
    mine.write_text("the user's")
    files.save_model(files.load_model(dense.path), path)
    fold_file(dense.path, random_plan(dense.geometry, 2), path)
    assert len(list(tmp_path.glob("model.onnx.????????????.data"))) == 1
    run(path, dense.images())
    monkeypatch.setattr(files, "INLINE_LIMIT", 1 << 30)
    files.save_model(files.load_model(path), path)
    assert {file.name for file in tmp_path.iterdir()} == {mine.name, path.name, other.name}
    run(path, dense.images())


def test_a_missing_weights_file_is_named(exported, tmp_path, small_limit):
    path = tmp_path / "large.onnx"
    files.save_model(files.load_model(exported().path), path)
    (data,) = (other for other in tmp_path.iterdir() if other != path)
    data.unlink()
    with pytest.raises(UserError, match=f"needs its weights file {data.name}"):
        files.load_model(path)


def test_an_interrupted_write_keeps_the_old_file(exported, tmp_path, small_limit, monkeypatch):
    dense = exported("class token")
    path = tmp_path / "large.onnx"
    files.save_model(files.load_model(dense.path), path)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    model = files.load_model(dense.path)
    model.metadata_props["changed"] = "yes"
    real = ir.save

    def interrupted(*args, **kwargs):
        real(*args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(ir, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        files.save_model(model, path)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_empty_and_other_bytes_are_refused(tmp_path):
    for content in (b"", b"PK\x03\x04 not onnx", b"\x08\x08"):
        path = tmp_path / "odd.onnx"
        path.write_bytes(content)
        with pytest.raises(UserError, match="odd.onnx"):
            files.load_model(path)
    with pytest.raises(UserError, match="cannot read"):
        files.load_model(tmp_path)
