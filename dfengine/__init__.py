"""Scores videos for face manipulation: from a path to p_fake, with the evidence.

import dfengine

result = dfengine.score("clip.mp4")
result.p_fake      # probability that a face was manipulated, or None
result.status      # "ok", "no_face" or "error": failure is data, never a made-up score
"""

from __future__ import annotations

from dfengine import errors
from dfengine.bundle import Bundle
from dfengine.engine import Engine
from dfengine.info import build_info
from dfengine.runtime import Device
from dfengine.stages.decode import DEFAULT_MEMORY_BYTES
from dfengine.types import VERSION, PathLikeStr, VideoScore

__all__ = ["Bundle", "Engine", "VideoScore", "build_info", "errors", "score"]
__version__ = VERSION


def score(
    path: PathLikeStr,
    *,
    bundle: PathLikeStr | Bundle = "default",
    device: str | Device = "auto",
    frames: str | int | None = None,
    mode: str | None = None,
    threads: int | None = None,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
) -> VideoScore:
    """Scores one video. For many, make an Engine and keep it: its networks are compiled only once.

    ``bundle``: the name of a packaged one, a folder with a bundle.json, or a Bundle. ``device``: "auto" (a GPU if it
    can be used), "cpu", "cuda", or a dfengine.runtime.Device, which is closed afterwards. ``frames``: which frames are
    scored, a number N for uniform:N or a policy such as "every:10:17"; ``mode``: which frame stands for a wanted time,
    "exact", "reference" or "keyframe" (both: dfengine.sampling; by default the bundle's). ``threads``: cores to use, by
    default all. ``memory_bytes``: decoded frames held at a time.

    What is wrong with the file is in the result; a bundle, a device or an option that cannot be had raises BundleError,
    DeviceError or OptionError.
    """
    with Engine(
        bundle, device=device, frames=frames, mode=mode, workers=1, threads=threads, memory_bytes=memory_bytes
    ) as engine:
        return engine.score(path)
