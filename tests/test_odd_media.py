"""Videos that are good, but not plain: scored as the same pictures without the oddity, or refused as what they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from assets import FACE, NOBODY, Clip, joined_streams, write_bundle, write_clip, x264
from av.stream import Disposition

from dfengine import Engine
from dfengine.sampling import Mode, Policy
from dfengine.stages.decode import open_video
from dfengine.types import Image, VideoScore

MakeClip = Callable[[Clip], Path]
PREVIEW = x264("preview.mp4", "keyint=12", wh=(64, 48), frames=36)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with Engine(write_bundle(tmp_path_factory.mktemp("bundle"), sampling="uniform:5")) as engine:
        yield engine


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MakeClip:
    folder = tmp_path_factory.mktemp("clips")
    return lambda clip: write_clip(clip, folder)


def decode(path: Path, policy: str = "uniform:5", mode: Mode = "exact") -> tuple[list[Image], list[str]]:
    with open_video(path) as video:
        images = [image for part in video.frames(Policy.parse(policy), mode) for image in part.images]
    return images, video.warnings


def assert_as(score: VideoScore, twin: VideoScore, tolerance: float) -> None:
    assert (score.status, twin.status) == ("ok", "ok"), score.error
    assert score.p_fake == pytest.approx(twin.p_fake, abs=tolerance)
    assert len(score.tracks) == len(twin.tracks)


@pytest.fixture(scope="module")
def faults(data_dir: Path) -> Path:
    if not (data_dir / "faults").is_dir():
        pytest.skip("$DFENGINE_TEST_DATA has no faults/")
    return data_dir / "faults"


# -- several video streams ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("container", ["mp4", "mkv"])
@pytest.mark.parametrize("preview", [0, 1])
def test_of_several_videos_the_best_is_scored_and_the_others_are_named(
    engine: Engine, made: MakeClip, tmp_path: Path, container: str, preview: int
) -> None:
    parts = [(made(FACE), int(Disposition.default)), (made(PREVIEW), 0)]
    parts = parts[::-1] if preview == 0 else parts
    path = joined_streams(tmp_path / f"both.{container}", parts)
    score = engine.score(path)
    assert_as(score, engine.score(made(FACE)), 0)
    assert score.warnings == (
        f"the file holds 2 videos: stream {1 - preview} (h264, 320x240) is scored, "
        f"not looked at: stream {preview} (h264, 64x48)",
    )


def test_the_default_video_is_scored_though_it_is_the_smaller(made: MakeClip, tmp_path: Path) -> None:
    path = joined_streams(tmp_path / "both.mkv", [(made(NOBODY), 0), (made(PREVIEW), int(Disposition.default))])
    images, warnings = decode(path)
    assert images[0].upright_hw == (48, 64)
    assert "not looked at: stream 0 (h264, 320x240)" in warnings[0]


@pytest.mark.parametrize("frames", [0, 1])
def test_a_stream_without_frames_or_with_a_still_is_passed_over(
    made: MakeClip, tmp_path: Path, frames: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    still = made(x264("still.mp4", "keyint=12", wh=(64, 48), frames=1))
    parts = [(still, int(Disposition.default)), (made(FACE), 0)]
    path = joined_streams(tmp_path / "empty.mkv", parts, empty=() if frames else (0,))
    images, warnings = decode(path)
    assert len(images) == 5
    assert images[0].upright_hw == (240, 320)
    assert warnings == []
    monkeypatch.setattr("dfengine.stages.decode.video.KEPT_BYTES", 0)  # opened once more
    assert decode(path)[0][4].upright_hw == (240, 320)


def test_a_cover_picture_beside_a_video_is_no_video(made: MakeClip, tmp_path: Path) -> None:
    cover = made(Clip("cover.avi", "mjpeg", "yuvj420p", wh=(640, 480), frames=1))
    path = joined_streams(tmp_path / "cover.mp4", [(made(PREVIEW), 0), (cover, int(Disposition.attached_pic))])
    images, warnings = decode(path)
    assert images[0].upright_hw == (48, 64)
    assert warnings == []


@pytest.mark.parametrize(
    "name",
    [
        "two_video_streams_default_second.mkv",
        "two_video_streams_small_preview_first.mp4",
        "declared_but_empty_first_stream.mkv",
    ],
)
def test_real_files_with_several_streams(faults: Path, name: str) -> None:
    images, warnings = decode(faults / name)
    assert images[0].upright_hw == (480, 640)
    assert bool(warnings) == (not name.startswith("declared"))
