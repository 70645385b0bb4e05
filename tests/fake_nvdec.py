"""PyNvVideoCodec of FFmpeg and host memory: what dfengine.gpu.nvdec uses of the package, and faults on demand.

    nvc = FakeNvc(fail_at=7)
    pool = NvdecPool(FakeGpu(), nvc=nvc)

It decodes what it is given, into buffers that the next Decode overwrites, with NVDEC's habits: pictures whose size
changes are scaled to the first size, and what was damaged is concealed. A wait between streams that is missing is not
seen, because everything runs at once.
"""

from __future__ import annotations

import ctypes
import threading
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
from av.codec.context import CodecContext

from dfengine.stages.decode.cpu import to_image

SUPPORTED = {
    "supported": 1,
    "num_decoder_engines": 2,
    "width_min": 48,
    "height_min": 16,
    "width_max": 4096,
    "height_max": 4096,
    "mb_num_max": 65536,
}


class NvcError(Exception):
    """PyNvVideoCodec's own errors derive from Exception alone."""


class FakeNvc:
    """The module. ``caps`` by (codec, bit depth) replace those of SUPPORTED.

    Faults: ``fail_at`` (the n-th packet of a decoder raises, -1: the flush), ``create_fails``, ``lost`` (frames that
    never come, counted in order of time), ``shown_size`` (of all frames), ``late`` (times are off by that many ticks),
    ``kind`` (of all frames); ``heal`` ends them.
    """

    cudaVideoCodec = SimpleNamespace(H264="h264", HEVC="hevc")  # noqa: N815
    cudaVideoChromaFormat = SimpleNamespace(**{"420": 1})  # noqa: N815
    OutputColorType = SimpleNamespace(NATIVE=0)
    DisplayDecodeLatencyType = SimpleNamespace(NATIVE=0)

    class PacketData:
        bsl_data = 0
        bsl = 0
        pts = 0

    def __init__(self, **faults: Any) -> None:
        self.caps: dict[tuple[str, int], dict[str, int]] = {}
        self.heal()
        self.__dict__ |= faults
        self.decoders: list[FakeDecoder] = []
        self.asked = 0
        self._lock = threading.Lock()

    def heal(self) -> None:
        self.fail_at: int | None = None
        self.create_fails = False
        self.lost: set[int] = set()
        self.shown_size: tuple[int, int] | None = None
        self.late = 0
        self.kind = ""

    def GetDecoderCaps(self, gpuid: int, codec: str, chromaformat: int, bitdepth: int) -> dict[str, int]:  # noqa: N802
        assert (gpuid, chromaformat) == (0, 1)
        self.asked += 1
        return SUPPORTED | self.caps.get((codec, bitdepth), {})

    def CreateDecoder(self, **options: Any) -> FakeDecoder:  # noqa: N802
        if self.create_fails:
            raise NvcError("PyNvDecoder constructor failed: no libnvcuvid.so.1\nPlease install it")
        assert options["usedevicememory"]
        assert options["cudastream"] != 0
        with self._lock:
            self.decoders.append(FakeDecoder(self, options["codec"]))
            return self.decoders[-1]


class FakeDecoder:
    def __init__(self, nvc: FakeNvc, codec: str) -> None:
        self._nvc = nvc
        self._codec = CodecContext.create(codec, "r")
        self._codec.thread_count = 1
        self._buffers: list[np.ndarray] = []
        self._wh: tuple[int, int] | None = None
        self.packets: list[bytes] = []
        self.pts: list[int] = []
        self.flushes = 0
        self.frames = 0
        self._busy = threading.Lock()

    def Decode(self, packet: FakeNvc.PacketData) -> list[FakeFrame]:  # noqa: N802
        assert self._busy.acquire(blocking=False), "two threads use one decoder"
        try:
            for buffer in self._buffers:
                buffer.fill(0xAB)
            return self._decode(packet)
        finally:
            self._busy.release()

    def _decode(self, packet: FakeNvc.PacketData) -> list[FakeFrame]:
        nvc, frames = self._nvc, []
        if packet.bsl:
            data = ctypes.string_at(packet.bsl_data, packet.bsl)
            assert data.startswith(b"\0\0\0\1"), "not Annex B"
            if nvc.fail_at == len(self.packets):
                raise NvcError(
                    "HandlePictureDecode : \nError code : 999\nError Type : cuvidDecodePicture returned error 999\n"
                    "at NvDecoder.cpp:885\n"
                )
            self.packets.append(data)
            self.pts.append(packet.pts)
            given = av.Packet(data)
            given.pts = packet.pts
            try:
                frames = self._codec.decode(given)
            except av.FFmpegError:
                frames = []  # the parser drops what it cannot read
        else:
            if nvc.fail_at == -1:
                raise NvcError("cuvidParseVideoData returned error 1")
            self.flushes += 1
            frames = self._codec.decode(None)
            self._codec.flush_buffers()
        result = []
        for frame in frames:
            self.frames += 1
            if self.frames - 1 not in nvc.lost:
                result.append(self._keep(frame, len(result)))
        return result

    def _keep(self, frame: av.VideoFrame, place: int) -> FakeFrame:
        nvc = self._nvc
        self._wh = self._wh or (frame.width, frame.height)
        w, h = nvc.shown_size or self._wh
        pts = frame.pts
        if (frame.width, frame.height) != (w, h):
            frame = frame.reformat(width=w, height=h)
        luma, blue, red = to_image(frame).components
        deep = luma.dtype == np.uint16
        nv12 = np.concatenate([luma, np.stack([blue, red], axis=-1).reshape(h // 2, w)])
        if deep:
            nv12 = nv12 << (16 - frame.format.components[0].bits)
        while len(self._buffers) <= place:
            self._buffers.append(np.zeros(0, np.uint8))
        if len(self._buffers[place]) != nv12.nbytes:
            self._buffers[place] = np.empty(nv12.nbytes, np.uint8)
        self._buffers[place][:] = nv12.view(np.uint8).ravel()
        return FakeFrame(self._buffers[place], (w, h), nvc.kind or ("P016" if deep else "NV12"), (pts or 0) + nvc.late)


class FakeFrame:
    def __init__(self, buffer: np.ndarray, wh: tuple[int, int], kind: str, pts: int) -> None:
        self.format = SimpleNamespace(name=kind)
        self._pointer, self._wh, self._pts = buffer.ctypes.data, wh, pts
        self._bytes = len(buffer) * 2 // 3  # of luma

    def getPTS(self) -> int:  # noqa: N802
        return self._pts

    def cuda(self) -> list[Any]:
        w, h = self._wh
        return [SimpleNamespace(shape=[h, w, 1]), SimpleNamespace(shape=[h // 2, w // 2, 2])]

    def GetPtrToPlane(self, plane: int) -> int:  # noqa: N802
        return self._pointer + plane * self._bytes
