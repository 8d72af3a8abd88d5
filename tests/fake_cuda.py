"""A CUDA runtime in host memory, to be put in the place of ``cuda.bindings.runtime``.

What is queued on a stream waits until the stream is synchronised, as on a GPU: a missing synchronisation gives old
data, memory that is used after it was freed is an error, and whatever was not given back can be counted.
"""

from __future__ import annotations

import ctypes
from enum import IntEnum
from types import ModuleType, SimpleNamespace


class Error(IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100
    cudaErrorStreamCaptureUnsupported = 900


class Kind(IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2


class CaptureMode(IntEnum):
    cudaStreamCaptureModeGlobal = 0
    cudaStreamCaptureModeThreadLocal = 1


class FakeCuda(ModuleType):
    """Settable: ``driver`` and ``runtime`` (12060 is 12.6; driver 0 is none), ``devices``, ``properties``, ``memory``
    (bytes), ``failing`` ({function: Error}), ``capturable``.

    ``calls`` are the names of the functions called, ``live`` what was made and not yet given back.
    """

    cudaMemcpyKind = Kind
    cudaStreamCaptureMode = CaptureMode

    def __init__(self):
        super().__init__("cuda.bindings.runtime")
        self.driver, self.runtime, self.devices, self.memory = 12060, 12060, 1, 1 << 30
        self.properties = SimpleNamespace(name=b"Orin", major=8, minor=7, totalGlobalMem=1 << 35)
        self.failing: dict[str, Error] = {}
        self.capturable = True
        self.calls: list[str] = []
        self.live: dict[int, tuple[str, object]] = {}
        self.clock_ms = 0.0
        self._next = 1

    def __getattribute__(self, name):
        value = super().__getattribute__(name)
        if not name.startswith("cuda") or not callable(value) or isinstance(value, type):
            return value

        def called(*arguments):
            self.calls.append(name)
            if name in self.failing:
                return (self.failing[name], None)
            if not self.driver and "Version" not in name and "Error" not in name:
                return (Error.cudaErrorInsufficientDriver, None)
            return value(*arguments)

        return called

    # -- things -------------------------------------------------------------------------------------------------------

    def _make(self, kind, value):
        handle, self._next = self._next, self._next + 1
        self.live[handle] = (kind, value)
        return handle

    def _get(self, kind, handle):
        found = self.live.get(int(handle))
        assert found is not None and found[0] == kind, f"{kind} {handle} is {found}"
        return found[1]

    def _drop(self, kind, handle):
        self._get(kind, handle)
        del self.live[int(handle)]
        return (Error.cudaSuccess,)

    def count(self, kind):
        return sum(found[0] == kind for found in self.live.values())

    # -- the machine --------------------------------------------------------------------------------------------------

    def cudaDriverGetVersion(self):
        return Error.cudaSuccess, self.driver

    def cudaRuntimeGetVersion(self):
        return Error.cudaSuccess, self.runtime

    def cudaGetErrorString(self, error):
        return Error.cudaSuccess, f"text of {Error(error).name}".encode()

    def cudaGetLastError(self):
        return (Error.cudaSuccess,)

    def cudaGetDeviceCount(self):
        return (Error.cudaSuccess, self.devices) if self.devices else (Error.cudaErrorNoDevice, None)

    def cudaGetDevice(self):
        return Error.cudaSuccess, 0

    def cudaGetDeviceProperties(self, device):
        return Error.cudaSuccess, self.properties

    # -- memory -------------------------------------------------------------------------------------------------------

    def _allocate(self, kind, size):
        if size > self.memory:
            return Error.cudaErrorMemoryAllocation, None
        self.memory -= size
        block = (ctypes.c_byte * size)()
        ctypes.memset(block, 0x7F, size)  # NaN as float32: what is never written is seen.
        address = ctypes.addressof(block)
        self.live[address] = (kind, block)
        return Error.cudaSuccess, address

    def _release(self, kind, address):
        self.memory += len(self._get(kind, address))
        return self._drop(kind, address)

    def cudaMalloc(self, size):
        return self._allocate("device", size)

    def cudaMallocHost(self, size):
        return self._allocate("host", size)

    def cudaFree(self, address):
        return self._release("device", address)

    def cudaFreeHost(self, address):
        return self._release("host", address)

    def cudaMemcpyAsync(self, target, source, size, kind, stream):
        sides = ("device", "host") if kind == Kind.cudaMemcpyHostToDevice else ("host", "device")
        for side, address in zip(sides, (target, source), strict=True):
            assert size <= len(self._get(side, address))

        def copy():
            for side, address in zip(sides, (target, source), strict=True):
                self._get(side, address)
            ctypes.memmove(target, source, size)

        self.submit(stream, copy)
        return (Error.cudaSuccess,)

    # -- streams, events and graphs -----------------------------------------------------------------------------------

    def submit(self, stream, work):
        """Queue ``work``; while the stream records, it goes into the graph instead."""
        state = self._get("stream", stream)
        (state.queue if state.recording is None else state.recording).append(work)

    def cudaStreamCreateWithFlags(self, flags):
        return Error.cudaSuccess, self._make("stream", SimpleNamespace(queue=[], recording=None, broken=False))

    def cudaStreamDestroy(self, stream):
        return self._drop("stream", stream)

    def cudaStreamSynchronize(self, stream):
        state = self._get("stream", stream)
        assert state.recording is None, "a recording stream cannot be waited for"
        queue, state.queue = state.queue, []
        for work in queue:
            work()
        return (Error.cudaSuccess,)

    def cudaEventCreateWithFlags(self, flags):
        return Error.cudaSuccess, self._make("event", SimpleNamespace(ms=None, stream=None))

    def cudaEventDestroy(self, event):
        return self._drop("event", event)

    def cudaEventRecord(self, event, stream):
        state = self._get("event", event)
        state.ms, state.stream = None, stream

        def note():
            state.ms = self.clock_ms

        self.submit(stream, note)
        return (Error.cudaSuccess,)

    def cudaEventSynchronize(self, event):
        return self.cudaStreamSynchronize(self._get("event", event).stream)

    def cudaEventElapsedTime(self, start, end):
        first, last = self._get("event", start).ms, self._get("event", end).ms
        assert first is not None and last is not None, "the event has not happened yet"
        return Error.cudaSuccess, last - first

    def cudaStreamBeginCapture(self, stream, mode):
        if not self.capturable:
            return (Error.cudaErrorStreamCaptureUnsupported,)
        self._get("stream", stream).recording = []
        return (Error.cudaSuccess,)

    def cudaStreamEndCapture(self, stream):
        state = self._get("stream", stream)
        work, state.recording = state.recording, None
        return Error.cudaSuccess, self._make("graph", work)

    def cudaGraphInstantiateWithFlags(self, graph, flags):
        return Error.cudaSuccess, self._make("executable graph", list(self._get("graph", graph)))

    def cudaGraphDestroy(self, graph):
        return self._drop("graph", graph)

    def cudaGraphExecDestroy(self, graph):
        return self._drop("executable graph", graph)

    def cudaGraphLaunch(self, graph, stream):
        for work in self._get("executable graph", graph):
            self.submit(stream, work)
        return (Error.cudaSuccess,)
