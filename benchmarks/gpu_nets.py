"""Each network alone on a GPU: rows a second, by batch, precision and runtime: ``python -m benchmarks.gpu_nets``.

What is timed is Executor.run: copy into the batch, the network, the outputs on the host. Before that, its outputs are
compared with the CPU's. Without a GPU: one line, exit code 2.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from dfengine.bundle import Bundle
from dfengine.errors import DeviceError, DfengineError
from dfengine.gpu import backends
from dfengine.gpu.executor import Executor, Profile
from dfengine.gpu.lanes import Gpu
from dfengine.runtime.openvino import OpenVinoSession

from .harness import save, time_calls
from .nets import make_bundle

BATCHES = (1, 8, 32, 64)
DETECTOR_BATCHES = {"pnet": (1, 16), "rnet": (64, 1024), "onet": (16, 512)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=backends.BACKENDS, help="default: the one that would be chosen")
    parser.add_argument("--precision", choices=("fp16", "fp32"), nargs="+", default=["fp16", "fp32"])
    parser.add_argument("--repeats", type=int, default=30)
    options = parser.parse_args()
    try:
        gpu = Gpu.open()
        backend = options.backend or backends.choose_backend(gpu).name
    except DeviceError as error:
        print(f"nothing was measured: {error}", file=sys.stderr)
        return 2
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        bundles = [Bundle.load("default"), *(make_bundle(n, Path(scratch)) for n in ("efficientnet_b1", "xception"))]
        found = backends.networks(bundles[0])[:3]
        for bundle in bundles:
            found += backends.networks(bundle)[3:]
        for name, data, profiles, most in found:
            for precision in options.precision:
                try:
                    rows += measure(gpu, backend, name, data, profiles, most, precision, options.repeats)
                except DfengineError as error:
                    rows.append({"network": name, "precision": precision, "error": str(error)})
                    print(f"{name} {precision}: {error}")
    device = {"name": gpu.name, "driver": gpu.driver, "compute_capability": gpu.compute_capability}
    what = "Executor.run by network, batch and precision, one stream"
    print("wrote", save("gpu_nets", {"what": what, "gpu": device, "backend": backend, "rows": rows}).name)
    return 0


def measure(
    gpu: Gpu, backend: str, name: str, data: bytes, profiles: tuple[Profile, ...], most: int, precision: Any,
    repeats: int,
) -> list[dict[str, Any]]:  # fmt: skip
    (executor,) = backends.make_executors(
        gpu, name, data, precision=precision, input_shapes=profiles, max_batch=most, contexts=1, backend=backend
    )
    session = OpenVinoSession(name, data, threads=1)
    batches = DETECTOR_BATCHES.get(name.split("/")[-1], [b for b in BATCHES if b <= most])
    found: list[dict[str, Any]] = []
    try:
        for batch in batches:
            inputs = [np.random.default_rng(0).standard_normal((batch, *p.usual)) for p in profiles]
            found.append(time_batch(gpu, executor, session, [x.astype(executor.dtype) for x in inputs], repeats))
            found[-1] |= {"network": name, "precision": precision, "batch": batch, "parameters": parameters(data)}
            print(f"{name:<40} {precision} batch {batch:>4}: {found[-1]['rows_per_s']:>9.0f} rows/s")
    finally:
        executor.close()
    return found


def time_batch(
    gpu: Gpu, executor: Executor, session: OpenVinoSession, inputs: list[np.ndarray], repeats: int
) -> dict[str, Any]:
    batch = len(inputs[0])
    with gpu.lane() as lane:
        part = tuple(lane.upload(x) for x in inputs)
        ready = lane.record()
        got = executor.run([part], [ready])
        few = slice(0, 8)
        wanted = session.run(*(x[few].astype(np.float32) for x in inputs))
        difference = max(float(np.abs(g[few] - w).max()) for g, w in zip(got, wanted, strict=True))
        seconds = time_calls(lambda: executor.run([part], [ready]), repeats=repeats, warm_up=5)
    return seconds | {"rows_per_s": batch / seconds["median_s"], "largest_difference_to_cpu": difference}


def parameters(data: bytes) -> int:
    return sum(int(np.prod(t.dims)) for t in onnx.load_model_from_string(data).graph.initializer)


if __name__ == "__main__":
    sys.exit(main())
