"""The whole engine on a real GPU against the CPU: scores, decoders, memory, the command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from assets import FACE, NOBODY, TWO_FACES, write_clip
from conftest import TOLERANCE

from dfengine import Engine, VideoScore
from dfengine.devices import resolve_device
from dfengine.errors import DeviceError
from dfengine.gpu.device import GpuDevice
from dfengine.gpu.lanes import Gpu

from .conftest import missing

REAL = Path(os.environ.get("DFENGINE_TEST_DATA", "missing")) / "clips"


@pytest.fixture(scope="module", autouse=True)  # before the other fixtures
def _usable() -> None:
    try:
        resolve_device("cuda")
    except DeviceError as error:
        missing(str(error))


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("clips")
    return [write_clip(clip, folder) for clip in (FACE, TWO_FACES, NOBODY)]


@pytest.fixture(scope="module")
def on_cpu(clips: list[Path]) -> Iterator[list[VideoScore]]:
    with Engine(device="cpu") as engine:
        yield [engine.score(path) for path in clips]


def assert_agree(score: VideoScore, expected: VideoScore, precision: str) -> None:
    assert (score.path, score.status, score.error) == (expected.path, expected.status, expected.error)
    if expected.p_fake is not None:
        tolerance = TOLERANCE["p_fake", {"fp16": "float16", "fp32": "float32"}[precision]]
        assert score.p_fake == pytest.approx(expected.p_fake, abs=tolerance)


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_scores_are_those_of_the_cpu(clips: list[Path], on_cpu: list[VideoScore], precision: Any) -> None:
    with Engine(device=GpuDevice(precision=precision)) as engine:
        for path, expected in zip(clips, on_cpu, strict=True):
            score = engine.score(path)
            assert_agree(score, expected, precision)
            assert score.device == "cuda:0"
            assert score.runtime


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
@pytest.mark.parametrize("mode", ["exact", "reference", "keyframe"])
def test_real_clips(mode: str, precision: Any) -> None:
    if not REAL.is_dir():
        pytest.skip("DFENGINE_TEST_DATA is not set: no real clips")
    videos = sorted(p for p in REAL.iterdir() if p.suffix in (".mp4", ".webm", ".mkv"))
    with Engine(device="cpu", mode=mode) as engine:
        expected = list(engine.stream(videos, ordered=True))
    with Engine(device=GpuDevice(precision=precision), mode=mode) as engine:
        scores = list(engine.stream(videos, ordered=True))
    for score, other in zip(scores, expected, strict=True):
        assert_agree(score, other, precision)
    assert any(s.decoder == "nvdec" for s in scores), {s.fallback_reason for s in scores}


def test_many_at_a_time_are_each_alone(clips: list[Path], on_cpu: list[VideoScore]) -> None:
    with Engine(device="cuda") as engine:
        for score, expected in zip(engine.stream(clips * 20, ordered=True), on_cpu * 20, strict=True):
            assert_agree(score, expected, "fp16")


def test_memory_comes_back_and_stays_below_what_is_stated(clips: list[Path]) -> None:
    with Engine(device="cuda") as engine:
        list(engine.stream(clips * 10))
        gpu = engine._shared.device.gpu
        before = gpu.free_bytes()
        list(engine.stream(clips * 10))
        assert before - gpu.free_bytes() < 64 << 20
        assert before - gpu.free_bytes() < engine.gpu_memory_mib << 20


def test_a_full_gpu_is_a_typed_row_and_passes(clips: list[Path], on_cpu: list[VideoScore]) -> None:
    with Engine(device="cuda", workers=1) as engine:
        gpu: Gpu = engine._shared.device.gpu
        with gpu.lane() as lane:
            hoard = []
            step = 1 << 30
            while step >= 1 << 20:
                if gpu.free_bytes() < step + (8 << 20):
                    step //= 2
                    continue
                hoard.append(lane.empty((step,), "uint8"))
            score = engine.score(clips[0])
            assert score.status == "ok" or (score.error is not None and score.error.type == "DeviceMemoryError")
            hoard.clear()
        assert_agree(engine.score(clips[0]), on_cpu[0], "fp16")


def test_the_command(clips: list[Path], on_cpu: list[VideoScore]) -> None:
    command = [sys.executable, "-m", "dfengine", "score", "--device", "cuda", "--json", *map(str, clips)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    rows = {row["path"]: row for row in map(json.loads, result.stdout.splitlines())}
    assert result.returncode == 0, result.stderr
    for path, expected in zip(clips, on_cpu, strict=True):
        assert rows[str(path)]["device"] == "cuda:0"
        if expected.p_fake is not None:
            assert rows[str(path)]["p_fake"] == pytest.approx(expected.p_fake, abs=TOLERANCE["p_fake", "float16"])
