"""Record what the commands say and write today as what is expected of them: python tests/golden/record.py [-k help]

Read the difference (git diff tests/golden) before it is committed: it is what a user will see change.
"""

import os
import sys
from pathlib import Path

import pytest

if __name__ == "__main__":
    os.environ["VPRUNER_RECORD"] = "1"
    sys.exit(pytest.main(["-q", "-p", "no:xdist", str(Path(__file__).parents[1] / "test_golden.py"), *sys.argv[1:]]))
