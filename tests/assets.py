"""Small clips, made when they are first asked for: many codecs and containers, and damaged copies of them.

A Clip is a recipe. ``write_clip`` follows it and keeps the file in a folder of the session, so that tests share it. An
encoder that is missing skips the test that asks for it.
"""

from __future__ import annotations

import hashlib
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import ColorRange, Colorspace
from numpy.typing import NDArray

from dfengine.bundle import SCHEMA_VERSION, Bundle, CropSpec, ModelSpec, to_json
from dfengine.sampling import Policy
from dfengine.stages.media import READ_ALL_TITLES

RGB = NDArray[np.uint8]  # (H, W, 3)


@cache
def _texture() -> RGB:
    noise = np.random.default_rng(1).integers(0, 256, (40, 40, 3), np.uint8)
    return noise.repeat(16, axis=0).repeat(16, axis=1)  # (640, 640, 3), coarse enough to compress


def pattern(i: int, w: int, h: int) -> RGB:
    """Picture ``i`` of a pan over coarse noise: no two are equal, and each is well predicted by its neighbours."""
    y, x = (2 * i) % 300, (3 * i) % 300
    return _texture()[y : y + h, x : x + w]


def blinking(i: int, w: int, h: int) -> RGB:
    """Two scenes in turn, every second picture: the best reference of a picture is not the one next to it."""
    return pattern(i // 2 + 100 * (i % 2), w, h)


@cache
def _portrait(side: int) -> RGB:
    from skimage import data, transform

    face = data.astronaut()[0:320, 70:390]  # the head and the shoulders, the face is about 100 px of 320
    return (255 * transform.resize(face, (side, side), anti_aliasing=True)).astype(np.uint8)


def moving_face(i: int, w: int, h: int) -> RGB:
    """A public-domain portrait that drifts over gray, nearly as large as the picture."""
    picture = np.full((h, w, 3), 96, np.uint8)
    side = min(w, h) - 24
    portrait = _portrait(side)
    x, y = (w - side) // 2 + 2 * (i % 12) - 12, (h - side) // 2 + i % 8 - 4
    picture[y : y + side, x : x + side] = portrait
    return picture


def two_faces(i: int, w: int, h: int) -> RGB:
    """The portrait and its mirror image side by side, both moving, in different ways."""
    left = moving_face(i, w // 2, h)
    right = moving_face((5 * i + 3) % 12, w - w // 2, h)[:, ::-1]
    return np.concatenate([left, right], axis=1)


def nobody(i: int, w: int, h: int) -> RGB:
    """A moving gradient: nothing that looks like a face."""
    ramp = (np.arange(w) + 4 * i) % 256
    return np.broadcast_to(ramp[None, :, None], (h, w, 3)).astype(np.uint8)


@dataclass(frozen=True)
class Clip:
    """How to make a clip. ``name`` is the file name; its suffix chooses the container unless ``container`` does."""

    name: str
    codec: str
    pix_fmt: str = "yuv420p"
    wh: tuple[int, int] = (160, 120)
    frames: int = 40
    rate: Fraction = Fraction(25)
    options: dict[str, str] = field(default_factory=dict, hash=False)
    container: str | None = None
    container_options: dict[str, str] = field(default_factory=dict, hash=False)
    picture: Callable[[int, int, int], RGB] = pattern
    pts_ms: Callable[[int], int] | None = None  # presentation times, instead of i / rate
    colorspace: Colorspace | None = None
    color_range: ColorRange | None = None
    audio: bool = False

    def __str__(self) -> str:
        return self.name


def x264(name: str, params: str, **fields: object) -> Clip:
    options = {"preset": "veryfast", "crf": "30", "x264-params": params}
    return Clip(name, "libx264", options=options, **fields)  # type: ignore[arg-type]


def x265(name: str, params: str, **fields: object) -> Clip:
    options = {"preset": "veryfast", "crf": "32", "x265-params": f"log-level=none:pools=1:frame-threads=1:{params}"}
    return Clip(name, "libx265", options=options, **fields)  # type: ignore[arg-type]


FASTSTART = {"movflags": "faststart"}

# Every kind of stream the decoder has to deal with; the names say what is special about it.
B_PYRAMID = x264(
    "h264_bpyramid.mp4", "bframes=3:b-pyramid=normal:b-adapt=0:ref=4:keyint=250:scenecut=0", picture=blinking
)
H264_KEYS = x264("h264_keys.mp4", "keyint=5:bframes=2:b-adapt=0", frames=120, container_options=FASTSTART)
TWO_KEYS = x264("h264_two_keys.mp4", "keyint=90:bframes=1:b-adapt=0:scenecut=0:open-gop=1", frames=150)
H264_OPEN_GOP = x264("h264_opengop.mp4", "keyint=8:open-gop=1:bframes=3:b-adapt=0:scenecut=0", frames=96)
H264_REFRESH = x264("h264_intra_refresh.mp4", "intra-refresh=1:keyint=20:bframes=0", frames=90)
HEVC_OPEN_GOP = x265("hevc_opengop.mp4", "keyint=10:open-gop=1:bframes=4:b-adapt=0", frames=80)
AVI_NO_PTS = Clip("mpeg4_bframes.avi", "mpeg4", options={"bf": "2", "g": "12", "qscale": "6"})

CLIPS = (
    B_PYRAMID,
    H264_KEYS,
    H264_OPEN_GOP,
    H264_REFRESH,
    x264("h264_opengop.mkv", "keyint=8:open-gop=1:bframes=3:b-adapt=0:scenecut=0", frames=60),
    x264("h264_keys.ts", "keyint=10:bframes=2", frames=60),
    x264("h264.mov", "keyint=12:bframes=2", audio=True),
    x264("h264_bframes.avi", "keyint=12:bframes=2:b-pyramid=normal"),
    x264("h264.flv", "keyint=12:bframes=2"),
    x264("h264_raw.h264", "keyint=12:bframes=2", container="h264"),
    x264("h264_interlaced.mp4", "interlaced=1:keyint=15:bframes=2", wh=(160, 128)),
    x264("h264_420_10.mp4", "keyint=12:bframes=2", pix_fmt="yuv420p10le"),
    x264("h264_422.mkv", "keyint=12:bframes=2", pix_fmt="yuv422p"),
    x264("h264_444.mp4", "keyint=12:bframes=2", pix_fmt="yuv444p"),
    x264("h264_gray.mp4", "keyint=12:bframes=2", pix_fmt="gray"),
    x264("h264_full_range.mp4", "keyint=12:bframes=2", pix_fmt="yuvj420p"),
    x264("h264_odd_size.mkv", "keyint=12:bframes=2", pix_fmt="yuv444p", wh=(161, 119)),
    x264("h264_vfr.mp4", "keyint=12:bframes=2", pts_ms=lambda i: 20 * i + i * i),
    x264("h264_late_start.mkv", "keyint=12:bframes=2", pts_ms=lambda i: 7000 + 40 * i),
    HEVC_OPEN_GOP,
    x265("hevc.mkv", "keyint=250:bframes=4:b-pyramid=1", pix_fmt="yuv420p10le"),
    x265("hevc_444_12.mp4", "keyint=12:bframes=3", pix_fmt="yuv444p12le"),
    x265("hevc_rgb.mkv", "keyint=12:bframes=3", pix_fmt="gbrp"),
    Clip("vp8.webm", "libvpx", options={"g": "12", "deadline": "realtime", "cpu-used": "8", "auto-alt-ref": "1"}),
    Clip(
        "vp9.webm",
        "libvpx-vp9",
        options={"g": "20", "cpu-used": "8", "deadline": "good", "auto-alt-ref": "1", "lag-in-frames": "16"},
    ),
    Clip("vp9_odd_size.webm", "libvpx-vp9", wh=(161, 119), options={"g": "12", "cpu-used": "8"}),
    Clip("av1.mkv", "libsvtav1", options={"g": "16", "preset": "12", "svtav1-params": "lp=1"}),
    Clip(
        "av1_10.mp4", "libsvtav1", pix_fmt="yuv420p10le", options={"g": "16", "preset": "12", "svtav1-params": "lp=1"}
    ),
    Clip("mpeg1.mpg", "mpeg1video", options={"bf": "2", "g": "12"}),
    Clip("mpeg2.ts", "mpeg2video", options={"bf": "2", "g": "12"}),
    Clip("mpeg2_422.mkv", "mpeg2video", pix_fmt="yuv422p", options={"bf": "2", "g": "12"}),
    Clip("mpeg4.mp4", "mpeg4", options={"bf": "2", "g": "12", "qscale": "6"}),
    AVI_NO_PTS,
    Clip("msmpeg4.avi", "msmpeg4", options={"g": "12"}),
    Clip("mjpeg.avi", "mjpeg", pix_fmt="yuvj420p", frames=12),
    Clip("ffv1_16.mkv", "ffv1", pix_fmt="yuv420p16le", wh=(64, 48), frames=6),
    Clip("prores.mov", "prores", pix_fmt="yuv422p10le", frames=6),
    Clip("palette.gif", "gif", pix_fmt="rgb8", wh=(80, 60), frames=12, rate=Fraction(10)),
    Clip("raw.y4m", "wrapped_avframe", wh=(64, 48), frames=12),
    Clip("one_frame.mp4", "libx264", frames=1),
)

FACE = x264("face.mp4", "keyint=12:bframes=2", wh=(320, 240), frames=36, picture=moving_face, audio=True)
TWO_FACES = x264("two_faces.mp4", "keyint=12:bframes=2", wh=(480, 240), frames=36, picture=two_faces)
NOBODY = x264("nobody.mp4", "keyint=12:bframes=2", wh=(320, 240), frames=24, picture=nobody)


def write_clip(clip: Clip, folder: Path) -> Path:
    """The clip's file in ``folder``, made if it is not there."""
    path = folder / clip.name
    if path.exists():
        return path
    for codec in (clip.codec, "aac") if clip.audio else (clip.codec,):
        if codec not in av.codecs_available:
            pytest.skip(f"this FFmpeg has no {codec}")
    partial = path.with_name("partial_" + clip.name)
    with av.open(str(partial), "w", format=clip.container or _container(clip), options=clip.container_options) as out:
        stream = out.add_stream(clip.codec, rate=clip.rate, options=dict(clip.options))
        stream.width, stream.height = clip.wh
        stream.pix_fmt = clip.pix_fmt
        codec = stream.codec_context
        codec.thread_count = 1  # the same bytes on every machine
        if clip.pts_ms is not None:
            codec.time_base = Fraction(1, 1000)
        if clip.colorspace is not None:
            codec.colorspace = clip.colorspace
        if clip.color_range is not None:
            codec.color_range = clip.color_range
        sound = out.add_stream("aac", rate=16000, layout="mono") if clip.audio else None
        for i in range(clip.frames):
            frame = av.VideoFrame.from_ndarray(clip.picture(i, *clip.wh), format="rgb24")
            frame = frame.reformat(
                format=clip.pix_fmt, dst_colorspace=clip.colorspace, dst_color_range=clip.color_range
            )
            if clip.pts_ms is not None:
                frame.pts, frame.time_base = clip.pts_ms(i), Fraction(1, 1000)
            else:
                frame.pts, frame.time_base = i, 1 / clip.rate
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
        if sound is not None:
            samples = np.zeros((1, int(16000 * clip.frames / clip.rate)), np.float32)
            silence = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
            silence.sample_rate, silence.pts, silence.time_base = 16000, 0, Fraction(1, 16000)
            out.mux(sound.encode(silence))
            out.mux(sound.encode(None))
    partial.rename(path)
    return path


def with_sound(video: Path, samples: NDArray[np.floating], out: Path) -> Path:
    """The pictures of ``video`` with ``samples`` at 16 kHz, (N,), as lossless sound."""
    with av.open(str(video)) as source, av.open(str(out), "w", format="matroska") as sink:
        pictures = sink.add_stream_from_template(source.streams.video[0])
        sound = sink.add_stream("pcm_s16le", rate=16000, layout="mono")
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = pictures
                sink.mux(packet)
        frame = av.AudioFrame.from_ndarray((samples * 32767).astype(np.int16)[None], format="s16", layout="mono")
        frame.sample_rate, frame.pts = 16000, 0
        sink.mux(sound.encode(frame))
        sink.mux(sound.encode(None))
    return out


def joined_streams(out: Path, parts: Sequence[tuple[Path, int]], *, empty: Sequence[int] = ()) -> Path:
    """One file with the video stream of each part, under a disposition (av.stream.Disposition).

    Those whose place is in ``empty`` are declared and have no packets.
    """
    with ExitStack() as opened, av.open(str(out), "w") as sink:
        sources = [opened.enter_context(av.open(str(path))) for path, _ in parts]
        streams = [sink.add_stream_from_template(source.streams.video[0]) for source in sources]
        for stream, (_, disposition) in zip(streams, parts, strict=True):
            stream.disposition = disposition
        packets = [
            (float(p.dts * p.time_base), i, p)
            for i, source in enumerate(sources)
            for p in source.demux(video=0)
            if p.size and p.dts is not None and i not in empty
        ]
        for _, i, packet in sorted(packets, key=lambda p: p[:2]):
            packet.stream = streams[i]
            sink.mux(packet)
    return out


def _container(clip: Clip) -> str:
    suffix = Path(clip.name).suffix[1:]
    named = {"mkv": "matroska", "ts": "mpegts", "mpg": "mpeg", "y4m": "yuv4mpegpipe"}
    return named.get(suffix, suffix)


def write_bundle(folder: Path, **changes: object) -> Path:
    """A bundle whose one member's logit is the mean of its input: brighter faces are "fake". Takes Bundle's fields."""
    from onnx import TensorProto, helper

    folder.mkdir(parents=True, exist_ok=True)
    graph = helper.make_graph(
        [
            helper.make_node("ReduceMean", ["x", "axes"], ["flat"]),
            helper.make_node("Reshape", ["flat", "to"], ["logit"]),
        ],
        "mean",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 32, 32])],
        [helper.make_tensor_value_info("logit", TensorProto.FLOAT, ["n", 1])],
        [
            helper.make_tensor("axes", TensorProto.INT64, [3], [1, 2, 3]),
            helper.make_tensor("to", TensorProto.INT64, [2], [-1, 1]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    weights = model.SerializeToString()
    (folder / "mean.onnx").write_bytes(weights)
    member = ModelSpec(
        name="mean",
        file="mean.onnx",
        sha256=hashlib.sha256(weights).hexdigest(),
        crop=CropSpec(input_hw=(32, 32), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)),
    )
    fields = {
        "schema_version": SCHEMA_VERSION,
        "name": "development",
        "licence": "none",
        "members": (member,),
    } | changes
    if isinstance(fields.get("sampling"), str):
        fields["sampling"] = Policy.parse(fields["sampling"])
    (folder / "bundle.json").write_text(to_json(Bundle(**fields)), encoding="utf-8")
    return folder


def write_face_table(
    folder: Path, videos: Sequence[tuple[str, int, str, str]], *, frames: int = 3, tracks: int = 1, seed: int = 0
) -> Path:
    """A folder as training.faces writes it, without videos: the astronaut's face in many lights.

    ``videos``: (path, label, source_id, split) of each. Each has its own tint and mirror, each frame its own
    brightness; in fakes the lower half of the face is darker, so that there is something to learn.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image as PilImage
    from skimage import data

    from training.table import SCHEMA

    region = data.astronaut()[20:220:2, 130:330:2]  # (100, 100, 3)
    box = np.float32([24.4, 19.8, 70, 77.5])  # as the detector sees it
    points = np.float32([[37.1, 40.7], [58.8, 42], [47.4, 54.6], [36.2, 60.2], [57.8, 61.1]])
    rng = np.random.default_rng(seed)
    rows = []
    for path, label, source_id, split in videos:
        known = {
            "path": path,
            "label": label,
            "source_id": source_id,
            "original": None,
            "dataset": "made",
            "split": split,
        }
        tint, mirror = rng.uniform(0.6, 1.2, 3), rng.random() < 0.5
        for track, index in np.ndindex(tracks, frames):
            rgb = region * tint * rng.uniform(0.8, 1.1)
            rgb[50:78, 24:70] *= 0.6 if label else 1.0
            rgb = rgb.clip(0, 255).astype(np.uint8)
            place, marks = box, points
            if mirror:
                rgb, place = rgb[:, ::-1], np.float32([100 - box[2], box[1], 100 - box[0], box[3]])
                marks = (np.float32([100, 0]) + points * np.float32([-1, 1]))[[1, 0, 2, 4, 3]]
            file = folder / "crops" / Path(path).stem / f"{track}-{index}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            PilImage.fromarray(np.ascontiguousarray(rgb)).save(file)
            corner = np.float32([200, 100])  # of the region, in the frame
            face = {
                "track": track,
                "pts_seconds": index / 2,
                "index": 10 * index,
                "box": place + np.tile(corner, 2),
                "landmarks": (marks + corner).reshape(10),
                "confidence": 0.99,
                "crop": file.relative_to(folder).as_posix(),
                "crop_xyxy": [200, 100, 300, 200],
                "crop_hw": [100, 100],
                "failure": None,
            }
            rows.append(known | face)
    table = pa.Table.from_pylist(rows, SCHEMA).replace_schema_metadata({"source": str(folder)})
    pq.write_table(table, folder / "faces.parquet")
    return folder


# -- damage ------------------------------------------------------------------------------------------------------------


def truncated(data: bytes, ratio: float) -> bytes:
    return data[: int(len(data) * ratio)]


def flipped(data: bytes, start_ratio: float, length: int = 64) -> bytes:
    """``length`` bytes inverted, from ``start_ratio`` of the file on."""
    start = int(len(data) * start_ratio)
    middle = bytes(b ^ 0xFF for b in data[start : start + length])
    return data[:start] + middle + data[start + length :]


# -- header surgery on ISO base media files (mp4, mov): ISO/IEC 14496-12 -----------------------------------------------


def patch_box(data: bytes, box: str, offset: int, value: bytes, *, nth: int = 0) -> bytes:
    """Overwrites bytes of the ``nth`` box of that type, ``offset`` bytes behind the type."""
    at = -1
    for _ in range(nth + 1):
        at = data.index(box.encode("ascii"), at + 1)
    start = at + 4 + offset
    assert start + len(value) <= len(data)
    return data[:start] + value + data[start + len(value) :]


def rotated(data: bytes, degrees: int, *, mirrored: bool = False) -> bytes:
    """The display matrix in tkhd (version 0) set to a turn by ``degrees`` clockwise, of the picture or its mirror
    image."""
    a, b = {0: (1, 0), 90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees]
    sign = -1 if mirrored else 1
    return with_matrix(data, (sign * a, sign * b, -b, a))


def with_matrix(data: bytes, abcd: tuple[float, float, float, float]) -> bytes:
    """The upper left of the display matrix in tkhd (version 0) set."""
    a, b, c, d = (round(v * (1 << 16)) for v in abcd)
    return patch_box(data, "tkhd", 40, struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30))


def stated_durations(data: bytes, factor: float) -> bytes:
    """All durations in the headers (mvhd, tkhd, mdhd, version 0) multiplied; the table of samples stays true."""
    for box, offset in (("mvhd", 16), ("tkhd", 20), ("mdhd", 16)):
        at = data.index(box.encode("ascii")) + 4 + offset
        (ticks,) = struct.unpack(">I", data[at : at + 4])
        data = patch_box(data, box, offset, struct.pack(">I", min(int(ticks * factor), 0xFFFFFFFE)))
    return data


def stated_duration_mkv(data: bytes, seconds: float) -> bytes:
    """The Duration of a Matroska file (RFC 9559: id 0x4489, here 8 bytes of float, in milliseconds) replaced."""
    at = data.index(b"\x44\x89\x88") + 3
    return data[:at] + struct.pack(">d", seconds * 1000) + data[at + 8 :]


# -- the oracle --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Decoded:
    """A frame of a plain decode of everything. ``planes`` are as in Image.components."""

    time: float | None
    planes: tuple[NDArray[np.generic], ...]


def decode_plainly(path: Path, *, skip: str = "DEFAULT") -> list[Decoded]:
    """All frames in the order in which FFmpeg gives them, on one thread, damaged ones left out."""
    frames = []
    with av.open(str(path), **READ_ALL_TITLES) as container:
        stream = container.streams.best("video")
        stream.codec_context.thread_count = 1
        stream.codec_context.skip_frame = skip
        for packet in container.demux(stream):
            try:
                got = packet.decode()
            except av.FFmpegError:
                continue
            frames += [Decoded(f.time, _planes(f)) for f in got if not f.is_corrupt]
    return frames


def _planes(frame: av.VideoFrame) -> tuple[NDArray[np.generic], ...]:
    name = frame.format.name
    if not name.startswith(("yuv4", "yuvj", "gray")):
        rgb = frame.to_ndarray(format="rgb24")
        return rgb[..., 0], rgb[..., 1], rgb[..., 2]
    dtype = np.uint16 if frame.format.components[0].bits > 8 else np.uint8
    planes = []
    for plane in frame.planes:
        row = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[: plane.height]
        planes.append(row[:, : plane.width * np.dtype(dtype).itemsize].copy().view(dtype))
    if frame.interlaced_frame:  # the upper field stands for the picture
        planes = [plane[::2] for plane in planes]
    return tuple(planes)


def packet_times(path: Path) -> NDArray[np.float64]:
    """Presentation times of the packets that are shown, ascending; NaN for each that states none."""
    with av.open(str(path), **READ_ALL_TITLES) as container:
        return np.sort(
            [
                float(p.pts * p.time_base) if p.pts is not None else np.nan
                for p in container.demux(container.streams.best("video"))
                if p.size and not p.is_discard
            ]
        )


# Decodes in a process of its own, so that what a hostile header makes it allocate can be measured and limited.
_MEASURED = """
import resource, sys
from dfengine.stages.decode import open_video
from dfengine.errors import InputError
from dfengine.sampling import Sampling
def peak_kib(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak_kib()
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
try:
    with open_video(sys.argv[1]) as video:
        list(video.frames(Sampling.parse("uniform:5", "exact")))
except InputError as error:
    print(type(error).__name__, error.message)
print("KiB", peak_kib() - before)
"""


def decode_measured(path: Path) -> tuple[str, int]:
    """(what was raised, memory in MiB)"""
    done = subprocess.run([sys.executable, "-c", _MEASURED, str(path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    text, _, kib = done.stdout.rpartition("KiB")
    return text.strip(), int(kib) // 1024
