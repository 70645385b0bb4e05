"""Decoding with PyAV (FFmpeg) on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing
from itertools import chain
from typing import Any

import av
import numpy as np
from av.codec.context import CodecContext
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from dfengine.errors import DecodeError, InputError, NotAVideo, SourceNotFound, UnsupportedVideo
from dfengine.media import open_media
from dfengine.sampling import MAX_SNAP_FRAMES, Mode, Policy, Segment, nearest, plan_segments, towards_key_frames
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

# Times closer than this are equal: sums of float64 seconds, where the finest clocks in use tick at 1 ns to 1 us.
TIE_SECONDS = 1e-7

# Containers whose key-frame flags mean "decoding can start here". Elsewhere the flag comes from a parser that
# also sets it on recovery points of intra refresh, from which decoding is not exact.
_TRUSTED_KEYS = ("mov", "matroska")

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
_ENCRYPTED = "the video is encrypted; score a decrypted copy"
_ENCRYPTED_TAGS = ("encv", "drmi")  # sample entries of ISO 23001-7 and of FairPlay


class CpuVideo:
    """One open video. Not thread-safe; a context manager.

    After ``frames`` is exhausted, ``warnings`` says what was wrong with the file and ``frames_decoded`` how many
    frames came out of the decoder.
    """

    name = "pyav"

    def __init__(self, path: PathLikeStr, *, threads: int = 1) -> None:
        self.path = path
        self.warnings: list[str] = []
        self.frames_decoded = 0
        self._threads = threads
        self._damaged = 0
        self._opened = ExitStack()
        self._kept: list[Packet[Any]] | None = []  # None: they were too many
        self._container, self._stream = self._open()
        try:
            self._check_stream()
        except InputError:
            self.close()
            raise

    def __enter__(self) -> CpuVideo:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Releases the file and the decoder. Frames that were handed out stay valid."""
        self._opened.close()
        self._kept = None

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
        origin = packets.timeline[0]
        wanted = policy.wanted_seconds(packets.timeline_stated)
        if mode == "exact":
            wanted = np.unique(packets.timeline_stated[nearest(packets.timeline_stated, wanted)])
        elif mode == "keyframe":
            wanted = towards_key_frames(wanted, packets.timeline, packets.key_seconds)
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
        for frame, frame_seconds, satisfied in self._nearest_frames(packets, wanted, mode):
            found += satisfied
            if frame_seconds == previous:
                continue
            previous = frame_seconds
            image = to_image(frame)
            if images and held + image.nbytes > memory_bytes:
                yield flush(is_last=False)
            images.append(image)
            seconds.append(frame_seconds)
            held += image.nbytes
        if images:
            yield flush(is_last=True)
        self._judge(found, len(wanted))

    def _note_read_error(self, error: av.FFmpegError) -> None:
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

    def _scan(self) -> _Packets:
        """Reads all packets without decoding any: the times, not the header, say what is in the file."""
        seconds: list[float] = []
        is_key: list[bool] = []
        shown: list[bool] = []
        # AVI states the order of decoding only; the times that FFmpeg guesses from it are wrong with B-pictures.
        timed = self._container.format.name != "avi"
        last_end = 0.0
        kept_bytes = 0
        length_bytes = _nal_length_bytes(self._stream.codec_context)
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
                seconds.append(float(stamp * packet.time_base) if stamp is not None else np.nan)
                is_key.append(packet.is_keyframe and (length_bytes == 0 or _is_intra(bytes(packet), length_bytes)))
                shown.append(not packet.is_discard)
                kept_bytes += packet.size
                if kept_bytes > KEPT_BYTES:
                    self._kept = None
                elif self._kept is not None:
                    self._kept.append(packet)
        except av.FFmpegError as error:
            self.warnings.append(f"reading stopped after {len(seconds)} video packets ({_text(error)})")
        times = np.array(seconds, np.float64)
        rate = float(self._stream.average_rate or self._stream.base_rate or 25)
        if np.isnan(times).any():  # no clock at all: count
            times, timed = np.arange(len(times)) / rate, False
        timeline = np.unique(times[np.array(shown, bool)])
        if len(timeline) == 0:
            raise NotAVideo("the video stream has no frames", path=self.path, stage=STAGE)
        missing = self._missing_seconds(last_end)
        stated = timeline
        if missing > 0:
            self.warnings.append(f"the file is truncated: {missing:.2f} s are stated but not there")
            step = float(np.median(np.diff(timeline))) if len(timeline) > 1 else 1 / rate
            # A file with less than a fifth of its frames is refused anyway; a header may state any duration.
            lost = min(int(missing / step), 4 * len(timeline) + 1000)
            stated = np.concatenate([timeline, timeline[-1] + step * np.arange(1, lost + 1)])
        trusted = timed and any(name in self._container.format.name for name in _TRUSTED_KEYS)
        return _Packets(times, np.array(is_key, bool) & trusted, timeline, stated, timed)

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

    def _nearest_frames(self, packets: _Packets, wanted: F64, mode: Mode) -> Iterator[tuple[VideoFrame, float, int]]:
        """Yields (frame, its seconds, how many wanted times it stands for), ascending in time."""
        for segment, decoded in self._decode_segments(packets, wanted, mode):
            targets = wanted[segment]
            done = 0
            last: tuple[VideoFrame, float] | None = None
            with closing(decoded):
                for frame, at in decoded:
                    # Targets up to this frame belong to it or to the one before, whichever is nearer.
                    here = done + int(np.searchsorted(targets[done:], at + TIE_SECONDS))
                    near = targets[done:here]
                    if last is not None:
                        split = int(np.count_nonzero(near - last[1] <= at - near + TIE_SECONDS))
                        if satisfied := packets.count_close(last[1], near[:split], mode):
                            yield *last, satisfied
                        near = near[split:]
                    if satisfied := packets.count_close(at, near, mode):
                        yield frame, at, satisfied
                    done, last = here, (frame, at)
                    if done == len(targets):
                        break
            if last is not None and (satisfied := packets.count_close(last[1], targets[done:], mode)):
                yield *last, satisfied

    def _decode_segments(
        self, packets: _Packets, wanted: F64, mode: Mode
    ) -> Iterator[tuple[slice, Generator[tuple[VideoFrame, float], None, None]]]:
        """Yields, for each run of packets that must be decoded, which wanted times it serves and its frames."""
        # From the start of the file, not by a seek. Note [First packet first]: x264 tells its version only in the first
        # packet, and decoders need it to read old 4:4:4 streams: without it those frames turn green. So the first
        # packet is always decoded, also where the first wanted frame is far behind it.
        if self._kept is None:
            self.close()
            self._container, self._stream = self._open()
            demuxed = enumerate(p for p in self._container.demux(self._stream) if p.size > 0)
        else:
            demuxed = enumerate(self._kept)
        codec = self._stream.codec_context
        codec.options = {"max_pixels": str(MAX_PIXELS)}  # sizes may change mid-stream
        # Frame threads wait for each other's reference rows: on two cores four decode 1080p in .65 s, two in .75 s.
        codec.thread_count = 2 * self._threads if self._threads > 1 else 1
        codec.thread_type = "AUTO"
        if mode != "exact" and packets.timed:
            codec.skip_frame = "NONREF"  # never BIDIR: P-pictures may depend on B-pictures
        segments = list(plan_segments(packets.seconds, packets.is_key, wanted))
        if segments[0].first > 0:
            segments.insert(0, Segment(0, 1, np.inf, slice(0, 0)))
        for segment in segments:
            yield segment.wanted, self._decode(demuxed, segment, packets)
        if self._damaged:
            self.warnings.append(f"{self._damaged} packets or frames were damaged")

    def _decode(
        self, demuxed: Iterator[tuple[int, Packet[VideoStream]]], segment: Segment, packets: _Packets
    ) -> Generator[tuple[VideoFrame, float], None, None]:
        """Yields the usable frames of packets [segment.first, segment.end) and leaves the decoder empty."""
        codec = self._stream.codec_context
        try:
            for packet in chain(_take(demuxed, segment, self._note_read_error), (None,)):
                try:
                    frames = codec.decode(packet)
                except av.FFmpegError:
                    self._damaged += 1
                    continue
                for frame in frames:
                    if packets.timed and frame.pts is not None:
                        # Not frame.time: PyAV gives frames that a flush brings out no time base, and so no time.
                        at = float(frame.pts * (self._stream.time_base or 0))
                    else:
                        at = float(packets.timeline[min(self.frames_decoded, len(packets.timeline) - 1)])
                    self.frames_decoded += 1
                    if frame.is_corrupt:
                        self._damaged += 1
                    elif at >= segment.begin_seconds:
                        yield frame, at
        finally:
            codec.flush_buffers()


class _Packets:
    """What a scan of the file found. Times are seconds on the stream's own clock."""

    def __init__(self, seconds: F64, is_key: Bool, timeline: F64, timeline_stated: F64, timed: bool) -> None:
        self.seconds = seconds  # by packet, in decoding order
        self.is_key = is_key  # whether decoding can begin there, as far as the container is to be trusted
        self.timeline = timeline  # of the frames that are there, ascending
        self.timeline_stated = timeline_stated  # also of frames that the header promises and a cut took away
        self.timed = timed  # False: packets carry no presentation time, frames are counted instead

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


def _nal_length_bytes(codec: CodecContext) -> int:
    """Size of the length in front of each NAL unit of H.264 in mp4 and Matroska (ISO 14496-15); 0 for all else."""
    avcc = codec.extradata or b""
    return (avcc[4] & 3) + 1 if codec.name == "h264" and len(avcc) > 4 and avcc[0] == 1 else 0


def _is_intra(packet: bytes, length_bytes: int) -> bool:
    """Whether a packet of H.264 begins a picture without prediction from others.

    Encoders that refresh intra in columns flag the start of each refresh as a key frame; it is predicted all the same.
    """
    at = 0
    while at + length_bytes < len(packet):
        size = int.from_bytes(packet[at : at + length_bytes], "big")
        at += length_bytes
        kind = packet[at] & 31
        if kind == 5:  # IDR
            return True
        if kind == 1:  # a slice: first_mb_in_slice and slice_type follow, as Exp-Golomb codes (ITU-T H.264, 7.3.3)
            bits = "".join(f"{b:08b}" for b in packet[at + 1 : at + 9])
            codes: list[int] = []
            while len(codes) < 2:
                zeros = len(bits) - len(bits.lstrip("0"))
                codes.append(int(bits[zeros : 2 * zeros + 1] or "0", 2) - 1)
                bits = bits[2 * zeros + 1 :]
            return codes[1] % 5 in (2, 4)  # I, SI
        at += size
    return False


def _take(
    demuxed: Iterator[tuple[int, Packet[VideoStream]]], segment: Segment, on_error: Callable[[av.FFmpegError], None]
) -> Iterator[Packet[VideoStream]]:
    try:
        for i, packet in demuxed:
            if i >= segment.first:
                yield packet
            if i + 1 >= segment.end:
                return
    except av.FFmpegError as error:
        on_error(error)


def to_image(frame: VideoFrame) -> Image:
    """Views a decoded frame as an Image. Planar formats of 8 to 16 bits are not copied.

    Others (palettes, packed RGB, packed YUV, floats, big-endian) go through swscale to planar RGB or 4:4:4 first.
    """
    layout = frame.format
    components = [c for c in layout.components if not c.is_alpha]
    if (
        (not layout.is_planar and len(components) > 1)
        or layout.has_palette
        or layout.is_big_endian
        or layout.is_bit_stream
        or layout.is_bayer
        or len(components) not in (1, 3)
        or len({c.plane for c in components}) != len(components)
        or not all(8 <= c.bits <= 16 for c in components)
    ):
        target = "gbrp" if layout.is_rgb or layout.has_palette else "yuv444p"
        return to_image(frame.reformat(format=target))
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
    return Image(
        components=tuple(arrays),
        bit_depth=depth,
        matrix=matrix,
        full_range=full_range,
        subsampling_xy=(-(-w // cw), -(-h // ch)),
        rotation=round(-frame.rotation / 90) % 4 * 90,
    )


def _text(error: av.FFmpegError) -> str:
    return str(error.strerror or error)
