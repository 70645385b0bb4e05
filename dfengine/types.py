"""The values that flow between the stages: frozen, validated, one struct of arrays each.

Capital letters in shapes have one meaning throughout: N images, F faces, R track rows, B crops, H height, W width.
Boxes are xyxy float32 pixels, half-open, in the upright full-resolution frame, whose pixels are square: a picture with
others is stretched along the side on which they are longer (``Image.upright_hw``), as players show it. Images are RGB
once they are RGB.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib import metadata
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeGuard

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from dfengine.sampling import Sampling

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
Bool = NDArray[np.bool_]


VERSION = metadata.version("dfengine")


class DeviceMemory(Protocol):
    """An array on a GPU: what dfengine.gpu.array.DeviceArray is to the stages."""

    pointer: int
    lane: Any  # the dfengine.gpu.lanes.Lane in the order of whose stream it is written
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    nbytes: int

    def __len__(self) -> int: ...


Array = NDArray[Any] | DeviceMemory
Dtype = Literal["float32", "float16"]  # of network input


def on_device(array: Array) -> TypeGuard[DeviceMemory]:
    return not isinstance(array, np.ndarray)


LANDMARKS = 5  # left eye, right eye, nose, left and right corner of the mouth, as seen in the picture


def _check(array: NDArray[Any], name: str, dtype: Any, shape: tuple[int | None, ...]) -> None:
    if array.dtype != dtype or array.ndim != len(shape):
        raise ValueError(f"{name} must be {np.dtype(dtype)} with {len(shape)} axes, got {array.dtype} {array.shape}")
    if any(want is not None and want != have for want, have in zip(shape, array.shape, strict=True)):
        raise ValueError(f"{name} must have shape {shape} (None: any), got {array.shape}")


class _Described:
    """Prints what is in it by type and shape."""

    def __repr__(self) -> str:
        values = ((f.name, getattr(self, f.name)) for f in fields(self))  # type: ignore[arg-type]
        return f"{type(self).__name__}({', '.join(f'{name}={_shape(value)}' for name, value in values)})"


def _shape(value: Any) -> str:
    if isinstance(value, np.ndarray) or hasattr(value, "lane"):
        return f"{value.dtype}{list(value.shape)}" + (" on a GPU" if on_device(value) else "")
    if isinstance(value, tuple) and value and isinstance(value[0], Image):
        return f"<{len(value)} of {' and '.join(sorted({'{}x{}'.format(*i.upright_hw) for i in value}))}>"
    if isinstance(value, tuple):
        return f"({', '.join(map(_shape, value))})"
    return repr(value)


@dataclass(frozen=True, eq=False, repr=False)
class Image(_Described):
    """One decoded picture as the decoder left it; nothing is converted or copied.

    ``components``: (Y,) or (Y, Cb, Cr) or (R, G, B), each (H, W) uint8 or uint16, strided views allowed, all in main
    memory or all on one GPU; chroma is smaller by ``subsampling_xy``. ``bit_depth``: of the samples; MSB-aligned P010
    counts as 16.
    ``matrix``: "bt601", "bt709", "bt2020", "smpte240m", "fcc", "ycgco", "rgb" or "gray".
    ``mirrored``: left and right are to be swapped first; ``rotation``: then so many degrees clockwise (0, 90, 180, 270)
    make the picture upright. ``pixel_aspect``: width of a pixel over its height, as coded.
    ``transfer``: "sdr", or "pq" or "hlg" of ITU-R BT.2100, which the kernels turn into SDR (csrc/transfer.h).
    """

    components: tuple[Array, ...]
    bit_depth: int = 8
    matrix: str = "bt601"
    full_range: bool = False
    subsampling_xy: tuple[int, int] = (1, 1)
    rotation: int = 0
    mirrored: bool = False
    pixel_aspect: float = 1.0
    transfer: str = "sdr"

    @property
    def upright_hw(self) -> tuple[int, int]:
        """The size in square pixels: coded pixels are split, never joined."""
        h, w = self.components[0].shape
        if self.pixel_aspect != 1:
            h, w = round(h / min(self.pixel_aspect, 1)), round(w * max(self.pixel_aspect, 1))
        return (w, h) if self.rotation in (90, 270) else (h, w)

    @property
    def nbytes(self) -> int:
        return sum(c.nbytes for c in self.components)

    @classmethod
    def from_rgb(cls, rgb: NDArray[np.uint8]) -> Image:
        """Wraps an upright RGB uint8 (H, W, 3) array, without copying."""
        _check(rgb, "rgb", np.uint8, (None, None, 3))
        return cls((rgb[..., 0], rgb[..., 1], rgb[..., 2]), matrix="rgb", full_range=True)


@dataclass(frozen=True, eq=False, repr=False)
class Frames(_Described):
    """Sampled frames of one video, in order of time.

    ``frame_index`` is the frame's place in the order of presentation, 0 for the first. ``is_last``: no more frames of
    this video follow in another Frames.
    """

    images: tuple[Image, ...]  # N
    pts_seconds: F64  # (N,), from the start of the video's first frame
    frame_index: I64  # (N,)
    is_last: bool = True

    def __post_init__(self) -> None:
        n = len(self.images)
        _check(self.pts_seconds, "pts_seconds", np.float64, (n,))
        _check(self.frame_index, "frame_index", np.int64, (n,))

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True, eq=False, repr=False)
class Faces(_Described):
    """Faces found in some images, such as those of a Frames."""

    image_index: I64  # (F,), which image each is in, ascending
    xyxy: F32  # (F, 4)
    landmarks: F32  # (F, 5, 2), xy
    confidence: F32  # (F,)

    def __post_init__(self) -> None:
        n = len(self.image_index)
        _check(self.image_index, "image_index", np.int64, (n,))
        _check(self.xyxy, "xyxy", np.float32, (n, 4))
        _check(self.landmarks, "landmarks", np.float32, (n, LANDMARKS, 2))
        _check(self.confidence, "confidence", np.float32, (n,))

    def __len__(self) -> int:
        return len(self.image_index)

    def __getitem__(self, rows: Any) -> Faces:
        return Faces(self.image_index[rows], self.xyxy[rows], self.landmarks[rows], self.confidence[rows])

    @classmethod
    def empty(cls) -> Faces:
        return cls(
            np.zeros(0, np.int64),
            np.zeros((0, 4), np.float32),
            np.zeros((0, LANDMARKS, 2), np.float32),
            np.zeros(0, np.float32),
        )

    @classmethod
    def concatenate(cls, parts: Sequence[Faces]) -> Faces:
        """Rows of all parts, in the order given; of none, no rows."""
        parts = [cls.empty(), *parts]
        return cls(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(cls)))


@dataclass(frozen=True, eq=False, repr=False)
class Tracks(_Described):
    """Faces joined in time, one row a (person, frame), ordered by track and then by time.

    Rows that were filled from a past box have ``detected`` False, NaN landmarks and confidence 0.
    """

    track_id: I64  # (R,)
    frame_index: I64  # (R,), the frame's place in the order of presentation
    pts_seconds: F64  # (R,)
    xyxy: F32  # (R, 4)
    landmarks: F32  # (R, 5, 2)
    confidence: F32  # (R,)
    detected: Bool  # (R,)

    def __post_init__(self) -> None:
        n = len(self.track_id)
        for name in ("track_id", "frame_index"):
            _check(getattr(self, name), name, np.int64, (n,))
        _check(self.pts_seconds, "pts_seconds", np.float64, (n,))
        _check(self.xyxy, "xyxy", np.float32, (n, 4))
        _check(self.landmarks, "landmarks", np.float32, (n, LANDMARKS, 2))
        _check(self.confidence, "confidence", np.float32, (n,))
        _check(self.detected, "detected", np.bool_, (n,))

    def __len__(self) -> int:
        return len(self.track_id)

    def __getitem__(self, rows: Any) -> Tracks:
        return Tracks(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))

    @classmethod
    def concatenate(cls, parts: Sequence[Tracks]) -> Tracks:
        """Joins parts, one behind the other: rows are no longer ordered by track."""
        return cls(*(np.concatenate([getattr(p, name) for p in parts]) for name in cls.__dataclass_fields__))


@dataclass(frozen=True)
class Plan:
    """How much work one video gets: what may differ from video to video in one run.

    ``members``: names of the bundle's members that run, at least one; the blend is over these alone.
    """

    sampling: Sampling
    members: tuple[str, ...]


@dataclass(frozen=True)
class FrameScore:
    """One face in one frame. ``landmarks`` is None where the box was filled from the past of its track.

    ``box`` is xyxy and ``landmarks`` are xy, in square pixels of the upright frame, as players show it: of a file with
    320x480 pixels that are twice as wide as high, those of a picture of 640x480.
    """

    frame_index: int
    pts_seconds: float
    box: tuple[float, float, float, float]
    landmarks: tuple[tuple[float, float], ...] | None
    p_fake: float


@dataclass(frozen=True, repr=False)
class TrackScore:
    """One person."""

    track_id: int
    p_fake: float
    frames: tuple[FrameScore, ...]

    def __repr__(self) -> str:
        return f"TrackScore(track_id={self.track_id}, p_fake={self.p_fake:.4f}, frames=<{len(self.frames)}>)"


@dataclass(frozen=True)
class ErrorInfo:
    """Why a video has no score. ``type`` is the name of a class in dfengine.errors."""

    type: str
    stage: str
    message: str


@dataclass(frozen=True, repr=False)
class VideoScore:
    """The answer for one video.

    ``p_fake`` is the probability that a face in the video was manipulated, in [0, 1]; it is None unless ``status``
    is "ok". "Could not tell" is a status, never 0.5. ``logit`` is log(p / (1 - p)) of the calibrated score.
    ``timings`` are wall-clock seconds by stage. ``sampling`` (the text of a policy), ``mode`` and the keys of
    ``members`` say what was spent on it; ``bundle_digest`` and ``detector_digest`` are those of the Bundle and of its
    detector's networks. ``runtime`` is what ran the networks, with the reason where it was not the first choice;
    ``fallback_reason`` says why a video was decoded on the CPU although there is a GPU. ``fingerprint`` is set in runs
    over many videos only: a hash of the file's path, size and time of change, of what was asked for and of what it is
    made with; a resumed run skips rows with the same one.
    """

    path: str
    status: Literal["ok", "no_face", "error"]
    p_fake: float | None = None
    logit: float | None = None
    error: ErrorInfo | None = None
    warnings: tuple[str, ...] = ()
    tracks: tuple[TrackScore, ...] = ()
    members: Mapping[str, float] = field(default_factory=dict)
    frames_decoded: int = 0
    frames_scored: int = 0
    sampling: str = ""
    mode: str = ""
    bundle: str = ""
    bundle_digest: str = ""
    detector_digest: str = ""
    dfengine_version: str = ""
    device: str = ""
    runtime: str = ""
    decoder: str = ""
    fallback_reason: str | None = None
    timings: Mapping[str, float] = field(default_factory=dict)
    fingerprint: str = ""

    def __post_init__(self) -> None:
        if (self.status == "ok") != (self.p_fake is not None):
            raise ValueError(f"p_fake is given exactly when status is 'ok', got {self.status!r} and {self.p_fake}")
        if self.p_fake is not None and not 0.0 <= self.p_fake <= 1.0:
            raise ValueError(f"p_fake must be in [0, 1], got {self.p_fake}")
        if (self.status == "error") != (self.error is not None):
            raise ValueError(f"error is given exactly when status is 'error', got {self.status!r} and {self.error}")
        if self.logit is not None and not math.isfinite(self.logit):
            raise ValueError(f"logit must be finite, got {self.logit}")

    def __repr__(self) -> str:
        text = f"path={self.path!r}, status={self.status!r}, "
        if self.p_fake is not None:
            text += f"p_fake={self.p_fake:.4f}, tracks=<{len(self.tracks)}>, frames_scored={self.frames_scored}, "
        if self.error is not None:
            text += f"error={self.error!r}, "
        seconds = sum(self.timings.values())
        return f"VideoScore({text}warnings=<{len(self.warnings)}>, bundle={self.bundle!r}, {seconds:.2f} s)"

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings, in the order of the fields: what ``--json`` prints."""
        return {name: _plain(getattr(self, name)) for name in self.__dataclass_fields__}


def _plain(value: Any) -> Any:
    if hasattr(value, "__dataclass_fields__"):
        return {name: _plain(getattr(value, name)) for name in value.__dataclass_fields__}
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    return value


PathLikeStr = str | PathLike[str]
