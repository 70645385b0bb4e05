"""The GPU's driver, through PyCUDA and cuda-bindings: whether it is there, and what it refuses, as errors of ours.

PyCUDA has no CUDA graphs, so those few calls go to NVIDIA's cuda-bindings, which torch and CuPy bring along.
"""

from __future__ import annotations

import re
from typing import Any

from dfengine.errors import DeviceError, DeviceMemoryError, first_line

__all__ = ["check_result", "find_driver", "refusal", "says_memory_is_full"]

# How the driver (CUDA_ERROR_OUT_OF_MEMORY, "out of memory", cudaErrorMemoryAllocation), TensorRT ("OutOfMemory",
# "insufficient memory") and cuBLAS and cuDNN (..._STATUS_ALLOC_FAILED) say it.
_FULL = re.compile(r"out[ _]?of[ _]?memory|MemoryAllocation|insufficient memory|ALLOC_FAILED", re.IGNORECASE)


def find_driver(ordinal: int) -> tuple[Any, Any]:
    """PyCUDA's and cuda-bindings' driver modules, if they find the GPU with this number. Raises DeviceError."""
    try:
        import pycuda.driver as pycuda
    except ImportError as error:
        raise DeviceError(f"no GPU can be used: {_why_no_pycuda(error)}", stage="device") from None
    try:
        from cuda.bindings import driver as graphs
    except ImportError:
        raise DeviceError(
            "no GPU can be used: the package cuda-bindings is missing; pip install 'dfengine[gpu]'", stage="device"
        ) from None
    try:
        pycuda.init()
        count = pycuda.Device.count()
    except pycuda.Error as error:
        raise DeviceError(
            f"no GPU can be used: the driver says '{first_line(error)}'; nvidia-smi must list the GPU, and in a "
            "container NVIDIA_DRIVER_CAPABILITIES must hold compute,utility,video",
            stage="device",
        ) from None
    if not 0 <= ordinal < count:
        raise DeviceError(
            f"there is no GPU number {ordinal}: the driver shows {count}, counted from 0; see CUDA_VISIBLE_DEVICES",
            stage="device",
        )
    return pycuda, graphs


def check_result(graphs: Any, call: str, result: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a call of cuda-bindings returned beside its status. Raises DeviceError, in PyCUDA's words."""
    if result[0] != graphs.CUresult.CUDA_SUCCESS:
        raise DeviceError(f"{call} failed: {result[0].name}")
    return result[1:]


def refusal(text: str) -> DeviceError | DeviceMemoryError:
    """The error for what the driver says. Where it happened is known to whoever is in the way."""
    if says_memory_is_full(text):
        return DeviceMemoryError(
            f"the GPU's memory is full ({text}); lower workers or memory_bytes, or stop what else runs on it"
        )
    return DeviceError(f"the GPU failed ({text}); if it does so for every video from now on, start the process again")


def says_memory_is_full(text: str) -> bool:
    """Whether that is what the driver, TensorRT or torch say with their message."""
    return _FULL.search(text) is not None


def _why_no_pycuda(error: ImportError) -> str:
    if "libcuda" in str(error):
        return f"there is no NVIDIA driver ({first_line(error)}); install it, or start the container with --gpus all"
    if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] == "pycuda":
        return "the package pycuda is missing; pip install 'dfengine[gpu]'"
    why = first_line(error)
    return f"the package pycuda cannot be loaded ({why}); build it anew: pip install --force-reinstall pycuda"
