"""Which device a run gets: the one that was named, or what this machine has."""

from __future__ import annotations

from dfengine.errors import DeviceError, OptionError
from dfengine.runtime import CpuDevice, Device
from dfengine.stages.decode import DecoderPool

DEVICES = ("auto", "cpu", "cuda")

# The GPU that a run gets: the first that CUDA_VISIBLE_DEVICES shows.
ORDINAL = 0


def resolve_device(device: str) -> str:
    """Turns "auto" into what this machine has, "cpu" or "cuda". Raises DeviceError or OptionError."""
    from dfengine.gpu.device import why_no_gpu

    if device not in DEVICES:
        raise OptionError(f"device must be one of {', '.join(DEVICES)}; got {device!r}")
    if device == "cpu":
        return "cpu"
    missing = why_no_gpu()
    if missing and device == "cuda":
        raise DeviceError(f"device 'cuda' cannot be had: {missing}; or use --device cpu", stage="device")
    return "cpu" if missing else "cuda"


def open_device(device: str) -> Device:
    """Opens what ``resolve_device`` names. Raises DeviceError or OptionError."""
    if resolve_device(device) == "cpu":
        return CpuDevice()
    from dfengine.gpu.device import GpuDevice

    return GpuDevice(ordinal=ORDINAL)


def device_name(device: str) -> str:
    """What rows call the device that ``open_device`` opens for what ``resolve_device`` has returned."""
    return device if device == "cpu" else f"{device}:{ORDINAL}"


def open_decoders(device: Device) -> tuple[DecoderPool | None, str]:
    """The decoders of a GPU, or why videos are decoded on the CPU all the same."""
    if device.gpu is None:
        return None, ""
    from dfengine.gpu.nvdec import NvdecPool

    try:
        return NvdecPool(device.gpu), ""
    except DeviceError as error:
        return None, error.message
