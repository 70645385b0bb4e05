"""Which of a file's video streams is the video."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from av.codec.context import CodecContext
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream

_PICTURES_BESIDE = Disposition.attached_pic | Disposition.timed_thumbnails  # of a song, or for a bar to seek with


def rank(container: InputContainer) -> list[VideoStream]:
    """The streams that may be the video, best first; cover pictures and thumbnails are none.

    First is what FFmpeg calls best (av_find_best_stream: marked as default, then the bit rate), unless there is no
    decoder for it; the others follow by the same mark, and by size.
    """
    best = container.streams.best("video")

    def key(stream: VideoStream) -> tuple[bool, bool, bool, int]:
        w, h = _size(stream)
        is_default = bool(stream.disposition & Disposition.default)
        return not _decodable(stream), best is None or stream.index != best.index, not is_default, -w * h

    return sorted((s for s in container.streams.video if not s.disposition & _PICTURES_BESIDE), key=key)


def choose(ranked: Sequence[VideoStream], packets: Mapping[int, int]) -> VideoStream:
    """The best of them that has frames, and more than one if any has: a single one is a still picture.

    ``packets``: how many there are, by the stream's index.
    """
    for least in (2, 1):
        for stream in ranked:
            if packets.get(stream.index, 0) >= least:
                return stream
    return ranked[0]


def passed_over(ranked: Sequence[VideoStream], chosen: int, packets: Mapping[int, int]) -> str:
    """A warning that names the videos that are not looked at, or ""."""
    named = {s.index: f"stream {s.index} ({_label(s)})" for s in ranked}
    others = [name for i, name in named.items() if i != chosen and packets.get(i, 0) > 1]
    if not others:
        return ""
    return f"the file holds {len(others) + 1} videos: {named[chosen]} is scored, not looked at: {', '.join(others)}"


def _decodable(stream: VideoStream) -> bool:
    codec: CodecContext | None = stream.codec_context
    return codec is not None


def _size(stream: VideoStream) -> tuple[int, int]:
    return (stream.codec_context.width, stream.codec_context.height) if _decodable(stream) else (0, 0)


def _label(stream: VideoStream) -> str:
    w, h = _size(stream)
    return f"{stream.codec_context.name}, {w}x{h}" if _decodable(stream) else "no decoder"
