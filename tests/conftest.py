"""What every test shares: where the repository is, files made once, and which tests this machine cannot run."""

import contextlib
import functools
import gc
import importlib
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import store
from fail_over import pytest_addoption, pytest_configure  # noqa: F401

#: The module in which torch's exporter keeps them.
REGISTRY = "torch.onnx._internal.exporter._registration"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Escape surrogates in captured logs: pytest-xdist stops the whole run when it has to send one."""
    report = yield
    report.sections = [(title, text.encode("utf-8", "backslashreplace").decode()) for title, text in report.sections]
    return report


@pytest.fixture(scope="session")
def repository() -> Path:
    return Path(__file__).resolve().parents[1]


@pytest.fixture
def reported():
    """What the code under test reports: its stages and remarks."""
    from vpruner.core import progress

    with progress.reporting(progress.Sink()) as record:
        yield record


# The makers import torch, which collecting the suite must not do.
@pytest.fixture(scope="module")
def card(tmp_path_factory) -> Path:
    """A model card of a tiny random ViT with weights beside it."""
    from tiny_cards import write_card

    return write_card(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """A folder of labelled images for it."""
    from tiny_cards import write_images

    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="session")
def exported():
    """``exported(kind, opset=, dynamic_batch=, batch_size=, **changes)``: a dense ONNX file of a tiny model."""
    from export_tools import exported

    return exported


@pytest.fixture(scope="session")
def written():
    """``written(Foreign(...))``: the file, exported once."""
    from foreign_graphs import written

    return written


def runs_commands(module: Path) -> bool:
    alone = ("test_docs", "test_golden", "test_recorded")
    return module.parent.name in ("cli", "pipeline", "benchmarks") or module.stem in alone


@pytest.fixture(scope="module", autouse=True)
def exports_once(request):
    """Commands and jobs that export a model get the answer of PyTorch's exporter from the store where it is there.

    What the exporter does is tested in tests/export, where it is always asked.
    """
    if not (runs_commands(request.path) or request.path.stem == "test_ort_torch"):
        yield
        return
    torch = pytest.importorskip("torch")
    from exports import remembering

    with contextlib.suppress(ImportError):
        importlib.import_module(REGISTRY)
        read_operators_once()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.onnx, "export", remembering(torch.onnx.export))
        yield


@pytest.fixture(scope="module", autouse=True)
def settles_soon(request):
    """One untimed run before each that is timed, not up to twenty: tiny graphs and machines in memory fill no caches.

    How many there are otherwise is tested in tests/core/test_timing.py.
    """
    with pytest.MonkeyPatch.context() as patch:
        if runs_commands(request.path) or request.path.parent.name == "runtime":
            patch.setattr("vpruner.core.timing.MOST_SETTLING_RUNS", 1)
        yield


@pytest.fixture(scope="module", autouse=True)
def one_onnxruntime_thread(request):
    """Of onnxruntime, where a command is not told how many: threads that wait for each other on a busy machine take a
    hundred times as long as tiny graphs do.
    """
    wanted = runs_commands(request.path) or request.path.stem == "test_api"
    if not (wanted and importlib.util.find_spec("onnxruntime")):
        yield
        return
    import onnxruntime

    class Options(onnxruntime.SessionOptions):
        def __init__(self):
            super().__init__()
            self.intra_op_num_threads = 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnxruntime, "SessionOptions", Options)
        yield


def pytest_sessionstart(session):
    if not hasattr(session.config, "workerinput"):
        store.sweep()


def spare_collector() -> None:
    """Let the garbage collector pass over what is there by now, which is what was imported.

    Each measuring begins with a full collection, which takes a tenth of a second with all of torch in sight.
    """
    gc.collect()
    gc.freeze()


def pytest_collection_finish():
    spare_collector()


def pytest_runtest_setup():
    read_operators_once()


def read_operators_once():
    """Let torch read the operators that it exports to once: a third of every export is parsing their source anew."""
    module = sys.modules.get(REGISTRY)
    registry = getattr(module, "ONNXRegistry", None)
    if registry and not hasattr(registry, "read_again"):
        registry.read_again = registry.from_torchlib
        registry.from_torchlib = staticmethod(functools.cache(registry.read_again))
        spare_collector()


@pytest.fixture(scope="session", autouse=True)
def store_unchanged():
    """No test changes what all of them share."""
    yield
    assert not store.changed()


def _nvidia_gpu() -> bool:
    # nvidia-smi, not torch.cuda: collecting the suite must not import torch.
    if not shutil.which("nvidia-smi"):
        return False
    return b"GPU 0" in subprocess.run(["nvidia-smi", "-L"], capture_output=True, check=False).stdout


def pytest_collection_modifyitems(items):
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not _nvidia_gpu():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU; nvidia-smi lists none"))
