"""What decoders are given, and what they must do: between the file (video.py) and those that decode (cpu.py, NVDEC)."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any, Protocol

import numpy as np
from av.packet import Packet
from av.video.stream import VideoStream

from dfengine.sampling import MAX_SNAP_FRAMES, Mode, Segment, nearest
from dfengine.types import F64, Bool, Image

# Larger pictures are refused before anything is allocated for them: no decoder in hardware takes more than
# 8192 x 8192 (NVDEC, all codecs), and one such frame costs 100 MB as 8-bit 4:2:0.
MAX_PIXELS = 8192 * 8192

# Times closer than this are equal: sums of float64 seconds, where the finest clocks in use tick at 1 ns to 1 us.
TIE_SECONDS = 1e-7


class CannotDecode(Exception):
    """A decoder cannot take this video, or failed on it, and the next one should: why, in one line for people."""


class Packets:
    """What a scan of the file found. Times are seconds on the stream's own clock."""

    def __init__(
        self, seconds: F64, is_key: Bool, is_shown: Bool, timeline: F64, timeline_stated: F64, timed: bool
    ) -> None:
        self.seconds = seconds  # by packet, in decoding order
        self.is_key = is_key  # whether decoding can begin there, as far as the container is to be trusted
        self.is_shown = is_shown  # False: an edit list hides its frame
        self.timeline = timeline  # of the frames that are there, ascending
        self.timeline_stated = timeline_stated  # also of frames that the header promises and a cut took away
        self.timed = timed  # False: packets carry no presentation time, frames are counted instead
        self.warnings: tuple[str, ...] = ()  # what is wrong with the file, as far as that shows without decoding
        self.notes: tuple[str, ...] = ()  # what else should be known of it

    @property
    def key_seconds(self) -> F64:
        """Times of the key frames, ascending; empty where they are out of order and so cannot be trusted."""
        seconds = self.seconds[self.is_key]
        return seconds if np.all(np.diff(seconds) > 0) else seconds[:0]

    def count_within_reach(self, at: float, targets: F64, mode: Mode) -> int:
        """How many targets the frame at ``at`` may stand for; the others were lost."""
        if len(targets) == 0:
            return 0
        ranks = nearest(self.timeline_stated, np.concatenate([[at], targets]))
        allowed = 0 if mode == "exact" else MAX_SNAP_FRAMES
        return int(np.count_nonzero(np.abs(ranks[1:] - ranks[0]) <= allowed))


# A packet's place in decoding order, and the packet.
Numbered = tuple[int, "Packet[VideoStream]"]


class PacketDecoder(Protocol):
    """Turns packets of one video into pictures, whatever these are between ``decode`` and ``to_image``.

    ``start`` and ``decode`` raise CannotDecode where the next decoder should try.
    """

    name: str
    frames_decoded: int  # since ``start``
    damaged: int  # packets and frames, since ``start``
    notes: list[str]  # what a user should know of the pictures, since ``start``

    def examine(self, packet: Packet[Any]) -> None:
        """Sees each packet of the scan, in decoding order."""

    def start(self, stream: VideoStream, packets: Packets, mode: Mode) -> None:
        """Prepares for decoding ``stream``, whose first packet comes next. In modes but exact, frames that no other
        depends on need not be decoded."""

    def decode(
        self, numbered: Iterator[Numbered], segment: Segment, wanted: F64
    ) -> Generator[tuple[Any, float], None, None]:
        """Yields the usable pictures of the segment's packets, ascending in time, with their seconds, and leaves the
        decoder empty. ``wanted``: the times that the segment serves."""

    def to_image(self, picture: Any) -> Image:
        """Of a picture that was the last or the last but one from ``decode``."""

    def close(self) -> None:
        """Gives back what ``start`` took. Images stay valid."""


class DecoderPool(Protocol):
    """Decoders beside the CPU's, shared by the videos in work."""

    def decoder(self, lane: Any) -> PacketDecoder:
        """One for one video, whose images will lie in the memory of ``lane``."""

    def close(self) -> None: ...
