"""What the headers of H.264 and HEVC say without decoding: NAL units, pictures nobody depends on, parameter sets.

Sources: ITU-T H.264 (7.3, 7.4.1), ITU-T H.265 (7.3, 7.4.2), ISO/IEC 14496-15 (avcC, hvcC and the lengths in packets).

Note [Why not FFmpeg's bitstream filters]
h264_mp4toannexb and hevc_mp4toannexb (av.BitStreamFilterContext) were tried. They give the same units, with the
header's parameter sets in front of every IDR picture. Where decoding begins at another key frame, as in open groups of
pictures, they add none (av 18: clip h264_opengop.mp4), and a decoder that begins there needs them; so does every
segment after a seek, whatever went through the filter before. They let units of a second layer and with a forbidden
bit pass. The units have to be told apart in any case, for nal_ref_idc, layers and parameter sets; putting start codes
in front of them is one line more, and 3 to 15 us a packet in place of 20 to 50.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from av.codec.context import CodecContext

_START = b"\0\0\0\1"
_START_CODE = re.compile(b"\0\0\1")

_H264_SPS, _H264_PPS = 7, 8
_HEVC_VPS, _HEVC_SPS, _HEVC_PPS = 32, 33, 34
_HEVC_SUB_LAYER_NON_REFERENCE = range(0, 15, 2)
_H264_HIGH = (100, 110, 122, 244, 44, 83, 86, 118, 128, 138, 139, 134, 135)  # profiles that state their chroma format


@dataclass(frozen=True)
class Picture:
    """What the headers of one packet say. ``disposable``: no other picture of the same temporal layer, or of a lower
    one, depends on it. ``sps``: sequence parameter sets that lie in it."""

    disposable: bool
    layer: int = 0
    sps: tuple[bytes, ...] = ()


@dataclass(frozen=True)
class Sequence:
    """What a sequence parameter set says about all its pictures. Sizes and crops are luma samples."""

    chroma_format: int  # 0 gray, 1 4:2:0, 2 4:2:2, 3 4:4:4
    bit_depth: int  # the larger of luma's and chroma's
    coded_wh: tuple[int, int]
    crop_ltrb: tuple[int, int, int, int]
    progressive: bool

    @property
    def display_wh(self) -> tuple[int, int]:
        left, top, right, bottom = self.crop_ltrb
        return self.coded_wh[0] - left - right, self.coded_wh[1] - top - bottom


class NalFormat:
    """How NAL units lie in the packets of one stream. For other codecs, ``codec`` is "" and nothing is known."""

    def __init__(self, codec: CodecContext) -> None:
        config = bytes(codec.extradata or b"")
        self.codec = codec.name if codec.name in ("h264", "hevc") else ""
        self.length_bytes = 0  # 0: start codes (Annex B)
        sets: Iterable[bytes] = ()
        if self.codec == "h264" and len(config) > 6 and config[0] == 1:
            self.length_bytes = (config[4] & 3) + 1
            sets = _counted_sets(config, 5)
        elif self.codec == "hevc" and len(config) > 22 and (config[0] or config[1] or config[2] > 1):
            self.length_bytes = (config[21] & 3) + 1
            sets = _arrayed_sets(config, 22)
        elif self.codec:
            sets = map(bytes, _split_start_codes(config))
        self.parameter_sets = tuple(unit for unit in sets if self._is_parameter_set(unit))

    def may_begin(self, packet: bytes) -> bool:
        """Whether decoding can begin at a packet that its container calls a key frame.

        Encoders of H.264 that refresh intra in columns flag the start of each refresh as a key frame; it is predicted
        all the same.
        """
        if self.codec != "h264" or not self.length_bytes:
            return True
        try:
            for unit in self.units(packet):
                kind = unit[0] & 31
                if kind == 5:  # IDR
                    return True
                if kind == 1:  # a slice: first_mb_in_slice and slice_type follow
                    bits = _Bits(bytes(unit[1:9]))
                    bits.ue()
                    return bits.ue() % 5 in (2, 4)  # I, SI
        except ValueError:
            pass
        return False

    def units(self, packet: bytes) -> Iterator[memoryview]:
        """The NAL units of a packet, of the base layer alone. Raises ValueError behind the last whole one."""
        view = memoryview(packet)
        split = _split_lengths(view, self.length_bytes) if self.length_bytes else _split_start_codes(packet)
        for unit in split:
            if len(unit) < (2 if self.codec == "hevc" else 1):
                continue
            if unit[0] & 0x80:
                raise ValueError("a NAL unit begins with a forbidden bit")
            if self.codec == "hevc" and _layer_id(unit) > 0:  # the other eye of a stereo video, for one
                continue
            yield unit

    def annex_b(self, units: Iterable[bytes | memoryview]) -> bytes:
        """The units with start codes in front."""
        return b"".join(part for unit in units for part in (_START, unit))

    def beginning(self, packet: bytes, slice_bytes: int) -> bytes:
        """The packet, cut off behind the first ``slice_bytes`` of its first slice. Raises ValueError as ``units``."""
        kept: list[bytes | memoryview] = []
        for unit in self.units(packet):
            if self._is_slice(unit):
                kept.append(unit[:slice_bytes])
                break
            kept.append(unit)
        if not self.length_bytes:
            return self.annex_b(kept)
        return b"".join(part for unit in kept for part in (len(unit).to_bytes(self.length_bytes, "big"), unit))

    def picture(self, packet: bytes) -> Picture:
        """Raises ValueError if the packet is damaged so far that its units cannot be told apart."""
        disposable, layer, sps = True, 0, []
        has_slices = has_sets = False
        for unit in self.units(packet):
            if self.codec == "h264":
                is_disposable = not unit[0] & 0x60  # nal_ref_idc
            else:
                is_disposable = self._kind(unit) in _HEVC_SUB_LAYER_NON_REFERENCE
                layer = max(layer, (unit[1] & 7) - 1)
            if self._is_slice(unit):
                has_slices = True
                disposable &= is_disposable
            elif self._is_parameter_set(unit):
                has_sets = True
                if self._is_sps(unit):
                    sps.append(bytes(unit))
        # What is left out must not take parameter sets along that later pictures need.
        return Picture(disposable and has_slices and not has_sets, layer, tuple(sps))

    def sequence(self, sps: bytes) -> Sequence:
        """What a sequence parameter set says. Raises ValueError if it cannot be read."""
        bits = _Bits(sps.replace(b"\0\0\3", b"\0\0"))  # emulation prevention
        return _h264_sequence(bits) if self.codec == "h264" else _hevc_sequence(bits)

    def sps(self) -> tuple[bytes, ...]:
        """Those of the container's header."""
        return tuple(unit for unit in self.parameter_sets if self._is_sps(unit))

    def _kind(self, unit: bytes | memoryview) -> int:
        return unit[0] & 31 if self.codec == "h264" else unit[0] >> 1 & 63

    def _is_slice(self, unit: bytes | memoryview) -> bool:
        return 1 <= self._kind(unit) <= 5 if self.codec == "h264" else self._kind(unit) < 32

    def _is_sps(self, unit: bytes | memoryview) -> bool:
        return self._kind(unit) == (_H264_SPS if self.codec == "h264" else _HEVC_SPS)

    def _is_parameter_set(self, unit: bytes | memoryview) -> bool:
        sets = (_H264_SPS, _H264_PPS) if self.codec == "h264" else (_HEVC_VPS, _HEVC_SPS, _HEVC_PPS)
        return len(unit) > 1 and self._kind(unit) in sets


def _layer_id(unit: memoryview) -> int:
    return (unit[0] & 1) << 5 | unit[1] >> 3


def _split_lengths(packet: memoryview, length_bytes: int) -> Iterator[memoryview]:
    at = 0
    while at + length_bytes < len(packet):
        size = int.from_bytes(packet[at : at + length_bytes], "big")
        at += length_bytes
        yield packet[at : at + size]
        at += size
    if at != len(packet):
        raise ValueError("the lengths of the NAL units do not fit the packet")


def _split_start_codes(packet: bytes) -> Iterator[memoryview]:
    starts = [m.end() for m in _START_CODE.finditer(packet)]
    for start, end in zip(starts, [s - 3 for s in starts[1:]] + [len(packet)], strict=True):
        while end > start and packet[end - 1] == 0:  # zeros in front of the next start code
            end -= 1
        yield memoryview(packet)[start:end]


def _counted_sets(config: bytes, at: int) -> Iterator[bytes]:
    """avcC: a count and SPS, a count and PPS, each with its length in two bytes."""
    for mask in (31, 255):
        count, at = config[at] & mask if at < len(config) else 0, at + 1
        for _ in range(count):
            size = int.from_bytes(config[at : at + 2], "big")
            yield config[at + 2 : at + 2 + size]
            at += 2 + size


def _arrayed_sets(config: bytes, at: int) -> Iterator[bytes]:
    """hvcC: a count of arrays, each with a type, a count, and units with their lengths in two bytes."""
    arrays, at = config[at], at + 1
    for _ in range(arrays):
        count, at = int.from_bytes(config[at + 1 : at + 3], "big"), at + 3
        for _ in range(count):
            size = int.from_bytes(config[at : at + 2], "big")
            yield config[at + 2 : at + 2 + size]
            at += 2 + size


class _Bits:
    """Reads bits from the most significant on. Raises ValueError at the end."""

    def __init__(self, data: bytes) -> None:
        self._value, self._left = int.from_bytes(data, "big"), 8 * len(data)

    def u(self, count: int) -> int:
        if count > self._left:
            raise ValueError("a header ends too early")
        self._left -= count
        return self._value >> self._left & (1 << count) - 1

    def ue(self) -> int:
        """An unsigned Exp-Golomb code."""
        zeros = 0
        while not self.u(1):
            zeros += 1
        return (1 << zeros) - 1 + self.u(zeros)

    def se(self) -> int:
        code = self.ue()
        return (code + 1) // 2 if code % 2 else -(code // 2)


def _h264_sequence(bits: _Bits) -> Sequence:
    """7.3.2.1.1"""
    bits.u(8)
    profile = bits.u(8)
    bits.u(16)  # constraints, level
    bits.ue()  # its number
    chroma, depth = 1, 8
    if profile in _H264_HIGH:
        chroma = bits.ue()
        if chroma == 3:
            bits.u(1)
        depth = 8 + max(bits.ue(), bits.ue())
        bits.u(1)
        if bits.u(1):
            for i in range(8 if chroma != 3 else 12):
                if bits.u(1):
                    _skip_scaling_list(bits, 16 if i < 6 else 64)
    bits.ue()  # log2_max_frame_num
    order = bits.ue()
    if order == 0:
        bits.ue()
    elif order == 1:
        bits.u(1)
        bits.se()
        bits.se()
        for _ in range(bits.ue()):
            bits.se()
    bits.ue()  # max_num_ref_frames
    bits.u(1)
    blocks_w, units_h = bits.ue() + 1, bits.ue() + 1
    frames_only = bits.u(1)
    if not frames_only:
        bits.u(1)
    bits.u(1)
    sx, sy = _chroma_steps(chroma)
    sy *= 2 - frames_only
    left, right, top, bottom = (bits.ue() for _ in range(4)) if bits.u(1) else (0, 0, 0, 0)
    coded_wh = 16 * blocks_w, 16 * units_h * (2 - frames_only)
    return Sequence(chroma, depth, coded_wh, (sx * left, sy * top, sx * right, sy * bottom), bool(frames_only))


def _skip_scaling_list(bits: _Bits, size: int) -> None:
    last = following = 8
    for _ in range(size):
        if following:
            following = (last + bits.se()) % 256
        last = following or last


def _hevc_sequence(bits: _Bits) -> Sequence:
    """7.3.2.2.1, 7.3.3"""
    bits.u(16 + 4)
    sub_layers = bits.u(3)
    bits.u(1 + 40)
    progressive, interlaced = bits.u(1), bits.u(1)
    bits.u(46 + 8)
    present = [(bits.u(1), bits.u(1)) for _ in range(sub_layers)]
    if sub_layers:
        bits.u(2 * (8 - sub_layers))
    for has_profile, has_level in present:
        bits.u(88 * has_profile + 8 * has_level)
    bits.ue()  # its number
    chroma = bits.ue()
    if chroma == 3:
        bits.u(1)
    coded_wh = bits.ue(), bits.ue()
    sx, sy = _chroma_steps(chroma)
    left, right, top, bottom = (bits.ue() for _ in range(4)) if bits.u(1) else (0, 0, 0, 0)
    depth = 8 + max(bits.ue(), bits.ue())
    return Sequence(
        chroma, depth, coded_wh, (sx * left, sy * top, sx * right, sy * bottom), bool(progressive or not interlaced)
    )


def _chroma_steps(chroma_format: int) -> tuple[int, int]:
    return {1: (2, 2), 2: (2, 1)}.get(chroma_format, (1, 1))
