"""Networks on the CPU, with OpenVINO."""

from __future__ import annotations

import queue
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from importlib import metadata
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dfengine.bundle import Precision
from dfengine.errors import InferenceError, first_line
from dfengine.runtime.contract import Seen

# What OpenVINO prepares for a shape of input it keeps, for 5,000 shapes and layers by default: 400 sizes of pyramid
# levels then cost 540 MB, with this limit 410. Videos of one size lose 3 % of CPU time by it.
_SHAPES_KEPT = "200"

# A network takes this much input at a time, and at least four rows, so that layers hand over to each other in the cache
# and memory does not grow with the batch. On one core R-Net took 28 us a crop in parts of 64 and 34 in batches of 500;
# EfficientNet-B1 at 240 px took 14 ms and 99 MiB in parts of 4, 16 ms and 522 MiB in batches of 32. Fewer rows than
# four gained nothing in float32; single ones cost 12 % more in bfloat16.
_PART_BYTES = 512 << 10
_MIN_PART_ROWS = 4


@cache
def _core() -> Any:
    # openvino tells an analytics host that it was imported, and keeps an id in the user's home, unless its package for
    # that cannot be imported.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino.Core()


class OpenVinoSession:
    """A compiled network with one single-threaded inference stream per thread it may use.

    Streams do not share work, so the parts of a batch are dealt out to the streams that are idle. That uses all cores
    for one caller, and lets several callers share them.

    Note [Few shapes]
    A shape of input that a network has not seen costs 2 to 4 ms, whatever its size, and a change to another known one
    some .4 ms. No two videos give R-Net as many proposals, so the parts of a batch are powers of two. Pictures of any
    size (P-Net) go one by one: a shape is a size then, and that is no slower than together. How a batch is cut changed
    no bit of any network that was tried.
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
            says = f"OpenVINO {metadata.version('openvino')} says {first_line(error)!r}"
            raise InferenceError(
                f"network {name} cannot be compiled: {says}; export it again, as ONNX of operations that OpenVINO "
                "knows",
                stage="runtime",
            ) from None
        self.inputs, self.outputs = ([_seen(p) for p in ports] for ports in (self._model.inputs, self._model.outputs))
        self._any_size = any(d.is_dynamic for d in list(self._model.inputs[0].get_partial_shape())[1:])
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
        parts = list(_parts(count, 1 if self._any_size else _part_rows(inputs[0].nbytes // count)))
        # One request at least; more only if idle, so that callers never wait for each other in a circle.
        requests = [self._idle.get()]
        while len(requests) < min(self._streams, len(parts)):
            try:
                requests.append(self._idle.get_nowait())
            except queue.Empty:
                break
        results: list[NDArray[np.float32]] = []
        turns = [parts[i : i + len(requests)] for i in range(0, len(parts), len(requests))]
        try:
            for turn in turns:
                # Networks read from these arrays, so they must outlive the turn.
                fed = [[np.ascontiguousarray(x[part], np.float32) for x in inputs] for part in turn]
                for request, arrays in zip(requests, fed, strict=False):
                    request.start_async(arrays, share_inputs=True)
                for request, part in zip(requests, turn, strict=False):
                    request.wait()
                    outputs = [t.data for t in request.output_tensors]
                    if not results:
                        results = [np.empty((count, *y.shape[1:]), np.float32) for y in outputs]
                    for result, y in zip(results, outputs, strict=True):
                        result[part] = y
        except RuntimeError as error:
            got = ", ".join(str(x.shape) for x in inputs)
            raise InferenceError(
                f"network {self.name} failed on a batch of shape {got} ({first_line(error)})",
                stage="runtime",
            ) from None
        finally:
            for request in requests:
                with suppress(RuntimeError):  # where one has failed, another may still be reading
                    request.wait()
                self._idle.put(request)
        return results


def _seen(port: Any) -> Seen:
    shape = port.get_partial_shape()
    if shape.rank.is_dynamic:
        return None
    return tuple(d.get_length() if d.is_static else None for d in shape)


def _part_rows(row_bytes: int) -> int:
    """Rows that go through a network together, a power of two."""
    return 1 << (max(_MIN_PART_ROWS, _PART_BYTES // max(row_bytes, 1)).bit_length() - 1)


def _parts(count: int, rows: int) -> Iterator[slice]:
    """Cuts ``count`` rows into parts of ``rows``, a power of two, and the rest into smaller powers of two."""
    start = 0
    while start < count:
        stop = start + min(rows, 1 << ((count - start).bit_length() - 1))
        yield slice(start, stop)
        start = stop
