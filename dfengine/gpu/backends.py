"""Which runtime the networks get on a GPU, why, and what is missing for the others."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import cast, get_args

from dfengine.bundle import Bundle, DetectorSettings, ModelSpec
from dfengine.errors import DeviceError, DfengineError, OptionError
from dfengine.gpu.cache import EngineCache, default_cache_dir
from dfengine.gpu.executor import Executor, GpuPrecision, Profile, detector_profiles, member_profiles
from dfengine.gpu.lanes import Gpu
from dfengine.gpu.tensorrt import compile_network, import_tensorrt, make_tensorrt_executors

log = logging.getLogger("dfengine")

# In order of preference. TensorRT times kernels on the very GPU; RTX knows only some GPUs; torch knows all.
BACKENDS = ("tensorrt", "tensorrt_rtx", "torch")

# Largest batches. A member's: 64 crops of 224 px are 19 MB in float16, and GPUs are busy from 32 on. R-Net and O-Net
# get the proposals of 16 frames together; P-Net 8 frames, since its memory is planned for the largest frames.
MAX_BATCH = {"pnet": 8, "rnet": 1024, "onet": 512, "member": 64}


@dataclass(frozen=True)
class Backend:
    """The runtime that was chosen, and why. ``name`` is one of BACKENDS."""

    name: str
    reason: str


def choose_backend(gpu: Gpu, *, cache_dir: Path | None = None) -> Backend:
    """The first of BACKENDS that is installed and supports the GPU. Raises DeviceError, which says why none does."""
    refused = []
    for name in BACKENDS:
        try:
            version = _try(name, gpu, EngineCache(cache_dir or default_cache_dir()))
        except DfengineError as error:
            refused.append(error.message if error.message.startswith(name) else f"{name}: {error.message}")
        else:
            why = f"{name} {version} supports {gpu.name}"
            return Backend(name, "; ".join([why, *refused]))
    raise DeviceError(f"no runtime can use {gpu.name}: {'; '.join(refused)}", stage="device")


def make_executors(
    gpu: Gpu,
    name: str,
    onnx: bytes,
    *,
    precision: GpuPrecision,
    input_shapes: Sequence[Profile],
    max_batch: int,
    contexts: int,
    cache_dir: Path | None = None,
    backend: str | None = None,
) -> list[Executor]:
    """``contexts`` executors of one network, for as many threads. ``name`` is for messages and file names.

    ``backend``: one of BACKENDS, as ``choose_backend`` gave it; choosing anew for each network costs time.
    Raises DeviceError, DeviceMemoryError, InferenceError.
    """
    cache = EngineCache(cache_dir or default_cache_dir())
    backend = backend or choose_backend(gpu, cache_dir=cache.folder).name
    if backend == "torch":
        from dfengine.gpu.torch import make_torch_executors

        return make_torch_executors(
            gpu, name, onnx, input_shapes, precision=precision, max_batch=max_batch, contexts=contexts
        )
    return make_tensorrt_executors(
        import_tensorrt(backend), gpu, name, onnx, input_shapes, precision=precision, max_batch=max_batch,
        contexts=contexts, cache=cache,
    )  # fmt: skip


def compile_bundle(
    bundle: Bundle, backend: str, *, precision: str = "fp16", folder: Path | None = None
) -> dict[str, Path]:
    """Compiles all networks that scoring with a bundle takes, the detector's too: file by network.

    "tensorrt" compiles for the GPU of this machine, "tensorrt_rtx" for all GPUs it knows, and needs none.
    Raises BundleError, DeviceError, InferenceError, OptionError, OutputError.
    """
    if backend not in BACKENDS[:2]:
        raise OptionError(f"backend must be one of {', '.join(BACKENDS[:2])}; got {backend!r}")
    if precision not in get_args(GpuPrecision):
        raise OptionError(f"precision must be fp16 or fp32; got {precision!r}")
    runtime = import_tensorrt(backend)
    gpu = None if runtime.is_rtx else Gpu.open()
    cache = EngineCache(folder or default_cache_dir())
    made = {}
    try:
        for name, onnx, profiles, max_batch in networks(bundle):
            with gpu.current() if gpu is not None else nullcontext():
                made[name] = compile_network(
                    runtime,
                    gpu,
                    name,
                    onnx,
                    profiles,
                    precision=cast(GpuPrecision, precision),
                    max_batch=max_batch,
                    cache=cache,
                )[1]
    finally:
        if gpu is not None:
            gpu.close()
    return made


def networks(bundle: Bundle) -> list[tuple[str, bytes, tuple[Profile, ...], int]]:
    """All networks of a bundle and of its detector: name, ONNX, shapes of the inputs, largest batch."""
    detector = Bundle.load(bundle.detector.nets) if any(m.kind != "detector" for m in bundle.members) else bundle
    found = []
    for m in detector.members:
        found.append((f"{detector.name}/{m.name}", detector.onnx_bytes(m), *limits(m, bundle.detector)))
    for m in bundle.members if detector is not bundle else ():
        found.append((f"{bundle.name}/{m.name}", bundle.onnx_bytes(m), *limits(m)))
    return found


def limits(spec: ModelSpec, detector: DetectorSettings | None = None) -> tuple[tuple[Profile, ...], int]:
    """The shapes of a network's inputs, and its largest batch. ``detector``: how P-, R- and O-Net will be used."""
    if detector is not None:
        return detector_profiles(spec, detector), MAX_BATCH[spec.name]
    return member_profiles(spec), max(1, MAX_BATCH["member"] // spec.clip_frames)


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
        return f"not usable: {package} {version} cannot be loaded ({error})"
    return f"usable: {package} {version}"


def _explain_backend(name: str, gpu: Gpu | None) -> str:
    if gpu is None:  # nothing is imported, which takes torch seconds
        found = importlib.util.find_spec(name) is not None
        return f"not usable: {'there is no GPU' if found else 'the package is missing'}"
    try:
        return f"usable: {_try(name, gpu, EngineCache(default_cache_dir()))}"
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
        raise DeviceError(f"torch: {error}; pip install 'dfengine[gpu-torch]'", stage="device") from None
    return str(torch.__version__)


def _try(name: str, gpu: Gpu, cache: EngineCache) -> str:
    """The version of a runtime that can use this GPU. Raises DfengineError."""
    version = _version(name)
    if name == "torch":
        import torch

        if not torch.cuda.is_available():
            raise DeviceError(f"torch {version} has no CUDA, or it does not fit to the driver", stage="device")
        return version
    with gpu.current():  # the smallest real engine: P-Net. A plan that is refused is one for another GPU.
        onnx, profiles = _smallest_network()
        compile_network(
            import_tensorrt(name), gpu, "mtcnn/pnet", onnx, profiles, precision="fp16", max_batch=MAX_BATCH["pnet"],
            cache=cache,
        )  # fmt: skip
    return version


def _smallest_network() -> tuple[bytes, tuple[Profile, ...]]:
    bundle = Bundle.load("mtcnn")
    spec = bundle.member("pnet")
    return bundle.onnx_bytes(spec), detector_profiles(spec, DetectorSettings())
