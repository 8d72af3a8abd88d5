"""What a measurement was made on: hardware and versions, nothing that names a person, a host or a folder."""

from __future__ import annotations

import os
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

from .. import __version__

#: Distributions whose version can move a latency or an accuracy. Several bring the same import name.
PACKAGES = (
    "numpy",
    "pillow",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-openvino",
    "onnxruntime-directml",
    "openvino",
    "tensorrt",
    "torch",
    "timm",
    "transformers",
    "onnx",
)


#: Of a container, in versions 2 and 1: its limit, what it uses, and which line of ``memory.stat`` is idle cache.
_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "inactive_file"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "total_inactive_file",
    ),
)


def environment() -> dict[str, Any]:
    """A JSON object that travels with every measurement.

    Versions are read from the installed packages' metadata: nothing heavy is imported. What cannot be read is None.
    ``load_average_1m`` is the machine's at this moment: read before measuring, it tells whether others used it.
    """
    return {
        "cpu": cpu_model(),
        "board": _text("/proc/device-tree/model"),
        "cores_usable": usable_cores(),
        "memory_gib": _memory_gib(),
        "gpus": _nvidia_gpus(),
        "machine": platform.machine(),
        "os": _os_name(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "vpruner": __version__,
        "packages": {name: version for name in PACKAGES if (version := _version(name)) is not None},
        "load_average_1m": _load_average(),
        "cpu_governor": _text("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
    }


def usable_cores() -> int:
    """Logical cores this process may run on: the affinity mask, cut by the container's CPU quota where there is one."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS and Windows
        cores = os.cpu_count() or 1
    quota, _, period = (_text("/sys/fs/cgroup/cpu.max") or "").partition(" ")
    if quota.isdigit() and period.isdigit() and int(period):
        cores = min(cores, max(1, int(quota) // int(period)))
    return cores


def available_memory() -> int | None:
    """Bytes that this process can still take: what Linux calls available, cut by the container's limit where there is
    one; None where that is not known."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", _text("/proc/meminfo") or "", re.MULTILINE)
    known = [] if found is None else [int(found[1]) << 10]
    for limit, used, cache in _CGROUPS:
        numbers = [_text(limit) or "", _text(used) or ""]
        if all(number.isdigit() for number in numbers):
            # Pages of files that were not touched lately count as used, and are given back when they are needed.
            idle = re.search(rf"^{cache} (\d+)", _text(Path(used).with_name("memory.stat")) or "", re.MULTILINE)
            known.append(int(numbers[0]) - int(numbers[1]) + (0 if idle is None else int(idle[1])))
    return max(0, min(known)) if known else None


def cpu_model() -> str | None:
    """The processor's name; on ARM, where the kernel gives none, implementer and part number."""
    return cpu_model_from_cpuinfo(_text("/proc/cpuinfo") or "") or platform.processor() or None


def cpu_model_from_cpuinfo(text: str) -> str | None:
    """The name in the text of ``/proc/cpuinfo``."""
    values: dict[str, str] = {}
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon and value.strip():
            values.setdefault(key.strip(), value.strip())
    if "model name" in values:
        return values["model name"]
    if "CPU part" in values:
        return f"ARM implementer {values.get('CPU implementer', '?')} part {values['CPU part']}"
    return values.get("Hardware")


def _nvidia_gpus() -> list[str]:
    """Model names. The driver's files are read, so that neither CUDA nor nvidia-smi is needed."""
    names = []
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        # The file also holds the serial-like UUID and bus address; the model alone is taken.
        lines = (_text(path) or "").splitlines()
        names += [line.partition(":")[2].strip() for line in lines if line.startswith("Model:")]
    return names


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, OSError, ValueError):
        return None


def _os_name() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return f"{platform.system()} {platform.release()}"


def _load_average() -> float | None:
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):
        return None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _text(path: str | Path) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip("\0\n ") or None
    except OSError:
        return None
