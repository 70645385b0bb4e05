"""Scores videos for face manipulation: from a path to p_fake, with the evidence.

import dfengine

result = dfengine.score("clip.mp4")
result.p_fake      # probability that a face was manipulated, or None
result.status      # "ok", "no_face" or "error": failure is data, never a made-up score
"""

from __future__ import annotations

from typing import Any

from dfengine import errors
from dfengine.bundle import Bundle
from dfengine.engine import Engine
from dfengine.info import build_info
from dfengine.types import PathLikeStr, VideoScore

__all__ = ["Bundle", "Engine", "VideoScore", "build_info", "errors", "score"]
__version__ = "0.1.0"


def score(
    path: PathLikeStr, *, bundle: PathLikeStr | Bundle = "default", device: str = "auto", **options: Any
) -> VideoScore:
    """Scores one video. For many, make an Engine and keep it: its networks are compiled only once.

    ``options`` are those of Engine. What is wrong with the file is in the result; a bundle, a device or an option that
    cannot be had raises BundleError, DeviceError or OptionError.
    """
    with Engine(bundle, device=device, **options) as engine:
        return engine.score(path)
