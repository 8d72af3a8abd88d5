"""Which files may be replaced: those that vpruner wrote, as their marks say."""

import os
import shutil
import socket

import pytest
from PIL import Image

from vpruner.core.errors import UserError
from vpruner.core.files import atomic_path, scratch_beside, write_text
from vpruner.core.ours import PICTURE_MARKS, is_ours, marked_picture
from vpruner.pipeline.folders import check_free, check_output

#: Inputs of a run, and files that no mark fits into.
_OTHERS = {".tar", ".pt"}


def test_every_file_that_an_earlier_version_wrote_is_known(repository):
    recorded = repository / "tests" / "recorded"
    written = [path for path in recorded.rglob("*") if path.is_file() and path.suffix not in _OTHERS]
    unknown = [path.name for path in written if not is_ours(path)]
    assert unknown == ["README.md"] and len(written) > 25
    assert is_ours(recorded / "static") and is_ours(recorded / "compare") and not is_ours(recorded)


@pytest.mark.parametrize(
    "name", ["a.json", "a.md", "a.html", "a.onnx", "a.safetensors", "a.jsonl", "a.png", "a.svg", "a.engine", "a.txt"]
)
@pytest.mark.parametrize("content", [b"years of work", b'{"schema": 1}', b"\xff" * 100, b"\x08\x09\x12\x07pytorch"])
def test_a_file_without_the_mark_is_not_ours(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    assert not is_ours(path)
    with pytest.raises(UserError, match=f"{name} is there already, and vpruner did not write it; choose another name"):
        check_output(path, "")
    assert path.read_bytes() == content
    path.write_bytes(b"")
    check_output(path, "")


def test_pictures_are_marked(tmp_path):
    figures = pytest.importorskip("matplotlib.figure")
    for form, marks in PICTURE_MARKS.items():
        figures.Figure().savefig(tmp_path / f"marked.{form}", metadata=marks)
        figures.Figure().savefig(tmp_path / f"plain.{form}")
        assert is_ours(tmp_path / f"marked.{form}") and not is_ours(tmp_path / f"plain.{form}")
    Image.new("RGB", (4, 4)).save(tmp_path / "tokens.png", pnginfo=marked_picture())
    assert is_ours(tmp_path / "tokens.png")


def test_pipes_and_devices_are_no_output(tmp_path):
    pipe, plug = tmp_path / "pipe.json", tmp_path / "plug.json"
    os.mkfifo(pipe)
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(str(plug))
        for path, what in ((pipe, "a pipe"), (plug, "a socket"), ("/dev/null", "a device"), ("/dev/stdout", "an open")):
            with pytest.raises(UserError, match=f"is {what}.*, expected the name of a file"):
                write_text(path, "text")
            with pytest.raises(UserError, match=f"is {what}.*, expected the name of a file"):
                scratch_beside(path).__enter__()
            with pytest.raises(UserError, match=f"is {what}.*, expected the name of a file"):
                check_output(pipe.with_name("x") / path, "")
        with pytest.raises(UserError, match=r"pipe\.json is a pipe; choose another folder"):
            check_free(pipe, force=True)
    assert pipe.is_fifo()


def test_a_link_stays_and_its_target_is_written(tmp_path):
    (tmp_path / "store").mkdir()
    link, target = tmp_path / "plan.json", tmp_path / "store" / "blob"
    link.symlink_to(target)
    write_text(link, "first")  # The target is not there yet.
    write_text(link, "second")
    assert link.is_symlink() and target.read_text() == "second"
    assert os.listdir(tmp_path / "store") == ["blob"]
    with pytest.raises(UserError, match="vpruner did not write it"):
        check_output(link, ".json")
    write_text(link, '{"schema": 1, "vpruner": "0.1.0"}')
    check_output(link, ".json")
    around = tmp_path / "around"
    around.symlink_to(around)
    with pytest.raises(UserError, match="is a link that leads nowhere"):
        write_text(around, "text")


def test_a_run_of_an_earlier_version_may_be_replaced(repository, tmp_path):
    folder = shutil.copytree(repository / "tests" / "recorded" / "static", tmp_path / "run")
    check_free(folder, force=True)
    (folder / "report.md").write_text("# My own notes\n")
    with pytest.raises(UserError, match=r"run holds report\.md, which no run wrote"):
        check_free(folder, force=True)


def test_atomic_path_leaves_what_was_there_when_it_fails(tmp_path):
    (tmp_path / "a.txt").write_text("before")

    def fail():
        with atomic_path(tmp_path / "a.txt") as temporary:
            temporary.write_text("after")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.txt", "before")]
