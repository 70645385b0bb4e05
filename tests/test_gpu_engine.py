"""The engine on a GPU of main memory (tests/fake_gpu.py): everything but the arithmetic of a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from assets import FACE, NOBODY, TWO_FACES, write_bundle, write_clip
from conftest import TOLERANCE
from fake_cuda import FakeGpu
from fake_gpu import FakeGpuDevice, crop_resize_cuda
from fake_nvdec import FakeNvc

from dfengine import Engine, VideoScore
from dfengine.errors import DeviceError
from dfengine.gpu.nvdec import NvdecPool
from dfengine.stages import _kernels
from dfengine.stages.track import Linker
from dfengine.types import Frames


@pytest.fixture(autouse=True)
def fake_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dfengine.stages._kernels.crop_resize_cuda", crop_resize_cuda, raising=False)


@pytest.fixture(autouse=True)
def no_nvdec(monkeypatch: pytest.MonkeyPatch) -> None:
    """Videos are decoded on the CPU unless a test says otherwise."""

    def refuse(gpu: Any) -> None:
        raise DeviceError("PyNvVideoCodec is missing; test", stage="device")

    monkeypatch.setattr("dfengine.gpu.nvdec.NvdecPool", refuse)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundle"), sampling="uniform:7")


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("clips")
    return [write_clip(clip, folder) for clip in (FACE, TWO_FACES, NOBODY)]


@pytest.fixture(scope="module")
def on_cpu(bundle: Path, clips: list[Path]) -> Iterator[list[VideoScore]]:
    with Engine(bundle, device="cpu") as engine:
        yield [engine.score(path) for path in clips]


def assert_agree(score: VideoScore, expected: VideoScore, tolerance: float) -> None:
    assert (score.path, score.status, score.error) == (expected.path, expected.status, expected.error)
    assert score.frames_scored == expected.frames_scored
    # NVDEC gets all packets of a run; the CPU stops at the last frame that is wanted.
    assert abs(score.frames_decoded - expected.frames_decoded) <= (2 if score.decoder == "nvdec" else 0)
    if expected.p_fake is not None:
        assert score.p_fake == pytest.approx(expected.p_fake, abs=tolerance)
    for track, other in zip(score.tracks, expected.tracks, strict=True):
        assert [f.frame_index for f in track.frames] == [f.frame_index for f in other.frames]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_scores_are_those_of_the_cpu(bundle: Path, clips: list[Path], on_cpu: list[VideoScore], dtype: Any) -> None:
    with Engine(bundle, device=FakeGpuDevice(dtype=dtype)) as engine:
        for path, expected in zip(clips, on_cpu, strict=True):
            score = engine.score(path)
            assert_agree(score, expected, TOLERANCE["p_fake", dtype])
            assert (score.device, score.runtime) == ("cuda:0", "fake")


def test_why_nvdec_was_not_used_is_in_every_score(bundle: Path, clips: list[Path]) -> None:
    with Engine(bundle, device=FakeGpuDevice()) as engine:
        score = engine.score(clips[0])
    assert score.decoder == "pyav"
    assert score.fallback_reason == "PyNvVideoCodec is missing; test"


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_videos_share_networks_and_stay_apart(
    bundle: Path, clips: list[Path], on_cpu: list[VideoScore], workers: int
) -> None:
    with Engine(bundle, device=FakeGpuDevice(max_batch=4, contexts=1), workers=workers) as engine:
        scores = list(engine.stream(clips * 4, ordered=True))
    for score, expected in zip(scores, on_cpu * 4, strict=True):
        assert_agree(score, expected, TOLERANCE["p_fake", "float32"])


@pytest.mark.parametrize("workers", [1, 3])
def test_all_memory_comes_back(bundle: Path, clips: list[Path], tmp_path: Path, workers: int) -> None:
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(clips[0].read_bytes()[:3000])
    gpu = FakeGpu()
    with Engine(bundle, device=FakeGpuDevice(gpu), workers=workers) as engine:
        held = []
        for _ in range(3):
            scores = list(engine.stream([*clips, broken, tmp_path / "missing.mp4"]))
            assert sum(s.status == "error" for s in scores) == 2
            assert gpu.live_bytes == 0
            held.append(gpu.allocated_bytes)
        if workers == 1:  # with more, how much is kept depends on which videos meet
            assert held[0] == held[1] == held[2]
        assert gpu.allocated_bytes < engine.gpu_memory_mib << 20
    assert gpu.allocated_bytes == 0


def test_16_videos_are_in_work_unless_told(bundle: Path) -> None:
    with Engine(bundle, device=FakeGpuDevice()) as engine:
        assert engine.workers == 16


def test_networks_without_memory_for_large_batches_use_smaller_ones(
    bundle: Path, clips: list[Path], on_cpu: list[VideoScore]
) -> None:
    device = FakeGpuDevice()
    with Engine(bundle, device=device) as engine:
        for executor in device.executors["mean"]:
            executor.room = 4
        assert_agree(engine.score(clips[0]), on_cpu[0], TOLERANCE["p_fake", "float32"])
    assert device.batches["mean"][0] == 7
    assert max(device.batches["mean"][1:]) <= 4


def test_a_network_without_any_memory_costs_a_typed_row_and_nothing_else(
    bundle: Path, clips: list[Path], on_cpu: list[VideoScore]
) -> None:
    device = FakeGpuDevice()
    with Engine(bundle, device=device) as engine:
        for executor in device.executors["mean"]:
            executor.room = 0
        score = engine.score(clips[0])
        assert score.error is not None
        assert (score.error.type, score.error.stage) == ("DeviceMemoryError", "runtime")
        assert "full" in score.error.message
        for executor in device.executors["mean"]:
            executor.room = 100
        assert_agree(engine.score(clips[0]), on_cpu[0], TOLERANCE["p_fake", "float32"])


def test_a_gpu_that_is_too_small_is_a_row(bundle: Path, clips: list[Path]) -> None:
    gpu = FakeGpu(memory_bytes=200_000)
    with Engine(bundle, device=FakeGpuDevice(gpu)) as engine:
        score = engine.score(clips[0])
        assert score.error is not None
        assert score.error.type == "DeviceMemoryError"
        assert "MiB" in score.error.message
        assert gpu.live_bytes == 0


def test_what_the_driver_refuses_is_a_typed_row(bundle: Path, clips: list[Path], on_cpu: list[VideoScore]) -> None:
    gpu = FakeGpu()
    with Engine(bundle, device=FakeGpuDevice(gpu)) as engine:
        gpu.fake.fails["htod"] = "an illegal memory access was encountered"
        error = engine.score(clips[0]).error
        assert error is not None
        assert (error.type, error.stage) == ("DeviceError", "decode")
        assert error.message.startswith("the GPU failed (htod failed: an illegal memory access was encountered); if")
        gpu.fake.fails.clear()
        assert_agree(engine.score(clips[0]), on_cpu[0], TOLERANCE["p_fake", "float32"])


def test_crops_without_memory_are_made_in_halves(bundle: Path, clips: list[Path], on_cpu: list[VideoScore]) -> None:
    """The largest amount that works is found by trying: below it the video fails, above it all is well."""
    failed = 0
    for kib in (600, 900, 1200, 1600, 2400, 8000):
        gpu = FakeGpu(memory_bytes=kib << 10)
        with Engine(bundle, device=FakeGpuDevice(gpu)) as engine:
            score = engine.score(clips[0])
        if score.status == "error":
            assert score.error is not None
            assert score.error.type == "DeviceMemoryError"
            failed += 1
        else:
            assert_agree(score, on_cpu[0], TOLERANCE["p_fake", "float32"])
    assert 0 < failed < 6


def test_dark_frames_are_looked_at_where_they_lie(bundle: Path, tmp_path: Path) -> None:
    """Brightness is judged on the host; the frames of NOBODY are dark enough or not, as on the CPU."""
    with Engine(bundle, device=FakeGpuDevice()) as engine:
        assert engine.score(write_clip(NOBODY, tmp_path)).status == "no_face"


@pytest.fixture
def nvdec(monkeypatch: pytest.MonkeyPatch) -> FakeNvc:
    nvc = FakeNvc()
    monkeypatch.setattr("dfengine.gpu.nvdec.NvdecPool", lambda gpu: NvdecPool(gpu, nvc=nvc))
    return nvc


@pytest.mark.parametrize("mode", ["exact", "reference", "keyframe"])
def test_the_whole_path_from_nvdec_on(bundle: Path, clips: list[Path], nvdec: FakeNvc, mode: str) -> None:
    """Fake decoder, fake kernel, fake networks: what is left are the engine, the memory and the order of things."""
    with Engine(bundle, device="cpu", mode=mode) as engine:
        expected = [engine.score(path) for path in clips]
    gpu = FakeGpu()
    with Engine(bundle, device=FakeGpuDevice(gpu), mode=mode, workers=4) as engine:
        for score, other in zip(engine.stream(clips * 3, ordered=True), expected * 3, strict=True):
            assert_agree(score, other, TOLERANCE["p_fake", "float32"])
            assert (score.decoder, score.fallback_reason) == ("nvdec", None)
        assert gpu.live_bytes == 0


def test_the_kernels_own_program(
    bundle: Path, clips: list[Path], nvdec: FakeNvc, on_cpu: list[VideoScore], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CUDA kernel's code, compiled for the CPU."""

    def emulated(*args: Any, stream: int, **options: Any) -> None:
        _kernels.crop_resize_emulated(*args, **options)

    monkeypatch.setattr("dfengine.stages._kernels.crop_resize_cuda", emulated)
    with Engine(bundle, device=FakeGpuDevice(dtype="float16")) as engine:
        assert_agree(engine.score(clips[0]), on_cpu[0], TOLERANCE["p_fake", "float16"])


def test_a_decoder_that_fails_is_replaced_by_the_cpu_and_said(
    bundle: Path, clips: list[Path], nvdec: FakeNvc, on_cpu: list[VideoScore]
) -> None:
    nvdec.fail_at = 5
    with Engine(bundle, device=FakeGpuDevice()) as engine:
        score = engine.score(clips[0])
        assert_agree(score, on_cpu[0], TOLERANCE["p_fake", "float32"])
        assert score.decoder == "pyav"
        assert score.fallback_reason is not None
        assert score.fallback_reason.startswith("NVDEC failed")
        nvdec.heal()
        assert engine.score(clips[0]).decoder == "nvdec"


def test_a_video_is_scored_while_another_waits_for_the_decoder(
    bundle: Path, clips: list[Path], nvdec: FakeNvc, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A decoder is free again as soon as the frames are decoded, not when they are scored."""
    monkeypatch.setattr("dfengine.gpu.nvdec.NvdecPool", lambda gpu: NvdecPool(gpu, 1, nvc=nvdec))
    with Engine(bundle, device=FakeGpuDevice(), workers=2) as engine:
        lent: list[int] = []
        shared = engine._shared
        real = shared.detector.detect

        def detect(*args: Any, **options: Any) -> Any:
            lent.append(shared.decoders._lent)  # type: ignore[union-attr]
            return real(*args, **options)

        shared.detector.detect = detect  # type: ignore[method-assign]
        assert engine.score(clips[0]).decoder == "nvdec"
        assert lent == [0]


def test_frames_that_end_with_none(bundle: Path) -> None:
    """A decoder that fails after its last useful frame leaves an empty end to the one that replaces it."""
    frames = Frames((), np.zeros(0), np.zeros(0, np.int64))
    with Engine(bundle, device="cpu") as engine:
        faces = engine._shared.detector.detect(frames.images)
        rows, image_index = Linker(engine.bundle.tracking).link(frames, faces)
        assert len(rows) == len(image_index) == 0
