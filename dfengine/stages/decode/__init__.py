"""path -> Frames: sampled frames as YUV planes, with their times and rotation."""

from __future__ import annotations

import os
import stat
from typing import Any

from dfengine.errors import NotAVideo, SourceNotFound, SourceNotReadable
from dfengine.stages.decode.cpu import CpuDecoder
from dfengine.stages.decode.decoder import DecoderPool, PacketDecoder
from dfengine.stages.decode.first_bytes import other_kind
from dfengine.stages.decode.video import DEFAULT_MEMORY_BYTES, Video
from dfengine.types import PathLikeStr

__all__ = ["DEFAULT_MEMORY_BYTES", "DecoderPool", "Video", "open_video"]

STAGE = "open"


def open_video(path: PathLikeStr, *, threads: int = 1, lane: Any = None, pool: DecoderPool | None = None) -> Video:
    """Opens a video for decoding; use it as a context manager.

    With a ``lane`` (a dfengine.gpu.lanes.Lane), images are in that GPU's memory, allocated from the lane, and with a
    ``pool`` too they are decoded by its decoders where they can; else on the CPU, with ``threads`` cores.

    Raises SourceNotFound, SourceNotReadable, NotAVideo or UnsupportedVideo. Nothing is opened that could block
    or that is plainly no video.
    """
    _check_source(path)
    decoders: list[PacketDecoder] = [CpuDecoder(threads=threads, lane=lane)]
    if lane is not None and pool is not None:
        decoders.insert(0, pool.decoder(lane))
    return Video(path, decoders)


def _check_source(path: PathLikeStr) -> None:
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        raise SourceNotFound("there is no such file", path=path, stage=STAGE) from None
    except PermissionError:
        raise SourceNotReadable("a folder on the way to the file may not be entered", path=path, stage=STAGE) from None
    except (OSError, ValueError) as error:  # name too long, a NUL in it
        raise SourceNotFound(f"the name cannot be looked up ({error})", path=path, stage=STAGE) from None
    if stat.S_ISDIR(status.st_mode):
        if not os.access(path, os.R_OK | os.X_OK):
            raise SourceNotReadable("the folder may not be read; check its permissions", path=path, stage=STAGE)
        raise NotAVideo("this is a folder; name a video in it", path=path, stage=STAGE)
    if not stat.S_ISREG(status.st_mode):
        raise NotAVideo(
            "this is a pipe, a socket or a device; only regular files can be scored: write it to a file first",
            path=path,
            stage=STAGE,
        )
    if status.st_size == 0:
        raise NotAVideo("the file is empty (0 bytes)", path=path, stage=STAGE)
    try:
        with open(path, "rb") as file:
            kind = other_kind(file)
    except PermissionError:
        raise SourceNotReadable("the file may not be read; check its permissions", path=path, stage=STAGE) from None
    except OSError as error:
        raise SourceNotReadable(f"the file cannot be read ({error})", path=path, stage=STAGE) from None
    if kind:
        raise NotAVideo(f"this is {kind}, not a video", path=path, stage=STAGE)
