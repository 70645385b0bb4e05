"""One GPU: its context, streams, events, device and pinned memory, through PyCUDA; CUDA graphs through cuda-bindings.

    with gpu.lane() as lane:
        frames = lane.upload(array)
        ready = lane.record()

A Lane is one thread's way to the GPU. What is enqueued through it runs in order; between lanes, events keep order.

Note [Ownership]
PyCUDA frees streams, events and memory where Python drops them, and on a thread that has no context that is a leak with
a message on stderr. So nothing of PyCUDA's is ever dropped by chance: arrays and events give back what they hold to
their lane, by an append that any thread may make at any time, and only lanes free, with the context current. A lane
hands memory out again at once: what runs on its stream later starts after whatever used the memory on its stream. Work
on another stream is not covered by that, so who reads an array there keeps it until that stream is known to be done.

Note [Errors of the driver]
PyCUDA raises what the driver refuses, whatever the call. Such errors become dfengine's in one place: where they leave
``with lane`` or ``with gpu.current()``, through which every call goes that uses the GPU.
"""

from __future__ import annotations

import ctypes
import math
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from dfengine.errors import DeviceError, DeviceMemoryError, first_line
from dfengine.gpu.array import Block, DeviceArray
from dfengine.gpu.driver import check_result, find_driver, refusal

__all__ = ["Event", "Gpu", "Graph", "Lane"]

# Free memory a lane keeps for later use. The decoded frames of a chunk and a batch of crops are about half of it.
CACHE_BYTES = 512 << 20

# cuMemAlloc aligns to 256 bytes; smaller pieces would only make more classes.
_SMALLEST = 256

_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: not ordered with stream 0, where torch works

# The primary context of each GPU, which torch uses too. Released by the end of the process only: PyCUDA's own way to do
# it when the object dies is one for other contexts, and fails.
_contexts: dict[int, Any] = {}
_opening = threading.Lock()


class Gpu:
    """A GPU through its primary context. Thread-safe. ``driver`` is the newest CUDA that the driver supports."""

    ordinal: int
    name: str
    compute_capability: tuple[int, int]
    memory_bytes: int
    driver: str

    def __init__(self, pycuda: Any, graphs: Any, context: Any, *, ordinal: int = 0) -> None:
        """Use ``Gpu.open``. ``pycuda``: pycuda.driver; ``graphs``: cuda.bindings.driver."""
        device = pycuda.Device(ordinal)
        self.ordinal = ordinal
        self.name = device.name()
        self.compute_capability = device.compute_capability()
        self.memory_bytes = device.total_memory()
        version = pycuda.get_driver_version()
        self.driver = f"CUDA {version // 1000}.{version % 1000 // 10}"
        self._pycuda, self._graphs, self._context = pycuda, graphs, context
        # While a stream is being captured nobody may wait for streams, and graphs are not captured while memory is
        # freed, for which streams must have come to an end.
        self._exclusive = threading.RLock()
        self._lanes: list[Lane] = []
        self._finalizer = weakref.finalize(self, _close_lanes, self._lanes, context)

    @classmethod
    def open(cls, ordinal: int = 0) -> Gpu:
        """The GPU with this number. Raises DeviceError if there is none, or no way to it, with the fix."""
        pycuda, graphs = find_driver(ordinal)
        try:
            with _opening:
                if ordinal not in _contexts:
                    _contexts[ordinal] = pycuda.Device(ordinal).retain_primary_context()
                    ctypes.pythonapi.Py_IncRef(ctypes.py_object(_contexts[ordinal]))  # never dies
            return cls(pycuda, graphs, _contexts[ordinal], ordinal=ordinal)
        except pycuda.Error as error:
            raise DeviceError(
                f"GPU number {ordinal} cannot be used: {first_line(error)}; nvidia-smi shows what else runs on it, and "
                "its compute mode",
                stage="device",
            ) from None

    @staticmethod
    def check(ordinal: int = 0) -> None:
        """What ``open`` raises, without making a context, which costs hundreds of MiB."""
        find_driver(ordinal)

    @property
    def exclusive(self) -> threading.RLock:
        """To hold while capturing a graph by other means than ``Lane.capture``, or waiting for the whole GPU."""
        return self._exclusive

    def lane(self) -> Lane:
        """A new lane, for one thread. Its stream lives as long as the Gpu is open."""
        return Lane(self)

    @contextmanager
    def current(self) -> Iterator[None]:
        """The context is current on this thread inside it: for what needs no stream of its own.

        What the driver refuses leaves it as DeviceError or DeviceMemoryError: Note [Errors of the driver].
        """
        with self._typed_errors():
            self._context.push()
            try:
                yield
            finally:
                self._pycuda.Context.pop()

    @contextmanager
    def _typed_errors(self) -> Iterator[None]:
        try:
            yield
        except self._pycuda.Error as error:
            raise refusal(first_line(error)) from None

    def free_bytes(self) -> int:
        """Device memory nobody holds. What lanes keep for later use is not in it."""
        with self.current():
            free: int = self._pycuda.mem_get_info()[0]
            return free

    def close(self) -> None:
        """Closes all lanes. Arrays must not be held any longer. Raises DeviceError if the GPU has failed before."""
        with self._typed_errors():
            self._finalizer()

    def _allocate(self, size: int) -> Any:
        """Device memory from the driver; if that has none, after freeing what lanes keep."""
        try:
            return self._pycuda.mem_alloc(size)
        except self._pycuda.MemoryError:
            with self._exclusive:
                for lane in list(self._lanes):
                    lane._trim()
            try:
                return self._pycuda.mem_alloc(size)
            except self._pycuda.MemoryError:
                free, total = (n >> 20 for n in self._pycuda.mem_get_info())
                raise DeviceMemoryError(
                    f"the GPU has no room for {-(-size >> 20)} MiB: {free} of {total} MiB are free; lower workers or "
                    "memory_bytes, or stop what else runs on it"
                ) from None


class Lane:
    """One thread's way to the GPU: a stream of its own, and memory that is reused in the order of that stream.

    Entering it (``with lane``) makes the context current on this thread; all methods need that. What the driver refuses
    leaves it as DeviceError or DeviceMemoryError (Note [Errors of the driver]). Not thread-safe: used by one thread at
    a time. ``stream`` is the CUstream handle, never 0.
    """

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self._pycuda = gpu._pycuda
        self._free: dict[int, deque[Any]] = {}  # by size class; Note [Ownership]
        self._events: deque[Any] = deque()
        self._staging: NDArray[np.uint8] | None = None  # pinned
        self._staged: Event | None = None  # the last upload
        self._entered: list[AbstractContextManager[None]] = []  # it may be entered again inside itself
        with gpu.current():
            self._stream = self._pycuda.Stream(_NON_BLOCKING)
            self.stream: int = self._stream.handle
        gpu._lanes.append(self)

    def __enter__(self) -> Lane:
        entered = self.gpu.current()
        entered.__enter__()
        self._entered.append(entered)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._entered.pop().__exit__(kind, error, trace)

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> DeviceArray:
        """Memory with anything in it, C-contiguous. Raises DeviceMemoryError."""
        shape, dtype = tuple(map(int, shape)), np.dtype(dtype)
        nbytes = math.prod(shape) * dtype.itemsize
        block = self._block(nbytes) if nbytes else None
        return DeviceArray(block.pointer if block else 0, shape, dtype, owner=block, lane=self, available=nbytes)

    def upload(self, array: NDArray[Any]) -> DeviceArray:
        """A copy of an array of the host; the array may be changed at once. Raises DeviceMemoryError."""
        target = self.empty(array.shape, array.dtype)
        if array.nbytes:
            if self._staged is not None:
                self._staged.synchronize()
            if self._staging is None or self._staging.nbytes < array.nbytes:
                self._staging = self.pinned((array.nbytes,), np.uint8)
            staged = self._staging[: array.nbytes]
            np.copyto(staged.view(array.dtype).reshape(array.shape), array)
            self._pycuda.memcpy_htod_async(target.pointer, staged, self._stream)
            self._staged = self.record()
        return target

    def download(self, array: DeviceArray) -> NDArray[Any]:
        """A copy on the host, C-contiguous. Waits for this lane's stream."""
        if array.size == 0:
            return np.empty(array.shape, array.dtype)
        # What lies between the elements of a view comes along; views are dense or share their gaps with others.
        span = np.empty(array.span, np.uint8)
        self._pycuda.memcpy_dtoh_async(span, array.pointer, self._stream)
        self.synchronize()
        strided: NDArray[Any] = np.ndarray(array.shape, array.dtype, buffer=span.data, strides=array.strides)
        return strided.copy()  # in C order

    def copy(self, source: DeviceArray, target: DeviceArray) -> None:
        """Copies on the stream, without waiting. Both have the same shape and dtype.

        Each must be C-contiguous, or consist of contiguous rows that lie one pitch apart; else ValueError.
        """
        if source.shape != target.shape or source.dtype != target.dtype:
            raise ValueError(f"cannot copy {source.dtype} {source.shape} to {target.dtype} {target.shape}")
        if source.size == 0:
            return
        if source.is_contiguous and target.is_contiguous:
            self._pycuda.memcpy_dtod_async(target.pointer, source.pointer, source.nbytes, self._stream)
            return
        width = min(source.row_bytes, target.row_bytes)
        copy = self._pycuda.Memcpy2D()
        copy.set_src_device(source.pointer)
        copy.set_dst_device(target.pointer)
        copy.width_in_bytes, copy.height = width, source.nbytes // width
        copy.src_pitch, copy.dst_pitch = source.pitch(width), target.pitch(width)
        copy(self._stream)

    def pinned(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """Page-locked memory of the host, which copies without a detour. Drop it inside a ``with lane``."""
        array: NDArray[Any] = self._pycuda.pagelocked_empty(shape, np.dtype(dtype))
        return array

    def download_into(self, array: DeviceArray, host: NDArray[Any]) -> None:
        """Copies a contiguous array to pinned memory of the same size, on the stream, without waiting."""
        if not array.is_contiguous or array.nbytes != host.nbytes:
            raise ValueError(f"cannot download {array.dtype} {array.shape} into {host.dtype} {host.shape}")
        if array.nbytes:
            self._pycuda.memcpy_dtoh_async(host, array.pointer, self._stream)

    def record(self) -> Event:
        """An event that comes when all that was enqueued so far is done."""
        try:
            event = self._events.pop()
        except IndexError:
            event = self._pycuda.Event(self._pycuda.event_flags.DISABLE_TIMING)
        event.record(self._stream)
        return Event(event, self._events)

    def wait(self, event: Event) -> None:
        """What is enqueued from now on starts after the event. The thread does not wait."""
        self._stream.wait_for_event(event._event)

    def synchronize(self) -> None:
        """Waits until all that was enqueued is done."""
        self._stream.synchronize()

    def capture(self, work: Callable[[], None]) -> Graph:
        """Records what ``work`` enqueues on this lane, without running it.

        Raises DeviceError if that cannot be captured; the lane can be used afterwards. What ``work`` raises passes.
        """
        graphs = self.gpu._graphs
        with self.gpu._exclusive:
            mode = graphs.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
            check_result(graphs, "cuStreamBeginCapture", graphs.cuStreamBeginCapture(self.stream, mode))
            failed = True
            try:
                work()
                failed = False
            finally:
                error, graph = graphs.cuStreamEndCapture(self.stream)
                if failed and graph is not None and int(graph):
                    graphs.cuGraphDestroy(graph)
            check_result(graphs, "cuStreamEndCapture", (error,))
            try:
                (executable,) = check_result(graphs, "cuGraphInstantiate", graphs.cuGraphInstantiate(graph, 0))
            finally:
                graphs.cuGraphDestroy(graph)
        return Graph(graphs, executable)

    def launch(self, graph: Graph) -> None:
        """Enqueues all that a graph holds. Raises DeviceError, DeviceMemoryError."""
        try:
            check_result(graph._graphs, "cuGraphLaunch", graph._graphs.cuGraphLaunch(graph._executable, self.stream))
        except DeviceError as error:
            raise refusal(error.message) from None

    def close(self) -> None:
        """Waits for the stream and frees what the lane keeps. Only arrays it gave out can be used afterwards."""
        with self.gpu.current():
            self._close()

    def _close(self) -> None:
        self.synchronize()
        self._trim()
        self._staged = self._staging = None
        self._events.clear()

    def _block(self, nbytes: int) -> Block:
        size = _size_class(nbytes)
        free = self._free.setdefault(size, deque())
        try:
            allocation = free.pop()
        except IndexError:
            if sum(size * len(blocks) for size, blocks in list(self._free.items())) + size > CACHE_BYTES:
                with self.gpu._exclusive:
                    self._trim()
            allocation = self.gpu._allocate(size)
        return Block(allocation, free)

    def _trim(self) -> None:
        """Frees what is kept for later use. The context must be current."""
        if not any(self._free.values()):
            return
        self._stream.synchronize()
        for blocks in list(self._free.values()):
            while blocks:
                blocks.pop().free()


class Event:
    """A point in the order of a lane's stream. Goes back to the lane when it dies."""

    def __init__(self, event: Any, home: deque[Any]) -> None:
        self._event, self._home = event, home

    def __del__(self) -> None:
        self._home.append(self._event)

    def synchronize(self) -> None:
        """Waits until it has come."""
        self._event.synchronize()


class Graph:
    """What ``Lane.capture`` recorded, ready to be launched again and again, on the lane that recorded it.

    Refers to the memory that was used then: whoever keeps the graph keeps that.
    """

    def __init__(self, graphs: Any, executable: Any) -> None:
        self._graphs, self._executable = graphs, executable

    def __del__(self) -> None:
        self._graphs.cuGraphExecDestroy(self._executable)


def _close_lanes(lanes: list[Lane], context: Any) -> None:
    """Also at the end of the process, or PyCUDA would complain about what is left."""
    if lanes:
        context.push()
        try:
            for lane in lanes:
                lane._close()
                lane._stream = None
            lanes.clear()
        finally:
            context.pop()


def _size_class(nbytes: int) -> int:
    """Sizes in steps of a quarter of a power of two, so that memory fits again; at most a fifth is wasted."""
    step = max(_SMALLEST, 1 << max(0, (nbytes - 1).bit_length() - 3))
    return -(-nbytes // step) * step
