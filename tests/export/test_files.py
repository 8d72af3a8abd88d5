"""Files that are written whole or not at all, with weights inside or beside."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from click.testing import CliRunner
from export_tools import random_plan, relative_difference, run

from vpruner.cli import main
from vpruner.core.errors import UserError
from vpruner.export import files
from vpruner.export.fold import fold_file
from vpruner.export.graph import open_graph


@pytest.fixture
def small_limit(exported, monkeypatch):
    exported()  # Other tests use it too, with its weights inside.
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


def test_a_file_moves_with_its_weights_and_they_are_not_copied(exported, tmp_path, small_limit):
    dense = exported("class token")
    source, target = tmp_path / "scratch" / "a.onnx", tmp_path / "b.onnx"
    files.save_model(files.load_model(dense.path), source)
    (data,) = source.parent.glob("a.onnx.*.data")
    inode = data.stat().st_ino
    stale = tmp_path / "b.onnx.0123456789ab.data"
    stale.write_text("of an earlier file")
    files.move_model(source, target)
    (moved,) = tmp_path.glob("b.onnx.*.data")
    assert moved.stat().st_ino == inode and not list(source.parent.iterdir())
    images = dense.images()
    assert relative_difference(run(target, images), run(dense.path, images)) == 0
    again = tmp_path / "other" / "b.onnx"
    again.parent.mkdir()
    text = target.read_bytes()
    files.move_model(target, again)
    assert again.read_bytes() == text and relative_difference(run(again, images), run(dense.path, images)) == 0


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


def test_a_weights_file_shorter_than_its_entries_is_named(exported, tmp_path, small_limit):
    path = tmp_path / "large.onnx"
    files.save_model(files.load_model(exported().path), path)
    (data,) = (other for other in tmp_path.iterdir() if other != path)
    whole = data.read_bytes()
    data.write_bytes(whole[:-1])
    with pytest.raises(
        UserError, match=rf"large.onnx needs initializer '.*{data.name}, which has {len(whole) - 1} bytes"
    ):
        files.load_model(path)


@pytest.mark.parametrize("form", ["raw", "typed", "a constant node's"])
def test_numbers_that_do_not_fill_their_shape_are_damage(form, tmp_path):
    numbers = onnx.helper.make_tensor("w", onnx.TensorProto.FLOAT, [2, 3], [1.0] * 6, raw=False)
    if form == "raw":
        numbers = onnx.numpy_helper.from_array(np.ones((2, 3), np.float32), "w")
        numbers.raw_data = numbers.raw_data[:-4]
    else:
        del numbers.float_data[-1]
    constant = onnx.helper.make_node("Constant", [], ["w"], name="numbers", value=numbers)
    infos = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2, 3]) for name in "xy"]
    nodes = [onnx.helper.make_node("Add", ["x", "w"], ["y"])]
    inside = form.startswith("a constant")
    graph = onnx.helper.make_graph(
        [constant, *nodes] if inside else nodes, "add", infos[:1], infos[1:], [] if inside else [numbers]
    )
    path = tmp_path / "damaged.onnx"
    path.write_bytes(onnx.helper.make_model(graph).SerializeToString())
    where = "attribute 'value' of node 'numbers'" if inside else "initializer 'w'"
    found = "has 20 bytes of 24" if form == "raw" else "cannot be read"
    for command in COMMANDS:
        assert f"damaged.onnx is damaged: {where} {found}" in refused(command, path, tmp_path)


#: As a user types them; PATH is the file.
COMMANDS = {
    "fold": ["fold", "PATH", "--identity", "-q"],
    "inspect": ["inspect", "PATH"],
    "check": ["check", "PATH", "--for", "trt10"],
    "convert": ["convert", "PATH", "--precision", "int8-dynamic", "-q"],
}


def refused(command, path, folder):
    """The one line of error of a command that fails and writes nothing."""
    before = set(folder.iterdir())
    output = ["-o", str(folder / "out.onnx")] if command in ("fold", "convert") else []
    arguments = [str(path) if argument == "PATH" else argument for argument in COMMANDS[command]]
    result = CliRunner().invoke(main, [*arguments, *output])
    assert isinstance(result.exception, SystemExit) and result.exit_code == 2, (result.exception, result.output)
    (line,) = result.stderr.strip().splitlines()
    assert set(folder.iterdir()) == before and not result.stdout
    return line


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_names_what_is_not_whole(command, exported, tmp_path, small_limit):
    whole = exported().path
    cut = tmp_path / "cut.onnx"
    for length in (0, 20, 5000, -200):
        cut.write_bytes(whole.read_bytes()[:length])
        assert "cut.onnx" in refused(command, cut, tmp_path)
    assert "nowhere.onnx" in refused(command, tmp_path / "nowhere.onnx", tmp_path)
    path = tmp_path / "large.onnx"
    files.save_model(files.load_model(whole), path)
    (data,) = tmp_path.glob("large.onnx.*.data")
    data.write_bytes(data.read_bytes()[:1000])
    if command == "check":  # A finding there: the linter reads no weights.
        result = CliRunner().invoke(main, ["check", str(path), "--for", "trt10"])
        assert result.exit_code == 1 and "has 1000 bytes of" in result.stdout and data.name in result.stdout
        return
    line = refused(command, path, tmp_path)
    assert "large.onnx needs initializer" in line and f"{data.name}, which has 1000 bytes of" in line
    data.unlink()
    assert f"large.onnx needs its weights file {data.name}" in refused(command, path, tmp_path)


def test_an_initializer_of_another_type_than_declared_is_refused(exported, tmp_path):
    """ONNX's checker is given the declaration alone where the numbers are many."""
    model = onnx.load(exported("class token").path)
    name = next(one.name for one in model.graph.initializer if list(one.dims) == [32, 96])
    tensor = next(one for one in model.graph.initializer if one.name == name)
    tensor.data_type = onnx.TensorProto.INT32
    declared = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [32, 96])
    model.graph.value_info.append(declared)
    onnx.save(model, tmp_path / "odd.onnx")
    with pytest.raises(UserError, match=f"odd.onnx is damaged: .*'{name}' holds INT32, and is declared as FLOAT"):
        open_graph(tmp_path / "odd.onnx")
