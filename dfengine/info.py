"""What this installation is made of, and what can be used on this machine."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

from dfengine.bundle import PACKAGED, Bundle
from dfengine.gpu.backends import explain_cuda
from dfengine.machine import usable_cores
from dfengine.stages import _kernels

# Without these pieces nothing is scored on a GPU. Without NVDEC frames are decoded by the CPU.
NEEDED = ("kernel", "pycuda", "gpu", "networks")


def build_info() -> dict[str, Any]:
    """Versions and capabilities, as plain values."""
    import av

    return {
        "dfengine": metadata.version("dfengine"),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "cores": usable_cores(),
        "compiler": _kernels.compiler,
        "cuda_compiled": bool(_kernels.cuda_architectures),
        "openvino": metadata.version("openvino"),
        "pyav": metadata.version("av"),
        "ffmpeg_libavcodec": ".".join(map(str, av.library_versions["libavcodec"])),
    }


def devices() -> dict[str, str]:
    """Each device, and why it can or cannot be used here."""
    archs = _kernels.cuda_architectures
    kernel = f"usable: compiled for {', '.join(map(str, archs))}" if archs else "not usable: compiled without CUDA"
    pieces = {"kernel": kernel} | explain_cuda()
    missing = [name for name, text in pieces.items() if name in NEEDED and text.startswith("not usable")]
    return {
        "cpu": f"usable: OpenVINO {metadata.version('openvino')}, {usable_cores()} cores",
        "cuda": f"not usable: {', '.join(missing)} (below)" if missing else f"usable: {pieces['networks'][8:]}",
        **{f"cuda {name}": text for name, text in pieces.items()},
    }


def packaged_bundles() -> dict[str, str]:
    """The bundles that come with the package."""
    lines = {}
    for file in sorted(PACKAGED.glob("*/bundle.json")):
        bundle = Bundle.load(file.parent.name)
        size = sum(f.stat().st_size for f in file.parent.iterdir()) / 1e6
        members = ", ".join(m.name for m in bundle.members)
        state = " (experimental)" if bundle.experimental else ""
        lines[bundle.name] = f"{members}; {size:.1f} MB; {bundle.licence}{state}"
    return lines
