"""A GPU of host memory: what dfengine.gpu.lanes uses of pycuda.driver and of cuda.bindings.driver, in NumPy.

    gpu = FakeGpu(memory_bytes=1 << 20)
    with gpu.lane() as lane:                     # the real Lane over the stand-ins
        lane.upload(array).pointer               # the address of host memory
    assert gpu.live_bytes == 0                   # all arrays are gone

What is enqueued runs at once, so that a missing wait is not seen; a call without a current context is, and so is a
stream that is used while it is captured in another way than by enqueueing.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from enum import Enum
from types import SimpleNamespace
from typing import Any

import numpy as np

from dfengine.gpu.lanes import Gpu

NAME, COMPUTE_CAPABILITY = "Fake GPU", (9, 0)


class FakeGpu(Gpu):
    """Refuses memory beyond ``memory_bytes``."""

    def __init__(self, memory_bytes: int = 1 << 30) -> None:
        self.fake = _Driver(memory_bytes)
        super().__init__(self.fake, self.fake.graphs, self.fake.context)

    @property
    def live_bytes(self) -> int:
        """Device memory that arrays hold; what lanes keep for later use is not in it."""
        kept = sum(size * len(blocks) for lane in self._lanes for size, blocks in lane._free.items())
        return self.fake.allocated - kept

    @property
    def allocated_bytes(self) -> int:
        """Device memory that arrays and lanes hold."""
        return self.fake.allocated


def host_view(pointer: int, nbytes: int) -> np.ndarray:
    """The bytes at an address of the fake device."""
    return np.frombuffer((ctypes.c_uint8 * nbytes).from_address(pointer), np.uint8) if nbytes else np.zeros(0, np.uint8)


def array_of(array: Any) -> np.ndarray:
    """A device array's own memory, as NumPy sees it."""
    i = array.__cuda_array_interface__
    span = sum((n - 1) * s for n, s in zip(i["shape"], i["strides"], strict=True)) + np.dtype(i["typestr"]).itemsize
    memory = host_view(i["data"][0], span if 0 not in i["shape"] else 0)
    return np.ndarray(i["shape"], np.dtype(i["typestr"]), buffer=memory.data, strides=i["strides"])


class _Driver:
    """pycuda.driver."""

    class Error(Exception):
        pass

    class MemoryError(Error):
        pass

    class LogicError(Error):
        pass

    event_flags = SimpleNamespace(DISABLE_TIMING=2)

    def __init__(self, memory_bytes: int) -> None:
        self.memory_bytes = memory_bytes
        self.allocated = 0
        self.calls: list[str] = []  # in order
        self.refuses_graphs = False
        self.fails: dict[str, str] = {}  # what the driver says, by the name of a call that fails from now on
        self._depth = threading.local()
        self._streams: dict[int, _Stream] = {}
        driver = self

        class Context:
            @staticmethod
            def push() -> None:
                driver._depth.value = driver._current() + 1

            @staticmethod
            def pop() -> None:
                assert driver._current() > 0, "cannot pop context from empty stack"
                driver._depth.value -= 1

        self.Context = self.context = Context
        self.graphs = _Graphs(self)

    def _current(self) -> int:
        return getattr(self._depth, "value", 0)

    def called(self, name: str, stream: _Stream | None = None, *, work: Callable[[], None] | None = None) -> None:
        """Every call passes here. ``work``: what is enqueued."""
        if not self._current():
            raise self.LogicError(f"{name} failed: invalid device context")
        self.calls.append(name)
        if name in self.fails:
            kind = self.MemoryError if "out of memory" in self.fails[name] else self.Error
            raise kind(f"{name} failed: {self.fails[name]}")
        if stream is not None and stream.captured is not None:
            if work is None:
                raise self.LogicError(f"{name} failed: operation not permitted when stream is capturing")
            stream.captured.append(work)
        elif work is not None:
            work()

    @staticmethod
    def get_driver_version() -> int:
        return 13000

    def Device(self, ordinal: int) -> Any:  # noqa: N802
        return SimpleNamespace(
            name=lambda: NAME, compute_capability=lambda: COMPUTE_CAPABILITY, total_memory=lambda: self.memory_bytes
        )

    def Stream(self, flags: int) -> _Stream:  # noqa: N802
        assert flags == 1, "not a non-blocking stream"
        self.called("Stream")
        stream = _Stream(self)
        self._streams[stream.handle] = stream
        return stream

    def Event(self, flags: int) -> Any:  # noqa: N802
        self.called("Event")
        return SimpleNamespace(
            record=lambda stream: self.called("record", stream, work=lambda: None),
            synchronize=lambda: self.called("Event.synchronize"),
        )

    def mem_get_info(self) -> tuple[int, int]:
        self.called("mem_get_info")
        return self.memory_bytes - self.allocated, self.memory_bytes

    def mem_alloc(self, size: int) -> _Allocation:
        self.called("mem_alloc")
        if self.allocated + size > self.memory_bytes:
            raise self.MemoryError("cuMemAlloc failed: out of memory")
        self.allocated += size
        return _Allocation(self, size)

    def pagelocked_empty(self, shape: Any, dtype: Any) -> np.ndarray:
        self.called("pagelocked_empty")
        return np.empty(shape, dtype)

    def memcpy_htod_async(self, target: int, source: np.ndarray, stream: _Stream) -> None:
        assert source.flags.c_contiguous
        data = source.view(np.uint8).ravel()
        self.called("htod", stream, work=lambda: np.copyto(host_view(target, data.nbytes), data))

    def memcpy_dtoh_async(self, target: np.ndarray, source: int, stream: _Stream) -> None:
        assert target.flags.c_contiguous
        data = target.reshape(-1).view(np.uint8)
        self.called("dtoh", stream, work=lambda: np.copyto(data, host_view(source, data.nbytes)))

    def memcpy_dtod_async(self, target: int, source: int, size: int, stream: _Stream) -> None:
        self.called("dtod", stream, work=lambda: np.copyto(host_view(target, size), host_view(source, size)))

    def Memcpy2D(self) -> _Memcpy2D:  # noqa: N802
        return _Memcpy2D(self)


class _Stream:
    def __init__(self, driver: _Driver) -> None:
        self._driver = driver
        self.handle = id(self)
        self.captured: list[Callable[[], None]] | None = None

    def synchronize(self) -> None:
        self._driver.called("synchronize", self)

    def wait_for_event(self, event: Any) -> None:
        self._driver.called("wait", self, work=lambda: None)


class _Allocation:
    def __init__(self, driver: _Driver, size: int) -> None:
        self._driver, self._size = driver, size
        self._memory = np.full(size + 256, 0xCD, np.uint8)  # nobody may count on zeros

    def __int__(self) -> int:
        return -(-self._memory.ctypes.data // 256) * 256

    def free(self) -> None:
        self._driver.called("mem_free")
        assert len(self._memory), "freed twice"
        self._memory = self._memory[:0]
        self._driver.allocated -= self._size


class _Memcpy2D:
    def __init__(self, driver: _Driver) -> None:
        self._driver = driver
        self.width_in_bytes = self.height = self.src_pitch = self.dst_pitch = 0

    def set_src_device(self, pointer: int) -> None:
        self._source = pointer

    def set_dst_device(self, pointer: int) -> None:
        self._target = pointer

    def __call__(self, stream: _Stream) -> None:
        width, height = self.width_in_bytes, self.height
        assert width <= self.src_pitch
        assert width <= self.dst_pitch

        def rows(pointer: int, pitch: int) -> np.ndarray:
            memory = host_view(pointer, pitch * (height - 1) + width)
            return np.lib.stride_tricks.as_strided(memory, (height, width), (pitch, 1))

        source, target = rows(self._source, self.src_pitch), rows(self._target, self.dst_pitch)
        self._driver.called("copy2d", stream, work=lambda: np.copyto(target, source))


class _Graphs:
    """cuda.bindings.driver: calls return (status, values...)."""

    class CUresult(Enum):
        CUDA_SUCCESS = 0
        CUDA_ERROR_OUT_OF_MEMORY = 2
        CUDA_ERROR_ILLEGAL_ADDRESS = 700
        CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED = 900

    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL=1)

    def __init__(self, driver: _Driver) -> None:
        self._driver = driver
        self._works: dict[int, list[Callable[[], None]]] = {}
        self.live = 0  # graphs that are not destroyed

    def cuStreamBeginCapture(self, stream: int, mode: int) -> tuple[Any]:  # noqa: N802
        self._driver.called("begin capture")
        self._driver._streams[stream].captured = []
        return (self.CUresult.CUDA_SUCCESS,)

    def cuStreamEndCapture(self, stream: int) -> tuple[Any, Any]:  # noqa: N802
        self._driver.called("end capture")
        s = self._driver._streams[stream]
        works, s.captured = s.captured or [], None
        if self._driver.refuses_graphs:
            return self.CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, 0
        return self.CUresult.CUDA_SUCCESS, self._keep(works)

    def cuGraphInstantiate(self, graph: int, flags: int) -> tuple[Any, Any]:  # noqa: N802
        return self.CUresult.CUDA_SUCCESS, self._keep(self._works[graph])

    def cuGraphLaunch(self, graph: int, stream: int) -> tuple[Any]:  # noqa: N802
        if "cuGraphLaunch" in self._driver.fails:
            return (self.CUresult[self._driver.fails["cuGraphLaunch"]],)
        works = self._works[graph]
        self._driver.called("launch", self._driver._streams[stream], work=lambda: [work() for work in works])  # type: ignore[arg-type,return-value]
        return (self.CUresult.CUDA_SUCCESS,)

    def cuGraphDestroy(self, graph: int) -> tuple[Any]:  # noqa: N802
        self.live -= self._works.pop(graph, None) is not None
        return (self.CUresult.CUDA_SUCCESS,)

    cuGraphExecDestroy = cuGraphDestroy  # noqa: N815

    def _keep(self, works: list[Callable[[], None]]) -> int:
        key = max(self._works, default=0) + 1
        self._works[key] = works
        self.live += 1
        return key
