"""Decoding with NVDEC through PyNvVideoCodec 2.x: the planes never leave the GPU.

Note [What NVDEC gets]
H.264 and HEVC with 4:2:0, progressive, one sequence parameter set a video, a file without visible damage, and what
``GetDecoderCaps`` says the GPU takes. All else, and any failure, goes to the CPU decoder. In modes but exact, packets
of pictures that nobody depends on are never submitted: those whose NAL units say so (H.264: nal_ref_idc 0; HEVC:
sub-layer non-reference pictures of the highest temporal layer in the file).

Note [Checked, not believed]
NVDEC's parser drops pictures it cannot start from without a word, and PyNvVideoCodec scales pictures to the first
size where the size changes. So before decoding it is known which times must come out, in which order; the first frame
that does not fit ends NVDEC's part. What it cannot tell: damage inside a picture, which NVDEC conceals.

Note [Equal parameter sets]
PyNvVideoCodec keeps a decoder's size, crop and number of surfaces when the next video has the same coded size, and
scales, or refuses, when it has not. So a decoder is used again only for videos with the very same sequence parameter
set, which states all of these; otherwise it is made anew.

Note [Buffers]
A frame of ``Decode`` is overwritten by the next ``Decode``, on the decoder's stream. So wanted frames are copied to
memory of the caller's lane at once, between two events: the copy waits for the decoder, and the decoder for the copy.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import av
import numpy as np
from av.packet import Packet
from av.video.stream import VideoStream

from dfengine.errors import DeviceError, DeviceMemoryError, first_line
from dfengine.sampling import Mode, Segment
from dfengine.stages.decode.cpu import picture_notes, to_image
from dfengine.stages.decode.decoder import TIE_SECONDS, CannotDecode, Numbered, Packets
from dfengine.stages.decode.nal import NalFormat, Picture, Sequence
from dfengine.types import F64, Image

if TYPE_CHECKING:
    from dfengine.gpu.lanes import Gpu, Lane

# A session decodes on one engine; while its video waits for the other stages, or its thread for the interpreter, that
# engine is idle. Two sessions an engine cover such gaps. Chosen, to be measured by benchmarks/nvdec.py.
SESSIONS_PER_ENGINE = 2

# How long a video waits for a decoder before the CPU decodes it. Decoders are held while their video is scored, seconds
# at most; longer means that somebody keeps a video open without reading on. Chosen.
WAIT_SECONDS = 60.0

# Of the first slice: its header takes a few bytes, some dozen if it lists references or weights. Chosen.
_LOOK_BYTES = 256

_CODECS = {"h264": "H264", "hevc": "HEVC"}  # names of PyNvVideoCodec.cudaVideoCodec
_LABELS = {"h264": "H.264", "hevc": "HEVC"}
_CHROMA = ("4:0:0", "4:2:0", "4:2:2", "4:4:4")
_DTYPES = {"NV12": np.uint8, "P016": np.uint16}

_Key = tuple[str, bytes]  # codec and sequence parameter set; Note [Equal parameter sets]


class NvdecPool:
    """NVDEC sessions of one GPU, lent to one video at a time. Thread-safe.

    ``size``: how many there may be; by default two for each decoder engine that the driver reports. ``nvc``: stands in
    for the package PyNvVideoCodec. Raises DeviceError if that, or the driver's part of it, is not here.
    """

    def __init__(self, gpu: Gpu, size: int | None = None, *, nvc: Any = None) -> None:
        self._gpu = gpu
        self._nvc = nvc if nvc is not None else _import_nvc()
        self._caps: dict[tuple[str, int], dict[str, int]] = {}
        self._changed = threading.Condition()
        self._idle: list[_Session] = []  # the one used last comes last
        self._lanes: list[Lane] = []  # of sessions that ended; a lane's stream lives as long as the Gpu
        self._lent = 0
        self._closed = False
        self.engines = self.capabilities("h264", 8)["num_decoder_engines"]
        self.size = size if size is not None else max(1, SESSIONS_PER_ENGINE * self.engines)

    def decoder(self, lane: Lane) -> NvdecDecoder:
        """See dfengine.stages.decode.decoder.DecoderPool."""
        return NvdecDecoder(lane, self)

    def capabilities(self, codec: str, bit_depth: int) -> dict[str, int]:
        """What the driver says of 4:2:0 video. Asked once: it makes a CUDA context each time."""
        with self._changed:
            if (codec, bit_depth) not in self._caps:
                chroma = getattr(self._nvc.cudaVideoChromaFormat, "420")
                named = getattr(self._nvc.cudaVideoCodec, _CODECS[codec])
                try:
                    caps = self._nvc.GetDecoderCaps(
                        gpuid=self._gpu.ordinal, codec=named, chromaformat=chroma, bitdepth=bit_depth
                    )
                except Exception as error:  # of no common type
                    raise DeviceError(
                        f"NVDEC cannot be asked what it takes: {first_line(error)}", stage="device"
                    ) from None
                self._caps[codec, bit_depth] = dict(caps)
            return self._caps[codec, bit_depth]

    def check(self, codec: str, sequence: Sequence) -> None:
        """Raises CannotDecode if the GPU does not take such pictures."""
        name, depth, (w, h) = _LABELS[codec], sequence.bit_depth, sequence.coded_wh
        try:
            caps = self.capabilities(codec, depth)
        except DeviceError as error:
            raise CannotDecode(error.message) from None
        if not caps["supported"]:
            raise CannotDecode(f"NVDEC of this GPU does not take {name} with {depth} bits")
        low_w, low_h, high_w, high_h = (caps[k] for k in ("width_min", "height_min", "width_max", "height_max"))
        blocks = -(-w // 16) * -(-h // 16)
        if not (low_w <= w <= high_w and low_h <= h <= high_h and blocks <= caps["mb_num_max"]):
            raise CannotDecode(
                f"NVDEC of this GPU takes {name} of {low_w}x{low_h} to {high_w}x{high_h} pixels and at most "
                f"{caps['mb_num_max']} macroblocks; this is {w}x{h}"
            )

    def borrow(self, key: _Key) -> _Session:
        """Waits for a free session, at most WAIT_SECONDS. Raises CannotDecode. Give it back with ``give_back``."""
        deadline = time.monotonic() + WAIT_SECONDS
        stale: _Session | None = None
        with self._changed:
            while True:
                if self._closed:
                    raise CannotDecode("the engine was closed")
                equal = next((s for s in reversed(self._idle) if s.key == key), None)
                if equal is not None:
                    self._idle.remove(equal)
                    self._lent += 1
                    return equal
                if self._lent + len(self._idle) < self.size:
                    break
                if self._idle:
                    stale = self._idle.pop(0)
                    break
                if not self._changed.wait(deadline - time.monotonic()):
                    raise CannotDecode(f"none of {self.size} NVDEC decoders became free in {WAIT_SECONDS:.0f} s")
            self._lent += 1
        lane: Lane | None = None
        try:
            if stale is not None:
                self._end(stale)
            with self._changed:
                lane = self._lanes.pop() if self._lanes else None
            lane = lane or self._gpu.lane()
            return _Session(self._gpu, self._nvc, key, lane)
        except BaseException as error:
            self._forget(lane)
            if isinstance(error, Exception):
                raise CannotDecode(f"NVDEC cannot be started: {first_line(error)}") from error
            raise

    def give_back(self, session: _Session, *, healthy: bool) -> None:
        """``healthy``: everything went well and the decoder was emptied; otherwise it is not used again."""
        with self._changed:
            if healthy and not self._closed:
                self._idle.append(session)
                self._lent -= 1
                self._changed.notify()
                return
        self._end(session)
        self._forget()

    def close(self) -> None:
        """Ends idle sessions now and lent ones when they come back."""
        with self._changed:
            self._closed = True
            idle, self._idle = self._idle, []
            self._changed.notify_all()
        for session in idle:
            self._end(session)

    def _end(self, session: _Session) -> None:
        try:
            session.close()
        except Exception:  # it failed before, which was reported; its lane is not used again
            return
        with self._changed:
            self._lanes.append(session.lane)

    def _forget(self, lane: Lane | None = None) -> None:
        """One is lent no longer; ``lane`` was to be its own."""
        with self._changed:
            if lane is not None:
                self._lanes.append(lane)
            self._lent -= 1
            self._changed.notify()


class _Session:
    """One decoder of PyNvVideoCodec, on a stream of its own. Used by one thread at a time."""

    def __init__(self, gpu: Gpu, nvc: Any, key: _Key, lane: Lane) -> None:
        self.key = key
        self.lane = lane
        self.is_filled = False
        self._nvc = nvc
        with self.lane:
            self._decoder = nvc.CreateDecoder(
                gpuid=gpu.ordinal,
                codec=getattr(nvc.cudaVideoCodec, _CODECS[key[0]]),
                cudacontext=0,  # the primary context, as the lane's
                cudastream=self.lane.stream,
                usedevicememory=True,
                outputColorType=nvc.OutputColorType.NATIVE,
                latency=nvc.DisplayDecodeLatencyType.NATIVE,  # the others are for streams without B-pictures
            )

    def decode(self, data: bytes, pts: int) -> list[Any]:
        """The frames, in order of time, that whole pictures in Annex B bring out; none: all that are left."""
        packet = self._nvc.PacketData()
        self.is_filled = bool(data)
        if data:
            packet.bsl_data = ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value
            packet.bsl = len(data)
            packet.pts = pts
        frames: list[Any] = self._decoder.Decode(packet)
        return frames

    def close(self) -> None:
        # Freeing waits for the whole GPU, which must not happen while a graph is captured.
        with self.lane.gpu.exclusive, self.lane:
            self.lane.synchronize()  # also waits for the copies of its frames; Note [Buffers]
            self._decoder = None


class NvdecDecoder:
    """Decodes with NVDEC; images are 4:2:0 with interleaved chroma (NV12, P016) in memory of ``lane``."""

    name = "nvdec"

    def __init__(self, lane: Lane, pool: NvdecPool) -> None:
        self.frames_decoded = 0
        self.damaged = 0
        self.notes: list[str] = []
        self._lane, self._pool = lane, pool
        self._nal: NalFormat | None = None
        self._examined = -1  # index of the stream
        self._pictures: list[Picture] = []  # by packet, as the next
        self._stamps: list[int | None] = []
        self._fault = ""
        self._session: _Session | None = None
        self._healthy = True

    def examine(self, packet: Packet[Any]) -> None:
        if self._nal is None or packet.stream.index != self._examined:  # of several streams another is taken
            self._nal, self._examined = NalFormat(packet.stream.codec_context), packet.stream.index
            self._pictures, self._stamps, self._fault = [], [], ""
        if not self._nal.codec or self._fault:
            return
        try:
            if packet.is_corrupt:
                raise ValueError("the container calls it corrupt")
            self._pictures.append(self._nal.picture(bytes(packet)))
            self._stamps.append(packet.pts)
        except ValueError as error:
            self._fault = f"the file is damaged: packet {len(self._pictures)}: {error}"

    def start(self, stream: VideoStream, packets: Packets, mode: Mode) -> None:
        self.frames_decoded = self.damaged = 0
        self._stream, self._packets = stream, packets
        self._template: Image | None = None
        key = self._admit(packets)
        top = max(p.layer for p in self._pictures)
        self._submitted = [mode == "exact" or not (p.disposable and p.layer == top) for p in self._pictures]
        self._session, self._healthy = self._pool.borrow(key), True

    def decode(
        self, numbered: Iterator[Numbered], segment: Segment, wanted: F64
    ) -> Generator[tuple[Image | None, float], None, None]:
        """Pictures that no wanted time can choose are None: they are not copied."""
        assert self._nal is not None
        due = _Due(self._packets, self._stamps, self._submitted, segment, wanted)
        self._empty()  # what a segment before brought in that nobody waited for
        try:
            for number, packet in numbered:
                if number == 0:
                    self._template = self._look_at(packet)
                if self._submitted[number]:
                    sets = self._nal.parameter_sets if number == segment.first else ()
                    data = self._nal.annex_b(chain(sets, self._nal.units(bytes(packet))))
                    yield from self._run(data, packet.pts or 0, due)
            yield from self._run(b"", 0, due)
            due.check_all_came()
        except Exception:
            self._healthy = False
            raise

    def to_image(self, picture: Image | None) -> Image:
        assert picture is not None, "a picture was chosen that no wanted time could choose"
        return picture

    def close(self) -> None:
        if self._session is not None:
            with suppress(CannotDecode):
                self._empty()
            session, self._session = self._session, None
            self._pool.give_back(session, healthy=self._healthy)

    def _admit(self, packets: Packets) -> _Key:
        """What the video needs of a decoder. Raises CannotDecode if NVDEC is not for it."""
        nal = self._nal
        assert nal is not None, "a scan that finds no packet raises"
        if not nal.codec:
            codec = self._stream.codec_context.name
            raise CannotDecode(f"NVDEC is used for H.264 and HEVC alone; the codec is {codec}")
        if self._fault or packets.warnings:
            raise CannotDecode(self._fault or f"the file is damaged: {packets.warnings[0]}")
        if not packets.timed:
            raise CannotDecode("the file does not state when frames are shown; NVDEC's frames are told apart by that")
        sps = {*nal.sps(), *(unit for picture in self._pictures for unit in picture.sps)}
        if len(sps) != 1:
            raise CannotDecode(f"the video has {len(sps)} sequence parameter sets; NVDEC is used for one alone")
        (only,) = sps
        try:
            sequence = nal.sequence(only)
        except ValueError as error:
            raise CannotDecode(f"the sequence parameter set cannot be read: {error}") from None
        if sequence.chroma_format != 1:
            raise CannotDecode(f"NVDEC is used for 4:2:0 alone; this is {_CHROMA[sequence.chroma_format & 3]}")
        if not sequence.progressive:
            raise CannotDecode("the video is interlaced; NVDEC would change its pictures")
        if any(sequence.crop_ltrb[:2]):
            raise CannotDecode("the video is cropped at the left or at the top; NVDEC would crop it elsewhere")
        self._pool.check(nal.codec, sequence)
        self._display_wh = sequence.display_wh
        return nal.codec, only

    def _look_at(self, packet: Packet[VideoStream]) -> Image:
        """A picture that has all but the first picture's samples: FFmpeg tells rotation and colours, for both decoders.

        It gets the beginning of the first slice, and does not conceal the rest: .5 ms instead of 30 ms at 1080p.
        """
        assert self._nal is not None
        codec = self._stream.codec_context
        codec.thread_count = 1
        codec.options = {"ec": "0"}
        try:
            # Without the packet's flags: an edit list may hide this picture.
            begun = Packet(self._nal.beginning(bytes(packet), _LOOK_BYTES))
            frames = [*codec.decode(begun), *codec.decode(None)]
        except av.FFmpegError as error:
            raise CannotDecode(f"FFmpeg does not take the first picture ({error.strerror})") from None
        finally:
            codec.flush_buffers()
        if not frames:
            raise CannotDecode("FFmpeg does not show the first picture, as if it depended on others")
        if (frames[0].width, frames[0].height) != self._display_wh:
            raise CannotDecode(
                f"the first picture is {frames[0].width}x{frames[0].height}, its parameter set states "
                f"{self._display_wh[0]}x{self._display_wh[1]}"
            )
        if frames[0].interlaced_frame:
            raise CannotDecode("the video is interlaced; NVDEC would change its pictures")
        self.notes = picture_notes(frames[0], self._stream)
        return to_image(frames[0], self._stream)

    def _run(self, data: bytes, pts: int, due: _Due) -> list[tuple[Image | None, float]]:
        """What comes out when ``data`` goes in. Raises CannotDecode if that is not what is due."""
        assert self._session is not None
        pictures: list[tuple[Image | None, float]] = []
        try:
            with self._lane as lane:
                frames = self._session.decode(data, pts)
                self.frames_decoded += len(frames)
                taken = [due.take(frame.getPTS()) for frame in frames]
                any_wanted = any(place is not None and place[1] for place in taken)
                if any_wanted:
                    lane.wait(self._session.lane.record())  # Note [Buffers]
                for frame, place in zip(frames, taken, strict=True):
                    if place is not None:
                        at, is_wanted = place
                        pictures.append((self._copy(frame) if is_wanted else None, at))
                if any_wanted:
                    self._session.lane.wait(lane.record())
        except (CannotDecode, DeviceMemoryError):
            raise
        except Exception as error:  # PyNvVideoCodec's have no common type
            raise CannotDecode(f"NVDEC failed: {first_line(error)}") from error
        return pictures

    def _copy(self, frame: Any) -> Image:
        """A frame in memory of the lane. Raises CannotDecode if it is not what the video's headers state."""
        from dfengine.gpu.array import DeviceArray

        assert self._template is not None
        (w, h), kind = self._display_wh, frame.format.name
        if kind not in _DTYPES or (kind == "NV12") != (self._template.bit_depth == 8):
            raise CannotDecode(f"NVDEC gave frames of kind {kind} for {self._template.bit_depth} bits")
        dtype = np.dtype(_DTYPES[kind])
        seen_h, seen_w = frame.cuda()[0].shape[:2]
        # One buffer: rows of luma, then rows of chroma. Its views state strides in other units from version to version.
        luma, chroma = frame.GetPtrToPlane(0), frame.GetPtrToPlane(1)
        pitch, rest = divmod(chroma - luma, h)
        if (seen_w, seen_h) != (w, h) or rest or pitch < w * dtype.itemsize:
            raise CannotDecode(
                f"NVDEC gave frames of {seen_w}x{seen_h} for {w}x{h}, with {chroma - luma} bytes of luma"
            )
        rows = (h + h // 2, w)
        source = DeviceArray(luma, rows, dtype, strides=(pitch, dtype.itemsize), owner=frame, lane=self._lane)
        planes = self._lane.empty(rows, dtype)
        self._lane.copy(source, planes)
        pair = (w * dtype.itemsize, 2 * dtype.itemsize)
        blue, red = (
            planes.view(offset=h * w * dtype.itemsize + i * dtype.itemsize, shape=(h // 2, w // 2), strides=pair)
            for i in range(2)
        )
        components: tuple[Any, ...] = (planes[:h], blue, red)
        # P016 has its bits at the top.
        return replace(self._template, components=components, bit_depth=8 * dtype.itemsize, subsampling_xy=(2, 2))

    def _empty(self) -> None:
        """Drops what is in the decoder, so that it can begin elsewhere."""
        assert self._session is not None
        if self._healthy and self._session.is_filled:
            try:
                with self._lane:
                    self._session.decode(b"", 0)
            except Exception as error:
                self._healthy = False
                raise CannotDecode(f"NVDEC failed: {first_line(error)}") from error


class _Due:
    """Which frames of a segment must come out, in which order, and which of them a wanted time may choose."""

    def __init__(
        self, packets: Packets, stamps: list[int | None], submitted: list[bool], segment: Segment, wanted: F64
    ) -> None:
        mine = slice(segment.first, segment.end)
        seconds = packets.seconds[mine]
        usable = np.array(submitted[mine], bool) & packets.is_shown[mine] & (seconds >= segment.begin_seconds)
        order = np.flatnonzero(usable)[np.argsort(seconds[usable], kind="stable")]
        places = set(order.tolist())
        self._stamps = [stamps[segment.first + i] for i in order]
        self._others = {stamp for i, stamp in enumerate(stamps[mine]) if i not in places}
        self._seconds = seconds[order].tolist()
        self._came = 0
        self._wanted: set[int] = set()
        if len(order) and len(wanted):
            right = np.searchsorted(seconds[order], wanted).clip(0, len(order) - 1)
            left = (right - 1).clip(0)
            before, behind = wanted - seconds[order][left], seconds[order][right] - wanted
            # The chooser settles ties; both sides of one are kept.
            self._wanted |= set(left[before <= behind + 2 * TIE_SECONDS].tolist())
            self._wanted |= set(right[behind <= before + 2 * TIE_SECONDS].tolist())

    def take(self, stamp: int) -> tuple[float, bool] | None:
        """The seconds of the frame that came, and whether it may be chosen; None if it is not used.

        Raises CannotDecode if another was due.
        """
        place = self._came
        if place < len(self._stamps) and stamp == self._stamps[place]:
            self._came += 1
            return self._seconds[place], place in self._wanted
        if stamp in self._others:
            return None
        due = self._stamps[place] if place < len(self._stamps) else "none"
        raise CannotDecode(f"NVDEC gave the frame with time stamp {stamp} where {due} was due")

    def check_all_came(self) -> None:
        """Raises CannotDecode."""
        if self._came < len(self._stamps):
            raise CannotDecode(f"NVDEC gave {self._came} of {len(self._stamps)} frames")


def _import_nvc() -> Any:
    try:
        import PyNvVideoCodec
    except Exception as error:  # without the driver's libraries it raises RuntimeError
        raise DeviceError(
            f"NVDEC cannot be used: {first_line(error)}; pip install 'dfengine[gpu]', and in a container "
            "NVIDIA_DRIVER_CAPABILITIES must hold compute,utility,video",
            stage="device",
        ) from None
    return PyNvVideoCodec
