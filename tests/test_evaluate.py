"""Evaluation by video, calibration, and the bundle that comes of it."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")  # the `train` extra

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
import torch
from assets import FACE, write_clip
from training_assets import write_faces

from dfengine import Engine
from dfengine.bundle import Aggregation, Bundle, Calibration, ModelSpec
from dfengine.stages.aggregate import judge, pool_rows, sigmoid
from dfengine.types import Tracks
from training import evaluate, export, scoring, train
from training.calibration import VideoLogits, fit_calibration
from training.checkpoint import load_checkpoint, save_checkpoint
from training.errors import CheckpointError, ExportError, TrainingError
from training.report import NUMBERS, measure, print_report, read_evaluation, write_report
from training.table import FaceTable

RECIPE = """
[data]
workers = 0
[model]
input_hw = [32, 32]
[train]
epochs = 4
batch = 8
lr = 2e-3
[bundle]
sampling = "uniform:5"
sampling_mode = "exact"
aggregation = { frames = "mean", members = "geometric_mean" }
[members.a]
[members.b]
model.margin_ratio = 0.0
model.weight = 2.0
train.seed = 1
"""


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two datasets, and a video of the test split in which nobody was found."""
    folder = write_faces(tmp_path_factory.mktemp("faces"), sources={"train": 16, "val": 8, "test": 10})
    table = pq.read_table(folder / "faces.parquet")
    rows = table.to_pylist()
    for row in rows:
        row["dataset"] = "even" if int(row["path"].split("_")[0][-3:]) % 2 == 0 else "odd"
    failed = dict.fromkeys(rows[0]) | {
        "path": "lost.mp4", "label": 1, "source_id": "lost", "dataset": "odd", "split": "test",
        "failure": "no face was found",
    }  # fmt: skip
    pq.write_table(pa.Table.from_pylist([*rows, failed], table.schema), folder / "faces.parquet")
    return folder


@pytest.fixture(scope="module")
def checkpoints(faces: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs")
    (folder / "two.toml").write_text(RECIPE)
    train.main([str(folder / "two.toml"), "--faces", str(faces), "--out", str(folder / "run")])
    return [folder / "run" / name / train.BEST for name in ("a", "b")]


@pytest.fixture(scope="module")
def report(checkpoints: list[Path], faces: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("evaluation")
    return evaluate.evaluate(checkpoints, faces, out), out


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(FACE, tmp_path_factory.mktemp("video"))


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_each_dataset_has_its_numbers(report: tuple[dict, Path]) -> None:
    datasets = report[0]["by_dataset"]
    assert list(datasets) == ["even", "odd", "all datasets pooled"]
    assert [d["real"] for d in datasets.values()] == [5, 5, 10]
    assert [d["fake"] for d in datasets.values()] == [5, 5, 10]
    assert [d["not_scored"] for d in datasets.values()] == [0, 1, 1]
    assert report[0]["not_scored"] == {"lost.mp4": "no face was found"}
    for row in datasets.values():
        assert "calibration_error_95" not in row, "resampling moves it to one side"
        for name in set(NUMBERS) - {"calibration_error"}:
            low, high = row[f"{name}_95"]
            assert low <= row[name] <= high, name
        assert row["auc_above_sharpness"] == pytest.approx(row["auc"] - row["sharpness_auc"])
        assert row["threshold"] == 0.5
        assert row["pairs"] == row["fake"], "each fake knows its original"


def test_the_files(report: tuple[dict, Path], capsys: pytest.CaptureFixture[str]) -> None:
    found, out = report
    assert {p.name for p in out.iterdir()} == {"evaluation.json", "predictions.csv", "roc.png", "reliability.png"}
    assert json.loads((out / "evaluation.json").read_text())["by_dataset"].keys() == found["by_dataset"].keys()
    assert len((out / "predictions.csv").read_text().splitlines()) == 1 + 20
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in ("roc.png", "reliability.png"))
    print_report(found)
    assert "log loss" in capsys.readouterr().out


def test_an_evaluation_that_cannot_be_written_leaves_the_former_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    former = tmp_path / "evaluation.json"
    former.write_text("former")

    def fill_the_disk(path: Path, text: str, **options: object) -> None:
        with path.open("w") as file:
            file.write(text[:5])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", fill_the_disk)
    with pytest.raises(OSError, match="No space left"):
        write_report({"split": "test"}, None, Calibration(), tmp_path)  # type: ignore[arg-type] # not come to
    assert former.read_text() == "former"
    assert list(tmp_path.iterdir()) == [former]


def predictions(table: FaceTable, trained: scoring.Trained, split: str) -> scoring.Predictions:
    return scoring.predict(trained.network, scoring.make_evaluation_batches(table, trained, split).epoch(0))


def test_videos_are_judged_as_the_engine_judges(checkpoints: list[Path], faces: Path) -> None:
    table = FaceTable.load(faces)
    trained = [scoring.load_trained(path) for path in checkpoints]
    found = {t.name: predictions(table, t, "test") for t in trained}
    bundle = scoring.make_bundle(trained, [t.spec for t in trained])
    assert bundle.aggregation == Aggregation(frames="mean", members="geometric_mean")
    scored = scoring.score_videos(table.split("test").faces, found, bundle)
    name = scored.video[0]
    rows = sorted(found["a"][name][1])
    assert len(rows) == 3
    by_frame = {m: sigmoid(np.array([found[m][name][1][r][1] for r in rows])).mean() for m in ("a", "b")}
    log_p = (np.log(by_frame["a"]) + 2 * np.log(by_frame["b"])) / 3
    assert scored.logits.p_fake(Calibration())[0] == pytest.approx(np.exp(log_p), abs=1e-6)
    tracks = scoring.make_tracks(table.split("test").faces, np.array(rows))
    verdict = judge(tracks, {m: np.array([found[m][name][1][r][1] for r in rows]) for m in ("a", "b")}, bundle)
    assert verdict.logit == scored.logits.calibrated(bundle.calibration)[0]


def test_networks_that_see_different_fakes_are_not_blended(tmp_path: Path) -> None:
    folder = write_faces(tmp_path / "faces", sources={"train": 8, "val": 4})
    table = pq.read_table(folder / "faces.parquet")
    pq.write_table(table.filter(pa.compute.equal(table["label"], 0)), folder / "faces.parquet")
    (tmp_path / "two.toml").write_text(
        "[data]\nworkers = 0\n[fakes]\nratio = 1.0\n[model]\ninput_hw = [32, 32]\n[train]\nepochs = 1\nbatch = 8\n"
        "[augment]\njpeg = 1.0\n[members.a]\n[members.b]\naugment.jpeg_quality = [50, 30]\n"
        "[members.c]\ntrain.seed = 1\n"
    )
    train.main([str(tmp_path / "two.toml"), "--faces", str(folder), "--out", str(tmp_path / "run")])
    a, b, c = (tmp_path / "run" / name / train.BEST for name in "abc")
    with pytest.raises(TrainingError, match=r"'a' and 'b' make different ones \(their recipes differ in \[fakes\]"):
        evaluate.evaluate([a, b], folder, tmp_path / "out", split="val")
    table = FaceTable.load(folder)
    batches = {p: scoring.make_evaluation_batches(table, scoring.load_trained(p), "val") for p in (a, c)}
    scoring.check_same_pictures(batches)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"kind": "best"}, "its recipe is none of this version"),
        ({"kind": "best", "recipe": 5, "name": "a"}, "its recipe is none of this version"),
        ({"kind": "best", "recipe": {}}, "the network has no name"),
    ],
)
def test_a_header_with_something_else(state: dict, message: str, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "x.safetensors", {"x": torch.zeros(1)}, state)
    with pytest.raises(CheckpointError, match=message):
        scoring.load_trained(tmp_path / "x.safetensors")


def test_the_threshold_is_stated_and_used() -> None:
    scored = make_scored([0.0, 1.0, 1.0, 0.0], [-2.0, 0.2, 2.0, -0.5])
    for threshold, accuracy in ((0.5, 1.0), (0.6, 0.75), (0.1, 0.5)):
        measured = measure(scored, Calibration(), threshold)
        assert (measured["threshold"], measured["accuracy"]) == (threshold, accuracy)


def test_one_class_is_no_auc() -> None:
    measured = measure(make_scored([0.0, 0.0], [-1.0, 1.0]), Calibration())
    assert (measured["auc"], measured["auc_95"], measured["eer"], measured["pair_accuracy"]) == (None, None, None, None)
    assert measured["log_loss"] > 0
    json.dumps(measured, allow_nan=False)


def make_scored(labels: list[float], logits: list[float]) -> scoring.Scored:
    n = len(labels)
    names = [f"v{i}" for i in range(n)]
    scores = one_track_each(np.array(logits))
    return scoring.Scored(names, np.array(labels), names, [None] * n, ["d"] * n, scores, np.arange(float(n)))


def one_track_each(logits: np.ndarray) -> VideoLogits:
    return VideoLogits(list(logits[:, None]), [np.ones(1)] * len(logits), "max")


# -- calibration -------------------------------------------------------------------------------------------------------


def test_calibration_recovers_temperature_and_bias(rng: np.random.Generator) -> None:
    logits = rng.normal(0, 4, 20_000)
    labels = (rng.random(len(logits)) < sigmoid(logits / 2.5 + 0.4)).astype(float)
    fitted = fit_calibration(one_track_each(logits), labels)
    assert fitted.temperature == pytest.approx(2.5, rel=0.05)
    assert fitted.bias == pytest.approx(0.4, abs=0.05)
    # The likelihood with Platt's targets is highest where both its derivatives are 0.
    fakes, reals = labels.sum(), (1 - labels).sum()
    error = sigmoid(logits / fitted.temperature + fitted.bias) - np.where(
        labels == 1, (fakes + 1) / (fakes + 2), 1 / (reals + 2)
    )
    assert abs(error.mean()) < 1e-7
    assert abs((error * logits).mean()) < 1e-7


def test_calibration_stays_finite_where_the_classes_do_not_overlap() -> None:
    logits = one_track_each(np.array([-200.0, -150.0, 90.0, 300.0]))
    fitted = fit_calibration(logits, np.array([0.0, 0.0, 1.0, 1.0]))
    p = logits.p_fake(fitted)[[0, 3]]
    assert 0.05 < p[0] < 0.35  # (1 / (n + 2)) is .25 for two
    assert 0.65 < p[1] < 0.95


def test_calibration_refuses_logits_that_point_the_wrong_way(rng: np.random.Generator) -> None:
    labels = np.repeat([0.0, 1.0], 50)
    with pytest.raises(TrainingError, match="do not rise with the label"):
        fit_calibration(one_track_each(rng.normal(0, 1, 100) - labels), labels)
    with pytest.raises(TrainingError, match=r"calibration needs both classes, there are 3 real and 0 fake videos"):
        fit_calibration(one_track_each(np.zeros(3)), np.zeros(3))


@pytest.mark.parametrize("frames", ["mean", "logit_mean", "median"])
@pytest.mark.parametrize("members", ["mean", "geometric_mean", "logit_mean"])
@pytest.mark.parametrize("tracks", ["max", "mean", "largest"])
def test_training_scores_as_the_engine_does(rng: np.random.Generator, frames: str, members: str, tracks: str) -> None:
    """Videos of one to nine people, calibrated: the engine calibrates each person and then pools."""
    bundle = Bundle(
        schema_version=1,
        name="test",
        licence="MIT",
        members=tuple(ModelSpec(name=n, file=n, sha256="", weight=w) for n, w in (("a", 1), ("b", 3))),
        aggregation=Aggregation(frames=frames, members=members, tracks=tracks),
        calibration=Calibration(temperature=2.5, bias=-0.7),
    )
    pooled, engine = [], []
    for people in (1, 2, 3, 9, 1, 2):
        rows = make_rows(rng, people, frames=3)
        logits = {name: rng.normal(0, 4, 3 * people) for name in ("a", "b")}
        pooled.append(pool_rows(rows, logits, bundle))
        engine.append(judge(rows, logits, bundle).logit)
    videos = VideoLogits([p.blend for p in pooled], [p.sides for p in pooled], tracks)
    assert videos.calibrated(bundle.calibration).tolist() == engine
    assert videos.take(np.array([3, 0])).calibrated(bundle.calibration).tolist() == [engine[3], engine[0]]


@pytest.mark.parametrize("rule", ["max", "mean", "largest"])
def test_what_is_fitted_is_what_the_engine_gives(rng: np.random.Generator, rule: str) -> None:
    """Videos of three people whose labels are drawn from the engine's own scores at a known calibration."""
    tracks, sides = rng.normal(0, 4, (30_000, 3)), rng.uniform(50, 200, (30_000, 3))
    logits = VideoLogits(list(tracks), list(sides), rule)
    labels = (rng.random(len(tracks)) < logits.p_fake(Calibration(temperature=2.5, bias=-0.7))).astype(float)
    fitted = fit_calibration(logits, labels)
    assert fitted.temperature == pytest.approx(2.5, rel=0.05)
    assert fitted.bias == pytest.approx(-0.7, abs=0.05)


def make_rows(rng: np.random.Generator, people: int, frames: int) -> Tracks:
    n = people * frames
    corner, side = rng.uniform(0, 100, (n, 2)), rng.uniform(50, 200, (n, 1))
    return Tracks(
        np.repeat(np.arange(people), frames),
        np.arange(n),
        np.arange(n) / 25,
        np.concatenate([corner, corner + side], axis=1).astype(np.float32),
        np.zeros((n, 5, 2), np.float32),
        np.ones(n, np.float32),
        np.ones(n, np.bool_),
    )


# -- export ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle(
    checkpoints: list[Path],
    faces: Path,
    report: tuple[dict, Path],
    video: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Bundle:
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("export") / "bundle"
    return export.export(checkpoints, out, faces=faces, videos=[video], evaluation=report[1] / "evaluation.json")


def test_a_bundle_of_two(bundle: Bundle, report: tuple[dict, Path], video: Path) -> None:
    assert [m.name for m in bundle.members] == ["a", "b"]
    assert [m.weight for m in bundle.members] == [1.0, 2.0]
    assert [m.crop.margin_ratio for m in bundle.members] == [0.2, 0.0]
    assert (str(bundle.sampling), bundle.sampling_mode, bundle.experimental) == ("uniform:5", "exact", True)
    assert bundle.calibration.temperature == report[0]["calibration"]["temperature"]
    assert bundle.calibration.fitted_on == "validation split: 8 real, 8 fake videos"
    assert {p.name for p in bundle.folder.iterdir()} == {"bundle.json", "a.onnx", "b.onnx"}
    assert [p.name for p in bundle.folder.parent.iterdir()] == ["bundle"], "nothing else is left behind"
    assert bundle.provenance["members"]["a"]["data"]["odd"] == {"real": 8, "fake": 8}
    assert bundle.provenance["held_out"]["split"] == "test"
    with Engine(bundle) as engine:
        score = engine.score(video)
    assert score.status == "ok"
    assert set(score.members) == {"a", "b"}


def test_the_engine_and_the_training_pipeline_agree(
    bundle: Bundle, checkpoints: list[Path], faces: Path, video: Path, tmp_path: Path
) -> None:
    trained = [scoring.load_trained(path) for path in checkpoints]
    assert export.check_engine(trained, bundle, [video], tmp_path) <= 1e-3
    assert export.check_logits(trained[0], bundle, FaceTable.load(faces)) < 1e-4


@pytest.mark.parametrize(
    "change", [{"margin_ratio": 0.5}, {"mean": (0.4, 0.5, 0.5)}, {"resize": "bilinear"}], ids=lambda c: next(iter(c))
)
def test_skew_is_refused(
    bundle: Bundle, checkpoints: list[Path], video: Path, tmp_path: Path, change: dict[str, object]
) -> None:
    """A bundle whose preprocessing is not what the networks were trained with."""
    trained = [scoring.load_trained(path) for path in checkpoints]
    members = tuple(dataclasses.replace(m, crop=dataclasses.replace(m.crop, **change)) for m in bundle.members)
    # The crops move the logit by little in a network this small; what is learned is made louder.
    for t in trained:
        t.network.head[0].weight.mul_(50)
    with pytest.raises(ExportError, match=r"the engine gives p_fake .*, the training pipeline on the same frames"):
        export.check_engine(trained, dataclasses.replace(bundle, members=members), [video], tmp_path)


def test_a_graph_that_disagrees_is_refused(checkpoints: list[Path], faces: Path, bundle: Bundle) -> None:
    trained = scoring.load_trained(checkpoints[0])
    trained.network.head[0].bias += 0.01
    with pytest.raises(
        ExportError, match=r"member 'a': OpenVINO and torch differ by 0\.01 in a logit, allowed is 0\.001"
    ):
        export.check_logits(trained, bundle, FaceTable.load(faces))


def test_what_cannot_be_exported_leaves_nothing(
    checkpoints: list[Path], faces: Path, report: tuple[dict, Path], video: Path, tmp_path: Path
) -> None:
    out = tmp_path / "bundle"
    evaluation = report[1] / "evaluation.json"
    with pytest.raises(TrainingError, match=r"evaluation\.json: the evaluation is of other checkpoints \(a, b\)"):
        export.export(checkpoints[:1], out, faces=faces, videos=[video], evaluation=evaluation)
    with pytest.raises(
        ExportError, match=r"the engine is checked on a video, and these faces are of photos or of videos"
    ):
        export.export(checkpoints, out, faces=faces)
    with pytest.raises(
        ExportError, match=r"gone\.mp4: the engine has no score to compare \(.*\); give a video with a face"
    ):
        export.export(checkpoints, out, faces=faces, videos=[tmp_path / "gone.mp4"])
    with pytest.raises(CheckpointError, match=r"two checkpoints are of one name, got \['a', 'a'\]"):
        export.export([checkpoints[0]] * 2, out, faces=faces, videos=[video])
    with pytest.raises(CheckpointError, match=r"checkpoint of kind 'last'; give a run's best\.safetensors"):
        export.export([checkpoints[0].with_name(train.LAST)], out, faces=faces, videos=[video])
    (tmp_path / "photo").mkdir()
    with pytest.raises(ExportError, match=r"photo: there is something that is no bundle; give another folder"):
        export.export(checkpoints, tmp_path / "photo", faces=faces, videos=[video])
    assert [p.name for p in tmp_path.iterdir()] == ["photo"]


def test_a_bundle_is_there_until_another_takes_its_place(tmp_path: Path) -> None:
    new, out, former = tmp_path / "new", tmp_path / "bundle", tmp_path / "former"
    out.mkdir()
    (out / "bundle.json").write_text("old")
    with pytest.raises(FileNotFoundError):
        export.replace_folder(new, out, former=former)
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]
    new.mkdir()
    export.replace_folder(new, out, former=former)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle", "former"]
    assert list(out.iterdir()) == []


def test_members_of_different_bundles(checkpoints: list[Path], tmp_path: Path) -> None:
    tensors, state = load_checkpoint(checkpoints[1])
    state["recipe"]["bundle"]["sampling"] = "uniform:9"
    save_checkpoint(tmp_path / "other.safetensors", tensors, state)
    trained = [scoring.load_trained(p) for p in (checkpoints[0], tmp_path / "other.safetensors")]
    with pytest.raises(CheckpointError, match=r"the checkpoints 'a' and 'b' have different \[bundle\] tables"):
        scoring.make_bundle(trained, [t.spec for t in trained])


def test_no_evaluation(tmp_path: Path, checkpoints: list[Path]) -> None:
    trained = [scoring.load_trained(p) for p in checkpoints]
    (tmp_path / "e.json").write_text("{}")
    with pytest.raises(TrainingError, match=r"e\.json: this is no evaluation of training\.evaluate"):
        read_evaluation(tmp_path / "e.json", trained)


def test_the_calibration_of_another_evaluation(
    checkpoints: list[Path], faces: Path, report: tuple[dict, Path], tmp_path: Path
) -> None:
    torch.set_num_threads(1)
    given = report[1] / "evaluation.json"
    found = evaluate.evaluate(checkpoints, faces, tmp_path, split="val", calibration=given)
    assert found["calibration"] == report[0]["calibration"]
    assert not found["calibrated_on_the_same_videos"]
