"""One open video: what is in the file, which packets are decoded for which times, and which frame stands for each.

Decoding itself is a PacketDecoder's: on the CPU (cpu.py) or by NVDEC (nvdec.py).
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from typing import Any, Protocol

import av
import numpy as np
from av.codec.context import CodecContext
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition
from av.video.stream import VideoStream

from dfengine.errors import DecodeError, InputError, NotAVideo, SourceNotFound, SourceNotReadable, UnsupportedVideo
from dfengine.sampling import MAX_SNAP_FRAMES, Mode, Policy, Segment, nearest, plan_segments, towards_key_frames
from dfengine.stages.decode.nal import NalFormat
from dfengine.stages.media import open_media
from dfengine.types import F64, Bool, Frames, Image, PathLikeStr

STAGE = "decode"

# Larger pictures are refused before anything is allocated for them: no decoder in hardware takes more than
# 8192 x 8192 (NVDEC, all codecs), and one such frame costs 100 MB as 8-bit 4:2:0.
MAX_PIXELS = 8192 * 8192

# Decoded frames that are kept at one time. 17 frames of 1080p are 53 MB, of 2160p 212 MB.
DEFAULT_MEMORY_BYTES = 256 << 20

# Packets that are kept from the scan, so that the file need not be opened and read again to decode it: FFmpeg decodes
# some frames to open an H.264 file, 9 ms at 1080p. 32 MiB are a minute of 1080p at 4.5 Mbit/s; longer videos are read
# twice.
KEPT_BYTES = 32 << 20

# A stated duration may exceed the last packet by this much without the file being called truncated: the
# duration of the last packet, and rounding by muxers that write milliseconds or whole frames.
TRUNCATION_SLACK_SECONDS = 0.5
TRUNCATION_SLACK_RATIO = 0.05

# Packets are read in the order of decoding, and their decoding times rise. Where they fall by more than this another
# file begins, with a clock of its own. Chosen: above what damage and rounding do, below any video worth joining.
RESTART_SECONDS = 0.3

# A warning tells of longer times without a frame. Chosen: slides stand for a minute, a clock that jumps leaves more.
LONG_GAP_SECONDS = 60.0

# What went wrong is no fault of the file: the disk, the network it lies on, memory, too many open files, permissions.
_OF_THE_MACHINE = frozenset(
    {errno.EIO, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.ETIMEDOUT, errno.EACCES, errno.EPERM}
)

# Times closer than this are equal: sums of float64 seconds, where the finest clocks in use tick at 1 ns to 1 us.
TIE_SECONDS = 1e-7

# Containers whose key-frame flags mean "decoding can start here". Elsewhere the flag comes from a parser that
# also sets it on recovery points of intra refresh, from which decoding is not exact.
_TRUSTED_KEYS = ("mov", "matroska")

_ENCRYPTED = "the video is encrypted; score a decrypted copy"
_ENCRYPTED_TAGS = ("encv", "drmi")  # sample entries of ISO 23001-7 and of FairPlay


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

    @property
    def key_seconds(self) -> F64:
        """Times of the key frames, ascending; empty where they are out of order and so cannot be trusted."""
        seconds = self.seconds[self.is_key]
        return seconds if np.all(np.diff(seconds) > 0) else seconds[:0]

    def count_close(self, at: float, targets: F64, mode: Mode) -> int:
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


class Video:
    """One open video. Not thread-safe; a context manager.

    After ``frames`` is exhausted, ``warnings`` says what was wrong with the file, ``frames_decoded`` how many frames
    came out of the decoder, ``name`` which decoder that was, and ``fallback_reason`` why it was not the first of
    ``decoders`` ("" if it was).
    """

    def __init__(self, path: PathLikeStr, decoders: Sequence[PacketDecoder]) -> None:
        self.path = path
        self.warnings: list[str] = []
        self.fallback_reason = ""
        self._decoders = decoders
        self._decoder = decoders[0]
        self._opened = ExitStack()
        self._kept: list[Packet[Any]] | None = []  # None: they were too many, or are used up
        self._container, self._stream = self._open()
        try:
            self._check_stream()
        except InputError:
            self.close()
            raise

    def __enter__(self) -> Video:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Releases the file and the decoder. Frames that were handed out stay valid."""
        self._decoder.close()
        self._opened.close()
        self._kept = None

    @property
    def name(self) -> str:
        return self._decoder.name

    @property
    def frames_decoded(self) -> int:
        return self._decoder.frames_decoded

    # -- opening -------------------------------------------------------------------------------------------------

    def _open(self) -> tuple[InputContainer, VideoStream]:
        with ExitStack() as undo:
            try:
                container = undo.enter_context(open_media(self.path))
            except FileNotFoundError:  # av's own is one too
                raise SourceNotFound(
                    "the file was there and is gone; score it again from where it is now", path=self.path, stage="open"
                ) from None
            except av.FFmpegError as error:
                self._raise_if_of_the_machine(error, "open")
                raise NotAVideo(
                    f"no video container was recognised ({_text(error)}); dfengine reads what FFmpeg reads",
                    path=self.path,
                    stage="open",
                ) from None
            form = container.format.name
            if form in ("image2", "ico", "tty") or form.endswith("_pipe"):
                raise NotAVideo(
                    f"this is a still image or text (FFmpeg format '{form}'), not a video",
                    path=self.path,
                    stage="open",
                )
            streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
            if not streams:
                kinds = sorted({str(s.type) for s in container.streams}) or ["headers"]
                cover = " and a cover picture" if container.streams.video else ""
                raise NotAVideo(
                    f"there is no video stream, only {', '.join(kinds)}{cover}", path=self.path, stage="open"
                )
            self._opened = undo.pop_all()
        return container, streams[0]

    def _check_stream(self) -> None:
        codec: CodecContext | None = self._stream.codec_context
        if codec is None:
            raise UnsupportedVideo("FFmpeg has no decoder for this video stream", path=self.path, stage="open")
        if codec.codec_tag in _ENCRYPTED_TAGS:
            raise UnsupportedVideo(_ENCRYPTED, path=self.path, stage="open")
        width, height = self._stream.codec_context.width, self._stream.codec_context.height
        if width * height > MAX_PIXELS:
            raise UnsupportedVideo(
                f"the header states {width}x{height} pixels, the limit is {MAX_PIXELS} (8192x8192)",
                path=self.path,
                stage="open",
            )

    # -- decoding ------------------------------------------------------------------------------------------------

    def frames(
        self, policy: Policy, mode: Mode = "reference", *, memory_bytes: int = DEFAULT_MEMORY_BYTES
    ) -> Iterator[Frames]:
        """Yields the sampled frames in order of time, as few Frames as ``memory_bytes`` allows (mostly one).

        May be called once. Raises DecodeError if fewer than half of the wanted frames could be decoded, after what
        could be decoded was yielded: a caller that keeps results must drop them then.
        """
        packets = self._scan()
        wanted = policy.wanted_seconds(packets.timeline_stated)
        if mode == "exact":
            wanted = np.unique(packets.timeline_stated[nearest(packets.timeline_stated, wanted)])
        elif mode == "keyframe":
            wanted = towards_key_frames(wanted, packets.timeline, packets.key_seconds)
        handed_out = -np.inf
        for decoder in self._decoders:
            self._decoder, self.warnings = decoder, list(packets.warnings)
            try:
                for frames in self._sample(packets, wanted, mode, memory_bytes, after=handed_out):
                    handed_out = float(frames.pts_seconds[-1]) if len(frames) else handed_out
                    yield frames
                return
            except CannotDecode as error:
                self.fallback_reason = str(error)
            finally:
                decoder.close()

    def _sample(
        self, packets: Packets, wanted: F64, mode: Mode, memory_bytes: int, *, after: float
    ) -> Iterator[Frames]:
        """``frames`` with one decoder. Those up to ``after`` were handed out by the one before."""
        origin = packets.timeline[0]
        found = 0
        images: list[Image] = []
        seconds: list[float] = []
        held = 0

        def flush(is_last: bool) -> Frames:
            nonlocal held
            pts = np.array(seconds, np.float64)
            result = Frames(tuple(images), pts - origin, nearest(packets.timeline, pts), is_last)
            images.clear()
            seconds.clear()
            held = 0
            return result

        previous: float | None = None
        for picture, picture_seconds, satisfied in self._nearest_pictures(packets, wanted, mode):
            found += satisfied
            if picture_seconds == previous or picture_seconds - origin <= after:
                continue
            previous = picture_seconds
            image = self._decoder.to_image(picture)
            if images and held + image.nbytes > memory_bytes:
                yield flush(is_last=False)
            images.append(image)
            seconds.append(picture_seconds)
            held += image.nbytes
        self._decoder.close()  # others may have it while these frames are scored
        if images or after > -np.inf:
            yield flush(is_last=True)
        self._judge(found, len(wanted))

    def _raise_if_of_the_machine(self, error: av.FFmpegError, stage: str) -> None:
        """The file may be good all the same: another time it can be read."""
        if error.errno in _OF_THE_MACHINE:
            raise SourceNotReadable(
                f"the file cannot be read ({_text(error)}); score it again when it can", path=self.path, stage=stage
            ) from None

    def _note_read_error(self, error: av.FFmpegError) -> None:
        self._raise_if_of_the_machine(error, STAGE)
        self.warnings.append(f"reading stopped early ({_text(error)})")

    def _judge(self, found: int, wanted: int) -> None:
        if found == wanted:
            return
        what = f"{found} of {wanted} wanted frames could be decoded"
        if 2 * found < wanted or found == 0:
            detail = "; " + "; ".join(self.warnings) if self.warnings else ""
            raise DecodeError(
                f"{what}, at least half are needed{detail}; fetch the file again or repair it",
                path=self.path,
                stage=STAGE,
            )
        self.warnings.append(what)

    def _scan(self) -> Packets:
        """Reads all packets without decoding any: the times, not the header, say what is in the file."""
        seconds: list[float] = []
        is_key: list[bool] = []
        shown: list[bool] = []
        warnings: list[str] = []
        # AVI states the order of decoding only; the times that FFmpeg guesses from it are wrong with B-pictures.
        timed = self._container.format.name != "avi"
        last_end = 0.0
        decoded_at, restarts = -np.inf, False
        kept_bytes = 0
        nal = NalFormat(self._stream.codec_context)
        try:
            for packet in self._container.demux():
                if packet.size == 0 or packet.time_base is None:
                    continue
                stamp = packet.pts if packet.pts is not None else packet.dts
                if stamp is not None:
                    last_end = max(last_end, float((stamp + (packet.duration or 0)) * packet.time_base))
                if packet.stream.index != self._stream.index:
                    continue
                # Not told by the codec tag: FFmpeg replaces that with the tag of the plain codec.
                if packet.has_sidedata("encryption_info"):
                    raise UnsupportedVideo(_ENCRYPTED, path=self.path, stage=STAGE)
                if packet.pts is None:
                    timed = False
                if packet.dts is not None:
                    decoded_before, decoded_at = decoded_at, float(packet.dts * packet.time_base)
                    restarts |= decoded_before - decoded_at > RESTART_SECONDS
                seconds.append(float(stamp * packet.time_base) if stamp is not None else np.nan)
                is_key.append(packet.is_keyframe and nal.may_begin(bytes(packet)))
                shown.append(not packet.is_discard)
                kept_bytes += packet.size
                if kept_bytes > KEPT_BYTES:
                    self._kept = None
                elif self._kept is not None:
                    self._kept.append(packet)
                for decoder in self._decoders:
                    decoder.examine(packet)
        except av.FFmpegError as error:
            self._raise_if_of_the_machine(error, STAGE)
            warnings.append(f"reading stopped after {len(seconds)} video packets ({_text(error)})")
        times = np.array(seconds, np.float64)
        rate = float(self._stream.average_rate or self._stream.base_rate or 25)
        if restarts:  # files that were joined end to end: sorted by time, one would hide the other
            warnings.append("the clock goes back in the middle, as in joined files; frames are counted instead")
            last_end = np.inf  # the header speaks of one of the clocks
        if restarts or np.isnan(times).any():  # no clock for all of it: count
            times, timed = np.arange(len(times)) / rate, False
        is_shown = np.array(shown, bool)
        timeline = np.unique(times[is_shown])
        if len(timeline) == 0:
            raise NotAVideo("the video stream has no frames", path=self.path, stage=STAGE)
        if len(timeline) > 1 and (gap := float(np.diff(timeline).max())) > LONG_GAP_SECONDS:
            warnings.append(f"there is no frame for {gap:.0f} s")
        missing = self._missing_seconds(last_end)
        stated = timeline
        if missing > 0:
            warnings.append(f"the file is truncated: {missing:.2f} s are stated but not there")
            step = float(np.median(np.diff(timeline))) if len(timeline) > 1 else 1 / rate
            # A file with less than a fifth of its frames is refused anyway; a header may state any duration.
            lost = min(int(missing / step), 4 * len(timeline) + 1000)
            stated = np.concatenate([timeline, timeline[-1] + step * np.arange(1, lost + 1)])
        trusted = timed and any(name in self._container.format.name for name in _TRUSTED_KEYS)
        packets = Packets(times, np.array(is_key, bool) & trusted, is_shown, timeline, stated, timed)
        packets.warnings = tuple(warnings)
        return packets

    def _missing_seconds(self, last_end: float) -> float:
        """How much of the stated duration no packet of any stream covers, if that is too much for rounding."""
        if self._container.duration is None:
            return 0.0
        start = (self._container.start_time or 0) / av.time_base
        stated = self._container.duration / av.time_base
        # Matroska states where the last frame ends, the others how long it takes from the first.
        missing = stated - last_end + (0.0 if "matroska" in self._container.format.name else start)
        slack = max(TRUNCATION_SLACK_SECONDS, TRUNCATION_SLACK_RATIO * stated)
        return missing if missing > slack else 0.0

    def _nearest_pictures(self, packets: Packets, wanted: F64, mode: Mode) -> Iterator[tuple[Any, float, int]]:
        """Yields (picture, its seconds, how many wanted times it stands for), ascending in time."""
        for segment, decoded in self._decode_segments(packets, wanted, mode):
            targets = wanted[segment]
            begins = targets.tolist()
            done = 0
            last: tuple[Any, float] | None = None
            with closing(decoded):
                for picture, at in decoded:
                    if done < len(begins) and begins[done] >= at + TIE_SECONDS:  # most frames: nobody is decided on yet
                        last = (picture, at)
                        continue
                    # Targets up to this frame belong to it or to the one before, whichever is nearer.
                    here = done + int(np.searchsorted(targets[done:], at + TIE_SECONDS))
                    near = targets[done:here]
                    if last is not None:
                        split = int(np.count_nonzero(near - last[1] <= at - near + TIE_SECONDS))
                        if satisfied := packets.count_close(last[1], near[:split], mode):
                            yield *last, satisfied
                        near = near[split:]
                    if satisfied := packets.count_close(at, near, mode):
                        yield picture, at, satisfied
                    done, last = here, (picture, at)
                    if done == len(targets):
                        break
            if last is not None and (satisfied := packets.count_close(last[1], targets[done:], mode)):
                yield *last, satisfied

    def _decode_segments(
        self, packets: Packets, wanted: F64, mode: Mode
    ) -> Iterator[tuple[slice, Generator[tuple[Any, float], None, None]]]:
        """Yields, for each run of packets that must be decoded, which wanted times it serves and its pictures."""
        # From the start of the file, not by a seek. Note [First packet first]: x264 tells its version only in the first
        # packet, and decoders need it to read old 4:4:4 streams: without it those frames turn green. So the first
        # packet is always decoded, also where the first wanted frame is far behind it.
        kept, self._kept = self._kept, None
        if kept is None:  # or a decoder has tried before: the next one begins with a fresh codec
            self._opened.close()
            self._container, self._stream = self._open()
        packets_again = kept or (p for p in self._container.demux(self._stream) if p.size > 0)
        self._decoder.start(self._stream, packets, mode)
        segments = list(plan_segments(packets.seconds, packets.is_key, wanted))
        if segments[0].first > 0:
            segments.insert(0, Segment(0, 1, np.inf, slice(0, 0)))
        demuxed = enumerate(packets_again)
        for segment in segments:
            taken = _take(demuxed, segment, self._note_read_error)
            yield segment.wanted, self._decoder.decode(taken, segment, wanted[segment.wanted])
        if self._decoder.damaged:
            self.warnings.append(f"{self._decoder.damaged} packets or frames were damaged")


def _take(
    demuxed: Iterator[Numbered], segment: Segment, on_error: Callable[[av.FFmpegError], None]
) -> Iterator[Numbered]:
    try:
        for i, packet in demuxed:
            if i >= segment.first:
                yield i, packet
            if i + 1 >= segment.end:
                return
    except av.FFmpegError as error:
        on_error(error)


def _text(error: av.FFmpegError) -> str:
    return str(error.strerror or error)
