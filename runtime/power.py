"""What the device does while it is measured: power, clocks, temperature, and whether it holds itself back.

A discrete GPU is asked through NVML (the package ``nvidia-ml-py``), a Jetson through ``tegrastats``; the settings that
decide a Jetson's speed through ``nvpmodel`` and ``jetson_clocks``. All of it is optional: what is absent is None, with
one remark that says what is missing.
"""

from __future__ import annotations

import importlib
import re
import shutil
import statistics
import subprocess
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

#: Seconds between two samples. NVML's own readings of power are some tens of milliseconds old.
INTERVAL = 0.1
#: A clock that falls by more than this during steady work was not let run free.
CLOCK_DROP = 0.1
#: Bits of ``nvmlClocksEventReasons``: those that slow down steady work. Idleness and clocks that the user set do not.
_REASONS = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}
#: Rails that measure all of a module or board, the most inclusive first. Where there is none, rails are added up.
_INPUT_RAILS = ("VIN", "VDD_IN", "POM_5V_IN")


@dataclass(frozen=True)
class Sample:
    """The device at one moment; None is not known.

    Attributes:
        watts: Of the whole GPU or module.
        gpu_mhz, memory_mhz: Clocks.
        celsius: Of the GPU.
        load: Share of time that the GPU was busy, in percent.
        rails: mW by name, on a Jetson.
        reasons: What holds the clocks back.
    """

    watts: float | None = None
    gpu_mhz: float | None = None
    memory_mhz: float | None = None
    celsius: float | None = None
    load: float | None = None
    rails: Mapping[str, float] = field(default_factory=dict)
    reasons: tuple[str, ...] = ()


# -- tegrastats -------------------------------------------------------------------------------------------------------

# "VDD_GPU_SOC 1617mW/1617mW" (Orin, Thor), "GPU 1089/1089" (Xavier under JetPack 4), never "RAM 2448/7620MB". A rail
# without load can read below zero.
_RAIL = re.compile(r"(?<!\S)([A-Za-z][A-Za-z0-9_]*) (-?\d+)(?:mW)?/(-?\d+)(?:mW)?(?!\S)")
# "GR3D_FREQ 99%@[1300]", "99%@[1098,1098,1098]" (Thor), "@[314,314,314]" (Thor, JetPack 7.0), "99%@1300", "99%".
_CLOCK = r"(?<!\S)(?:{name}) (?:(\d+)%)?(?:@\[?(\d+)((?:,\d+)*)\]?)?"
_GPU_CLOCK = re.compile(_CLOCK.format(name="GR3D_FREQ|GR3D"))
_MEMORY_CLOCK = re.compile(_CLOCK.format(name="EMC_FREQ|EMC"))
_TEMPERATURE = re.compile(r"(?<!\S)([A-Za-z][A-Za-z0-9_]*)@(-?\d+(?:\.\d+)?)C(?!\S)")


def parse_tegrastats(line: str) -> Sample:
    """One line of ``tegrastats``, of any Jetson: names of rails differ by module and are taken as they come."""
    rails = {name: float(now) for name, now, _ in _RAIL.findall(line)}
    gpu, memory = _GPU_CLOCK.search(line), _MEMORY_CLOCK.search(line)
    temperatures = {name.lower(): float(value) for name, value in _TEMPERATURE.findall(line)}
    clocks = [float(one) for one in f"{gpu[2]}{gpu[3]}".split(",")] if gpu and gpu[2] else []
    watts, _ = total_power(rails)
    return Sample(
        watts=watts,
        gpu_mhz=max(clocks, default=None),
        memory_mhz=float(memory[2]) if memory and memory[2] else None,
        # A sensor that is switched off says -256.
        celsius=next((temperatures[name] for name in ("gpu", "tj", "cpu") if temperatures.get(name, -1) > 0), None),
        load=float(gpu[1]) if gpu and gpu[1] else None,
        rails=rails,
    )


def total_power(rails: Mapping[str, float]) -> tuple[float | None, str]:
    """W of the module and what that is the reading of."""
    for name in _INPUT_RAILS:
        if name in rails:
            return rails[name] / 1e3, f"rail {name}"
    if not rails:
        return None, ""
    return sum(rails.values()) / 1e3, "sum of " + ", ".join(rails)


# -- settings of a Jetson ---------------------------------------------------------------------------------------------


def parse_nvpmodel(text: str) -> str | None:
    """The mode in what ``nvpmodel -q`` prints: ``"NV Power Mode: MAXN"`` -> ``"MAXN"``."""
    found = re.search(r"^NV Power Mode:\s*(\S.*?)\s*$", text, re.MULTILINE)
    return found[1] if found else None


def parse_jetson_clocks(text: str) -> dict[str, Any] | None:
    """What ``jetson_clocks --show`` says: ``gpu_mhz`` (lowest, highest, now) and whether clocks are ``pinned``.

    Pinned are clocks whose lowest frequency is the highest; the GPU's line decides, since the GPU is what is measured.
    """
    found = re.search(r"^GPU\s+MinFreq=(\d+)\s+MaxFreq=(\d+)\s+CurrentFreq=(\d+)", text, re.MULTILINE)
    if found is None:
        return None
    low, high, now = (int(value) / 1e6 for value in found.groups())
    return {"gpu_mhz": [round(low, 1), round(high, 1), round(now, 1)], "pinned": low == high}


def jetson_state() -> tuple[dict[str, Any] | None, list[str]]:
    """Power mode and clocks of a Jetson, and remarks; (None, []) on any other machine."""
    if shutil.which("nvpmodel") is None and shutil.which("tegrastats") is None:
        return None, []
    mode = parse_nvpmodel(_output("nvpmodel", "-q") or "")
    clocks = parse_jetson_clocks(_output("jetson_clocks", "--show") or "")
    remarks = []
    if clocks is None:
        remarks.append("whether clocks are pinned is not known: jetson_clocks --show needs root (run with sudo)")
    elif not clocks["pinned"]:
        remarks.append("clocks are not pinned, latencies follow the load: sudo jetson_clocks")
    return {"power_mode": mode, "clocks": clocks}, remarks


def _output(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


# -- sources ----------------------------------------------------------------------------------------------------------


class Source(ABC):
    """Where samples come from.

    Attributes:
        name: ``"nvml"`` or ``"tegrastats"``.
        watts_of: What the power is the reading of.
    """

    name: str
    watts_of: str = ""

    @abstractmethod
    def samples(self, stop: threading.Event) -> Iterator[Sample]:
        """Give samples until ``stop``."""

    def energy(self) -> float | None:
        """J since some moment in the past; None where there is no such counter."""
        return None

    def state(self) -> dict[str, Any]:
        """Settings that decide the speed."""
        return {}

    def close(self) -> None:  # noqa: B027 - most sources hold nothing
        """Give back what was opened."""


class Nvml(Source):
    """A discrete GPU.

    Args:
        index: Which, in the order of NVML.

    Raises:
        ImportError: ``nvidia-ml-py`` is not installed.
        Exception: NVML cannot be used here; its own error.
    """

    name, watts_of = "nvml", "board power"

    def __init__(self, index: int = 0):
        self.nvml = importlib.import_module("pynvml")
        self.nvml.nvmlInit()
        self.handle = self.nvml.nvmlDeviceGetHandleByIndex(index)

    def samples(self, stop: threading.Event) -> Iterator[Sample]:
        while not stop.is_set():
            yield self.sample()
            stop.wait(INTERVAL)

    def sample(self) -> Sample:
        nvml = self.nvml
        watts, bits = self._ask("nvmlDeviceGetPowerUsage"), self._ask("nvmlDeviceGetCurrentClocksEventReasons")
        if bits is None:  # its name before release 12.535
            bits = self._ask("nvmlDeviceGetCurrentClocksThrottleReasons")
        load = self._ask("nvmlDeviceGetUtilizationRates")
        return Sample(
            watts=None if watts is None else watts / 1e3,
            gpu_mhz=_float(self._ask("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_SM)),
            memory_mhz=_float(self._ask("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_MEM)),
            celsius=_float(self._ask("nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU)),
            load=None if load is None else float(load.gpu),
            reasons=tuple(text for bit, text in _REASONS.items() if bits and bits & bit),
        )

    def energy(self) -> float | None:
        millijoules = self._ask("nvmlDeviceGetTotalEnergyConsumption")
        return None if millijoules is None else millijoules / 1e3

    def state(self) -> dict[str, Any]:
        limit = self._ask("nvmlDeviceGetEnforcedPowerLimit")
        return {
            "power_limit_watts": None if limit is None else limit / 1e3,
            "gpu_mhz_highest": self._ask("nvmlDeviceGetMaxClockInfo", self.nvml.NVML_CLOCK_SM),
            "gpu_mhz_set": self._ask("nvmlDeviceGetApplicationsClock", self.nvml.NVML_CLOCK_SM),
        }

    def _ask(self, function: str, *arguments: Any) -> Any:
        """None where this GPU or this driver does not tell."""
        try:
            return getattr(self.nvml, function)(self.handle, *arguments)
        except (AttributeError, self.nvml.NVMLError):
            return None

    def close(self) -> None:
        try:
            self.nvml.nvmlShutdown()
        except self.nvml.NVMLError:
            pass


class Tegrastats(Source):
    """A Jetson."""

    name = "tegrastats"

    def samples(self, stop: threading.Event) -> Iterator[Sample]:
        command = ["tegrastats", "--interval", str(int(1e3 * INTERVAL))]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            try:
                for line in process.stdout:
                    if stop.is_set():
                        return
                    sample = parse_tegrastats(line)
                    self.watts_of = total_power(sample.rails)[1]
                    yield sample
            finally:
                process.terminate()


def find_source() -> tuple[Source | None, str]:
    """What can tell of this machine, and a remark where nothing can."""
    if shutil.which("tegrastats") is not None:
        return Tegrastats(), ""
    try:
        return Nvml(), ""
    except ImportError:
        return None, "power and clocks were not measured: pip install nvidia-ml-py"
    except Exception as error:
        return None, f"power and clocks were not measured: NVML says {str(error) or type(error).__name__}"


# -- watching ---------------------------------------------------------------------------------------------------------


class Watch:
    """Samples taken in the background, from entering a ``with`` block until leaving it.

    Attributes:
        seconds: How long the block took.
    """

    def __init__(self, source: Source, clock: Callable[[], float] = time.perf_counter):
        self.source, self.seconds = source, 0.0
        self._clock, self._stop = clock, threading.Event()
        self._found: list[Sample] = []
        self._energy: float | None = None
        self._thread = threading.Thread(target=self._collect, name="vpruner-power", daemon=True)

    def _collect(self) -> None:
        for sample in self.source.samples(self._stop):
            self._found.append(sample)

    def __enter__(self) -> Watch:
        self._energy_before, self._started = self.source.energy(), self._clock()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = self._clock() - self._started
        after = self.source.energy()
        self._stop.set()
        self._thread.join(timeout=5)
        if None not in (after, self._energy_before) and after > self._energy_before:
            self._energy = after - self._energy_before

    def summary(self, images: int) -> dict[str, Any]:
        """What was seen, for a row; ``images`` is how many were computed meanwhile."""
        return summarize(
            self._found,
            self.seconds,
            images,
            source=self.source.name,
            watts_of=self.source.watts_of,
            joules=self._energy,
        )


def summarize(
    samples: Sequence[Sample],
    seconds: float,
    images: int,
    *,
    source: str,
    watts_of: str = "",
    joules: float | None = None,
) -> dict[str, Any]:
    """Power and clocks over a time of steady work.

    Args:
        joules: By the device's own counter; None: mean power times time.

    Returns:
        JSON values: ``watts_mean``, ``watts_max``, ``joules_per_image``, ``energy_of`` (what that is computed from),
        ``gpu_mhz`` (lowest, median, highest), ``celsius_max``, ``rails_watts``, ``throttled`` (reasons, empty where
        there was none) and how many samples there were. What nobody told is None.
    """
    watts = [sample.watts for sample in samples if sample.watts is not None]
    clocks = [sample.gpu_mhz for sample in samples if sample.gpu_mhz is not None]
    degrees = [sample.celsius for sample in samples if sample.celsius is not None]
    mean = statistics.fmean(watts) if watts else None
    energy = joules if joules is not None else None if mean is None else mean * seconds
    rails = {name for sample in samples for name in sample.rails}
    return {
        "source": source,
        "samples": len(samples),
        "seconds": round(seconds, 3),
        "images": images,
        "watts_mean": _rounded(mean),
        "watts_max": _rounded(max(watts, default=None)),
        "watts_of": watts_of or None,
        "joules_per_image": None if energy is None or not images else float(f"{energy / images:.6g}"),
        "energy_of": None if energy is None else "counter" if joules is not None else "mean power",
        "gpu_mhz": [min(clocks), statistics.median(clocks), max(clocks)] if clocks else None,
        "celsius_max": max(degrees, default=None),
        "rails_watts": {
            name: _rounded(statistics.fmean([s.rails[name] for s in samples if name in s.rails]) / 1e3)
            for name in sorted(rails)
        },
        "throttled": throttling(samples),
    }


def throttling(samples: Sequence[Sample]) -> list[str]:
    """Why the device was slower than it can be: what it says itself, or a clock that fell while it was busy."""
    reasons = list(dict.fromkeys(reason for sample in samples for reason in sample.reasons))
    busy = [s.gpu_mhz for s in samples if s.gpu_mhz is not None and (s.load is None or s.load >= 50)]
    # The first samples may lie before the clocks rose.
    busy = busy[len(busy) // 4 :]
    if not reasons and len(busy) > 1 and min(busy) < (1 - CLOCK_DROP) * max(busy):
        reasons.append(f"GPU clock fell from {max(busy):.0f} to {min(busy):.0f} MHz")
    return reasons


@contextmanager
def open_source(wanted: bool = True) -> Iterator[tuple[Source | None, str]]:
    """:func:`find_source`, closed at the end; (None, "") where nobody asked for it."""
    source, remark = find_source() if wanted else (None, "")
    try:
        yield source, remark
    finally:
        if source is not None:
            source.close()


def _float(value: Any) -> float | None:
    return None if value is None else float(value)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
