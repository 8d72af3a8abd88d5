"""How long does ``vpruner fold`` take, and how much memory? On a large file, in a process of its own.

    python benchmarks/fold_memory.py
    python benchmarks/fold_memory.py --package ../older --way "read by each step"

A dense file of a timm model with random weights, and a plan that lets patches go evenly over the last five sixths of
the blocks. CPU time says more than the wall clock of a machine that others use. Peak memory is what Linux counts for
the process: everything resident, pages of mapped files included, and of that what is anonymous, which cannot be read
anew from a file. How often Python opens the dense file and a graph is recognised is counted on the bundled reference,
where it is the same: counting slows the process down. ``--package`` names a folder with another ``vpruner`` to measure.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from latency_ort import open_dense

import vpruner
from vpruner.core.environment import environment
from vpruner.core.files import file_sha256
from vpruner.core.plan import TokenPlan
from vpruner.core.rows import append_rows
from vpruner.core.specs import ExportSpec
from vpruner.pipeline.graphs import write_dense
from vpruner.prune.models import open_model

FOLD = "from vpruner.cli import main; main()"
#: The same, and at the end a line with how often the file named first was opened, and a graph was recognised.
COUNTED_FOLD = """
import json, os, sys
dense, counts = os.path.realpath(sys.argv[2]), {"reads": 0, "recognitions": 0}
def opened(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, os.PathLike)):
        counts["reads"] += os.path.realpath(arguments[0]) == dense
def called(frame, event, argument):
    if event == "call" and frame.f_code.co_name == "follow":
        counts["recognitions"] += frame.f_globals["__name__"] == "vpruner.export.follow.blocks"
from vpruner.cli import main
sys.addaudithook(opened)
sys.setprofile(called)
main(standalone_mode=False)
sys.setprofile(None)
print(json.dumps(counts))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_large_patch16_224", help="A timm name.")
    parser.add_argument("--package", type=Path, default=Path(vpruner.__file__).parents[1])
    parser.add_argument("--way", default="opened once", help="What to call the code that is measured.")
    parser.add_argument("--folder", type=Path, help="Where dense.onnx and plan.json stay; made there if missing.")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results/fold_memory.jsonl"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder, small = args.folder or Path(scratch, "large"), Path(scratch, "small")
        if not (folder / "plan.json").exists():
            write_inputs(open_dense(args.model, None, args.seed), folder, args.seed)
        write_inputs(open_model(), small, args.seed)
        counts = json.loads(
            subprocess.check_output(fold(COUNTED_FOLD, small), env=paths(args.package)).splitlines()[-1]
        )
        for repeat in range(args.repeats):
            found = measured(fold(FOLD, folder), paths(args.package))
            row = {
                "schema": 1,
                "kind": "fold",
                "benchmark": "fold_memory",
                "way": args.way,
                "model": args.model,
                "repeat": repeat,
                "file_bytes": (folder / "dense.onnx").stat().st_size,
                **found,
                **counts,
                "pruned_sha256": file_sha256(folder / "pruned.onnx"),
                "environment": environment(),
            }
            (folder / "pruned.onnx").unlink()
            append_rows(args.output, [row])
            print(
                {key: value for key, value in row.items() if key not in ("environment", "schema", "kind")}, flush=True
            )


def write_inputs(loaded, folder: Path, seed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_dense(loaded, folder / "dense.onnx", ExportSpec())
    geometry = loaded.adapter.geometry
    exits = np.linspace(geometry.depth / 6, geometry.depth, geometry.patches).round().astype(int)
    exits = np.random.default_rng(seed).permutation(exits)
    TokenPlan.from_exits(loaded.name, geometry, exits, weights_sha256=loaded.sha256).save(folder / "plan.json")


def fold(code: str, folder: Path) -> list[str]:
    files = [str(folder / "dense.onnx"), "--plan", str(folder / "plan.json"), "-o", str(folder / "pruned.onnx"), "-q"]
    return [sys.executable, "-c", code, "fold", *files]


def paths(package: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(package.resolve())}


def measured(command: list[str], env: dict[str, str]) -> dict[str, float]:
    """Seconds, and the most memory at once, of a process that succeeds."""
    started, peak, anonymous = time.perf_counter(), 0, 0
    with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL) as process:
        while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
            # Not getrusage: its high-water mark begins at that of this process.
            peak = max(peak, memory(process.pid, "VmHWM"))
            anonymous = max(anonymous, memory(process.pid, "RssAnon"))
            time.sleep(0.02)
        process.returncode = os.waitstatus_to_exitcode(ended[1])
    if process.returncode:
        raise SystemExit(f"vpruner fold failed with exit code {process.returncode}")
    return {
        "wall_seconds": round(time.perf_counter() - started, 1),
        "user_seconds": round(ended[2].ru_utime, 1),
        "system_seconds": round(ended[2].ru_stime, 1),
        "peak_bytes": peak,
        "peak_anonymous_bytes": anonymous,
    }


def memory(pid: int, name: str) -> int:
    """Bytes; 0 of a process that ends."""
    try:
        found = re.search(rf"{name}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0
    return 1024 * int(found[1]) if found else 0


if __name__ == "__main__":
    main()
