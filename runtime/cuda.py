"""The few CUDA calls that running an engine needs, through ``cuda-bindings``; every failure is one line.

Memory, streams, events and graphs are objects that free themselves: :meth:`close` at once, or when they are collected.
Nothing here is safe to share between threads.
"""

from __future__ import annotations

import ctypes
import importlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ..core.errors import UserError
from ..core.text import first_line

# Numbers of cudaError_t. The names are the same in every release; the enum's place in the package is not.
_OUT_OF_MEMORY = 2
_NOT_INITIALISED = 3
_STUB_LIBRARY = 34
_INSUFFICIENT_DRIVER = 35
_NO_DEVICE = 100
_DRIVER_FILE = "/proc/driver/nvidia/version"
_MIB = 1 << 20


@dataclass(frozen=True)
class DeviceProperties:
    """The GPU that this process uses.

    Attributes:
        name: Its model, ``"Orin"``.
        compute_capability: ``"8.7"``.
        total_bytes: Its memory; on a Jetson that is the machine's.
        driver: The CUDA version that the driver supports, ``"12.6"``.
        runtime: The CUDA version that ``cuda-bindings`` was built for.
        driver_release: The release of the kernel driver, ``"560.35.03"``, where the machine tells.
    """

    name: str
    compute_capability: str
    total_bytes: int
    driver: str
    runtime: str
    driver_release: str | None = None

    @property
    def architecture(self) -> str:
        """``"sm_87"``."""
        return architecture(self.compute_capability)


def architecture(compute_capability: str) -> str:
    """``"8.7"`` -> ``"sm_87"``."""
    return "sm_" + compute_capability.replace(".", "")


def bindings() -> ModuleType:
    """The runtime module of ``cuda-bindings``, under its present name or the one of ``cuda-python`` before 12.6.

    Raises:
        UserError: Neither is installed.
    """
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except ImportError as error:
        # Something else that is missing (a library of an installed cuda-bindings) is no reason to say "not installed".
        if not (error.name or "").startswith("cuda"):
            raise
    try:
        return importlib.import_module("cuda.cudart")
    except ImportError:
        raise UserError(
            "this needs the package 'cuda-bindings', which is not installed", "pip install 'vpruner[trt]'"
        ) from None


def call(name: str, *arguments: Any, wanted_bytes: int | None = None) -> Any:
    """Call a function of the CUDA runtime.

    Args:
        name: ``"cudaMalloc"``.
        wanted_bytes: What an allocation asks for, to be named when there is no room.

    Returns:
        What the function gives beyond its error code: nothing, one value, or a tuple.

    Raises:
        UserError: There is no driver, no GPU, not enough memory, or the call failed.
    """
    module = bindings()
    try:
        error, *values = getattr(module, name)(*arguments)
    except RuntimeError as failure:
        # Some releases raise where the driver's library cannot be loaded, instead of returning a code.
        raise UserError(f"no CUDA driver: {first_line(failure)}", _INSTALL_DRIVER) from None
    if int(error):
        raise _explained(module, name, error, wanted_bytes)
    return values[0] if len(values) == 1 else tuple(values) or None


_INSTALL_DRIVER = "this needs a machine with an NVIDIA GPU and its driver"


def _explained(module: ModuleType, name: str, error: Any, wanted_bytes: int | None) -> UserError:
    code = int(error)
    if code in (_NOT_INITIALISED, _STUB_LIBRARY, _INSUFFICIENT_DRIVER):
        driver = _version_of(module.cudaDriverGetVersion())
        if driver is None:
            return UserError("no CUDA driver is installed", _INSTALL_DRIVER)
        built_for = _version_of(module.cudaRuntimeGetVersion())
        return UserError(
            f"the driver supports CUDA {driver}, cuda-bindings {built_for or 'as installed'} asks for more",
            f"update the driver, or: pip install 'cuda-bindings<{int(driver.partition('.')[0]) + 1}'",
        )
    if code == _NO_DEVICE:
        return UserError("no NVIDIA GPU is visible", "check nvidia-smi and CUDA_VISIBLE_DEVICES")
    if code == _OUT_OF_MEMORY:
        return UserError(
            "the GPU is out of memory" + (f", {wanted_bytes / _MIB:.0f} MiB asked for" if wanted_bytes else ""),
            "close other programs that use it, or take a smaller batch",
        )
    failed, text = module.cudaGetErrorString(error)
    said = b"" if int(failed) else text
    said = said.decode(errors="replace") if isinstance(said, bytes) else str(said)
    return UserError(f"CUDA: {name} failed: {said or 'error'} (code {code})")


def _version_of(answer: tuple[Any, int]) -> str | None:
    """``(success, 12060)`` -> ``"12.6"``; None where the call failed or says 0, as it does without a driver."""
    error, number = answer
    return None if int(error) or not number else f"{number // 1000}.{number % 1000 // 10}"


def device_properties() -> DeviceProperties:
    """The current GPU.

    Raises:
        UserError: There is no driver or no GPU, or ``cuda-bindings`` is missing.
    """
    module = bindings()
    if not call("cudaGetDeviceCount"):
        raise UserError("no NVIDIA GPU is visible", "check nvidia-smi and CUDA_VISIBLE_DEVICES")
    properties = call("cudaGetDeviceProperties", call("cudaGetDevice"))
    name = properties.name.decode(errors="replace") if isinstance(properties.name, bytes) else str(properties.name)
    return DeviceProperties(
        name=name.strip("\0 "),
        compute_capability=f"{properties.major}.{properties.minor}",
        total_bytes=int(properties.totalGlobalMem),
        driver=_version_of(module.cudaDriverGetVersion()) or "?",
        runtime=_version_of(module.cudaRuntimeGetVersion()) or "?",
        driver_release=_driver_release(_DRIVER_FILE),
    )


def _driver_release(path: str) -> str | None:
    """From ``NVRM version: NVIDIA UNIX x86_64 Kernel Module  560.35.03  Fri Aug 16 ...``."""
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = re.search(r"^NVRM version:.*?\b(\d+\.\d+(?:\.\d+)?)\b", text, re.MULTILINE)
    return found[1] if found else None


class _Handle:
    """Something of the driver's that must be given back once."""

    _handle: Any = None

    def close(self) -> None:
        """Give it back; the second time is fine."""
        handle, self._handle = self._handle, None
        if handle is None:
            return
        try:
            self._free(handle)
        except UserError:
            # An error that shows here is of work before it (CUDA repeats those); there it was said.
            pass

    def _free(self, handle: Any) -> None:
        raise NotImplementedError

    def __del__(self):
        try:
            self.close()
        except Exception:  # While the interpreter ends, modules go first; an exception here is only noise.
            pass


class Stream(_Handle):
    """A queue of GPU work that does not wait for the default stream."""

    _NON_BLOCKING = 1

    def __init__(self):
        self._handle = call("cudaStreamCreateWithFlags", self._NON_BLOCKING)

    @property
    def handle(self) -> Any:
        """The object that cuda-bindings takes."""
        return self._handle

    def __int__(self) -> int:
        """The address that TensorRT takes."""
        return int(self._handle)

    def synchronize(self) -> None:
        """Wait until all that was queued is done."""
        call("cudaStreamSynchronize", self._handle)

    def _free(self, handle: Any) -> None:
        call("cudaStreamDestroy", handle)


class Event(_Handle):
    """A point in a stream whose time the GPU notes."""

    def __init__(self):
        self._handle = call("cudaEventCreateWithFlags", 0)  # 0: with timing

    def record(self, stream: Stream) -> None:
        call("cudaEventRecord", self._handle, stream.handle)

    def synchronize(self) -> None:
        """Wait until the GPU has reached it."""
        call("cudaEventSynchronize", self._handle)

    def elapsed_ms(self, since: Event) -> float:
        """Milliseconds of GPU time from ``since`` to this event; waits for this one."""
        self.synchronize()
        return float(call("cudaEventElapsedTime", since._handle, self._handle))

    def _free(self, handle: Any) -> None:
        call("cudaEventDestroy", handle)


class DeviceBuffer(_Handle):
    """Bytes on the GPU.

    Attributes:
        nbytes: How many were asked for.
    """

    def __init__(self, nbytes: int):
        self.nbytes = int(nbytes)
        # An address is needed even for nothing.
        self._handle = int(call("cudaMalloc", max(self.nbytes, 1), wanted_bytes=self.nbytes))

    @property
    def pointer(self) -> int:
        return self._handle

    def _free(self, handle: int) -> None:
        call("cudaFree", handle)


class PinnedBuffer(_Handle):
    """Page-locked bytes of the host: copies between them and the GPU do not stop the program."""

    def __init__(self, nbytes: int):
        self.nbytes = int(nbytes)
        self._handle = int(call("cudaMallocHost", max(self.nbytes, 1), wanted_bytes=self.nbytes))

    @property
    def pointer(self) -> int:
        return self._handle

    def array(self, shape: Sequence[int], dtype: Any) -> np.ndarray:
        """The first bytes as an array; it must not be touched after :meth:`close`."""
        dtype = np.dtype(dtype)
        count = int(np.prod(shape, dtype=np.int64))
        if count * dtype.itemsize > self.nbytes:
            raise ValueError(f"{dtype} {list(shape)} does not fit into {self.nbytes} bytes")
        memory = (ctypes.c_byte * max(self.nbytes, 1)).from_address(self._handle)
        return np.frombuffer(memory, dtype, count).reshape(tuple(shape))

    def _free(self, handle: int) -> None:
        call("cudaFreeHost", handle)


def copy_to_device(device: DeviceBuffer, host: PinnedBuffer, nbytes: int, stream: Stream) -> None:
    """Queue a copy of the first ``nbytes``."""
    kind = bindings().cudaMemcpyKind.cudaMemcpyHostToDevice
    call("cudaMemcpyAsync", device.pointer, host.pointer, nbytes, kind, stream.handle)


def copy_to_host(host: PinnedBuffer, device: DeviceBuffer, nbytes: int, stream: Stream) -> None:
    """Queue a copy of the first ``nbytes``."""
    kind = bindings().cudaMemcpyKind.cudaMemcpyDeviceToHost
    call("cudaMemcpyAsync", host.pointer, device.pointer, nbytes, kind, stream.handle)


class Graph(_Handle):
    """GPU work that was recorded once and is launched as a whole.

    Args:
        stream: Where ``work`` queues what it does.
        work: Called once; nothing runs on the GPU meanwhile.

    Raises:
        UserError: Something in ``work`` cannot be recorded.
    """

    def __init__(self, stream: Stream, work: Callable[[], None]):
        module = bindings()
        # Thread-local: another thread of the application may allocate meanwhile.
        call("cudaStreamBeginCapture", stream.handle, module.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
        try:
            work()
        except BaseException:
            self._abandon(module, stream)
            raise
        recorded = call("cudaStreamEndCapture", stream.handle)
        try:
            # Its arguments are the same in all releases, those of cudaGraphInstantiate changed with CUDA 12.
            self._handle = call("cudaGraphInstantiateWithFlags", recorded, 0)
        finally:
            call("cudaGraphDestroy", recorded)

    @staticmethod
    def _abandon(module: ModuleType, stream: Stream) -> None:
        """End a recording that failed; its own error codes say nothing new, but they must be taken off."""
        error, recorded = module.cudaStreamEndCapture(stream.handle)
        if not int(error):
            module.cudaGraphDestroy(recorded)
        module.cudaGetLastError()

    def launch(self, stream: Stream) -> None:
        call("cudaGraphLaunch", self._handle, stream.handle)

    def _free(self, handle: Any) -> None:
        call("cudaGraphExecDestroy", handle)
