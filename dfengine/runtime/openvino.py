"""Networks on the CPU, with OpenVINO."""

from __future__ import annotations

import queue
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dfengine.bundle import Precision
from dfengine.errors import InferenceError

# What OpenVINO prepares for a shape of input it keeps, for 5,000 shapes and layers unless told: 400 sizes of pyramid
# levels then cost 540 MB, with this limit 410. Videos of one size lose 3 % of CPU time by it.
_SHAPES_KEPT = "200"


@cache
def _core() -> Any:
    import openvino

    return openvino.Core()


class OpenVinoSession:
    """A compiled network with one single-threaded inference stream per thread it may use.

    Streams do not share work, so a batch is cut into as many parts as there are streams. That uses all cores for one
    caller, and lets several callers share them. How a batch is cut moves a result by rounding only.
    """

    def __init__(self, name: str, onnx: bytes, *, threads: int, precision: Precision = "fp32") -> None:
        self.name = name
        self._streams = max(1, threads)
        # Said outright: else OpenVINO takes bfloat16 where the CPU has it. Where it has not, that would be slower.
        narrow = precision == "bf16" and "BF16" in _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        try:
            self._model = _core().compile_model(
                _core().read_model(onnx, b""),
                "CPU",
                {
                    "NUM_STREAMS": str(self._streams),
                    "INFERENCE_NUM_THREADS": str(self._streams),
                    "INFERENCE_PRECISION_HINT": "bf16" if narrow else "f32",
                    "CPU_RUNTIME_CACHE_CAPACITY": _SHAPES_KEPT,
                    "ENABLE_CPU_PINNING": "NO",  # decode threads need the same cores
                },
            )
        except RuntimeError as error:
            raise InferenceError(f"network {name} cannot be compiled ({_first_line(error)})", stage="runtime") from None
        self._idle: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for _ in range(self._streams):
            self._idle.put(self._model.create_infer_request())

    def run(self, *inputs: Any) -> list[NDArray[np.float32]]:
        """See Session.run."""
        count = len(inputs[0])
        if count == 0:
            shapes = [
                [d.get_length() if d.is_static else 0 for d in o.get_partial_shape()] for o in self._model.outputs
            ]
            return [np.zeros([0, *shape[1:]], np.float32) for shape in shapes]
        # One request at least; more only if idle, so that callers never wait for each other in a circle.
        requests = [self._idle.get()]
        while len(requests) < min(self._streams, count):
            try:
                requests.append(self._idle.get_nowait())
            except queue.Empty:
                break
        cuts = [np.array_split(x, len(requests)) if len(requests) > 1 else [x] for x in inputs]
        try:
            for request, part in zip(requests, zip(*cuts, strict=True), strict=True):
                request.start_async([np.ascontiguousarray(x, np.float32) for x in part], share_inputs=False)
            for request in requests:
                request.wait()
            results = [[np.array(t.data) for t in request.output_tensors] for request in requests]
        except RuntimeError as error:
            got = ", ".join(str(x.shape) for x in inputs)
            raise InferenceError(
                f"network {self.name} failed on a batch of shape {got} ({_first_line(error)})",
                stage="runtime",
            ) from None
        finally:
            for request in requests:
                self._idle.put(request)
        return [np.concatenate(outputs) for outputs in zip(*results, strict=True)]


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
