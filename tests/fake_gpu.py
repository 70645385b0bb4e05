"""A GPU that the whole engine can run on, in main memory: fake context, fake kernel, fake networks.

The kernel is the CPU op on the fake device's memory; the networks are OpenVINO's. What is real: engine, detector,
backbone, decoder pool, NVDEC video, lanes, batching.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from fake_cuda import FakeGpu, array_of

from dfengine.bundle import Bundle, DetectorSettings
from dfengine.errors import DeviceMemoryError
from dfengine.gpu.array import DeviceArray
from dfengine.gpu.batching import BatchingSession, Outputs
from dfengine.gpu.device import GpuDevice
from dfengine.runtime import CpuDevice
from dfengine.stages import _kernels
from dfengine.types import Dtype, Image


def on_host(array: Any) -> np.ndarray:
    return array_of(array) if isinstance(array, DeviceArray) else array


def crop_resize_cuda(
    images: Sequence[Image], boxes: Any, image_index: Any, *, out: Any, stream: int, **options: Any
) -> None:
    """``_kernels.crop_resize_cuda`` by the CPU op."""
    hosts = [dataclasses.replace(image, components=tuple(array_of(c) for c in image.components)) for image in images]
    assert all(c.lane.stream == stream for image in images for c in image.components)
    target = array_of(out)
    target[:] = _kernels.crop_resize(
        hosts, boxes, image_index, out_hw=target.shape[2:], dtype=str(target.dtype), **options
    )


class FakeExecutor:
    """A network on OpenVINO. ``room``: rows that its memory suffices for."""

    def __init__(self, run: Callable[..., Outputs], max_batch: int, batches: list[int]) -> None:
        self._run = run
        self.max_batch = max_batch
        self.room = 1 << 30
        self._batches = batches

    def run(self, parts: Sequence[tuple[Any, ...]], ready: Sequence[Any]) -> Outputs:
        whole = [np.concatenate([on_host(x) for x in column]).astype(np.float32) for column in zip(*parts, strict=True)]
        self._batches.append(len(whole[0]))
        if len(whole[0]) > self.room:
            raise DeviceMemoryError("the fake GPU's memory is full", stage="runtime")
        return self._run(*whole)

    def close(self) -> None:
        pass


class FakeGpuDevice(GpuDevice):
    """``max_batch``: rows of any network at a time."""

    def __init__(
        self,
        gpu: FakeGpu | None = None,
        *,
        dtype: Dtype = "float32",
        max_batch: int = 64,
        contexts: int = 2,
    ) -> None:
        self._open_lanes(gpu or FakeGpu())
        self.runtime = "fake"
        self.dtype = dtype
        self.batches: dict[str, list[int]] = {}  # by network
        self.executors: dict[str, list[FakeExecutor]] = {}
        self._max_batch, self._contexts = max_batch, contexts

    def session(
        self, bundle: Bundle, member: str, *, threads: int = 1, detector: DetectorSettings | None = None
    ) -> Any:
        real = CpuDevice().session(bundle, member, threads=1)
        batches = self.batches.setdefault(member, [])
        executors = [FakeExecutor(real.run, self._max_batch, batches) for _ in range(self._contexts)]
        self.executors[member] = executors
        return BatchingSession(f"{bundle.name}/{member}", executors)
