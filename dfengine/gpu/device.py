"""Networks on an NVIDIA GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from dfengine.bundle import Bundle, DetectorSettings
from dfengine.errors import DeviceError
from dfengine.gpu.backends import choose_backend, make_executors
from dfengine.gpu.batching import BatchingSession
from dfengine.gpu.lanes import CACHE_BYTES, Gpu, Lane
from dfengine.gpu.spec import EngineSpec, GpuPrecision
from dfengine.stages import _kernels
from dfengine.types import Dtype

# Execution contexts of each network: while one runs, the rows of the next batch are gathered. Chosen, not measured.
CONTEXTS = 2


class GpuDevice:
    """A GPU, with TensorRT or torch. See Device.

    ``precision``: of all networks; it is in ``runtime``. "fp32" is for networks whose activations leave the range of
    float16 (65504); what `dfengine compile` makes is for "fp16".
    """

    name: str
    runtime: str
    dtype: Dtype
    gpu: Gpu

    def __init__(self, *, ordinal: int = 0, precision: GpuPrecision = "fp16") -> None:
        """Raises DeviceError, OptionError."""
        self._open_lanes(Gpu.open(ordinal))
        backend = choose_backend(self.gpu, precision=precision)
        self.runtime = f"{backend.reason}; networks in {precision}"
        self.dtype = "float16" if precision == "fp16" else "float32"
        self._backend, self._precision = backend.name, precision

    def _open_lanes(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.name = f"cuda:{gpu.ordinal}"
        self._lanes: list[Lane] = []  # that no thread holds
        self._sessions: list[BatchingSession] = []

    def session(
        self, bundle: Bundle, member: str, *, threads: int = 1, detector: DetectorSettings | None = None
    ) -> BatchingSession:
        """See Device.session. ``threads`` is for the CPU."""
        spec = EngineSpec.of_member(bundle, member, precision=self._precision, detector=detector)
        executors = make_executors(self.gpu, spec, contexts=CONTEXTS, backend=self._backend)
        self._sessions.append(BatchingSession(spec.name, executors))
        return self._sessions[-1]

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

    def lane_bytes(self, used: int) -> int:
        """See Device.lane_bytes."""
        return used * 5 // 4 + CACHE_BYTES  # sizes are rounded up by a fourth at most

    def close(self) -> None:
        for session in self._sessions:
            session.close()
        self.gpu.close()


def why_no_gpu() -> str:
    """What keeps this machine from using a GPU, with the fix; "" if nothing does.

    Whether a runtime can use the GPU is found out by opening it.
    """
    if not _kernels.cuda_architectures:
        return "dfengine was built without CUDA; build it where nvcc is on PATH (DFENGINE_CUDA=ON says what is missing)"
    try:
        Gpu.check()
    except DeviceError as error:
        return error.message
    return ""
