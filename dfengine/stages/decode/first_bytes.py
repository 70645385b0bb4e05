"""What a file is, from its bytes alone: before FFmpeg sees it, and where FFmpeg does not take it."""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterator
from typing import BinaryIO

from dfengine.types import PathLikeStr

_HEAD_BYTES = 1024

# A second picture right behind the end of the first: a stream of JPEGs. Pictures that belong to a still (a preview, a
# gain map, the other eye) lie inside it, or are announced by an index (CIPA DC-007, "MPF").
_NEXT_JPEG = re.compile(rb"\xff\xd9\0*\xff\xd8\xff")
_JPEG_INDEX = b"MPF\0"
_LARGEST_JPEG = 16 << 20  # no camera's stream has larger pictures: 8192 x 8192 at 2 bits a pixel

_BMP_HEADERS = (12, 16, 40, 52, 56, 64, 108, 124)  # sizes of the header behind the first 14 bytes, by version

# Brands of ISO base media files (ISO/IEC 23008-12, AV1 Image File Format) that hold an image, and those that say that
# a sequence of them is in it too.
STILL_BRANDS = ("avif", "heic", "heix", "mif1")
SEQUENCE_BRANDS = ("avis", "hevc", "hevx", "msf1")

# Text formats by which FFmpeg would open other files; it passes over bytes in them that no text has.
_REFERRING = (
    (b"#EXTM3U", "a playlist (HLS)"),
    (b"ffconcat", "a playlist (ffconcat)"),
    (b"v=0\n", "a description of a session (SDP)"),
    (b"v=0\r", "a description of a session (SDP)"),
)

# What an MP4 or QuickTime file may begin with (ISO/IEC 14496-12; QuickTime File Format), and how many boxes are looked
# at: those in front of the index are few.
_FIRST_BOXES = (b"ftyp", b"mdat", b"moov", b"free", b"skip", b"wide", b"pnot")
_MOST_BOXES = 1000


def other_kind(file: BinaryIO) -> str:
    """What the first bytes say the file is, if that is not a video; "" otherwise."""
    head = file.read(_HEAD_BYTES)
    if name := _still_image(head, file):
        return f"a still image ({name})"
    for magic, kind in _REFERRING:
        if head.startswith(magic):
            return kind
    # Text is refused before FFmpeg sees it: playlists (HLS, concat, DASH) would make it open other files.
    # YUV4MPEG2 is the one video format that begins with text.
    if not head.startswith(b"YUV4MPEG2") and not any(b < 9 or 13 < b < 32 for b in head):
        return "a text file"
    return ""


def _still_image(head: bytes, file: BinaryIO) -> str:
    """The format, of those that FFmpeg would take for a video of one frame; "" if it is none, or may move."""
    if head.startswith(b"\xff\xd8\xff"):
        file.seek(0)
        start = file.read(_LARGEST_JPEG)
        return "" if _NEXT_JPEG.search(start) and _JPEG_INDEX not in head else "JPEG"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "" if _is_animated_png(file) else "PNG"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "" if head[12:16] == b"VP8X" and len(head) > 20 and head[20] & 2 else "WebP"
    if head[:2] == b"BM" and head[6:10] == bytes(4) and int.from_bytes(head[14:18], "little") in _BMP_HEADERS:
        return "BMP"
    if head.startswith((b"II*\0", b"MM\0*")):
        return "TIFF"
    if head[4:8] == b"ftyp":
        end = min(int.from_bytes(head[:4], "big"), len(head))
        brands = [head[8:12], *(head[i : i + 4] for i in range(16, end - 3, 4))]
        major, *others = (brand.decode("latin-1") for brand in brands)
        if major in STILL_BRANDS and not set(others) & set(SEQUENCE_BRANDS):
            return major
    return ""


def _is_animated_png(file: BinaryIO) -> bool:
    """Whether acTL, which counts the pictures, comes before the first of them (PNG, third edition, 11.3.6.1)."""
    at = 8
    while True:
        file.seek(at)
        begin = file.read(12)
        if len(begin) < 12 or begin[4:8] in (b"IDAT", b"IEND"):
            return False
        if begin[4:8] == b"acTL":
            return int.from_bytes(begin[8:12], "big") > 1
        at += 12 + int.from_bytes(begin[:4], "big")


def missing_index(path: PathLikeStr) -> str:
    """Why an MP4 or QuickTime file has no whole index (moov), without which nothing can be read; "" if it has one, or
    is another kind of file."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        for kind, at, length in _boxes(file, size):
            is_cut = at + length > size
            if kind == b"moov":
                return "the download was cut in its index; fetch it again" if is_cut else ""
            if is_cut:
                return "the download was cut before its index; fetch it again"
            if at + length == size:
                return "the file has no index, as of a recording that was not finished; repair it or record it again"
    return ""


def read_index(path: PathLikeStr) -> bytes:
    """The index (moov) of an MP4 or QuickTime file, at most 64 MiB of it; nothing if there is none."""
    with open(path, "rb") as file:
        for kind, at, length in _boxes(file, os.path.getsize(path)):
            if kind == b"moov":
                file.seek(at)
                return file.read(min(length, 64 << 20))
    return b""


def _boxes(file: BinaryIO, size: int) -> Iterator[tuple[bytes, int, int]]:
    """(type, where it begins, bytes it says it has) of the outermost boxes; none if the file does not begin with one.

    The first that cannot be one, or lies beyond the end, ends it.
    """
    at = 0
    for _ in range(_MOST_BOXES):
        file.seek(at)
        begin = file.read(16)
        if len(begin) < 8 or (at == 0 and begin[4:8] not in _FIRST_BOXES):
            return
        (length,) = struct.unpack(">I", begin[:4])
        if length == 1 and len(begin) == 16:
            (length,) = struct.unpack(">Q", begin[8:])
        elif length == 0:
            length = size - at
        if length < 8:
            return
        yield begin[4:8], at, length
        at += length
