"""Running one network on a GPU: gathers rows of several callers into a batch of one of a few sizes, and runs that.

    executor.run([(crops_a,), (crops_b,)], ready=[event_a, event_b])   # -> outputs for all rows, on the host

What differs between TensorRT and torch is behind Network: it prepares a batch of a given shape once, and then only
enqueues it.

Note [Buckets]
Preparing a batch size costs memory and time, and a CUDA graph holds one shape only. So a batch is padded with rows of
no meaning to the next power of two, or to the largest batch. Rows of a network do not see each other.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dfengine.errors import DeviceError, DeviceMemoryError, InferenceError, first_line
from dfengine.gpu.array import DeviceArray
from dfengine.gpu.lanes import Event, Gpu, Lane
from dfengine.gpu.spec import EngineSpec, Shape

log = logging.getLogger("dfengine")

# Shapes that stay prepared. A member has 7 (batches of 1 to 64); P-Net 9 levels for each size of video, in 5 batches.
PREPARED_SHAPES = 64


class Prepared(Protocol):
    """A network made ready for batches of one shape, whose inputs and outputs always lie in the same memory."""

    @property
    def outputs(self) -> Sequence[DeviceArray]:
        """float32, (bucket, ...)"""

    def enqueue(self) -> None: ...

    def capture(self) -> Callable[[], None] | None:
        """A faster way to enqueue the same work, after it ran once; None if there is none. Raises anything."""


class Network(Protocol):
    """One network on one GPU, for one Executor."""

    def prepare(self, lane: Lane, inputs: Sequence[DeviceArray]) -> Prepared:
        """Raises DeviceMemoryError, InferenceError."""

    def close(self) -> None: ...


class Executor:
    """One execution context of one network: a stream, buffers of up to ``max_batch`` rows, graphs.

    Used by one thread at a time, which may be any. ``dtype`` is that of the inputs: float16 or float32.
    """

    def __init__(self, gpu: Gpu, spec: EngineSpec, network: Network) -> None:
        self.name = spec.name
        self.max_batch = spec.max_batch
        self.dtype = spec.dtype
        self._gpu, self._network, self._profiles = gpu, network, spec.profiles
        self._lane = gpu.lane()
        self._slots: OrderedDict[tuple[Shape, ...], _Slot] = OrderedDict()
        self._graphs = True  # until capturing failed once
        self._buffers: list[DeviceArray] = []

    def run(self, parts: Sequence[tuple[Any, ...]], ready: Sequence[Event]) -> list[NDArray[np.float32]]:
        """Runs rows of several callers as one batch, after the ``ready`` events.

        ``parts``: the network's inputs in order, (rows, ...) each, together at most ``max_batch`` rows: C-contiguous
        DeviceArrays of ``dtype``, or arrays in main memory. Returns the network's outputs for all rows in order, and
        waits until they are there. Raises DeviceMemoryError, InferenceError.
        """
        try:
            with self._lane as lane:
                parts = [tuple(self._on_device(x) for x in part) for part in parts]
                rows, shapes = self._check(parts)
                for event in ready:
                    lane.wait(event)
                slot = self._slot(tuple((bucket(rows, self.max_batch), *shape) for shape in shapes))
                start = 0
                for part in parts:
                    for source, target in zip(part, slot.inputs, strict=True):
                        lane.copy(source, target[start : start + len(source)])
                    start += len(part[0])
                slot.launch()
                for array, host in zip(slot.prepared.outputs, slot.hosts, strict=True):
                    lane.download_into(array[:rows], host[:rows])
                lane.synchronize()
                outputs: list[NDArray[np.float32]] = [host[:rows].copy() for host in slot.hosts]
                self._capture(slot)
                return outputs
        except DeviceError as error:
            rows = sum(len(part[0]) for part in parts)
            raise InferenceError(
                f"network {self.name} failed on a batch of {rows}: {error.message}", stage="runtime"
            ) from None

    def _on_device(self, array: Any) -> DeviceArray:
        if isinstance(array, DeviceArray):
            return array
        return self._lane.upload(np.ascontiguousarray(array, self.dtype))

    def close(self) -> None:
        """Frees buffers, graphs and the network's context."""
        with self._lane:
            self._slots.clear()
            self._buffers.clear()
            self._network.close()
        self._lane.close()

    def _check(self, parts: Sequence[tuple[DeviceArray, ...]]) -> tuple[int, list[Shape]]:
        """The rows there are, and the shapes of the inputs without the batch."""
        rows = sum(len(part[0]) for part in parts)
        shapes = [array.shape[1:] for array in parts[0]] if parts else []
        got = "; ".join(", ".join(f"{a.dtype} {a.shape}" for a in part) for part in parts)
        fits = len(shapes) == len(self._profiles) and rows <= self.max_batch
        for part in parts:
            fits = fits and [a.shape[1:] for a in part] == shapes and {len(a) for a in part} == {len(part[0])}
            fits = fits and all(a.dtype == self.dtype and a.is_contiguous for a in part)
        if not fits or not all(p.holds(shape) for p, shape in zip(self._profiles, shapes, strict=True)):
            wanted = ", ".join(f"{p.least}" if p.least == p.most else f"{p.least} to {p.most}" for p in self._profiles)
            raise InferenceError(
                f"network {self.name} takes up to {self.max_batch} contiguous rows of {self.dtype} {wanted}; got {got}",
                stage="runtime",
            )
        return rows, shapes

    def _slot(self, shapes: tuple[Shape, ...]) -> _Slot:
        slot = self._slots.pop(shapes, None)
        if slot is None:
            while len(self._slots) >= PREPARED_SHAPES:
                self._slots.popitem(last=False)
            try:
                slot = self._prepare(shapes)
            except DeviceMemoryError:
                if not self._slots:
                    raise
                self._slots.clear()
                slot = self._prepare(shapes)
        self._slots[shapes] = slot  # the last used is at the end
        return slot

    def _prepare(self, shapes: tuple[Shape, ...]) -> _Slot:
        if not self._buffers:
            self._buffers = [self._lane.empty((self.max_batch, *p.most), self.dtype) for p in self._profiles]
        inputs = [buffer.view(shape=shape) for buffer, shape in zip(self._buffers, shapes, strict=True)]
        prepared = self._network.prepare(self._lane, inputs)
        return _Slot(inputs, prepared, [self._lane.pinned(array.shape, array.dtype) for array in prepared.outputs])

    def _capture(self, slot: _Slot) -> None:
        if slot.graph is None and self._graphs:
            try:
                slot.graph = slot.prepared.capture() or slot.prepared.enqueue
            except Exception as error:  # whatever it is: without graphs it runs as well, only slower
                self._graphs = False
                log.warning("network %s runs without CUDA graphs (%s)", self.name, first_line(error))


class _Slot:
    """A prepared shape, with where its inputs go, and pinned memory for its outputs."""

    def __init__(self, inputs: list[DeviceArray], prepared: Prepared, hosts: list[NDArray[np.float32]]) -> None:
        self.inputs, self.prepared, self.hosts = inputs, prepared, hosts
        self.graph: Callable[[], None] | None = None

    def launch(self) -> None:
        (self.graph or self.prepared.enqueue)()


def bucket(rows: int, max_batch: int) -> int:
    """The batch size that ``rows`` rows are padded to. See Note [Buckets]."""
    return min(max_batch, 1 << max(0, rows - 1).bit_length())
