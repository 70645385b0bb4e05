"""Networks on an NVIDIA GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from dfengine.bundle import Bundle
from dfengine.cuda import Gpu, Lane
from dfengine.runtime import Session


class GpuDevice:
    """A GPU, with TensorRT or torch. See Device."""

    name: str
    runtime: str
    dtype: Literal["float32", "float16"]
    gpu: Gpu

    def __init__(self, *, precision: Literal["fp16", "fp32"] = "fp16") -> None:
        """Raises DeviceError."""
        self._open_lanes(Gpu.open())
        self.dtype = "float16" if precision == "fp16" else "float32"
        self.runtime = ""

    def _open_lanes(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.name = f"cuda:{gpu.ordinal}"
        self._lanes: list[Lane] = []  # that no thread holds

    def session(self, bundle: Bundle, member: str, *, threads: int = 1) -> Session:
        """See Device.session."""
        raise NotImplementedError

    @contextmanager
    def lane(self) -> Iterator[Lane]:
        """A lane of this thread's own; used again by others afterwards, with the memory that it keeps."""
        try:
            lane = self._lanes.pop()
        except IndexError:
            lane = self.gpu.lane()
        try:
            with lane:
                yield lane
        finally:
            self._lanes.append(lane)

    def close(self) -> None:
        self.gpu.close()


def why_no_gpu() -> str:
    """What keeps this machine from using a GPU, with the fix; "" if nothing does."""
    return "this build of dfengine has no GPU path"
