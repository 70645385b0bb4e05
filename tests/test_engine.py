from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import logging
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from assets import B_PYRAMID, FACE, NOBODY, TWO_FACES, rotated, write_bundle, write_clip, x264
from conftest import TOLERANCE

import dfengine
from dfengine import Engine, VideoScore
from dfengine.bundle import Bundle
from dfengine.errors import BundleError, BundleNotFound, DeviceError, OptionError
from dfengine.runtime import CpuDevice
from dfengine.sampling import Sampling
from dfengine.stages.detect import Detector
from dfengine.stages.track import Linker
from dfengine.types import Plan

FRAME_BYTES = 320 * 240 * 3 // 2  # of FACE
SEVEN = "uniform:7"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundle"), sampling=SEVEN)


@pytest.fixture(scope="module")
def engine(bundle: Path) -> Iterator[Engine]:
    with Engine(bundle, workers=2) as engine:
        yield engine


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("clips")
    return {
        "face": write_clip(FACE, folder),
        "two": write_clip(TWO_FACES, folder),
        "nobody": write_clip(NOBODY, folder),
        "missing": folder / "missing.mp4",
    }


@pytest.fixture(scope="module")
def alone(engine: Engine, clips: dict[str, Path]) -> dict[str, VideoScore]:
    """Each clip scored on its own: what every other way of scoring must give."""
    return {name: engine.score(path) for name, path in clips.items()}


def assert_same(a: VideoScore, b: VideoScore, *, tolerance: float = 0.0) -> None:
    """Equal but for the seconds spent."""
    x, y = (s.to_dict() for s in (a, b))
    assert x.pop("timings").keys() == y.pop("timings").keys()
    if tolerance == 0:
        assert x == y
        return
    assert (x["path"], x["status"], x["frames_scored"]) == (y["path"], y["status"], y["frames_scored"])
    assert x["p_fake"] == pytest.approx(y["p_fake"], abs=tolerance)
    for s, t in zip(a.tracks, b.tracks, strict=True):
        assert [f.frame_index for f in s.frames] == [f.frame_index for f in t.frames]
        assert [f.p_fake for f in s.frames] == pytest.approx([f.p_fake for f in t.frames], abs=tolerance)


# -- the answer --------------------------------------------------------------------------------------------------------


def test_one_face(alone: dict[str, VideoScore], clips: dict[str, Path]) -> None:
    score = alone["face"]
    assert (score.status, score.error, score.warnings) == ("ok", None, ())
    assert (score.path, score.bundle, score.device, score.decoder) == (str(clips["face"]), "development", "cpu", "pyav")
    assert score.frames_scored == 7
    assert 7 <= score.frames_decoded <= FACE.frames
    assert list(score.members) == ["mean"]
    assert score.p_fake is not None
    assert score.logit == pytest.approx(np.log(score.p_fake / (1 - score.p_fake)))
    (track,) = score.tracks
    assert len(track.frames) == 7
    assert all(a.pts_seconds < b.pts_seconds and a.frame_index < b.frame_index for a, b in pairwise(track.frames))
    for frame in track.frames:
        x1, y1, x2, y2 = frame.box
        # The portrait fills the height of 240 px but for a margin, and its face is a third of it, right of the middle.
        assert 40 < x2 - x1 < 110
        assert 40 < y2 - y1 < 110
        assert 0 <= x1 < x2 <= 320
        assert 0 <= y1 < y2 <= 240
        assert frame.landmarks is not None
        (left_x, left_y), (right_x, right_y), nose, *mouth = frame.landmarks
        assert left_x < nose[0] < right_x
        assert max(left_y, right_y) < nose[1] < min(y for _, y in mouth)


def test_two_people_are_two_tracks(alone: dict[str, VideoScore]) -> None:
    score = alone["two"]
    assert score.status == "ok"
    assert len(score.tracks) == 2
    assert len({t.track_id for t in score.tracks}) == 2
    left, right = sorted(score.tracks, key=lambda t: t.frames[0].box[0])
    assert all(f.box[2] < 240 for f in left.frames)
    assert all(f.box[0] > 240 for f in right.frames)
    assert score.p_fake == max(t.p_fake for t in score.tracks)  # the bundle's rule for tracks


def test_nobody_is_an_answer_and_no_number(alone: dict[str, VideoScore]) -> None:
    score = alone["nobody"]
    assert (score.status, score.p_fake, score.logit, score.error) == ("no_face", None, None, None)
    assert (score.tracks, score.members, score.frames_scored) == ((), {}, 0)
    assert score.frames_decoded > 0


def test_a_missing_file_is_a_row(alone: dict[str, VideoScore]) -> None:
    score = alone["missing"]
    assert (score.status, score.p_fake, score.frames_decoded, score.decoder) == ("error", None, 0, "")
    assert score.error is not None
    assert (score.error.type, score.error.stage) == ("SourceNotFound", "open")


def test_brightness_is_what_the_member_measures(bundle: Path, tmp_path: Path) -> None:
    # The member's logit is the mean of its input, so that a brighter portrait must score higher.
    def bright(i: int, w: int, h: int) -> np.ndarray:
        return (255 - (255 - FACE.picture(i, w, h)) * 0.7).astype(np.uint8)

    brighter = x264("bright.mp4", "keyint=12", wh=(320, 240), frames=20, picture=bright)
    plain = x264("plain.mp4", "keyint=12", wh=(320, 240), frames=20, picture=FACE.picture)
    with Engine(bundle, frames=4) as engine:
        scores = [engine.score(write_clip(c, tmp_path)) for c in (plain, brighter)]
    assert [s.status for s in scores] == ["ok", "ok"]
    assert scores[0].logit < scores[1].logit - 0.2


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotated_files_are_scored_upright(engine: Engine, clips: dict[str, Path], tmp_path: Path, degrees: int) -> None:
    # The coded pictures lie on their side or head: turned by the tag, they are upright again.
    def turned(i: int, w: int, h: int) -> np.ndarray:
        upright = FACE.picture(i, *((h, w) if degrees in (90, 270) else (w, h)))
        return np.ascontiguousarray(np.rot90(upright, degrees // 90))  # rot90 turns counter-clockwise

    wh = (240, 320) if degrees in (90, 270) else (320, 240)
    path = write_clip(x264("lying.mp4", "keyint=12:bframes=2", wh=wh, frames=FACE.frames, picture=turned), tmp_path)
    path.write_bytes(rotated(path.read_bytes(), degrees))
    score, upright = engine.score(path), engine.score(clips["face"])
    assert score.status == "ok", score.error
    for a, b in zip(score.tracks[0].frames, upright.tracks[0].frames, strict=False):
        assert np.abs(np.subtract(a.box, b.box)).max() < 12  # another encode, and MTCNN's whole pixels
    assert score.p_fake == pytest.approx(upright.p_fake, abs=0.05)


def test_to_dict_is_json_with_the_fields_of_the_contract(alone: dict[str, VideoScore]) -> None:
    fields = [
        "path", "status", "p_fake", "logit", "error", "warnings", "tracks", "members", "frames_decoded",
        "frames_scored", "sampling", "mode", "bundle", "bundle_digest", "detector_digest",
        "dfengine_version", "device", "runtime", "decoder", "fallback_reason", "timings", "fingerprint",
    ]  # fmt: skip
    for score in alone.values():
        data = score.to_dict()
        assert list(data) == fields
        assert json.loads(json.dumps(data, allow_nan=False)) == data
    track = alone["face"].to_dict()["tracks"][0]
    assert list(track) == ["track_id", "p_fake", "frames"]
    assert list(track["frames"][0]) == ["frame_index", "pts_seconds", "box", "landmarks", "p_fake"]
    assert list(alone["missing"].to_dict()["error"]) == ["type", "stage", "message"]


def test_timings_are_by_stage(alone: dict[str, VideoScore]) -> None:
    stages = {"decode", "detect", "track", "crop", "backbone", "aggregate"}
    assert set(alone["face"].timings) == stages
    assert set(alone["nobody"].timings) == stages - {"crop"}
    assert set(alone["missing"].timings) == {"decode"}
    assert all(seconds >= 0 for score in alone.values() for seconds in score.timings.values())


# -- the same video, the same score, however it was scheduled ----------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("ordered", [True, False])
def test_schedule_does_not_change_scores(
    bundle: Path, clips: dict[str, Path], alone: dict[str, VideoScore], workers: int, ordered: bool
) -> None:
    names = ["face", "missing", "nobody", "two", "face", "face"]
    with Engine(bundle, workers=workers) as engine:
        scores = list(engine.stream([clips[n] for n in names], ordered=ordered))
    expected = [str(clips[n]) for n in names]
    if ordered or workers == 1:
        assert [s.path for s in scores] == expected
    assert sorted(s.path for s in scores) == sorted(expected)
    by_path = {str(clips[n]): alone[n] for n in names}
    for score in scores:
        assert_same(score, by_path[score.path], tolerance=TOLERANCE["backbone", "float32"])


@pytest.mark.parametrize("memory_bytes", [0, FRAME_BYTES, 3 * FRAME_BYTES, 6 * FRAME_BYTES])
def test_memory_limit_does_not_change_scores(bundle: Path, clips: dict[str, Path], memory_bytes: int) -> None:
    # In exact mode. In the others, detection looks at neighbours, and those in another Frames cannot be seen.
    with (
        Engine(bundle, mode="exact") as roomy,
        Engine(bundle, mode="exact", memory_bytes=memory_bytes) as cramped,
        Engine(bundle, memory_bytes=memory_bytes) as reference,
    ):
        for name in ("face", "two", "nobody"):
            score = cramped.score(clips[name])
            assert_same(score, roomy.score(clips[name]), tolerance=TOLERANCE["backbone", "float32"])
            assert reference.score(clips[name]).status == score.status


def test_scoring_twice_gives_the_same(engine: Engine, clips: dict[str, Path], alone: dict[str, VideoScore]) -> None:
    assert_same(engine.score(clips["two"]), alone["two"], tolerance=TOLERANCE["backbone", "float32"])


def test_threads_may_share_an_engine(engine: Engine, clips: dict[str, Path], alone: dict[str, VideoScore]) -> None:
    names = ["face", "two", "nobody", "face"]
    scores: list[VideoScore | None] = [None] * len(names)

    def work(i: int) -> None:
        scores[i] = engine.score(clips[names[i]])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(names))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for name, score in zip(names, scores, strict=True):
        assert score is not None
        assert_same(score, alone[name], tolerance=TOLERANCE["backbone", "float32"])


# -- stream ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("count", [0, 1])
def test_stream_of_few(bundle: Path, clips: dict[str, Path], workers: int, count: int) -> None:
    with Engine(bundle, workers=workers) as engine:
        assert len(list(engine.stream([clips["missing"]] * count))) == count


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("ordered", [True, False])
def test_stream_reads_its_input_lazily(bundle: Path, clips: dict[str, Path], workers: int, ordered: bool) -> None:
    taken = []

    def paths() -> Iterator[Path]:
        for i in range(1000):
            taken.append(i)
            yield clips["missing"]

    with Engine(bundle, workers=workers) as engine:
        scores = engine.stream(paths(), ordered=ordered)
        assert taken == [], "nothing is read before the first score is asked for"
        for given in range(1, 6):
            next(scores)
            # The workers' own, and one that waits.
            assert len(taken) <= given + workers + 1
        scores.close()
    assert len(taken) < 10


def test_closing_a_stream_early_ends_its_threads(bundle: Path, clips: dict[str, Path]) -> None:
    with Engine(bundle, workers=2) as engine:
        scores = engine.stream([clips["face"]] * 50)
        assert next(scores).status == "ok"
        scores.close()
        assert not [t for t in threading.enumerate() if t.name.startswith("dfengine")]
        assert engine.score(clips["face"]).status == "ok", "the engine itself goes on"


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_of_the_input_reaches_the_caller(bundle: Path, clips: dict[str, Path], workers: int) -> None:
    def paths() -> Iterator[Path]:
        yield clips["missing"]
        raise LookupError("the list ends here")

    with Engine(bundle, workers=workers) as engine, pytest.raises(LookupError, match="the list ends here"):
        list(engine.stream(paths()))
    assert not [t for t in threading.enumerate() if t.name.startswith("dfengine")]


def test_ordered_gives_the_order_of_the_input_when_the_first_is_the_slowest(
    bundle: Path, clips: dict[str, Path]
) -> None:
    paths = [clips["two"], *[clips["missing"]] * 6, clips["face"]]
    with Engine(bundle, workers=2) as engine:
        assert [s.path for s in engine.stream(paths, ordered=True)] == [str(p) for p in paths]


def test_videos_share_the_cores(bundle: Path, clips: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of several videos in work asks for its share of the cores, in every stage, and a single one for all."""
    asked: set[tuple[str, int]] = set()

    def spy(target: str, name: str) -> None:
        module = importlib.import_module(target)
        real = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *args, **options: asked.add((name, options["threads"])) or real(*args, **options)
        )

    spy("dfengine.scoring", "open_video")
    spy("dfengine.scoring", "crop_tracks")
    spy("dfengine.stages.detect", "crop_resize")
    spy("dfengine.stages.detect", "pyramid")
    names = ("open_video", "crop_tracks", "crop_resize", "pyramid")
    with Engine(bundle, workers=4, threads=8) as engine:
        list(engine.stream([clips["face"]]))
        assert asked == {(name, 2) for name in names}
        asked.clear()
        engine.score(clips["face"])
        assert asked == {(name, 8) for name in names}


# -- what goes wrong inside --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("owner", "method", "stage"), [(Detector, "detect", "detect"), (Linker, "link", "track"), (Bundle, "member", None)]
)
def test_an_unexpected_exception_costs_one_video(
    bundle: Path, clips: dict[str, Path], monkeypatch, caplog, owner: type, method: str, stage: str | None, workers: int
) -> None:
    with Engine(bundle, workers=workers) as engine:

        def fail(*args: object, **kwargs: object) -> None:
            raise ZeroDivisionError("a defect")

        monkeypatch.setattr(owner, method, fail)
        scores = list(engine.stream([clips["face"], clips["missing"]], ordered=True))
    if stage is None:  # not on the main path: networks are looked up once, when the engine is made
        assert scores[0].status == "ok"
        return
    assert [s.status for s in scores] == ["error", "error"]
    error = scores[0].error
    assert error is not None
    assert (error.type, error.stage) == ("ZeroDivisionError", stage)
    assert "unexpected: a defect" in error.message
    assert scores[0].frames_decoded > 0, "a failed row tells how far it got"
    assert [r.levelno for r in caplog.records] == [logging.ERROR]
    assert caplog.records[0].exc_info is not None, "the traceback is in the log"


def test_running_out_of_memory_is_a_row(bundle: Path, clips: dict[str, Path], monkeypatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise MemoryError

    with Engine(bundle) as engine:
        monkeypatch.setattr(Detector, "detect", fail)
        score = engine.score(clips["face"])
    assert score.error is not None
    assert (score.error.type, score.error.stage) == ("MemoryError", "detect")
    assert "lower memory_bytes or workers" in score.error.message


def test_interruption_is_not_swallowed(bundle: Path, clips: dict[str, Path], monkeypatch) -> None:
    def interrupt(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    with Engine(bundle, workers=1) as engine:
        monkeypatch.setattr(Detector, "detect", interrupt)
        with pytest.raises(KeyboardInterrupt):
            engine.score(clips["face"])


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "policy", "mode"),
    [
        ({}, SEVEN, "reference"),
        ({"frames": 5}, "uniform:5", "reference"),
        ({"frames": "5"}, "uniform:5", "reference"),
        ({"frames": "every:10:3", "mode": "exact"}, "every:10:3", "exact"),
        ({"mode": "reference"}, SEVEN, "reference"),
    ],
)
def test_options_override_the_bundle(bundle: Path, options: dict[str, object], policy: str, mode: str) -> None:
    with Engine(bundle, **options) as engine:
        assert engine.plan.sampling == Sampling.parse(policy, mode)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frames": 0}, "sampling policy '0' is not understood; write uniform:N"),
        ({"frames": -1}, "sampling policy '-1' is not understood"),
        ({"frames": ""}, "sampling policy '' is not understood"),
        ({"frames": "all"}, "sampling policy 'all' is not understood"),
        ({"mode": "fast"}, "sampling mode must be exact, reference or keyframe; got 'fast'"),
        ({"mode": ""}, "sampling mode must be exact, reference or keyframe; got ''"),
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"threads": -2}, "threads must be at least 1, got -2"),
        ({"device": "tpu"}, "device must be one of auto, cpu, cuda; got 'tpu'"),
        ({"device": ""}, "device must be one of auto, cpu, cuda; got ''"),
    ],
)
def test_bad_options_are_refused(bundle: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        Engine(bundle, **options)
    assert message in str(caught.value)


def test_a_detector_is_no_bundle_to_score_with() -> None:
    with pytest.raises(BundleError, match="'mtcnn' has no member that scores; it is a detector"):
        Engine("mtcnn")


@pytest.mark.parametrize("members", [(), ("typo",), ("mean", "typo"), ("pnet",)])
def test_a_plan_of_unknown_members_is_refused(engine: Engine, clips: dict[str, Path], members: tuple[str, ...]) -> None:
    with pytest.raises(OptionError, match=r"the plan's members are \[.*\]; give one or more .* that score: mean"):
        engine.score(clips["face"], plan=Plan(Sampling.parse(SEVEN), members))


def test_cuda_cannot_be_had(bundle: Path) -> None:
    with pytest.raises(DeviceError, match=r"device 'cuda' cannot be had: .*; or use --device cpu"):
        Engine(bundle, device="cuda")


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_cpu_can(bundle: Path, device: str) -> None:
    with Engine(bundle, device=device) as engine:
        assert engine.device == "cpu"


def test_reference_mode_decodes_fewer_frames_and_scores_as_many(bundle: Path, clips: dict[str, Path]) -> None:
    scores = {}
    for mode in ("exact", "reference"):
        with Engine(bundle, mode=mode) as engine:
            scores[mode] = engine.score(clips["face"])
    assert scores["reference"].frames_decoded < scores["exact"].frames_decoded
    assert scores["reference"].frames_scored == scores["exact"].frames_scored == 7
    # Other frames of the same slow drift.
    assert scores["reference"].p_fake == pytest.approx(scores["exact"].p_fake, abs=0.02)


def test_frames_chooses_how_many(bundle: Path, clips: dict[str, Path]) -> None:
    for frames, scored in ((5, 5), (1, 1), ("every:12", 3), ("first:4:2", 2)):
        with Engine(bundle, frames=frames, mode="exact") as engine:
            assert engine.score(clips["face"]).frames_scored == scored


def test_a_plan_changes_what_one_video_gets(
    engine: Engine, clips: dict[str, Path], alone: dict[str, VideoScore]
) -> None:
    stages: list[str] = []
    assert engine.plan == Plan(Sampling.parse(SEVEN), ("mean",))
    less = engine.score(
        clips["face"], plan=Plan(Sampling.parse("uniform:2", "keyframe"), ("mean",)), on_stage=stages.append
    )
    assert (less.sampling, less.mode, less.frames_scored, list(less.members)) == ("uniform:2", "keyframe", 2, ["mean"])
    assert [s for s in dict.fromkeys(stages) if s] == ["decode", "detect", "track", "backbone", "crop", "aggregate"]
    assert stages[-1] == ""
    assert (alone["face"].sampling, alone["face"].mode) == (SEVEN, "reference")
    assert alone["face"].bundle_digest == engine.bundle.digest != ""
    assert alone["face"].detector_digest == Bundle.load("mtcnn").digest
    assert alone["face"].dfengine_version == dfengine.__version__
    assert_same(engine.score(clips["face"]), alone["face"], tolerance=TOLERANCE["backbone", "float32"])


def test_a_plan_says_the_mode_for_the_detector_too(bundle: Path, clips: dict[str, Path]) -> None:
    """A plan gives what an engine made for it gives."""
    with Engine(bundle, mode="exact") as exact, Engine(bundle, mode="reference") as reference:
        assert_same(
            reference.score(clips["two"], plan=exact.plan),
            exact.score(clips["two"]),
            tolerance=TOLERANCE["backbone", "float32"],
        )


def test_one_shot(bundle: Path, clips: dict[str, Path], alone: dict[str, VideoScore]) -> None:
    score = dfengine.score(clips["face"], bundle=bundle)
    assert_same(score, alone["face"], tolerance=TOLERANCE["backbone", "float32"])
    score = dfengine.score(str(clips["face"]), bundle=str(bundle), device="cpu", frames=3, mode="exact", threads=1)
    assert score.frames_scored == 3
    assert dfengine.score(clips["missing"], bundle=Bundle.load(bundle)).status == "error"
    with pytest.raises(BundleNotFound, match=r"there is no such bundle; give a folder with a bundle\.json"):
        dfengine.score(clips["face"], bundle=clips["missing"].parent / "no_bundle")
    with pytest.raises(OptionError, match="threads must be at least 1"):
        dfengine.score(clips["face"], bundle=bundle, threads=0)


def test_one_shot_takes_the_options_that_concern_one_video() -> None:
    """With their names, types and defaults, so that help() and type checkers tell what can be asked for."""
    of_engine = dict(inspect.signature(Engine).parameters)
    del of_engine["workers"]
    of_score = dict(inspect.signature(dfengine.score).parameters)
    del of_score["path"]
    assert list(of_score) == list(of_engine)
    for name, parameter in of_score.items():
        assert parameter.kind is inspect.Parameter.KEYWORD_ONLY
        assert (parameter.annotation, parameter.default) == (of_engine[name].annotation, of_engine[name].default)
        assert f"``{name}``: " in (dfengine.score.__doc__ or "")


def test_a_score_pickles_compares_and_prints_in_a_line(alone: dict[str, VideoScore], clips: dict[str, Path]) -> None:
    for score in alone.values():
        again = pickle.loads(pickle.dumps(score))
        assert again == score
        assert again != dataclasses.replace(score, timings=score.timings | {"decode": 99.0})
        assert again != dataclasses.replace(score, members={"other": 0.5})
        assert len(repr(score)) < 300 + len(score.path)
    p_fake = f"{alone['two'].p_fake:.4f}"
    assert repr(alone["two"]).startswith(f"VideoScore(path={str(clips['two'])!r}, status='ok', p_fake={p_fake}, ")
    assert "tracks=<2>, " in repr(alone["two"])
    assert "error=ErrorInfo(type='SourceNotFound', stage='open', " in repr(alone["missing"])


def test_a_closed_engine_may_be_closed_again(bundle: Path) -> None:
    with Engine(bundle) as engine:
        engine.close()
    engine.close()
    with pytest.raises(RuntimeError, match="the engine is closed; make a new one"):
        engine.score("any.mp4")


def test_nothing_is_taken_of_a_gpu_on_the_cpu(engine: Engine) -> None:
    assert engine.gpu_memory_mib == 0


# -- sessions: a row's result does not depend on the batch it is in ----------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("rows", [0, 1, 2, 5, 33])
def test_batch_composition_does_not_change_rows(
    bundle: Path, rng: np.random.Generator, rows: int, threads: int
) -> None:
    session = CpuDevice().session(Bundle.load(bundle), "mean", threads=threads)
    batch = rng.normal(size=(rows, 3, 32, 32)).astype(np.float32)
    (together,) = session.run(batch)
    assert together.shape == (rows, 1)
    one_by_one = [session.run(batch[i : i + 1])[0][0, 0] for i in range(rows)]
    assert together[:, 0] == pytest.approx(np.array(one_by_one), abs=TOLERANCE["backbone", "float32"])
    assert together[:, 0] == pytest.approx(batch.mean(axis=(1, 2, 3)), abs=TOLERANCE["backbone", "float32"])


def test_a_session_serves_more_callers_than_it_has_streams(bundle: Path, rng: np.random.Generator) -> None:
    session = CpuDevice().session(Bundle.load(bundle), "mean", threads=2)
    batches = [rng.normal(size=(1 + i % 5, 3, 32, 32)).astype(np.float32) for i in range(24)]
    results: dict[int, np.ndarray] = {}

    def work(start: int) -> None:
        for i in range(start, len(batches), 6):
            results[i] = session.run(batches[i])[0]

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for i, batch in enumerate(batches):
        assert results[i][:, 0] == pytest.approx(batch.mean(axis=(1, 2, 3)), abs=TOLERANCE["backbone", "float32"])


# -- real clips --------------------------------------------------------------------------------------------------------


def test_real_clip_scores_the_same_alone_in_a_stream_and_in_parts(bundle: Path, data_dir: Path) -> None:
    path = data_dir / "clips" / "004.mp4"
    make: list[Callable[[], Engine]] = [
        lambda: Engine(bundle, frames=4, workers=2),
        lambda: Engine(bundle, frames=4, workers=1, memory_bytes=1),
    ]
    scores = []
    for open_engine in make:
        with open_engine() as engine:
            scores += [engine.score(path), *engine.stream([path])]
    assert scores[0].status == "ok"
    for score in scores[1:]:
        assert_same(score, scores[0], tolerance=TOLERANCE["backbone", "float32"])


def test_assets_hold_what_the_tests_say() -> None:
    assert FACE.wh[0] * FACE.wh[1] * 3 // 2 == FRAME_BYTES
    assert len({FACE.picture(i, *FACE.wh).tobytes() for i in range(12)}) == 12
    assert B_PYRAMID.picture(0, 64, 64).tobytes() != B_PYRAMID.picture(1, 64, 64).tobytes()


def test_one_path_is_no_stream(engine: Engine, clips: dict[str, Path]) -> None:
    for path in (clips["face"], str(clips["face"])):
        with pytest.raises(
            TypeError, match=r"paths must be several paths, got the one path .*; write stream\(\[path\]\)"
        ):
            engine.stream(path)  # type: ignore[arg-type]


def test_bytes_are_no_path(engine: Engine, clips: dict[str, Path]) -> None:
    with pytest.raises(TypeError, match=r"a path must be text, got b'.*'; os.fsdecode\(path\) makes text of it"):
        engine.score(os.fsencode(clips["face"]))  # type: ignore[arg-type]


_FORKED = """
import os, sys, warnings
warnings.simplefilter("ignore")  # of Python 3.12, for processes with threads
import dfengine
engine = dfengine.Engine(sys.argv[2], threads=1)
assert engine.score(sys.argv[1]).status == "ok"
if os.fork() == 0:
    try:
        engine.score(sys.argv[1])
    except RuntimeError as error:
        print(error, flush=True)
    os._exit(0)
os.wait()
assert engine.score(sys.argv[1]).status == "ok"
"""


def test_an_engine_does_not_hang_after_a_fork(bundle: Path, clips: dict[str, Path]) -> None:
    command = [sys.executable, "-c", _FORKED, str(clips["face"]), str(bundle)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.startswith("the engine was made before this process was forked from another; make one in each")
