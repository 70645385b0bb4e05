"""Running networks: a Session takes a batch and returns its outputs."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dfengine.bundle import Bundle
from dfengine.errors import DeviceError, OptionError

__all__ = ["Session", "make_session", "resolve_device"]

DEVICES = ("auto", "cpu", "cuda")


class Session(Protocol):
    """One compiled network. Thread-safe."""

    name: str

    def run(self, *inputs: NDArray[Any]) -> list[NDArray[np.float32]]:
        """Runs a batch: the network's inputs in order, each (B, ...) float32; each output has B rows. B may be 0.

        Raises InferenceError.
        """


def resolve_device(device: str) -> str:
    """Turns "auto" into what this machine has. Raises DeviceError or OptionError."""
    if device not in DEVICES:
        raise OptionError(f"device must be one of {', '.join(DEVICES)}; got {device!r}")
    if device == "cuda":
        raise DeviceError(
            "device 'cuda' cannot be had: this build of dfengine has no GPU path; use --device cpu or auto",
            stage="device",
        )
    return "cpu"


def make_session(bundle: Bundle, member: str, *, threads: int) -> Session:
    """Compiles a member of a bundle for the CPU, to run on up to ``threads`` cores at a time."""
    from dfengine.runtime.openvino import OpenVinoSession

    spec = bundle.member(member)
    return OpenVinoSession(
        f"{bundle.name}/{member}", bundle.onnx_bytes(spec), threads=threads, precision=spec.precision
    )
