"""Where networks run: a Device compiles them to Sessions, and a Session takes a batch and returns its outputs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib import metadata
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dfengine.bundle import Bundle, DetectorSettings
from dfengine.errors import DeviceMemoryError
from dfengine.runtime.contract import check_network
from dfengine.types import Array, Dtype

__all__ = ["CpuDevice", "Device", "Session", "run_or_halve"]


class Session(Protocol):
    """One compiled network. Thread-safe."""

    name: str

    def run(self, *inputs: Array) -> list[NDArray[np.float32]]:
        """Runs a batch: the network's inputs in order, each (B, ...), of the device's dtype; B may be 0.

        The outputs have B rows each and are in main memory, whatever the device. Raises InferenceError, and
        DeviceMemoryError on a GPU.
        """


class Device(Protocol):
    """What the networks of one engine run on. Thread-safe."""

    name: str  # "cpu" or "cuda:0"
    runtime: str  # what runs the networks there, its version, and why it was chosen over others if it was
    dtype: Dtype  # of network input
    gpu: Any  # the dfengine.gpu.lanes.Gpu, None on the CPU

    def session(
        self, bundle: Bundle, member: str, *, threads: int, detector: DetectorSettings | None = None
    ) -> Session:
        """Compiles a member of a bundle; on the CPU to run on up to ``threads`` cores at a time.

        ``detector``: how the networks of a detector will be used. Raises BundleError, and InferenceError for a network
        that does not compile or is not of its kind.
        """

    def lane(self) -> AbstractContextManager[Any]:
        """What a thread holds while it scores a video: a dfengine.gpu.lanes.Lane, or None on the CPU."""

    def lane_bytes(self, used: int) -> int:
        """GPU memory that a lane takes at most for what uses ``used`` bytes of it at a time; 0 on the CPU."""

    def close(self) -> None: ...


class CpuDevice:
    """The CPU, with OpenVINO."""

    name = "cpu"

    def __init__(self) -> None:
        self.runtime = f"openvino {metadata.version('openvino')}"
        self.dtype: Dtype = "float32"
        self.gpu = None

    def session(
        self, bundle: Bundle, member: str, *, threads: int = 1, detector: DetectorSettings | None = None
    ) -> Session:
        """See Device.session."""
        from dfengine.runtime.openvino import OpenVinoSession

        spec = bundle.member(member)
        session = OpenVinoSession(
            f"{bundle.name}/{member}", bundle.onnx_bytes(spec), threads=threads, precision=spec.precision
        )
        check_network(session.name, spec, session.inputs, session.outputs)
        return session

    def lane(self) -> AbstractContextManager[None]:
        return nullcontext()

    def lane_bytes(self, used: int) -> int:
        return 0

    def close(self) -> None:
        pass


def run_or_halve(run: Callable[[int, int], None], start: int, stop: int) -> None:
    """Calls ``run(start, stop)``; where the memory of a GPU does not suffice for that, for both halves, once."""
    try:
        run(start, stop)
        return
    except DeviceMemoryError:
        middle = (start + stop) // 2
        if middle == start:
            raise
    run(start, middle)
    run(middle, stop)
