"""One open video: what is in the file, which packets are decoded for which times, and which frame stands for each.

Decoding itself is a PacketDecoder's: on the CPU (cpu.py) or by NVDEC (gpu/nvdec.py). A picture is the
decoder's own object; an Image is what the other stages take.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from typing import Any

import av
import numpy as np
from av.codec.context import CodecContext
from av.container import InputContainer
from av.packet import Packet
from av.video.stream import VideoStream

from dfengine.errors import DecodeError, InputError, NotAVideo, SourceNotFound, UnsupportedVideo
from dfengine.sampling import (
    Mode,
    Sampling,
    Segment,
    nearest,
    plan_segments,
    towards_key_frames,
)
from dfengine.stages.decode.decoder import MAX_PIXELS, TIE_SECONDS, CannotDecode, Numbered, PacketDecoder, Packets
from dfengine.stages.decode.dolby import own_colours
from dfengine.stages.decode.first_bytes import SEQUENCE_BRANDS, STILL_BRANDS, missing_index
from dfengine.stages.decode.nal import NalFormat
from dfengine.stages.decode.streams import choose, passed_over, rank
from dfengine.stages.media import GONE, open_media, raise_if_it_may_pass, reason
from dfengine.types import F64, Frames, Image, PathLikeStr

STAGE = "decode"

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


# Containers whose key-frame flags mean "decoding can start here". Elsewhere the flag comes from a parser that
# also sets it on recovery points of intra refresh, from which decoding is not exact.
_TRUSTED_KEYS = ("mov", "matroska")

_IMAGE_FORMATS = ("apng", "gif", "jpeg_pipe", "mjpeg")  # of FFmpeg, that hold one picture as well as many

_DOLBY_CODECS = ("hevc", "av1", "libdav1d")  # of FFmpeg, in which Dolby Vision may have colours of its own

_ENCRYPTED = "the video is encrypted; score a decrypted copy"
_ENCRYPTED_TAGS = ("encv", "drmi")  # sample entries of ISO 23001-7 and of FairPlay


@dataclass
class _Read:
    """What the packets say, by packet of the chosen stream, in decoding order."""

    timed: bool
    seconds: list[float] = field(default_factory=list)
    is_key: list[bool] = field(default_factory=list)
    shown: list[bool] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    count: Counter[int] = field(default_factory=Counter)  # packets of every stream, by its index
    last_end: float = 0.0  # of any stream
    restarts: bool = False


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
        self._chosen: int | None = None  # index of the stream, once it is known which have packets
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
                raise SourceNotFound(GONE, path=self.path, stage="open") from None
            except (av.FFmpegError, OSError) as error:  # OSError: where the name is none for FFmpeg
                raise_if_it_may_pass(error, self.path, "open")
                if why := missing_index(self.path):
                    raise DecodeError(why, path=self.path, stage="open") from None
                raise NotAVideo(
                    f"no video container was recognised ({reason(error)}); dfengine reads what FFmpeg reads",
                    path=self.path,
                    stage="open",
                ) from None
            form = container.format.name
            if form == "webp_pipe":  # the first bytes say that it moves
                raise UnsupportedVideo(
                    "this is an animated WebP, which this FFmpeg cannot decode; convert it to MP4 first",
                    path=self.path,
                    stage="open",
                )
            if form in ("image2", "ico", "tty") or (form.endswith("_pipe") and form not in _IMAGE_FORMATS):
                raise NotAVideo(
                    f"this is a still image or text (FFmpeg format '{form}'), not a video",
                    path=self.path,
                    stage="open",
                )
            ranked = rank(container)
            if not container.streams and (why := missing_index(self.path)):
                raise DecodeError(why, path=self.path, stage="open")
            if not ranked:
                kinds = sorted({str(s.type) for s in container.streams if s.type != "video"})
                found = [", ".join(kinds)] * bool(kinds) + ["a cover picture"] * bool(container.streams.video)
                only = " and ".join(found) or "headers"
                raise NotAVideo(f"there is no video stream, only {only}", path=self.path, stage="open")
            self._opened = undo.pop_all()
        return container, next((s for s in ranked if s.index == self._chosen), ranked[0])

    def _open_again(self) -> None:
        self._opened.close()
        self._container, self._stream = self._open()

    def _check_stream(self) -> None:
        codec: CodecContext | None = self._stream.codec_context
        if codec is None:
            raise UnsupportedVideo("FFmpeg has no decoder for this video stream", path=self.path, stage="open")
        if codec.codec_tag in _ENCRYPTED_TAGS:
            raise UnsupportedVideo(_ENCRYPTED, path=self.path, stage="open")
        if codec.name in _DOLBY_CODECS and (profile := own_colours(self.path, self._container.format.name)):
            raise UnsupportedVideo(
                f"this is Dolby Vision profile {profile}, whose samples mean other colours than FFmpeg gives; convert "
                "it to SDR or HDR10 first",
                path=self.path,
                stage="open",
            )
        width, height = self._stream.codec_context.width, self._stream.codec_context.height
        if width * height > MAX_PIXELS:
            raise UnsupportedVideo(
                f"the header states {width}x{height} pixels, the limit is {MAX_PIXELS} (8192x8192)",
                path=self.path,
                stage="open",
            )

    # -- decoding ------------------------------------------------------------------------------------------------

    def frames(self, sampling: Sampling, *, memory_bytes: int = DEFAULT_MEMORY_BYTES) -> Iterator[Frames]:
        """Yields the sampled frames in order of time, as few Frames as ``memory_bytes`` allows (mostly one).

        May be called once. Raises DecodeError if fewer than half of the wanted frames could be decoded, after what
        could be decoded was yielded: a caller that keeps results must drop them then.
        """
        packets = self._read_packets()
        wanted, mode = sampling.policy.wanted_seconds(packets.timeline_stated), sampling.mode
        if mode == "exact":
            wanted = np.unique(packets.timeline_stated[nearest(packets.timeline_stated, wanted)])
        elif mode == "keyframe":
            wanted = towards_key_frames(wanted, packets.timeline, packets.key_seconds)
        last_yielded = -np.inf
        for decoder in self._decoders:
            self._decoder, self.warnings = decoder, [*packets.warnings, *packets.notes]
            try:
                for frames in self._sample(packets, wanted, mode, memory_bytes, after=last_yielded):
                    last_yielded = float(frames.pts_seconds[-1]) if len(frames) else last_yielded
                    yield frames
                return
            except CannotDecode as error:
                self.fallback_reason = str(error)
            finally:
                decoder.close()

    def _sample(
        self, packets: Packets, wanted: F64, mode: Mode, memory_bytes: int, *, after: float
    ) -> Iterator[Frames]:
        """``frames`` with one decoder. Those up to ``after`` came from the one before."""
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
        self._check_found(found, len(wanted))
        self.warnings += self._decoder.notes

    def _note_read_error(self, error: av.FFmpegError) -> None:
        raise_if_it_may_pass(error, self.path, STAGE)
        self.warnings.append(f"reading stopped early ({reason(error)})")

    def _check_found(self, found: int, wanted: int) -> None:
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

    def _read_packets(self) -> Packets:
        """Reads all packets without decoding any: the times, not the header, say what is in the file."""
        read = self._read()
        self._chosen = choose(rank(self._container), read.count).index
        if self._chosen != self._stream.index:
            self._kept = []
            self._open_again()
            self._check_stream()
            read = self._read()
        if len(read.seconds) == 1 and _holds_stills(self._container):
            raise NotAVideo("there is a single picture in it: this is a still image", path=self.path, stage=STAGE)
        warnings, timed, last_end = list(read.warnings), read.timed, read.last_end
        times = np.array(read.seconds, np.float64)
        rate = float(self._stream.average_rate or self._stream.base_rate or 25)
        if read.restarts:  # files that were joined end to end: sorted by time, one would hide the other
            warnings.append("the clock goes back in the middle, as in joined files; frames are counted instead")
            last_end = np.inf  # the header speaks of one of the clocks
        if read.restarts or np.isnan(times).any():  # no clock for all of it: count
            times, timed = np.arange(len(times)) / rate, False
        is_shown = np.array(read.shown, bool)
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
        packets = Packets(times, np.array(read.is_key, bool) & trusted, is_shown, timeline, stated, timed)
        packets.warnings = tuple(warnings)
        others = passed_over(rank(self._container), self._chosen, read.count)
        packets.notes = (others,) if others else ()
        return packets

    def _read(self) -> _Read:
        """All packets, those of the chosen stream to be kept if they are few."""
        # AVI states the order of decoding only; the times that FFmpeg guesses from it are wrong with B-pictures.
        read = _Read(timed=self._container.format.name != "avi")
        decoded_at = -np.inf
        kept_bytes = 0
        nal = NalFormat(self._stream.codec_context)
        try:
            for packet in self._container.demux():
                if packet.size == 0 or packet.time_base is None:
                    continue
                read.count[packet.stream.index] += 1
                stamp = packet.pts if packet.pts is not None else packet.dts
                if stamp is not None:
                    read.last_end = max(read.last_end, float((stamp + (packet.duration or 0)) * packet.time_base))
                if packet.stream.index != self._stream.index:
                    continue
                # Not told by the codec tag: FFmpeg replaces that with the tag of the plain codec.
                if packet.has_sidedata("encryption_info"):
                    raise UnsupportedVideo(_ENCRYPTED, path=self.path, stage=STAGE)
                if packet.pts is None:
                    read.timed = False
                if packet.dts is not None:
                    decoded_before, decoded_at = decoded_at, float(packet.dts * packet.time_base)
                    read.restarts |= decoded_before - decoded_at > RESTART_SECONDS
                read.seconds.append(float(stamp * packet.time_base) if stamp is not None else np.nan)
                read.is_key.append(packet.is_keyframe and nal.may_begin(bytes(packet)))
                read.shown.append(not packet.is_discard)
                kept_bytes += packet.size
                if kept_bytes > KEPT_BYTES:
                    self._kept = None
                elif self._kept is not None:
                    self._kept.append(packet)
                for decoder in self._decoders:
                    decoder.examine(packet)
        except av.FFmpegError as error:
            raise_if_it_may_pass(error, self.path, STAGE)
            read.warnings.append(f"reading stopped after {len(read.seconds)} video packets ({reason(error)})")
        return read

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
            times = targets.tolist()  # of Python, which compares faster one by one
            done = 0
            last: tuple[Any, float] | None = None
            with closing(decoded):
                for picture, at in decoded:
                    if done < len(times) and times[done] >= at + TIE_SECONDS:  # most frames: no target is decided yet
                        last = (picture, at)
                        continue
                    # Targets up to this frame belong to it or to the one before, whichever is nearer.
                    here = done + int(np.searchsorted(targets[done:], at + TIE_SECONDS))
                    near = targets[done:here]
                    if last is not None:
                        split = int(np.count_nonzero(near - last[1] <= at - near + TIE_SECONDS))
                        if satisfied := packets.count_within_reach(last[1], near[:split], mode):
                            yield *last, satisfied
                        near = near[split:]
                    if satisfied := packets.count_within_reach(at, near, mode):
                        yield picture, at, satisfied
                    done, last = here, (picture, at)
                    if done == len(targets):
                        break
            if last is not None and (satisfied := packets.count_within_reach(last[1], targets[done:], mode)):
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
            self._open_again()
        packets_again = kept or (p for p in self._container.demux(self._stream) if p.size > 0)
        self._decoder.start(self._stream, packets, mode)
        segments = list(plan_segments(packets.seconds, packets.is_key, wanted))
        if segments[0].first > 0:
            segments.insert(0, Segment(0, 1, np.inf, slice(0, 0)))
        demuxed = enumerate(packets_again)
        for segment in segments:
            taken = _packets_of(demuxed, segment, self._note_read_error)
            yield segment.wanted, self._decoder.decode(taken, segment, wanted[segment.wanted])
        if self._decoder.damaged:
            self.warnings.append(f"{self._decoder.damaged} packets or frames were damaged")


def _holds_stills(container: InputContainer) -> bool:
    """Whether files of this kind are images as a rule."""
    brand = container.metadata.get("major_brand", "").strip()
    return container.format.name in _IMAGE_FORMATS or brand in (*STILL_BRANDS, *SEQUENCE_BRANDS)


def _packets_of(
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
