"""Power and clocks: lines of tegrastats as modules print them, an NVML that is not there, and one that is made here."""

import stat
import sys
import threading
import time
from types import ModuleType, SimpleNamespace

import pytest

from vpruner.runtime import power
from vpruner.runtime.power import (
    Nvml,
    Sample,
    Source,
    Tegrastats,
    Watch,
    find_source,
    jetson_state,
    open_source,
    parse_jetson_clocks,
    parse_nvpmodel,
    parse_tegrastats,
    summarize,
    throttling,
)

ORIN_AGX = (
    "11-20-2026 10:00:00 RAM 4722/30536MB (lfb 3x4MB) SWAP 0/15268MB (cached 0MB) CPU [12%@2201,0%@729,off,off] "
    "EMC_FREQ 15%@3199 GR3D_FREQ 99%@[1300,1300] NVENC off NVDEC off NVJPG off VIC off OFA off APE 174 cv0@-256.000C "
    "cpu@48.562C tboard@35.875C soc2@46.593C tdiode@37.5C soc0@47.468C cv1@-256.000C gpu@45.5C tj@48.562C "
    "VDD_GPU_SOC 9617mW/4617mW VDD_CPU_CV 400mW/0mW VIN_SYS_5V0 2900mW/2900mW NC 0mW/0mW VDDQ_VDD2_1V8AO 500mW/500mW"
)
ORIN_NANO = (
    "RAM 2848/7620MB (lfb 11x2MB) SWAP 369/3810MB (cached 3MB) CPU [0%@1497,0%@729] EMC_FREQ 61%@2133 "
    "GR3D_FREQ 99%@[612] NVDEC off VIC off APE 200 cpu@57.125C gpu@58.625C tj@58.312C "
    "VDD_IN 16321mW/11204mW VDD_CPU_GPU_CV 7104mW/4944mW VDD_SOC 3120mW/3659mW"
)
XAVIER_OLD = (
    "RAM 1903/15827MB (lfb 2960x4MB) SWAP 0/7913MB (cached 0MB) CPU [1%@1190,0%@1190,off,off] EMC_FREQ 0%@665 "
    "GR3D_FREQ 5%@318 APE 150 MTS fg 0% bg 0% AO@34C GPU@34.5C Tdiode@37C PMIC@100C AUX@34C CPU@35C thermal@34.5C "
    "Tboard@35C GPU 1089/1088 CPU 155/155 SOC 990/990 CV 0/0 VDDRQ 198/198 SYS5V 1530/1530"
)
THOR = (
    "RAM 9000/125772MB (lfb 2x4MB) SWAP 0/0MB (cached 0MB) CPU [1%@2601,0%@2601] EMC_FREQ @4266 "
    "GR3D_FREQ @[1575,1575,1530] APE 300 cpu@40.187C tj@44.093C soc012@40C gpu@43.5C soc345@41C "
    "VDD_GPU -392mW/-100mW VDD_CPU_SOC_MSS 5572mW/5572mW VIN_SYS_5V0 4880mW/4880mW VIN 23800mW/23800mW"
)


def test_orin_agx_has_no_input_rail_and_is_added_up():
    sample = parse_tegrastats(ORIN_AGX)
    assert sample.rails == {
        "VDD_GPU_SOC": 9617, "VDD_CPU_CV": 400, "VIN_SYS_5V0": 2900, "NC": 0, "VDDQ_VDD2_1V8AO": 500,
    }  # fmt: skip
    assert sample.watts == pytest.approx(13.417)
    assert (sample.gpu_mhz, sample.memory_mhz, sample.celsius, sample.load) == (1300, 3199, 45.5, 99)


def test_orin_nano_says_what_the_module_takes():
    sample = parse_tegrastats(ORIN_NANO)
    assert sample.watts == 16.321 and sample.gpu_mhz == 612 and sample.celsius == 58.625


def test_xavier_writes_milliwatts_without_a_unit():
    sample = parse_tegrastats(XAVIER_OLD)
    assert set(sample.rails) == {"GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"}  # and neither RAM nor SWAP
    assert sample.watts == pytest.approx(3.962) and sample.gpu_mhz == 318 and sample.celsius == 34.5


def test_thor_has_several_clocks_no_load_and_rails_below_zero():
    sample = parse_tegrastats(THOR)
    assert sample.watts == 23.8 and sample.rails["VDD_GPU"] == -392
    assert sample.gpu_mhz == 1575 and sample.memory_mhz == 4266 and sample.load is None and sample.celsius == 43.5


def test_a_line_of_something_else():
    assert parse_tegrastats("tegrastats: command not found\n") == Sample()


def test_settings_of_a_jetson():
    assert parse_nvpmodel("NV Fan Mode:quiet\nNV Power Mode: MODE_15W\n2\n") == "MODE_15W"
    assert parse_nvpmodel("") is None
    shown = (
        "SOC family:tegra234  Machine:NVIDIA Jetson Orin Nano\nOnline CPUs: 0-5\n"
        "cpu0: Online=1 Governor=schedutil MinFreq=1510400 MaxFreq=1510400 CurrentFreq=1510400\n"
        "GPU MinFreq=306000000 MaxFreq=624750000 CurrentFreq=306000000\n"
        "EMC MinFreq=204000000 MaxFreq=2133000000 CurrentFreq=2133000000 FreqOverride=0\n"
    )
    assert parse_jetson_clocks(shown) == {"gpu_mhz": [306.0, 624.8, 306.0], "pinned": False}
    pinned = shown.replace("MinFreq=306000000", "MinFreq=624750000")
    assert parse_jetson_clocks(pinned)["pinned"]
    assert parse_jetson_clocks("Error: Run this script as a root user") is None


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """``tools(name, text, code=0)``: a program on the path, and there is no other."""
    monkeypatch.setenv("PATH", str(tmp_path))

    def make(name, text, code=0, forever=False):
        path = tmp_path / name
        loop = "while True:\n    print(text, flush=True)\n    time.sleep(0.01)\n" if forever else "print(text)\n"
        path.write_text(f"#!{sys.executable}\nimport sys, time\ntext = {text!r}\n{loop}sys.exit({code})\n")
        path.chmod(path.stat().st_mode | stat.S_IEXEC)

    return make


def test_a_machine_that_is_no_jetson_has_no_such_state(tools):
    assert jetson_state() == (None, [])


def test_the_state_of_a_jetson_is_recorded_and_commented(tools):
    tools("nvpmodel", "NV Power Mode: MAXN\n0")
    tools("jetson_clocks", "Error: root", code=1)
    state, remarks = jetson_state()
    assert state == {"power_mode": "MAXN", "clocks": None} and "sudo" in remarks[0]
    tools("jetson_clocks", "GPU MinFreq=306000000 MaxFreq=624750000 CurrentFreq=306000000")
    state, remarks = jetson_state()
    assert state["clocks"]["pinned"] is False and "sudo jetson_clocks" in remarks[0]
    tools("jetson_clocks", "GPU MinFreq=624750000 MaxFreq=624750000 CurrentFreq=624750000")
    assert jetson_state()[1] == []


def test_tegrastats_is_watched_while_work_goes_on(tools):
    tools("tegrastats", ORIN_NANO, forever=True)
    with open_source() as (source, remark):
        assert isinstance(source, Tegrastats) and remark == ""
        with Watch(source) as watch:
            deadline = time.monotonic() + 20
            while len(watch._found) < 3 and time.monotonic() < deadline:
                time.sleep(0.01)
        found = watch.summary(images=100)
    assert found["source"] == "tegrastats" and found["samples"] >= 3 and found["watts_of"] == "rail VDD_IN"
    assert found["watts_mean"] == found["watts_max"] == 16.321 and found["gpu_mhz"] == [612, 612, 612]
    # Seconds are rounded to milliseconds, energy is of the time before that.
    assert found["joules_per_image"] == pytest.approx(16.321 * found["seconds"] / 100, abs=16.321 * 5.1e-4 / 100)
    assert found["rails_watts"]["VDD_SOC"] == 3.12 and found["throttled"] == [] and found["energy_of"] == "mean power"


# -- NVML -------------------------------------------------------------------------------------------------------------


class FakeNvml(ModuleType):
    """One GPU: 300 W, 1,755 MHz, and an energy counter that runs by itself."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    class NVMLError(Exception):
        pass

    def __init__(self):
        super().__init__("pynvml")
        self.reasons, self.energy_mj, self.lacks, self.open = 0x0, 0, set(), False

    def _check(self, name):
        if name in self.lacks:
            raise self.NVMLError("Not Supported")

    def nvmlInit(self):
        self._check("init")
        self.open = True

    def nvmlShutdown(self):
        self.open = False

    def nvmlDeviceGetHandleByIndex(self, index):
        return "gpu"

    def nvmlDeviceGetPowerUsage(self, handle):
        return 300_000

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        self._check("energy")
        self.energy_mj += 7_500
        return self.energy_mj

    def nvmlDeviceGetClockInfo(self, handle, kind):
        return {1: 1755, 2: 2619}[kind]

    def nvmlDeviceGetMaxClockInfo(self, handle, kind):
        return 1980

    def nvmlDeviceGetApplicationsClock(self, handle, kind):
        raise self.NVMLError("Not Supported")

    def nvmlDeviceGetEnforcedPowerLimit(self, handle):
        return 700_000

    def nvmlDeviceGetTemperature(self, handle, sensor):
        return 61

    def nvmlDeviceGetUtilizationRates(self, handle):
        return SimpleNamespace(gpu=98, memory=40)

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle):  # its name before release 12.535
        return self.reasons


@pytest.fixture
def nvml(monkeypatch, tools):
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(power, "INTERVAL", 0.005)
    return fake


def test_a_gpu_says_power_clocks_and_what_holds_it_back(nvml):
    nvml.reasons = 0x1 | 0x4 | 0x40  # idle, power cap, hot
    source = Nvml()
    sample = source.sample()
    assert (sample.watts, sample.gpu_mhz, sample.memory_mhz, sample.celsius, sample.load) == (300, 1755, 2619, 61, 98)
    assert sample.reasons == ("power cap", "hardware thermal slowdown")
    assert source.state() == {"power_limit_watts": 700, "gpu_mhz_highest": 1980, "gpu_mhz_set": None}
    source.close()
    assert not nvml.open


@pytest.mark.parametrize("counter", [True, False])
def test_energy_is_the_counters_where_there_is_one(nvml, counter):
    if not counter:
        nvml.lacks.add("energy")
    with open_source() as (source, _):
        with Watch(source) as watch:
            time.sleep(0.03)
        found = watch.summary(images=10)
    assert found["samples"] >= 2 and found["watts_of"] == "board power" and found["celsius_max"] == 61
    if counter:
        assert found["joules_per_image"] == 0.75 and found["energy_of"] == "counter"
    else:
        assert found["joules_per_image"] == pytest.approx(300 * found["seconds"] / 10, rel=2e-2)
    assert not nvml.open


def test_what_is_absent_is_one_remark(monkeypatch, nvml):
    nvml.lacks.add("init")
    source, remark = find_source()
    assert source is None and remark == "power and clocks were not measured: NVML says Not Supported"
    monkeypatch.setitem(sys.modules, "pynvml", None)
    source, remark = find_source()
    assert source is None and "pip install nvidia-ml-py" in remark
    with open_source(wanted=False) as nothing:
        assert nothing == (None, "")


# -- summaries --------------------------------------------------------------------------------------------------------


def test_nothing_known_is_none():
    found = summarize([], 1.0, 5, source="nvml")
    assert found["watts_mean"] is found["joules_per_image"] is found["gpu_mhz"] is found["celsius_max"] is None
    assert found["throttled"] == [] and found["rails_watts"] == {}


def test_a_clock_that_falls_under_load_is_throttling():
    steady = [Sample(gpu_mhz=1300, load=99)] * 8
    falling = [*steady, *[Sample(gpu_mhz=918, load=99)] * 4]
    assert throttling(steady) == [] and throttling(falling) == ["GPU clock fell from 1300 to 918 MHz"]
    # Before the work has begun, and while nothing is to do, clocks are low by themselves.
    assert throttling([Sample(gpu_mhz=306, load=99), *steady]) == []
    assert throttling([*steady, Sample(gpu_mhz=306, load=3)]) == []
    assert throttling([*falling, Sample(reasons=("power cap",))]) == ["power cap"]


def test_a_source_that_ends_by_itself_is_no_trouble():
    class Short(Source):
        name = "short"

        def samples(self, stop: threading.Event):
            yield Sample(watts=2.0)

    with Watch(Short(), clock=iter([0.0, 4.0]).__next__) as watch:
        watch._thread.join()
    assert watch.summary(8)["joules_per_image"] == 1.0 and Short().state() == {} and Short().close() is None
