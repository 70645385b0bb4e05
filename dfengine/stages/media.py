"""Opening a media file with FFmpeg, for its pictures and for its sound: local files only, whatever they refer to.

And whose fault it is when that fails: the file's for good, or the machine's for now.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import av
from av.container import InputContainer

from dfengine.errors import SourceNotReadable
from dfengine.types import PathLikeStr

# Containers that FFmpeg may look for in a file: all but those that name other files or addresses to read from.
_REFERRING = {"concat", "dash", "hls", "imf", "lavfi", "rtsp", "sap", "sdp", "vobsub", "webm_dash_manifest"}
_FORMATS = ",".join(sorted(av.formats_available - _REFERRING))

# Titles that are not UTF-8 are no reason to fail. PyAV 19 always replaces what it cannot read; until then it was asked.
READ_ALL_TITLES: dict[str, Any] = {"metadata_errors": "replace"} if int(av.__version__.partition(".")[0]) < 19 else {}

# What went wrong is no fault of the file: the disk, the network it lies on, memory, too many open files, permissions.
_PASSING = frozenset(
    {errno.EIO, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.ETIMEDOUT, errno.EACCES, errno.EPERM}
)

# Of a SourceNotFound while a file is being scored, which is opened more than once.
GONE = "the file was there and is gone; score it again from where it is now"


def may_pass(error: Exception) -> bool:
    """Whether an error of FFmpeg or the system is the machine's, and the file can be read another time.

    Any other lasts: the file is damaged, or is something else.
    """
    return getattr(error, "errno", None) in _PASSING


def raise_if_it_may_pass(error: Exception, path: PathLikeStr, stage: str) -> None:
    """Raises SourceNotReadable for an error that may pass."""
    if may_pass(error):
        raise SourceNotReadable(
            f"the file cannot be read ({reason(error)}); score it again when it can", path=path, stage=stage
        ) from None


def reason(error: Exception) -> str:
    """What FFmpeg or the system say of an error, without the number and the name of the file."""
    return str(getattr(error, "strerror", None) or error)


@contextmanager
def open_media(path: PathLikeStr) -> Iterator[InputContainer]:
    """The open container. Raises av.FFmpegError if it is none, OSError if it cannot be read."""
    name = os.fspath(path)
    source: Any = f"file:{name}"  # a bare name with a colon in it is an address to FFmpeg
    with ExitStack() as undo:
        try:
            os.fsencode(name).decode("utf-8")
        except UnicodeDecodeError:  # PyAV takes names in UTF-8 only
            source = undo.enter_context(open(name, "rb"))
        # Only local files: a container must not make the engine fetch something.
        options = {"protocol_whitelist": "file", "format_whitelist": _FORMATS}
        container = av.open(source, options=options, **READ_ALL_TITLES)
        undo.callback(container.close)
        yield container
