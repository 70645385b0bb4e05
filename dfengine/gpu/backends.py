"""Which runtime the networks get on a GPU, why, and what is missing for the others."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from dfengine.bundle import Bundle, DetectorSettings
from dfengine.errors import DeviceError, DfengineError, OptionError, first_line
from dfengine.gpu.cache import EngineCache, default_cache_dir
from dfengine.gpu.executor import Executor
from dfengine.gpu.lanes import Gpu
from dfengine.gpu.spec import EngineSpec, GpuPrecision
from dfengine.gpu.tensorrt import compile_network, import_tensorrt, make_tensorrt_executors

log = logging.getLogger("dfengine")

# In order of preference. TensorRT times kernels on the very GPU; RTX knows only some GPUs; torch knows all.
BACKENDS = ("tensorrt", "tensorrt_rtx", "torch")


@dataclass(frozen=True)
class Backend:
    """The runtime that was chosen, and why. ``name`` is one of BACKENDS."""

    name: str
    reason: str


def choose_backend(gpu: Gpu, *, precision: GpuPrecision = "fp16", cache_dir: Path | None = None) -> Backend:
    """The first of BACKENDS that is installed and supports the GPU. Raises DeviceError, which says why none does.

    ``precision``: of the networks that will run, since one is compiled to find out. Raises OptionError.
    """
    trial = trial_spec(precision)
    refused = []
    for name in BACKENDS:
        try:
            version = _try(name, gpu, trial, EngineCache(cache_dir or default_cache_dir()))
        except DfengineError as error:
            refused.append(error.message if error.message.startswith(name) else f"{name}: {error.message}")
        else:
            why = f"{name} {version} supports {gpu.name}"
            return Backend(name, "; ".join([why, *refused]))
    raise DeviceError(f"no runtime can use {gpu.name}: {'; '.join(refused)}", stage="device")


def make_executors(
    gpu: Gpu, spec: EngineSpec, *, contexts: int, backend: str, cache_dir: Path | None = None
) -> list[Executor]:
    """``contexts`` executors of one network, for as many threads. ``backend``: one of BACKENDS.

    Raises DeviceError, DeviceMemoryError, InferenceError.
    """
    if backend == "torch":
        from dfengine.gpu.torch import make_torch_executors

        return make_torch_executors(gpu, spec, contexts=contexts)
    cache = EngineCache(cache_dir or default_cache_dir())
    return make_tensorrt_executors(import_tensorrt(backend), gpu, spec, contexts=contexts, cache=cache)


def compile_bundle(
    bundle: Bundle, backend: str, *, precision: GpuPrecision = "fp16", folder: Path | None = None
) -> dict[str, Path]:
    """Compiles all that a GpuDevice of this precision looks for when it scores with a bundle: file by network.

    That is the bundle's networks and its detector's, and what ``choose_backend`` tries. "tensorrt" compiles for the
    GPU of this machine, "tensorrt_rtx" for all GPUs it knows, and needs none.
    Raises BundleError, DeviceError, InferenceError, OptionError, OutputError.
    """
    if backend not in BACKENDS[:2]:
        raise OptionError(f"backend must be one of {', '.join(BACKENDS[:2])}; got {backend!r}")
    specs = [trial_spec(precision), *EngineSpec.all_of(bundle, precision=precision)]
    runtime = import_tensorrt(backend)
    gpu = None if runtime.is_rtx else Gpu.open()
    cache = EngineCache(folder or default_cache_dir())
    made = {}
    try:
        for spec in specs:
            with gpu.current() if gpu is not None else nullcontext():
                made[spec.name] = compile_network(runtime, gpu, spec, cache)[1]
    finally:
        if gpu is not None:
            gpu.close()
    return made


def trial_spec(precision: GpuPrecision) -> EngineSpec:
    """The smallest real engine, P-Net: whether a runtime can use a GPU is found out with it."""
    return EngineSpec.of_member(Bundle.load("mtcnn"), "pnet", precision=precision, detector=DetectorSettings())


def explain_cuda() -> dict[str, str]:
    """Each piece that scoring on a GPU needs, and whether it can be used here or why not; last what was chosen."""
    rows = {"pycuda": _explain_package("pycuda", "pycuda.driver")}
    gpu = None
    try:
        gpu = Gpu.open()
    except DeviceError as error:
        rows["gpu"] = f"not usable: {error.message}"
    else:
        major, minor = gpu.compute_capability
        rows["gpu"] = (
            f"usable: {gpu.name}, compute capability {major}.{minor}, {gpu.memory_bytes >> 20} MiB, driver for "
            f"{gpu.driver}"
        )
    rows["PyNvVideoCodec"] = _explain_package("PyNvVideoCodec", "PyNvVideoCodec")
    for name in BACKENDS:
        rows[name] = _explain_backend(name, gpu)
    if gpu is None:
        rows["networks"] = "not usable: no GPU"
    else:
        try:
            rows["networks"] = f"usable: {choose_backend(gpu).reason}"
        except DeviceError as error:
            rows["networks"] = f"not usable: {error.message}"
        gpu.close()
    return rows


def _explain_package(package: str, module: str) -> str:
    try:
        version = metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not usable: the package is missing; pip install 'dfengine[gpu]'"
    try:
        importlib.import_module(module)
    except Exception as error:  # PyNvVideoCodec raises RuntimeError where the driver lacks a library
        return f"not usable: {package} {version} cannot be loaded ({first_line(error)})"
    return f"usable: {package} {version}"


def _explain_backend(name: str, gpu: Gpu | None) -> str:
    if gpu is None:  # nothing is imported, which takes torch seconds
        found = importlib.util.find_spec(name) is not None
        return f"not usable: {'there is no GPU' if found else 'the package is missing'}"
    try:
        return f"usable: {_try(name, gpu, trial_spec('fp16'), EngineCache(default_cache_dir()))}"
    except DfengineError as error:
        return f"not usable: {error.message.removeprefix(f'{name}: ')}"


def _version(name: str) -> str:
    """Raises DeviceError if it is not installed."""
    if name != "torch":
        return import_tensorrt(name).version
    try:
        import onnx2torch  # noqa: F401
        import torch
    except ImportError as error:
        raise DeviceError(f"torch: {first_line(error)}; pip install 'dfengine[gpu-torch]'", stage="device") from None
    return str(torch.__version__)


def _try(name: str, gpu: Gpu, trial: EngineSpec, cache: EngineCache) -> str:
    """The version of a runtime that can use this GPU. Raises DfengineError."""
    version = _version(name)
    if name == "torch":
        import torch

        if not torch.cuda.is_available():
            raise DeviceError(f"torch {version} has no CUDA, or it does not fit to the driver", stage="device")
        return version
    with gpu.current():  # a plan that is refused is one for another GPU
        compile_network(import_tensorrt(name), gpu, trial, cache)
    return version
