"""Networks on torch: for GPUs that neither TensorRT at hand supports.

The bundle's ONNX becomes a module through onnx2torch: no second file, and no code that comes with the weights. Float16
is written into the graph before, as for TensorRT (dfengine.gpu.precision).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from dfengine.errors import DeviceMemoryError, DfengineError, InferenceError, first_line
from dfengine.gpu.array import DeviceArray
from dfengine.gpu.driver import says_memory_is_full
from dfengine.gpu.executor import Executor
from dfengine.gpu.lanes import Gpu, Lane
from dfengine.gpu.precision import gather_constants
from dfengine.gpu.spec import EngineSpec

__all__ = ["TorchNetwork", "make_torch_executors", "to_module"]


def make_torch_executors(gpu: Gpu, spec: EngineSpec, *, contexts: int) -> list[Executor]:
    """Executors that share one module. Raises DeviceError, DeviceMemoryError, InferenceError."""
    import torch

    if spec.precision == "fp32":
        torch.backends.cudnn.allow_tf32 = False  # for the whole process: fp32 means what it says
    with gpu.current(), _errors_of(torch, spec.name):
        module = to_module(spec.graph(), spec.name, f"cuda:{gpu.ordinal}")
    return [Executor(gpu, spec, TorchNetwork(gpu, module, spec.name)) for _ in range(contexts)]


def to_module(onnx: bytes, name: str, device: str) -> Any:
    """An ONNX graph as a torch.nn.Module on ``device``, in channels-last layout. Raises InferenceError.

    Whole numbers stay on the CPU. They are sizes of tensors and places in them, which torch would otherwise fetch from
    the GPU each time, and no CUDA graph could be captured.
    """
    import onnx as onnx_package
    import onnx2torch
    import torch

    from dfengine.gpu import onnx2torch_more

    onnx2torch_more.register()
    model = onnx_package.load_model_from_string(onnx)
    gather_constants(model.graph)
    try:
        module = onnx2torch.convert(model).eval().requires_grad_(False)
    except NotImplementedError as error:
        raise InferenceError(
            f"network {name} cannot run on torch: onnx2torch does not know all of it ({first_line(error)})",
            stage="runtime",
        ) from None
    onnx2torch_more.replace(module, device)
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            layout = torch.channels_last if tensor.ndim == 4 else torch.preserve_format
            tensor.data = tensor.data.to(device, memory_format=layout)
    return module


class TorchNetwork:
    """A module for one Executor. ``as_tensor`` shows a device array to torch, without a copy."""

    def __init__(
        self, gpu: Gpu, module: Any, name: str, *, as_tensor: Callable[[DeviceArray], Any] | None = None
    ) -> None:
        self._gpu, self._module, self._name = gpu, module, name
        self._as_tensor = as_tensor or _as_cuda_tensor
        self._pool: Any = None  # memory that all graphs work in; they never run at the same time

    def prepare(self, lane: Lane, inputs: Sequence[DeviceArray]) -> PreparedModule:
        import torch

        with _errors_of(torch, self._name):
            tensors = [self._as_tensor(x) for x in inputs]
            if self._pool is None and tensors[0].is_cuda:
                self._pool = torch.cuda.graph_pool_handle()
            return PreparedModule(self._gpu, self._module, self._name, lane, tensors, self._pool)

    def close(self) -> None:
        self._module = self._pool = None


class PreparedModule:
    """A module for batches of one shape. See executor.Prepared.

    Runs once at the start, which shows what comes out and lets cuDNN choose its algorithms.
    """

    def __init__(self, gpu: Gpu, module: Any, name: str, lane: Lane, inputs: Sequence[Any], pool: Any) -> None:
        import torch

        self._torch, self._gpu, self._module, self._name, self._pool = torch, gpu, module, name, pool
        # Memory that torch gives out is safe on one stream only, so all of it is asked for on the lane's.
        stream: Any = torch.cuda.ExternalStream
        self._stream = stream(lane.stream, inputs[0].device) if inputs[0].is_cuda else None
        self._sources = inputs
        with self._current():
            # The same memory if its layout is channels-last already, else a place for copies.
            self._inputs = [x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x for x in inputs]
            self._results = [torch.empty(y.shape, dtype=torch.float32, device=y.device) for y in self._run()]
        self.outputs = [
            DeviceArray(y.data_ptr(), tuple(y.shape), np.float32, owner=y, lane=lane) for y in self._results
        ]

    def enqueue(self) -> None:
        with _errors_of(self._torch, self._name), self._current():
            for place, y in zip(self._results, self._run(), strict=True):
                place.copy_(y)

    def capture(self) -> Callable[[], None] | None:
        if self._stream is None:
            return None
        graph = self._torch.cuda.CUDAGraph()
        with self._gpu.exclusive, self._current():
            graph.capture_begin(self._pool, capture_error_mode="thread_local")
            try:
                for place, y in zip(self._results, self._run(), strict=True):
                    place.copy_(y)
            finally:
                graph.capture_end()

        def replay() -> None:
            with _errors_of(self._torch, self._name), self._current():
                graph.replay()

        return replay

    def _run(self) -> list[Any]:
        for x, source in zip(self._inputs, self._sources, strict=True):
            if x.data_ptr() != source.data_ptr():
                x.copy_(source)  # to the other layout
        with self._torch.inference_mode():
            y = self._module(*self._inputs)
        return list(y) if isinstance(y, tuple | list) else [y]

    def _current(self) -> AbstractContextManager[Any]:
        return self._torch.cuda.stream(self._stream) if self._stream is not None else contextlib.nullcontext()


def _as_cuda_tensor(array: DeviceArray) -> Any:
    import torch

    return torch.as_tensor(array, device="cuda")


@contextlib.contextmanager
def _errors_of(torch: Any, name: str) -> Iterator[None]:
    try:
        yield
    except DfengineError:
        raise
    except Exception as error:  # torch's are RuntimeErrors as a rule; those of a module that does not fit, of any type
        said = first_line(error)
        if isinstance(error, torch.OutOfMemoryError) or says_memory_is_full(said):
            raise DeviceMemoryError(
                f"network {name} does not fit into the GPU's memory ({said}); lower workers", stage="runtime"
            ) from None
        kind = "" if isinstance(error, RuntimeError) else f"{type(error).__name__}: "
        raise InferenceError(f"network {name} failed on torch ({kind}{said})", stage="runtime") from None
