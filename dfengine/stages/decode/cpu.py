"""Decoding with PyAV (FFmpeg) on the CPU."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import av
import numpy as np
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from dfengine.sampling import Mode, Segment
from dfengine.stages.decode.decoder import MAX_PIXELS, Numbered, Packets
from dfengine.types import F64, Image

if TYPE_CHECKING:
    from dfengine.gpu.lanes import Lane

# FFmpeg's AVColorSpace (ITU-T H.273 table 4). Anything else, "unspecified" above all, is BT.601: FFmpeg's own
# rule and therefore that of every training set made with it.
_MATRICES = {
    1: "bt709",
    4: "fcc",
    5: "bt601",
    6: "bt601",
    7: "smpte240m",
    8: "ycgco",
    9: "bt2020",
    10: "bt2020",
}
_LIMITED, _FULL = 1, 2  # AVColorRange
_TRANSFERS = {16: "pq", 18: "hlg"}  # AVColorTransferCharacteristic (H.273 table 3); all others count as SDR

# The widest pixels that H.264 has a code for are 2:1 (ITU-T H.264, table E-1), those of a field 2:1 and 1:2 of that.
MOST_ASPECT = 4


class CpuDecoder:
    """Decodes with FFmpeg on ``threads`` cores. With a ``lane``, images are in that GPU's memory."""

    name = "pyav"

    def __init__(self, *, threads: int = 1, lane: Lane | None = None) -> None:
        self.frames_decoded = 0
        self.damaged = 0
        self.notes: list[str] = []
        self._threads = threads
        self._lane = lane

    def examine(self, packet: Packet[Any]) -> None:
        """FFmpeg looks at the packets itself."""

    def start(self, stream: VideoStream, packets: Packets, mode: Mode) -> None:
        self.frames_decoded = self.damaged = 0
        self.notes = []
        self._stream, self._packets = stream, packets
        codec = stream.codec_context
        codec.options = {"max_pixels": str(MAX_PIXELS)}  # sizes may change mid-stream
        # Frame threads wait for each other's reference rows: on two cores four decode 1080p in .65 s, two in .75 s.
        codec.thread_count = 2 * self._threads if self._threads > 1 else 1
        codec.thread_type = "AUTO"
        if mode != "exact" and packets.timed:
            codec.skip_frame = "NONREF"  # never BIDIR: P-pictures may depend on B-pictures

    def decode(
        self, numbered: Iterator[Numbered], segment: Segment, wanted: F64
    ) -> Generator[tuple[VideoFrame, float], None, None]:
        codec, packets = self._stream.codec_context, self._packets
        try:
            for packet in chain((packet for _, packet in numbered), (None,)):
                try:
                    frames = codec.decode(packet)
                except (av.FFmpegError, ValueError):  # ValueError: PyAV 19's, where the codec could not be opened
                    self.damaged += 1
                    continue
                for frame in frames:
                    if packets.timed and frame.pts is not None:
                        # Not frame.time: PyAV gives frames that a flush brings out no time base, and so no time.
                        at = float(frame.pts * (self._stream.time_base or 0))
                    else:
                        at = float(packets.timeline[min(self.frames_decoded, len(packets.timeline) - 1)])
                    self.frames_decoded += 1
                    if frame.is_corrupt:
                        self.damaged += 1
                    elif at >= segment.begin_seconds:
                        yield frame, at
        finally:
            codec.flush_buffers()

    def to_image(self, picture: VideoFrame) -> Image:
        image = to_image(picture, self._stream)
        self.notes += [note for note in picture_notes(picture, self._stream) if note not in self.notes]
        if self._lane is None:
            return image
        with self._lane as lane:
            components: tuple[Any, ...] = tuple(lane.upload(np.asarray(c)) for c in image.components)
        return replace(image, components=components)

    def close(self) -> None:
        """The decoder is the file's, and closed with it."""


def to_image(frame: VideoFrame, stream: VideoStream | None = None) -> Image:
    """Views a decoded frame as an Image. Planar formats of 8 to 16 bits are not copied.

    Others (palettes, packed RGB, packed YUV, floats, big-endian) go through swscale to planar RGB, gray or 4:4:4 first.
    ``stream`` tells the shape of the pixels; without one they are square.

    Note [One field]
    An interlaced picture holds two moments, row about row. What moves has combs at its edges, and to networks a shaking
    head looks manipulated. So the upper field stands for the picture: every second row, of pixels twice as high. FFmpeg
    gives fields of HEVC one by one.
    """
    image = _view(frame)
    aspect = _pixel_aspect(stream) if stream is not None else 1.0
    if frame.interlaced_frame:
        aspect /= 2
        if stream is None or stream.codec_context.name != "hevc":
            image = replace(image, components=tuple(np.asarray(c)[::2] for c in image.components))
    return replace(image, pixel_aspect=aspect) if aspect != 1 else image


def picture_notes(frame: VideoFrame, stream: VideoStream) -> list[str]:
    """What a user should know of how a frame becomes an Image."""
    notes = []
    if frame.interlaced_frame:
        notes.append("the pictures are interlaced; one field of each is scored")
    if transfer := _TRANSFERS.get(int(frame.color_trc)):
        notes.append(f"the colours are HDR ({transfer.upper()}); they are mapped to SDR, as networks know them")
    stated = stream.sample_aspect_ratio
    if stated and _pixel_aspect(stream) != float(stated):
        notes.append(f"pixels are said to be {stated.numerator}:{stated.denominator}; they are taken for square")
    return notes


def _pixel_aspect(stream: VideoStream) -> float:
    """Width of a pixel over its height. What is not stated, or absurd, is 1."""
    stated = float(stream.sample_aspect_ratio or 1)
    return stated if 1 / MOST_ASPECT <= stated <= MOST_ASPECT else 1.0


def _view(frame: VideoFrame) -> Image:
    layout = frame.format
    components = [c for c in layout.components if not c.is_alpha]
    if (
        (not layout.is_planar and len(layout.components) > 1)
        or layout.has_palette
        or layout.is_big_endian
        or layout.is_bit_stream
        or layout.is_bayer
        or len(components) not in (1, 3)
        or len({c.plane for c in components}) != len(components)
        or not all(8 <= c.bits <= 16 for c in components)
    ):
        target = "gbrp" if layout.is_rgb or layout.has_palette else "gray" if len(components) == 1 else "yuv444p"
        return _view(frame.reformat(format=target))
    depth = components[0].bits
    dtype = np.uint8 if depth == 8 else np.uint16
    arrays = []
    for component in components:
        plane = frame.planes[component.plane]
        rows = np.frombuffer(memoryview(plane), dtype).reshape(-1, plane.line_size // np.dtype(dtype).itemsize)
        arrays.append(rows[: plane.height, : plane.width])
    limited = int(frame.color_range) == _LIMITED
    if layout.is_rgb:
        matrix, full_range = "rgb", True
    elif len(components) == 1:
        matrix, full_range = "gray", not limited  # swscale's rule: gray is full range unless tagged
    else:
        matrix = _MATRICES.get(int(frame.colorspace), "bt601")
        full_range = int(frame.color_range) == _FULL or layout.name.startswith("yuvj")
    (h, w), (ch, cw) = arrays[0].shape, arrays[-1].shape
    rotation, mirrored = _orientation(frame)
    return Image(
        components=tuple(arrays),
        bit_depth=depth,
        matrix=matrix,
        full_range=full_range,
        subsampling_xy=(-(-w // cw), -(-h // ch)),
        rotation=rotation,
        mirrored=mirrored,
        transfer=_TRANSFERS.get(int(frame.color_trc), "sdr"),
    )


def _orientation(frame: VideoFrame) -> tuple[int, bool]:
    """What makes the picture upright: degrees clockwise, and whether left and right are swapped before.

    From the display matrix, of which the upper left (a, b; c, d) carries a picture's (x, y) to (ax + cy, bx + dy)
    (ISO/IEC 14496-12, 8.3.2; FFmpeg's libavutil/display.h). One that would leave no picture counts as none.
    """
    data: Any = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return 0, False
    (a, b), (c, d) = np.frombuffer(bytes(data), np.int32).reshape(3, 3)[:2, :2].astype(np.float64)
    area = a * d - b * c
    if area == 0:
        return 0, False
    if area < 0:
        a, b = -a, -b
    return round(math.degrees(math.atan2(b - c, a + d)) / 90) % 4 * 90, bool(area < 0)
