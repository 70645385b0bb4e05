from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import av
import numpy as np
import pytest
from assets import FACE, NOBODY, Clip, decode_measured, pattern, write_bundle, write_clip, x264
from PIL import Image as PillowImage

from dfengine import Engine, errors
from dfengine.types import VideoScore


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    bundle = write_bundle(tmp_path_factory.mktemp("bundle"), sampling="uniform:5")
    with Engine(bundle) as engine:
        yield engine


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("clips")


def assert_refused(score: VideoScore, kind: str, stage: str, message: str) -> None:
    assert (score.status, score.p_fake, score.logit) == ("error", None, None)
    assert score.error is not None
    assert (score.error.type, score.error.stage) == (kind, stage), score.error
    assert message in score.error.message
    assert issubclass(getattr(errors, score.error.type), errors.InputError)
    assert "unexpected" not in score.error.message
    json.dumps(score.to_dict(), allow_nan=False)


# -- files that are no video -------------------------------------------------------------------------------------------


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def picture(path: Path, kind: str) -> Path:
    PillowImage.fromarray(pattern(0, 64, 48)).save(path, kind)
    return path


def jpeg_bytes(folder: Path) -> bytes:
    return picture(folder / "cover.jpg", "JPEG").read_bytes()


def tone(path: Path, codec: str, rate: int = 16000) -> Path:
    if codec not in av.codecs_available:
        pytest.skip(f"this FFmpeg has no {codec}")
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=rate, layout="mono")
        samples = np.sin(np.arange(rate // 2) / 9).astype(np.float32)[None]
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
        frame.sample_rate = rate
        resampler = av.AudioResampler(stream.format, "mono", rate)
        for part in [*resampler.resample(frame), *resampler.resample(None)]:
            out.mux(stream.encode(part))
        out.mux(stream.encode(None))
    return path


def song_with_cover(folder: Path) -> Path:
    """An MP3 with an ID3v2.3 APIC frame, which FFmpeg shows as a video stream of one frame."""
    jpeg = jpeg_bytes(folder)
    body = b"\x00image/jpeg\x00\x03\x00" + jpeg
    tag = b"APIC" + struct.pack(">I", len(body)) + b"\0\0" + body
    size = bytes((len(tag) >> shift) & 0x7F for shift in (21, 14, 7, 0))
    sound = tone(folder / "plain.mp3", "libmp3lame").read_bytes()
    return write(folder / "song.mp3", b"ID3\x03\0\0" + size + tag + sound)


def single_picture(folder: Path, codec: str, pix_fmt: str, suffix: str, container: str | None = None) -> Path:
    """A still that its first bytes do not betray."""
    clip = Clip(f"single{suffix}", codec, pix_fmt, wh=(64, 48), frames=1, container=container)
    return write_clip(clip, folder)


def jpeg_with_gain_map(folder: Path) -> Path:
    """Two JPEGs in one file, as phones write them, with the index that says so (CIPA DC-007) in the first."""
    data = jpeg_bytes(folder)
    return write(folder / "a.mp4", data[:2] + b"\xff\xe2\0\x08MPF\0II" + data[2:] + data)


def png_of_one(folder: Path) -> Path:
    data = picture(folder / "plain.png", "PNG").read_bytes()
    control = b"acTL" + struct.pack(">II", 1, 0)
    chunk = struct.pack(">I", 8) + control + struct.pack(">I", zlib.crc32(control))
    return write(folder / "a.png", data[:33] + chunk + data[33:])


def cut(folder: Path, length: int) -> Path:
    """An MP4 whose index comes last, without its last ``length`` bytes, or without as many of its index."""
    data = write_clip(x264("whole.mp4", "keyint=12", frames=12), folder).read_bytes()
    at = data.index(b"moov") - 4
    return write(folder / "cut.mp4", data[: at + length])


def song_with_cover_mp4(folder: Path) -> Path:
    from av.stream import Disposition

    sound = tone(folder / "sound.mp4", "aac")
    cover = write_clip(Clip("cover.avi", "mjpeg", "yuvj420p", wh=(64, 48), frames=1), folder)
    song = folder / "song.m4a"
    with av.open(str(sound)) as a, av.open(str(cover)) as b, av.open(str(song), "w", format="mp4") as out:
        streams = [out.add_stream_from_template(s) for s in (a.streams.audio[0], b.streams.video[0])]
        streams[1].disposition = Disposition.attached_pic
        for source, stream in zip((a, b), streams, strict=True):
            for packet in source.demux():
                if packet.dts is not None:
                    packet.stream = stream
                    out.mux(packet)
    return song


def headers_only(folder: Path) -> Path:
    """A Matroska file that ends where its first cluster would begin."""
    data = write_clip(x264("whole.mkv", "keyint=12", frames=4), folder).read_bytes()
    return write(folder / "headers.mkv", data[: data.index(b"\x1f\x43\xb6\x75")])


def no_frames(folder: Path, container: str) -> Path:
    with av.open(str(folder / f"a.{container}"), "w") as out:
        stream = out.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        out.start_encoding()
    return folder / f"a.{container}"


def encrypted(folder: Path) -> Path:
    key = "00112233445566778899aabbccddeeff"
    options = {"encryption_scheme": "cenc-aes-ctr", "encryption_key": key, "encryption_kid": key}
    return write_clip(x264("encrypted.mp4", "keyint=12", frames=12, container_options=options), folder)


def fifo(folder: Path) -> Path:
    if not hasattr(os, "mkfifo"):
        pytest.skip("this system has no named pipes")
    os.mkfifo(folder / "pipe.mp4")
    return folder / "pipe.mp4"


def link(folder: Path, target: str) -> Path:
    (folder / "link.mp4").symlink_to(target)
    return folder / "link.mp4"


def folder_named_mp4(folder: Path) -> Path:
    (folder / "folder.mp4").mkdir()
    return folder / "folder.mp4"


TEXT = b"not a video\n" * 50
Maker = Callable[[Path], "Path | str"]

REFUSED: list[tuple[str, Maker, str, str, str]] = [
    # name, what makes the file, type of the error, stage, part of the message
    ("missing", lambda d: d / "missing.mp4", "SourceNotFound", "open", "there is no such file"),
    ("no name", lambda d: "", "SourceNotFound", "open", "there is no such file"),
    ("dangling link", lambda d: link(d, "gone.mp4"), "SourceNotFound", "open", "there is no such file"),
    ("link to itself", lambda d: link(d, "link.mp4"), "SourceNotFound", "open", "the name cannot be looked up"),
    ("nul in name", lambda d: f"{d}/a\0b.mp4", "SourceNotFound", "open", "the name cannot be looked up"),
    ("name too long", lambda d: d / ("x" * 5000), "SourceNotFound", "open", "the name cannot be looked up"),
    ("lone surrogate", lambda d: f"{d}/\ud800.mp4", "SourceNotFound", "open", "the name cannot be looked up"),
    ("file as folder", lambda d: write(d / "f", TEXT) / "a.mp4", "SourceNotFound", "open", "there is no such file"),
    ("folder", folder_named_mp4, "NotAVideo", "open", "this is a folder"),
    ("pipe", fifo, "NotAVideo", "open", "this is a pipe, a socket or a device"),
    ("endless device", lambda d: "/dev/zero", "NotAVideo", "open", "this is a pipe, a socket or a device"),
    ("empty", lambda d: write(d / "a.mp4", b""), "NotAVideo", "open", "the file is empty (0 bytes)"),
    ("one byte", lambda d: write(d / "a.mp4", b"\0"), "NotAVideo", "open", "no video container was recognised"),
    ("zeros", lambda d: write(d / "a.mp4", bytes(9000)), "NotAVideo", "open", "no video container was recognised"),
    ("text", lambda d: write(d / "a.mp4", TEXT), "NotAVideo", "open", "this is a text file"),
    ("utf-8 text", lambda d: write(d / "a.mkv", "ü\n".encode() * 99), "NotAVideo", "open", "this is a text file"),
    ("html", lambda d: write(d / "a.webm", b"<!DOCTYPE html><html>404"), "NotAVideo", "open", "this is a text file"),
    ("jpeg", lambda d: picture(d / "a.jpg", "JPEG"), "NotAVideo", "open", "this is a still image (JPEG)"),
    ("jpeg as mp4", lambda d: picture(d / "a.mp4", "JPEG"), "NotAVideo", "open", "this is a still image (JPEG)"),
    ("png as mp4", lambda d: picture(d / "a.mp4", "PNG"), "NotAVideo", "open", "this is a still image (PNG)"),
    ("bmp as mp4", lambda d: picture(d / "a.mp4", "BMP"), "NotAVideo", "open", "this is a still image (BMP)"),
    ("tiff as mp4", lambda d: picture(d / "a.mp4", "TIFF"), "NotAVideo", "open", "this is a still image (TIFF)"),
    ("webp as mp4", lambda d: picture(d / "a.mp4", "WEBP"), "NotAVideo", "open", "this is a still image (WebP)"),
    ("avif as mp4", lambda d: picture(d / "a.mp4", "AVIF"), "NotAVideo", "open", "this is a still image (avif)"),
    ("jpeg with a gain map", jpeg_with_gain_map, "NotAVideo", "open", "this is a still image (JPEG)"),
    ("png that says it moves", png_of_one, "NotAVideo", "open", "this is a still image (PNG)"),
    ("gif of one picture", lambda d: single_picture(d, "gif", "rgb8", ".gif"), "NotAVideo", "decode", "a still image"),
    ("text that begins as BMP", lambda d: write(d / "a.mp4", b"BMW " * 50), "NotAVideo", "open", "this is a text file"),
    ("cut before its index", lambda d: cut(d, -9), "DecodeError", "open", "cut before its index; fetch it again"),
    ("cut in its index", lambda d: cut(d, 50), "DecodeError", "open", "cut in its index; fetch it again"),
    ("never finished", lambda d: cut(d, 0), "DecodeError", "open", "no index, as of a recording that was not finished"),
    ("song with cover in mp4", song_with_cover_mp4, "NotAVideo", "open", "only audio and a cover picture"),
    ("ppm as mp4", lambda d: picture(d / "a.mp4", "PPM"), "NotAVideo", "open", "this is a"),
    ("tga", lambda d: picture(d / "a.tga", "TGA"), "NotAVideo", "open", ""),
    ("jpeg 2000", lambda d: picture(d / "a.jp2", "JPEG2000"), "NotAVideo", "open", "this is a still image"),
    ("icon", lambda d: picture(d / "a.ico", "ICO"), "NotAVideo", "open", "this is a still image"),
    ("wav", lambda d: tone(d / "a.wav", "pcm_s16le"), "NotAVideo", "open", "there is no video stream, only audio"),
    ("sound in mp4", lambda d: tone(d / "a.mp4", "aac"), "NotAVideo", "open", "there is no video stream, only audio"),
    ("song with cover", song_with_cover, "NotAVideo", "open", "no video stream, only audio and a cover picture"),
    ("no frames", lambda d: no_frames(d, "avi"), "NotAVideo", "decode", "the video stream has no frames"),
    ("no streams", lambda d: no_frames(d, "mp4"), "NotAVideo", "open", "there is no video stream, only headers"),
    ("no clusters", headers_only, "NotAVideo", "open", "no video container was recognised (End of file)"),
    ("encrypted", encrypted, "UnsupportedVideo", "decode", "the video is encrypted; score a decrypted copy"),
]


@pytest.mark.parametrize(("make", "kind", "stage", "message"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_refused(engine: Engine, tmp_path: Path, make: Maker, kind: str, stage: str, message: str) -> None:
    try:
        path = make(tmp_path)
    except (KeyError, OSError) as error:
        pytest.skip(f"cannot be made here: {error}")  # an image format that this Pillow lacks
    assert_refused(engine.score(path), kind, stage, message)


@contextmanager
def ordinary_user() -> Iterator[None]:
    """Gives up root's right to read everything, for as long as this lasts."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("locked", ["file", "folder"])
def test_no_permission(engine: Engine, clips: Path, tmp_path: Path, locked: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    path = write(folder / "a.mp4", write_clip(FACE, clips).read_bytes())
    above = [p for p in path.parents if p != Path(p.anchor)]
    modes = {p: p.stat().st_mode for p in (*above, path)}
    try:
        for p in above:
            p.chmod(modes[p] | 0o111)
        (path if locked == "file" else folder).chmod(0)
        with ordinary_user():
            score = engine.score(path)
    finally:
        for p, mode in modes.items():
            p.chmod(mode)
    message = {"file": "the file may not be read", "folder": "a folder on the way to the file may not be entered"}
    assert_refused(score, "SourceNotReadable", "open", message[locked])


# -- files that refer to others ----------------------------------------------------------------------------------------

PLAYLISTS = {
    "m3u8": b"#EXTM3U\n#EXT-X-VERSION:3\n%s#EXT-X-TARGETDURATION:10\n#EXTINF:1.6,\nother.ts\n#EXT-X-ENDLIST\n",
    "ffconcat": b"ffconcat version 1.0\n%sfile other.ts\n",
    "mpd": b'<?xml version="1.0"?>\n<!--%s--><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"></MPD>\n',
    "sdp": b"v=0\n%sc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n",
}


# FFmpeg skips comments and unknown lines: a control byte in one keeps a playlist from looking like text.
@pytest.mark.parametrize("disguise", [b"", b"#\x01\n"], ids=["plain", "disguised"])
@pytest.mark.parametrize("kind", PLAYLISTS)
def test_playlists_are_not_followed(engine: Engine, tmp_path: Path, kind: str, disguise: bytes) -> None:
    write_clip(x264("other.ts", "keyint=12", wh=(320, 240), picture=FACE.picture), tmp_path)
    for name in (f"list.{kind}", "list.mp4"):
        score = engine.score(write(tmp_path / name, PLAYLISTS[kind] % disguise))
        assert_refused(score, "NotAVideo", "open", "")


# -- pictures too large for memory -------------------------------------------------------------------------------------


def y4m(w: int, h: int) -> Callable[[Path], Path]:
    return lambda d: write(d / "a.y4m", b"YUV4MPEG2 W%d H%d F25:1 C420jpeg\nFRAME\n" % (w, h) + bytes(4096))


def huge_gif(folder: Path) -> Path:
    data = write_clip(Clip("small.gif", "gif", "rgb8", wh=(32, 32), frames=3), folder).read_bytes()
    return write(folder / "a.gif", data[:6] + struct.pack("<HH", 30000, 30000) + data[10:])


def huge_vp8(folder: Path) -> Path:
    """The size in the first frame's header (RFC 6386, 9.1) is what the decoder believes, not the container's."""
    data = write_clip(Clip("small.webm", "libvpx", frames=4), folder).read_bytes()
    at = data.index(b"\x9d\x01\x2a") + 3
    return write(folder / "a.webm", data[:at] + struct.pack("<HH", 0x3FFF, 0x3FFF) + data[at + 4 :])


def huge_avi(folder: Path) -> Path:
    data = write_clip(Clip("small.avi", "huffyuv", "yuv422p", wh=(64, 48), frames=3), folder).read_bytes()
    at = data.index(b"strf") + 12  # behind the chunk's size and BITMAPINFOHEADER's own
    assert data[at : at + 8] == struct.pack("<ii", 64, 48)
    return write(folder / "a.avi", data[:at] + struct.pack("<ii", 20000, 20000) + data[at + 8 :])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (y4m(60000, 60000), ""),  # beyond what FFmpeg takes
        (y4m(20000, 20000), ""),
        (y4m(8200, 8192), "the header states 8200x8192 pixels, the limit is 67108864 (8192x8192)"),
        (huge_gif, ""),
        (huge_vp8, ""),
        (huge_avi, ""),
    ],
    ids=["y4m 60000", "y4m 20000", "y4m just over", "gif", "vp8", "avi"],
)
def test_absurd_sizes_are_refused_without_memory(tmp_path: Path, make: Callable[[Path], Path], message: str) -> None:
    refused, mib = decode_measured(make(tmp_path))
    assert refused.startswith(("UnsupportedVideo", "NotAVideo", "DecodeError"))
    assert message in refused
    assert mib < 300


# -- odd, but videos ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wh", [(1, 1), (2, 2), (11, 12), (12, 12), (4, 400), (2000, 8)])
def test_tiny_and_narrow_pictures_hold_no_face(engine: Engine, tmp_path: Path, wh: tuple[int, int]) -> None:
    score = engine.score(write_clip(Clip("a.y4m", "wrapped_avframe", "yuv444p", wh=wh, frames=3), tmp_path))
    assert score.status == "no_face", score.error


def test_the_size_may_change_in_mid_stream(engine: Engine, tmp_path: Path) -> None:
    parts = [
        x264(f"{w}.h264", "keyint=12", wh=(w, h), frames=12, picture=FACE.picture, container="h264")
        for w, h in ((320, 240), (240, 200))
    ]
    path = write(tmp_path / "both.h264", b"".join(write_clip(p, tmp_path).read_bytes() for p in parts))
    score = engine.score(path)
    assert score.status == "ok", score.error
    assert score.frames_scored == 5


NAMES = [
    b"caf\xe9.mp4",  # Latin-1
    "面.mp4".encode(),
    b"a b\tc.mp4",
    b"new\nline.mp4",
    b"-i.mp4",
    b"%03d.mp4",  # a pattern to FFmpeg's image demuxer
    b"concat:a.mp4",  # a protocol to FFmpeg
    b"http:x.mp4",
    b"a:b",
    b"'; rm.mp4",
]


@pytest.mark.parametrize("name", NAMES, ids=[ascii(n) for n in NAMES])
def test_any_name_will_do(engine: Engine, clips: Path, tmp_path: Path, name: bytes, monkeypatch) -> None:
    path = os.fsencode(tmp_path) + b"/" + name
    with open(path, "wb") as file:
        file.write(write_clip(FACE, clips).read_bytes())
    score = engine.score(os.fsdecode(path))
    assert score.status == "ok", score.error
    score.path.encode("utf-8")  # can be printed
    # A name without a folder in front, which FFmpeg might take for an option or for an address.
    monkeypatch.chdir(tmp_path)
    score = engine.score(os.fsdecode(name))
    assert score.status == "ok", score.error


def test_a_bad_file_with_a_name_that_is_not_utf8_is_refused(engine: Engine, tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/\xff.mp4"
    with open(name, "wb") as file:
        file.write(bytes(range(256)) * 9)
    score = engine.score(os.fsdecode(name))
    assert_refused(score, "NotAVideo", "open", "no video container was recognised")
    assert score.path.endswith(r"/\xff.mp4")


# -- many at once ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ordered", [True, False])
def test_bad_inputs_cost_no_other_video_its_score(engine: Engine, clips: Path, tmp_path: Path, ordered: bool) -> None:
    good = [write_clip(c, clips) for c in (FACE, NOBODY)]
    bad = [make(folder) for name, make, *_ in REFUSED[:20:3] for folder in [tmp_path / name] if not folder.mkdir()]
    paths = [p for i, b in enumerate(bad) for p in (b, good[i % 2])]
    scores = list(engine.stream(paths, ordered=ordered))
    key = sorted if not ordered else list
    assert key(s.path for s in scores) == key(errors.display_path(p) for p in paths)
    status = {str(good[0]): "ok", str(good[1]): "no_face"}
    assert all(s.status == status.get(s.path, "error") for s in scores)


# -- real files --------------------------------------------------------------------------------------------------------

NOT_VIDEOS = {"corrupt.jpg": "NotAVideo", "nasa_13013.mp4.audio.mp3": "NotAVideo", "sine_mono_s16.wav": "NotAVideo"}


def test_real_odd_files_score_or_give_a_clean_error(engine: Engine, data_dir: Path) -> None:
    paths = sorted((data_dir / "odd").iterdir())
    scores = {Path(s.path).name: s for s in engine.stream(paths)}
    assert len(scores) == len(paths)
    for name, score in scores.items():
        if score.error is not None:
            assert issubclass(getattr(errors, score.error.type), errors.InputError), (name, score.error)
    failed = {name: s.error.type for name, s in scores.items() if s.error is not None}
    assert {k: v for k, v in failed.items() if k in NOT_VIDEOS} == NOT_VIDEOS
    # Of the videos only the one that is damaged beyond repair may fail.
    assert set(failed) - set(NOT_VIDEOS) <= {"corrupted.mp4"}
