"""Everything dfengine raises on purpose.

    DfengineError
    ├── InputError                 the file cannot be scored; a row with status "error", never an exception of score()
    │   ├── SourceNotFound         (FileNotFoundError) nothing is there
    │   ├── SourceNotReadable      (PermissionError) it is there, but may not be read
    │   ├── NotAVideo              (ValueError) text, audio, a still image, a pipe, an empty file, a folder
    │   ├── UnsupportedVideo       (ValueError) encrypted, absurdly large, or no decoder for it
    │   └── DecodeError            (ValueError) damaged: too few of the wanted frames could be decoded
    ├── BundleError                (ValueError) the bundle is damaged, does not match its hashes, or is too new
    │   └── BundleNotFound         (FileNotFoundError)
    ├── OptionError                (ValueError) an option or a policy that cannot be understood
    ├── DeviceError                (RuntimeError) the device or a package it needs cannot be had here
    ├── InferenceError             (RuntimeError) a network failed to run
    ├── DeviceMemoryError          (MemoryError) the memory of a GPU ran out, with smaller batches too
    ├── OutputError                (OSError) results cannot be written: disk full, folder gone, not a file of ours
    ├── WorkerCrashed              (RuntimeError) the process that scored a video died, twice; a row
    ├── VideoTimeout               (TimeoutError) a video took longer than it may, twice; a row
    └── DeadlineExceeded           (TimeoutError) the time limit of the run left no time for a video; a row

Each error also derives from the matching builtin, so that callers need not know dfengine's names.
"""

from __future__ import annotations

from os import PathLike, fsencode

__all__ = [
    "BundleError",
    "BundleNotFound",
    "DeadlineExceeded",
    "DecodeError",
    "DeviceError",
    "DeviceMemoryError",
    "DfengineError",
    "InferenceError",
    "InputError",
    "NotAVideo",
    "OptionError",
    "OutputError",
    "SourceNotFound",
    "SourceNotReadable",
    "UnsupportedVideo",
    "VideoTimeout",
    "WorkerCrashed",
    "display_path",
    "first_line",
    "is_known",
]


def display_path(path: str | PathLike[str]) -> str:
    """A path as text that can be printed and encoded: bytes that are not UTF-8 become ``\\xNN``."""
    try:
        return fsencode(path).decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # no name of a file, but what JSON may hold: half of a surrogate pair
        return str(path).encode("utf-8", "backslashreplace").decode("utf-8")


# Lines that tell where something went wrong or that a reason follows. OpenVINO's end in a colon, but for this one.
_PREFACES = ("Model wasn't fully converted.",)


def first_line(error: BaseException) -> str:
    """What an error of another package says, for a message of ours: the first line with a reason, or its type.

    Places and prefaces ("Exception from src/inference/src/cpp/core.cpp:105:") are left out if anything follows them.
    What PyNvVideoCodec has to say stands behind its "Error Type :".
    """
    text = str(error)
    lines = [line.strip().removeprefix("-- ") for line in (text.partition("Error Type :")[2] or text).splitlines()]
    lines = [line for line in lines if line]
    reasons = (line for line in lines if not line.endswith(":") and line not in _PREFACES)
    return next(reasons, lines[0] if lines else type(error).__name__)


def is_known(kind: str) -> bool:
    """Whether the type of an error in a row is one that is raised on purpose; all others are defects of dfengine."""
    known = globals().get(kind)
    return kind == "MemoryError" or (isinstance(known, type) and issubclass(known, DfengineError))


class DfengineError(Exception):
    """Base of all. ``path`` is the file concerned ("" if none), ``stage`` where it happened ("" if nowhere)."""

    def __init__(self, message: str, *, path: str | PathLike[str] = "", stage: str = "") -> None:
        self.message = message
        self.path = path
        self.stage = stage
        name = display_path(path) if path != "" else ""
        super().__init__(f"{name}: {message}" if name else message)


class InputError(DfengineError):
    """The input cannot be scored."""


class SourceNotFound(InputError, FileNotFoundError):
    """There is no such file."""


class SourceNotReadable(InputError, PermissionError):
    """The file exists but may not be read."""


class NotAVideo(InputError, ValueError):
    """The input is something else than a video."""


class UnsupportedVideo(InputError, ValueError):
    """A video that dfengine cannot or will not decode."""


class DecodeError(InputError, ValueError):
    """A damaged video with too few decodable frames."""


class BundleError(DfengineError, ValueError):
    """The bundle is not what it says it is."""


class BundleNotFound(BundleError, FileNotFoundError):
    """There is no such bundle."""


class OptionError(DfengineError, ValueError):
    """An option that cannot be understood."""


class DeviceError(DfengineError, RuntimeError):
    """The device, or a package it needs, cannot be had here."""


class InferenceError(DfengineError, RuntimeError):
    """A network failed to run."""


class DeviceMemoryError(DfengineError, MemoryError):
    """The memory of a GPU ran out."""


class OutputError(DfengineError, OSError):
    """Results cannot be written, or what is there is no file of results."""


class WorkerCrashed(DfengineError, RuntimeError):
    """The process that scored a video died: a signal, or the kernel ran out of memory."""


class VideoTimeout(DfengineError, TimeoutError):
    """A video took longer than a single video may."""


class DeadlineExceeded(DfengineError, TimeoutError):
    """The time limit of the whole run left no time for a video."""
