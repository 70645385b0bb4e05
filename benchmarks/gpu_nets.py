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
from dfengine.gpu.executor import Executor
from dfengine.gpu.lanes import Gpu
from dfengine.gpu.spec import EngineSpec
from dfengine.runtime.openvino import OpenVinoSession

from .harness import save, time_calls
from .nets import make_bundle

BATCHES = (1, 8, 32, 64)
DETECTOR_BATCHES = {"pnet": (1, 8), "rnet": (64, 1024), "onet": (16, 512)}


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
        for precision in options.precision:
            specs = EngineSpec.all_of(bundles[0], precision=precision)
            specs += [s for bundle in bundles[1:] for s in EngineSpec.all_of(bundle, precision=precision)[3:]]
            for spec in specs:
                try:
                    rows += measure(gpu, backend, spec, options.repeats)
                except DfengineError as error:
                    rows.append({"network": spec.name, "precision": precision, "error": str(error)})
                    print(f"{spec.name} {precision}: {error}")
    device = {"name": gpu.name, "driver": gpu.driver, "compute_capability": gpu.compute_capability}
    what = "Executor.run by network, batch and precision, one stream"
    print("wrote", save("gpu_nets", {"what": what, "gpu": device, "backend": backend, "rows": rows}).name)
    return 0


def measure(gpu: Gpu, backend: str, spec: EngineSpec, repeats: int) -> list[dict[str, Any]]:
    (executor,) = backends.make_executors(gpu, spec, contexts=1, backend=backend)
    session = OpenVinoSession(spec.name, spec.onnx, threads=1)
    batches = DETECTOR_BATCHES.get(spec.name.split("/")[-1], [b for b in BATCHES if b <= spec.max_batch])
    found: list[dict[str, Any]] = []
    try:
        for batch in batches:
            inputs = [np.random.default_rng(0).standard_normal((batch, *p.usual)) for p in spec.profiles]
            found.append(time_batch(gpu, executor, session, [x.astype(executor.dtype) for x in inputs], repeats))
            found[-1] |= {"network": spec.name, "precision": spec.precision, "batch": batch}
            found[-1]["parameters"] = parameters(spec.onnx)
            print(f"{spec.name:<40} {spec.precision} batch {batch:>4}: {found[-1]['rows_per_s']:>9.0f} rows/s")
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
