"""Networks on an NVIDIA GPU."""

from __future__ import annotations


def why_no_gpu() -> str:
    """What keeps this machine from using a GPU, with the fix; "" if nothing does."""
    return "this build of dfengine has no GPU path"
