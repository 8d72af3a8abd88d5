"""Errors of other packages become one line that names the user's file; defects of ours stay as they are."""

import ast
import errno
import inspect
import io
import json
import math
import pathlib
import re
import resource
import tarfile
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import vpruner
from vpruner import api, pipeline
from vpruner.cli import main
from vpruner.core.boundary import CannotWrite, as_user_error, boundary, place_of, reading, writing
from vpruner.core.errors import GraphError, ParityError, UserError
from vpruner.core.files import atomic_path, scratch_beside, write_text
from vpruner.core.json_file import canonical_json
from vpruner.core.rows import append_rows, read_rows
from vpruner.core.scratch import temporary_folder
from vpruner.pipeline.calls import job


def foreign(module: str, name: str = "Fail", base: type = Exception, text: str = "no such thing\nat 5") -> Exception:
    """An error of another package, which need not be installed."""
    return type(name, (base,), {"__module__": module})(text)


FOREIGN = [
    foreign("onnx.onnx_cpp2py_export.checker", "ValidationError"),
    foreign("onnx_ir.serde", "SerdeError"),
    foreign("onnxruntime.capi.onnxruntime_pybind11_state"),
    foreign("safetensors._safetensors_rust", "SafetensorError"),
    foreign("safetensors_rust", "SafetensorError"),
    foreign("google.protobuf.message", "DecodeError"),
    foreign("PIL", "UnidentifiedImageError", OSError),
    foreign("PIL.Image", "DecompressionBombError"),
    tarfile.ReadError("no such thing"),
    zipfile.BadZipFile("no such thing"),
    json.JSONDecodeError("no such thing", "", 0),
    foreign("_pickle", "UnpicklingError"),
]


def raises(error: BaseException):
    raise error


@pytest.mark.parametrize("error", FOREIGN, ids=lambda error: type(error).__module__)
def test_errors_of_packages_name_the_files_that_were_given(error, tmp_path):
    (tmp_path / "a.onnx").touch()
    with pytest.raises(UserError, match=r"a\.onnx cannot be used: .*no such thing") as found, boundary(
        ["vit_tiny", None, 5, tmp_path / "a.onnx"]
    ):  # fmt: skip
        raises(error)
    assert found.value.__cause__ is error and "\n" not in str(found.value)


def test_the_names_of_packages_are_theirs():
    import onnx.checker
    import onnx_ir as ir
    from google.protobuf.message import DecodeError
    from onnxruntime.capi.onnxruntime_pybind11_state import InvalidGraph
    from PIL import UnidentifiedImageError
    from safetensors import SafetensorError

    for kind in (onnx.checker.ValidationError, ir.passes.PassError, DecodeError, InvalidGraph, UnidentifiedImageError,
                 SafetensorError):  # fmt: skip
        assert isinstance(as_user_error(kind("no")), UserError), kind


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (MemoryError(), "a.onnx: memory ran out; use fewer"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "a.onnx: memory ran out"),
        (foreign("torch", "OutOfMemoryError", RuntimeError, "CUDA out of memory"), "a.onnx: memory ran out"),
        (foreign("onnxruntime.capi", text="std::bad_alloc"), "a.onnx: memory ran out"),
        (RecursionError("maximum recursion depth exceeded"), "a.onnx is nested too deeply"),
        (OSError(errno.ENOSPC, "No space left on device", "b.bin"), "^b.bin: No space left on device; free some space"),
        (OSError(errno.EACCES, "Permission denied", b"b.bin"), "^b.bin: Permission denied"),
        (OSError(errno.EIO, "Input/output error"), "^Input/output error"),
    ],
)
def test_errors_of_the_system_say_what_there_was_too_little_of(error, says, tmp_path):
    (tmp_path / "a.onnx").touch()
    with pytest.raises(UserError, match=says), boundary([tmp_path / "a.onnx"]):
        raises(error)


@pytest.mark.parametrize(
    "error",
    [KeyError("x"), AssertionError(), TypeError("x"), RuntimeError("x"), ValueError("x"), ParityError("x"),
     BrokenPipeError(), KeyboardInterrupt(), ImportError("x"), GraphError("x")],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_defects_of_ours_pass_through_unchanged(error):
    with pytest.raises(type(error)) as found, boundary():
        raises(error)
    assert found.value is error and found.value.__cause__ is None


def test_what_a_pass_of_ours_raises_is_not_hidden_by_onnx_ir():
    for cause, expected in ((GraphError("node a"), GraphError), (KeyError("x"), type(None))):
        error = foreign("onnx_ir.passes", "PassError")
        error.__cause__ = cause
        assert type(as_user_error(error)) is expected


def test_a_reader_names_its_file_whatever_the_package_raises():
    for error in (*FOREIGN, RecursionError(), MemoryError(), OSError(errno.EIO, "Input/output error")):
        says = r"^a\.pth (cannot be read|is not weights, or is damaged): "
        with pytest.raises(UserError, match=says) as found, reading("a.pth", "save it again", "weights"):
            raises(error)
        assert found.value.hint == "save it again"
    with pytest.raises(UserError, match=r"^a.onnx cannot be read: .*invalid literal"), reading("a.onnx"):
        int("x")  # Raised in C, by the call itself.
    with (
        pytest.raises(UserError, match=r"is not an image, or is damaged: keys must be str"),
        reading("a", "", "an image"),
    ):
        json.dumps({json: 1})  # Raised in Python, by a package.


def test_a_defect_below_a_reader_stays_one():
    with pytest.raises(ValueError, match="is nan") as defect, reading("a.onnx"):
        canonical_json([math.nan])  # Raised by code of ours.
    assert place_of(defect.value).startswith("core/json_file.py:")
    for error in (UserError("x"), ImportError("x")):
        with pytest.raises(type(error)) as found, reading("a.onnx"):
            raises(error)
        assert found.value is error


@contextmanager
def files_of_at_most(size: int):
    """What ulimit -f does, in this process."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(params=[errno.EFBIG, errno.ENOSPC], ids=["ulimit", "full disk"])
def no_room(request, monkeypatch):
    """How a writer of bytes fails: really, where a limit of the process can do that; played for a full disk."""
    if request.param == errno.EFBIG:
        with files_of_at_most(50_000):
            yield "File too large; allow larger files: ulimit -f says how large they may be"
        return

    class Full(io.FileIO):
        def write(self, data):
            if self.tell() + len(data) > 50_000:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    def opened(path, mode="r", buffering=-1, encoding=None, errors=None, newline=None):
        raw = Full(path, mode.replace("b", "").replace("t", ""))
        if buffering == 0:
            return raw
        stream = io.BufferedWriter(raw) if mode[0] in "wa" else io.BufferedReader(raw)
        return stream if "b" in mode else io.TextIOWrapper(stream, encoding, errors, newline)

    monkeypatch.setattr(pathlib.Path, "open", opened)
    yield "No space left on device; free some space there"


def test_what_does_not_fit_leaves_what_was_there(no_room, tmp_path):
    path = tmp_path / "plan.json"
    write_text(path, "before")
    with pytest.raises(CannotWrite, match=f"^cannot write {path}: {no_room}, or choose another place with 'output'"):
        write_text(path, "x" * 100_000)
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_half_a_row_is_taken_back(no_room, tmp_path):
    path = tmp_path / "results.jsonl"
    append_rows(path, [{"kind": "mine", "text": "x" * 30_000}])
    with pytest.raises(UserError, match=f"^cannot write {path}: {no_room}"):
        append_rows(path, [{"kind": "mine", "text": "y" * 40_000}])
    (row,) = read_rows(path)
    assert row["text"] == "x" * 30_000


def test_a_file_in_a_scratch_folder_is_named_as_what_it_becomes(no_room, tmp_path):
    output = tmp_path / "runs" / "mine"
    with (
        pytest.raises(UserError, match=f"^cannot write {output}/plan.json: {no_room}"),
        scratch_beside(output, folder=True) as folder,
    ):
        write_text(folder / "plan.json", "x" * 100_000)
    output = tmp_path / "runs" / "a.onnx"
    with pytest.raises(UserError, match=f"^cannot write {output}: {no_room}"), scratch_beside(output) as folder:
        write_text(folder / "files" / "dense.onnx", "x" * 100_000)
    assert not (tmp_path / "runs").exists()
    with pytest.raises(GraphError) as found, scratch_beside(output) as folder:
        raise GraphError(f"{folder / 'a.onnx'} has no nodes", f"look at {folder}/b.onnx")
    assert str(found.value) == f"{output} has no nodes; look at {output}"


def test_temporary_files_name_the_folder_that_is_full(no_room, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    says = f"^cannot write temporary files in {tmp_path}: {no_room}, or set TMPDIR to a folder"
    with pytest.raises(UserError, match=says), scratch_beside(tmp_path / "out"), temporary_folder() as folder:
        write_text(Path(folder) / "a.txt", "x" * 100_000)
    torch = pytest.importorskip("torch")
    from vpruner.prune.tune.store import ActivationStore

    value = torch.arange(6.0).reshape(2, 3).T
    with ActivationStore(ram_bytes=1) as store:
        store.put("small", value)
        assert torch.equal(store.get("small"), value)
    with pytest.raises(UserError, match=says), ActivationStore(ram_bytes=1) as store:
        store.put("large", torch.zeros(100_000))
    assert not list(tmp_path.iterdir())


def test_weights_that_do_not_fit_are_said_in_one_line(tmp_path):
    torch = pytest.importorskip("torch")
    from vpruner.pipeline.learned import save_weights

    path = tmp_path / "model.safetensors"
    with (
        files_of_at_most(50_000),
        pytest.raises(UserError, match=f"^cannot write {path}: File too large; allow larger"),
    ):
        save_weights({"a": torch.zeros(100_000)}, path, {})
    assert not list(tmp_path.iterdir())


def test_what_numpy_cannot_write_is_said_in_the_words_of_the_system(tmp_path):
    says = f"^cannot write {tmp_path / 'a'}: File too large"
    for write in (np.ndarray.tofile, lambda array, stream: np.save(stream, array)):
        with pytest.raises(CannotWrite, match=says), files_of_at_most(50_000), atomic_path(tmp_path / "a") as temporary:
            write(np.zeros(100_000), temporary)
    full = OSError("problem writing element 2048 to file")
    with pytest.raises(CannotWrite, match="^cannot write a: No space left"), writing("a"):
        raises(full)


def test_other_errors_in_a_folder_are_not_about_writing(tmp_path):
    missing = tmp_path / "image.png"
    with pytest.raises(FileNotFoundError), scratch_beside(tmp_path / "out"), atomic_path(tmp_path / "a.json"):
        missing.read_bytes()
    with (
        pytest.raises(UserError, match=f"^cannot write {tmp_path}/out/a/b: No such file"),
        scratch_beside(tmp_path / "out", folder=True) as folder,
    ):
        (folder / "a" / "b").write_text("x")
    missing.mkdir()
    with pytest.raises(UserError, match=f"^cannot write {missing}: Is a directory"), writing(missing):
        missing.write_text("x")


# -- the command line -------------------------------------------------------------------------------------------------


def test_a_defect_is_one_honest_line_and_the_traceback_is_one_variable_away(monkeypatch, tmp_path):
    def fails(*arguments, **options):
        raise KeyError("x")

    monkeypatch.setattr("vpruner.core.rows.read_json_lines", fails)
    result = CliRunner().invoke(main, ["report", str(tmp_path / "rows.jsonl")])
    assert result.exit_code == 1 and result.stderr.count("\n") == 1
    said = re.sub(r"rows\.py:\d+ \(at core/test_boundary\.py:\d+\)", "rows.py:LINE", result.stderr)
    assert said.startswith(
        "Error: vpruner stopped on an error of its own: KeyError: 'x' in core/rows.py:LINE; this is a"
    )
    result = CliRunner().invoke(main, ["report", str(tmp_path / "rows.jsonl")], env={"VPRUNER_DEBUG": "1"})
    assert isinstance(result.exception, KeyError)


def test_a_command_names_its_file_where_a_package_does_not(monkeypatch, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.touch()
    for error, says in ((FOREIGN[2], "rows.jsonl cannot be used: onnxruntime says: no such thing"),
                        (MemoryError(), "rows.jsonl: memory ran out")):  # fmt: skip
        monkeypatch.setattr("vpruner.core.rows.read_json_lines", lambda *given, error=error, **others: raises(error))
        result = CliRunner().invoke(main, ["report", str(path)])
        assert result.exit_code == 2 and says in result.stderr and result.stderr.count("\n") == 1
        with pytest.raises(UserError, match=says), job(None, path):
            read_rows(path)


def test_every_call_of_the_python_api_lies_in_the_boundary():
    """Each public function and method that does work does it within job(), which holds the boundary."""
    outside = []
    for module in (api, pipeline.pruned, pipeline.images):
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and len(node.body) > 2:
                calls = [
                    one.func.id
                    for one in ast.walk(node)
                    if isinstance(one, ast.Call) and isinstance(one.func, ast.Name)
                ]
                public = node.name in {*vpruner.__all__, "prune", "with_plan", "export", "save", "module"}
                if public and "job" not in calls:
                    outside.append(f"{module.__name__}.{node.name}")
    assert not outside


def test_folders_that_were_made_for_nothing_go(tmp_path):
    with pytest.raises(ZeroDivisionError), scratch_beside(tmp_path / "runs" / "mine" / "out", folder=True):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with scratch_beside(tmp_path / "runs" / "mine" / "out", folder=True) as folder:
        folder.rename(tmp_path / "runs" / "mine" / "out")
    assert (tmp_path / "runs" / "mine" / "out").is_dir()
