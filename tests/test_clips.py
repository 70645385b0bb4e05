"""Clip and audio members: how tracks become clips, and what reaches the network. Networks are a few nodes, made here.

logit = sum over t of gains[t] * mean(crop t) + 10 * mean(log-mel): it tells which crops came, and in which order.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import os
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from assets import FACE, TWO_FACES, with_sound, write_clip
from conftest import TOLERANCE
from fake_gpu import FakeGpuDevice, crop_resize_cuda

from dfengine import Engine
from dfengine.bundle import SCHEMA_VERSION, AudioSettings, Bundle, CropSpec, ModelSpec, to_json
from dfengine.sampling import Policy
from dfengine.stages.audio import load_log_mel
from dfengine.stages.backbone import Backbone, clip_rows
from dfengine.stages.decode import Video
from dfengine.types import Tracks

HW = (6, 5)
AUDIO = AudioSettings(seconds=1.0)


def make_onnx(clip_frames: int, *, hears: bool, hw: tuple[int, int] = HW) -> bytes:
    from onnx import TensorProto, helper

    inputs = [helper.make_tensor_value_info("crops", TensorProto.FLOAT, ["batch", clip_frames, 3, *hw])]
    gains = [1.0 + t for t in range(clip_frames)]
    nodes = [
        helper.make_node("ReduceMean", ["crops"], ["means"], axes=[2, 3, 4], keepdims=0),
        helper.make_node("Mul", ["means", "gains"], ["scaled"]),
        helper.make_node("ReduceSum", ["scaled", "axis"], ["seen" if hears else "logit"], keepdims=1),
    ]
    tensors = [
        helper.make_tensor("gains", TensorProto.FLOAT, [clip_frames], gains),
        helper.make_tensor("axis", TensorProto.INT64, [1], [1]),
    ]
    if hears:
        inputs.append(helper.make_tensor_value_info("log_mel", TensorProto.FLOAT, ["batch", AUDIO.bands, AUDIO.frames]))
        tensors.append(helper.make_tensor("ten", TensorProto.FLOAT, [], [10.0]))
        nodes += [
            helper.make_node("ReduceMean", ["log_mel"], ["loud"], axes=[1, 2], keepdims=0),
            helper.make_node("Unsqueeze", ["loud", "axis"], ["loud1"]),
            helper.make_node("Mul", ["loud1", "ten"], ["heard"]),
            helper.make_node("Add", ["seen", "heard"], ["logit"]),
        ]
    out = [helper.make_tensor_value_info("logit", TensorProto.FLOAT, ["batch", 1])]
    graph = helper.make_graph(nodes, "clip", inputs, out, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())


def make_bundle(folder: Path, *members: dict, **changes: object) -> Bundle:
    folder.mkdir(parents=True, exist_ok=True)
    specs = []
    for i, change in enumerate(members):
        fields = {
            "name": f"m{i}",
            "file": f"m{i}.onnx",
            "kind": "clip",
            "crop": CropSpec(input_hw=HW),
            "clip_frames": 3,
        } | change
        data = make_onnx(fields["clip_frames"], hears=fields["kind"] == "audio", hw=fields["crop"].input_hw)
        (folder / fields["file"]).write_bytes(data)
        specs.append(ModelSpec(sha256=hashlib.sha256(data).hexdigest(), **fields))
    fields = {"schema_version": SCHEMA_VERSION, "name": "tiny", "licence": "none", "members": tuple(specs)} | changes
    (folder / "bundle.json").write_text(to_json(Bundle(**fields)))
    return Bundle.load(folder)


@pytest.mark.parametrize(
    ("count", "frames", "rows"),
    [
        (0, 3, []),
        (1, 3, [[0, 0, 0]]),
        (2, 3, [[0, 1, 1]]),
        (3, 3, [[0, 1, 2]]),
        (4, 3, [[0, 1, 2], [1, 2, 3]]),
        (6, 3, [[0, 1, 2], [3, 4, 5]]),
        (8, 3, [[0, 1, 2], [3, 4, 5], [5, 6, 7]]),
        (2, 1, [[0], [1]]),
    ],
)
def test_clip_rows(count: int, frames: int, rows: list[list[int]]) -> None:
    got = clip_rows(count, frames)
    assert got.shape == (len(rows), frames)
    assert got.tolist() == rows


def make_tracks(lengths: dict[int, int]) -> Tracks:
    ids = np.concatenate([np.full(n, i, np.int64) for i, n in lengths.items()])
    n = len(ids)
    steps = np.concatenate([np.arange(k) for k in lengths.values()]).astype(np.int64)
    boxes = np.tile(np.float32([0, 0, 9, 9]), (n, 1))
    return Tracks(
        ids, steps, steps * 0.5, boxes, np.zeros((n, 5, 2), np.float32), np.ones(n, np.float32), np.ones(n, bool)
    )


class Cutter:
    """make_crops over fixed pictures, one a row of ``tracks``."""

    def __init__(self, pictures: np.ndarray) -> None:
        self.pictures = pictures

    def __call__(self, crop: CropSpec, part: slice) -> np.ndarray:
        return self.pictures[part]


def expected(tracks: Tracks, means: np.ndarray, frames: int) -> np.ndarray:
    """By clip_rows, a track at a time."""
    logits = np.empty(len(tracks))
    for track in np.unique(tracks.track_id):
        rows = np.flatnonzero(tracks.track_id == track)
        for k, clip in enumerate(clip_rows(len(rows), frames)):
            logits[rows[k * frames : (k + 1) * frames]] = means[rows[clip]] @ np.arange(1, frames + 1)
    return logits


@pytest.mark.parametrize("cuts", [[], [4], [1, 2, 3, 9], list(range(1, 12))], ids=lambda c: f"{len(c) + 1} parts")
def test_a_video_in_any_number_of_parts(tmp_path: Path, rng: np.random.Generator, cuts: list[int]) -> None:
    backbone = Backbone(
        make_bundle(tmp_path, {}, {"clip_frames": 5, "crop": CropSpec(input_hw=HW, margin_ratio=0.3)}), threads=2
    )
    tracks = make_tracks({4: 11, 7: 2, 9: 12})
    pictures = rng.normal(size=(len(tracks), 3, *HW)).astype(np.float32)
    clips = backbone.clips({})
    order = []
    for low, high in zip([0, *cuts], [*cuts, 99], strict=True):
        rows = np.flatnonzero((tracks.frame_index >= low) & (tracks.frame_index < high))
        clips.add(tracks[rows], Cutter(pictures[rows]))
        order.append(rows)
    logits = clips.finish()
    rows = np.concatenate(order)
    assert list(logits) == ["m0", "m1"]
    means = pictures.astype(np.float64).mean(axis=(1, 2, 3))
    for name, frames in (("m0", 3), ("m1", 5)):
        want = expected(tracks, means, frames)[rows]
        np.testing.assert_allclose(logits[name], want, atol=5 * TOLERANCE["backbone", "float32"])


def test_nothing_added(tmp_path: Path) -> None:
    logits = Backbone(make_bundle(tmp_path, {})).clips({}).finish()
    assert logits["m0"].shape == (0,)


def test_little_is_kept_of_a_long_video(tmp_path: Path) -> None:
    clips = Backbone(make_bundle(tmp_path, {})).clips({})
    for _ in range(20):
        clips.add(make_tracks({0: 7}), Cutter(np.zeros((7, 3, *HW), np.float32)))
    ((held, waiting),) = clips._held.values()
    assert len(held) <= 2 * 3
    assert len(waiting) < 3


def test_frame_members_and_clip_members_in_one_bundle(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path, {"kind": "clip"}, {"clip_frames": 2, "kind": "audio", "audio": AUDIO})
    backbone = Backbone(bundle)
    assert backbone.run(3, Cutter(np.zeros((3, 3, *HW), np.float32))) == {}


HEARS = {"kind": "audio", "audio": AUDIO, "crop": CropSpec(input_hw=(32, 32)), "clip_frames": 4}


def test_the_engine_hears(tmp_path: Path) -> None:
    loud = 0.5 * np.sin(np.arange(24000) * 0.3)
    heard = with_sound(write_clip(FACE, tmp_path), loud, tmp_path / "loud.mkv")
    silent = write_clip(TWO_FACES, tmp_path)
    exact = {"sampling": Policy("uniform", 6), "sampling_mode": "exact"}
    bundle = make_bundle(tmp_path / "b", HEARS, HEARS | {"kind": "clip"}, **exact)
    with Engine(bundle, workers=1) as engine:
        a, b = engine.score(heard), engine.score(silent)
    assert (a.status, a.warnings) == ("ok", ())
    assert "audio" in a.timings
    difference = np.log(a.members["m0"] / (1 - a.members["m0"])) - np.log(a.members["m1"] / (1 - a.members["m1"]))
    assert difference == pytest.approx(10 * load_log_mel(heard, AUDIO).log_mel.mean(), abs=1e-3)
    assert b.status == "ok"
    assert b.warnings == ("member 'm0' heard nothing: there is no sound track, or nothing in it",)
    assert b.members["m0"] == pytest.approx(b.members["m1"], abs=1e-6)
    assert len(b.tracks) == 2
    (track,) = a.tracks
    assert len({f.p_fake for f in track.frames}) == 2, "six frames are two clips of four"
    assert track.frames[0].p_fake == track.frames[3].p_fake != track.frames[4].p_fake == track.frames[5].p_fake


def test_a_fault_of_the_machine_while_listening_is_a_row_and_the_video_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[Video] = []
    close = Video.close
    monkeypatch.setattr(Video, "close", lambda self: closed.append(self) or close(self))

    def fail(*args: object) -> None:
        raise av.error.FFmpegError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr("dfengine.stages.audio.open_media", fail)
    with Engine(make_bundle(tmp_path / "bundle", HEARS)) as engine:
        score = engine.score(write_clip(FACE, tmp_path))
    assert score.error is not None
    assert (score.error.type, score.error.stage) == ("SourceNotReadable", "audio")
    assert score.error.message == "the file cannot be read (Too many open files); score it again when it can"
    assert (score.decoder, score.p_fake) == ("pyav", None)
    assert len(closed) == 1


def test_a_plan_may_leave_members_out(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b", HEARS, HEARS | {"kind": "clip"}, sampling=Policy("uniform", 4))
    path = write_clip(TWO_FACES, tmp_path)
    with Engine(bundle, workers=1) as engine:
        score = engine.score(path, plan=dataclasses.replace(engine.plan, members=("m1",)))
    assert (score.status, list(score.members), score.warnings) == ("ok", ["m1"], ())
    assert "audio" not in score.timings, "nobody listens"


def test_chunks_of_a_video_do_not_move_the_score(tmp_path: Path) -> None:
    exact = {"sampling": Policy("uniform", 13), "sampling_mode": "exact"}
    bundle = make_bundle(tmp_path / "b", HEARS | {"kind": "clip"}, **exact)
    path = write_clip(FACE, tmp_path)
    with Engine(bundle, workers=1) as whole, Engine(bundle, workers=1, memory_bytes=3 * 320 * 240 * 3 // 2) as parts:
        a, b = whole.score(path), parts.score(path)
    assert a.p_fake == pytest.approx(b.p_fake, abs=1e-4)
    for f, g in zip(a.tracks[0].frames, b.tracks[0].frames, strict=True):
        assert f.p_fake == pytest.approx(g.p_fake, abs=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_on_a_gpu_clips_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: Any) -> None:
    """Crops of clips wait in main memory; sound comes from there."""
    monkeypatch.setattr("dfengine.stages._kernels.crop_resize_cuda", crop_resize_cuda, raising=False)
    bundle = make_bundle(tmp_path / "b", {"crop": CropSpec(input_hw=(32, 32))}, HEARS)
    rng = np.random.default_rng(0)
    video = with_sound(write_clip(TWO_FACES, tmp_path), rng.normal(0, 0.1, 16000), tmp_path / "sound.mp4")
    with Engine(bundle, device="cpu", frames=10) as engine:
        expected = engine.score(video)
    with Engine(bundle, device=FakeGpuDevice(dtype=dtype), frames=10) as engine:
        score = engine.score(video)
    assert score.status == expected.status == "ok"
    assert score.p_fake == pytest.approx(expected.p_fake, abs=TOLERANCE["p_fake", dtype])
    for name, value in expected.members.items():
        assert score.members[name] == pytest.approx(value, abs=TOLERANCE["p_fake", dtype])
