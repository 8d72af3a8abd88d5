"""What every test shares: where the repository is, and which tests this machine cannot run."""

import shutil
import subprocess
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def repository() -> Path:
    return Path(__file__).resolve().parents[1]


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
