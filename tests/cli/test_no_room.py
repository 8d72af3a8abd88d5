"""Commands that run out of room on the disk: one line that names the output, and nothing half-written."""

import resource

import pytest
from commands import call, fails


@pytest.mark.parametrize("size", [2_000, 100_000])
def test_a_graph_that_does_not_fit(size, card, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    output = tmp_path / "dense.onnx"
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))  # What ulimit -f does.
    try:
        fails(
            "export", card, "-o", output, says=f"cannot write {output}: File too large; allow larger files: ulimit -f"
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())
    call("export", card, "-o", output)
    assert list(tmp_path.iterdir()) == [output]
