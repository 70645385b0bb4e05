"""NVDEC itself: what the stand-in of tests/fake_nvdec.py takes for granted. The CPU decoder is the oracle."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from assets import FASTSTART, Clip, blinking, flipped, rotated, write_clip, x264, x265

from dfengine.errors import DeviceError, InputError
from dfengine.gpu.lanes import Gpu
from dfengine.gpu.nvdec import NvdecPool
from dfengine.sampling import Mode, Sampling
from dfengine.stages.decode import Video, open_video
from dfengine.types import Frames
from gpu.conftest import missing

MODES: tuple[Mode, ...] = ("exact", "reference", "keyframe")
WH = (320, 240)  # NVDEC takes no HEVC below 144x144
MakeClip = Callable[[Clip], Path]

PYRAMID = "bframes=3:b-pyramid=normal:b-adapt=0:ref=4:keyint=250:scenecut=0"
CLOSED = [
    x264("pyramid.mp4", PYRAMID, wh=WH, picture=blinking),
    x264("keys.mp4", "keyint=5:bframes=2:b-adapt=0", wh=WH, frames=120),
    x264("keys.ts", "keyint=10:bframes=2", wh=WH, frames=60),
    x264("slices.mkv", "keyint=12:bframes=2:slices=4", wh=WH),
    x264("full_range.mp4", "keyint=12:bframes=2", wh=WH, pix_fmt="yuvj420p"),
    x264("vfr.mp4", "keyint=12:bframes=2", wh=WH, pts_ms=lambda i: 20 * i + i * i),
    x264("late.mkv", "keyint=12:bframes=2", wh=WH, pts_ms=lambda i: 7000 + 40 * i),
    x264("one.mp4", "keyint=12", wh=WH, frames=1),
    x264("baseline.mp4", "keyint=30:bframes=0:cabac=0:8x8dct=0", wh=WH),
    x264("weighted.mp4", "keyint=60:bframes=3:weightp=2:weightb=1:ref=8", wh=WH, picture=blinking),
    x264("cropped.mp4", "keyint=12:bframes=2", wh=(322, 182)),
    x264("hd.mp4", "keyint=30", wh=(640, 360), frames=60),
    x265("hevc.mp4", "keyint=30:bframes=4:b-pyramid=1:open-gop=0", wh=WH, frames=80),
    x265("hevc_cropped.mp4", "keyint=12:bframes=2:open-gop=0", wh=(322, 182)),
    x265("hevc_10.mkv", "keyint=30:bframes=4:open-gop=0", wh=WH, pix_fmt="yuv420p10le"),
    x265("hevc_12.mkv", "keyint=30:bframes=4:open-gop=0", wh=WH, pix_fmt="yuv420p12le"),
]
# Where decoding begins at a picture that is no IDR, NVDEC may or may not begin; what it gives must be right.
OPEN = [
    x264("open.mp4", "keyint=8:open-gop=1:bframes=3:b-adapt=0:scenecut=0", wh=WH, frames=96),
    x265("hevc_open.mp4", "keyint=10:open-gop=1:bframes=4:b-adapt=0", wh=WH, frames=80),
]
LAYERS = x265("layers.mp4", "keyint=30:bframes=4:b-adapt=0:temporal-layers=3:open-gop=0", wh=WH, frames=60)
MAY_BE_REFUSED = ("does not take", "NVDEC gave")  # 12 bits; open groups
FALLS_BACK = [
    x264("h264_10.mp4", "keyint=12:bframes=2", wh=WH, pix_fmt="yuv420p10le"),  # but for GPUs that take it
    x264("h264_444.mp4", "keyint=12:bframes=2", wh=WH, pix_fmt="yuv444p"),
    x264("interlaced.mp4", "interlaced=1:keyint=15:bframes=2", wh=(320, 256)),
    x264("tiny.mp4", "keyint=12", wh=(32, 32)),
    Clip("vp9.webm", "libvpx-vp9", wh=WH, options={"g": "20", "cpu-used": "8"}),
]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> MakeClip:
    folder = tmp_path_factory.mktemp("clips")
    return lambda clip: write_clip(clip, folder)


@pytest.fixture
def pool(gpu: Gpu) -> Iterator[NvdecPool]:
    try:
        pool = NvdecPool(gpu)
    except DeviceError as error:
        missing(str(error))
    yield pool
    pool.close()


def decode(gpu: Gpu, pool: NvdecPool, path: Path, policy: str, mode: Mode, **limits: int) -> tuple[Video, Frames]:
    """The frames, on the host."""
    lane = gpu.lane()
    parts = []
    with open_video(path, lane=lane, pool=pool) as video:
        for frames in video.frames(Sampling.parse(policy, mode), **limits):
            parts.append(frames)
    with lane:
        planes = [[lane.download(c) for c in image.components] for part in parts for image in part.images]
    joined = Frames(
        tuple(image for part in parts for image in part.images),
        np.concatenate([part.pts_seconds for part in parts]),
        np.concatenate([part.frame_index for part in parts]),
    )
    video.planes = planes
    return video, joined


def check_same(gpu: Gpu, pool: NvdecPool, path: Path, policy: str, mode: Mode, **limits: int) -> str:
    """That planes and times are the CPU's, bit for bit. Returns the reason of a fallback."""
    video, got = decode(gpu, pool, path, policy, mode, **limits)
    with open_video(path) as on_cpu:
        (expected,) = on_cpu.frames(Sampling.parse(policy, mode))
    assert got.pts_seconds.tolist() == expected.pts_seconds.tolist()
    assert got.frame_index.tolist() == expected.frame_index.tolist()
    assert video.warnings == on_cpu.warnings
    for image, planes, other in zip(got.images, video.planes, expected.images, strict=True):
        assert (image.matrix, image.full_range, image.rotation) == (other.matrix, other.full_range, other.rotation)
        assert image.upright_hw == other.upright_hw
        for a, b in zip(planes, other.components, strict=True):
            assert np.array_equal(a, b << (image.bit_depth - other.bit_depth))
    return video.fallback_reason


def test_what_the_driver_says(pool: NvdecPool) -> None:
    caps = pool.capabilities("h264", 8)
    assert caps["supported"]
    assert caps["num_decoder_engines"] == pool.engines >= 1
    assert pool.size == 2 * pool.engines
    assert caps["width_max"] >= 4096 <= caps["height_max"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("clip", CLOSED, ids=str)
def test_planes_are_those_of_ffmpeg(gpu: Gpu, pool: NvdecPool, made: MakeClip, clip: Clip, mode: Mode) -> None:
    for policy in ("every:1", "uniform:7", "first:3"):
        reason = check_same(gpu, pool, made(clip), policy, mode)
        assert reason == "" or ("12" in clip.name and MAY_BE_REFUSED[0] in reason)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("clip", OPEN, ids=str)
def test_open_groups(gpu: Gpu, pool: NvdecPool, made: MakeClip, clip: Clip, mode: Mode) -> None:
    reasons = {check_same(gpu, pool, made(clip), f"uniform:{n}", mode) for n in (1, 2, 3, 5, 11)}
    assert all(reason == "" or reason.startswith(MAY_BE_REFUSED) for reason in reasons), reasons


def test_temporal_layers(gpu: Gpu, pool: NvdecPool, made: MakeClip) -> None:
    # FFmpeg leaves out more than the highest layer, so the frames are others; each must be one of a full decode.
    video, got = decode(gpu, pool, made(LAYERS), "every:1", "reference")
    with open_video(made(LAYERS)) as on_cpu:
        (full,) = on_cpu.frames(Sampling.parse("every:1", "exact"))
    assert video.fallback_reason == ""
    assert 20 < len(got) < 60
    for planes, i in zip(video.planes, got.frame_index, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(planes, full.images[i].components, strict=True))


@pytest.mark.parametrize("clip", FALLS_BACK, ids=str)
def test_what_nvdec_cannot_take(gpu: Gpu, pool: NvdecPool, made: MakeClip, clip: Clip) -> None:
    reason = check_same(gpu, pool, made(clip), "uniform:5", "reference")
    assert reason or "10" in clip.name


def test_reference_mode_halves_the_work(gpu: Gpu, pool: NvdecPool, made: MakeClip) -> None:
    path = made(x264("typical.mp4", "", wh=WH, frames=300))
    video, frames = decode(gpu, pool, path, "uniform:17", "reference")
    assert video.fallback_reason == ""
    assert len(frames) == 17
    assert video.frames_decoded <= 160


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_rotation(gpu: Gpu, pool: NvdecPool, made: MakeClip, tmp_path: Path, degrees: int) -> None:
    path = tmp_path / "turned.mp4"
    path.write_bytes(rotated(made(CLOSED[1]).read_bytes(), degrees))
    assert check_same(gpu, pool, path, "uniform:3", "reference") == ""


# -- decoders that are used again --------------------------------------------------------------------------------------


def test_one_decoder_after_another(gpu: Gpu, made: MakeClip) -> None:
    """Equal coded and other display sizes, other sizes, 8 then 10 bits, H.264 then HEVC, through a pool of one."""
    clips = [
        x264("reuse_532.mp4", "keyint=12", wh=(1280, 532), frames=10),
        x264("reuse_530.mp4", "keyint=12", wh=(1280, 530), frames=10),
        x264("reuse_small.mp4", "keyint=12", wh=WH, frames=10),
        x264("reuse_refs.mp4", "keyint=12:ref=16:bframes=8:b-pyramid=normal", wh=WH, frames=40),
        x265("reuse_8.mp4", "keyint=12:open-gop=0", wh=WH, frames=10),
        x265("reuse_10.mp4", "keyint=12:open-gop=0", wh=WH, frames=10, pix_fmt="yuv420p10le"),
    ]
    pool = NvdecPool(gpu, 1)
    for clip in [*clips, *reversed(clips), clips[0], clips[0]]:
        assert check_same(gpu, pool, made(clip), "every:1", "exact") == ""
    pool.close()


def test_sizes_that_change_within_a_video(gpu: Gpu, pool: NvdecPool, made: MakeClip, tmp_path: Path) -> None:
    data = b""
    for i, wh in enumerate([(320, 240), (192, 160)]):
        data += made(x264(f"part{i}.ts", "keyint=12:bframes=0", wh=wh, frames=20)).read_bytes()
    path = tmp_path / "sizes.ts"
    path.write_bytes(data)
    video, _ = decode(gpu, pool, path, "uniform:4", "reference")
    assert video.fallback_reason


def test_a_video_left_early_leaves_no_trace(gpu: Gpu, made: MakeClip) -> None:
    pool = NvdecPool(gpu, 1)
    for clip in (CLOSED[0], CLOSED[1]):
        with open_video(made(clip), lane=gpu.lane(), pool=pool) as video:
            parts = video.frames(Sampling.parse("every:1", "exact"), memory_bytes=0)
            next(parts)
            next(parts)
        assert check_same(gpu, pool, made(clip), "every:3", "exact") == ""
    pool.close()


def test_chunks(gpu: Gpu, pool: NvdecPool, made: MakeClip) -> None:
    assert check_same(gpu, pool, made(CLOSED[1]), "every:4", "exact", memory_bytes=3 * 320 * 240 * 3 // 2) == ""


def test_threads(gpu: Gpu, pool: NvdecPool, made: MakeClip) -> None:
    """More videos at a time than there are decoders, and each as if it were alone."""
    clips = CLOSED[:4]
    for clip in clips:
        made(clip)
    failures: list[BaseException] = []

    def work(start: int) -> None:
        try:
            for i in range(6):
                assert check_same(gpu, pool, made(clips[(start + i) % len(clips)]), "uniform:6", "reference") == ""
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(pool.size + 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_frames_outlive_the_pool(gpu: Gpu, made: MakeClip) -> None:
    pool = NvdecPool(gpu, 2)
    _, frames = decode(gpu, pool, made(CLOSED[0]), "uniform:5", "exact")
    decode(gpu, pool, made(CLOSED[0]), "every:1", "exact")
    pool.close()
    with open_video(made(CLOSED[0])) as on_cpu:
        (expected,) = on_cpu.frames(Sampling.parse("uniform:5", "exact"))
    with gpu.lane() as lane:
        for a, b in zip(frames.images, expected.images, strict=True):
            assert np.array_equal(lane.download(a.components[0]), b.components[0])


def test_decoders_give_their_memory_back(gpu: Gpu, made: MakeClip) -> None:
    def use() -> int:
        pool = NvdecPool(gpu, 2)
        decode(gpu, pool, made(CLOSED[11]), "uniform:5", "exact")
        pool.close()
        return gpu.free_bytes()

    use()
    before = use()
    for _ in range(5):
        after = use()
    assert after >= before - (64 << 20), "each session holds tens of MiB"


# -- damage ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [x264, x265], ids=["h264", "hevc"])
def test_damage_ends_in_frames_or_in_an_error(
    gpu: Gpu, pool: NvdecPool, made: MakeClip, tmp_path: Path, clip: Callable[..., Clip]
) -> None:
    data = made(
        clip(f"whole_{clip.__name__}.mp4", "keyint=12", wh=WH, frames=60, container_options=FASTSTART)
    ).read_bytes()
    for percent in range(20, 100, 10):
        path = tmp_path / f"{percent}.mp4"
        path.write_bytes(flipped(data, percent / 100))
        try:
            _, frames = decode(gpu, pool, path, "uniform:10", "reference")
        except InputError:
            continue
        assert len(frames) >= 5
    # And the pool is as good as before.
    assert check_same(gpu, pool, made(CLOSED[0]), "uniform:7", "exact") == ""


def test_real_files(gpu: Gpu, pool: NvdecPool, data_dir: Path) -> None:
    on_gpu = 0
    for path in sorted([*(data_dir / "odd").iterdir(), *(data_dir / "clips").glob("*.mp4")]):
        try:
            with open_video(path) as video:
                list(video.frames(Sampling.parse("uniform:5", "reference")))
        except InputError:
            continue
        if not video.warnings:
            on_gpu += check_same(gpu, pool, path, "uniform:5", "reference") == ""
    assert on_gpu > 10
