"""The loop: that it learns, that a killed run goes on as if nothing had been, and what several processes do."""

from __future__ import annotations

import contextlib
import csv
import json
import math
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")  # the `train` extra

import torch
from safetensors.torch import load_file
from training_assets import write_faces

from dfengine.bundle import Calibration
from dfengine.errors import DfengineError
from training import checkpoint, evaluate, metrics, scoring, train
from training.checkpoint import load_checkpoint, save_checkpoint
from training.errors import CheckpointError, TrainingError
from training.models import LstmSettings, ModelSettings, make_network
from training.optimise import TrainSettings, cosine_factor, label_loss, make_optimiser, mask_loss, order_loss
from training.table import FaceTable

ROOT = Path(__file__).parents[1]

RECIPE = """
[data]
workers = 0
[model]
backbone = "face_net"
input_hw = [32, 32]
head = ["dropout:0.1"]
[train]
epochs = 3
batch = 8
lr = 2e-3
ema_decay = 0.9
"""


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_faces(tmp_path_factory.mktemp("faces"), sources={"train": 12, "val": 4, "test": 4})


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(RECIPE)
    return path


def run(recipe: Path, faces: Path, out: Path, *changes: str, resume: bool = False) -> list[dict[str, float]]:
    """Trains, and returns metrics.csv."""
    sets = [x for change in changes for x in ("--set", change)]
    train.main([str(recipe), "--faces", str(faces), "--out", str(out), *sets, *(["--resume"] if resume else [])])
    return history(out)


def history(out: Path) -> list[dict[str, float]]:
    with open(out / "metrics.csv", newline="") as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def assert_same_run(a: Path, b: Path) -> None:
    assert (a / "metrics.csv").read_bytes() == (b / "metrics.csv").read_bytes()
    for name in (train.BEST, train.LAST):
        ours, theirs = load_file(a / name), load_file(b / name)
        assert ours.keys() == theirs.keys()
        for key in ours:
            torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=0)


# -- it learns ---------------------------------------------------------------------------------------------------------


def test_a_planted_trace_is_found_on_people_never_seen(tmp_path: Path, recipe: Path) -> None:
    # 200 videos: 100 people, each with a fake. What tells them apart is a darker mouth.
    faces = write_faces(tmp_path / "faces", sources={"train": 60, "val": 20, "test": 20})
    rows = run(recipe, faces, tmp_path / "run", "train.epochs=8", "train.batch=20", "model.head=[]")
    assert rows[-1]["auc"] > 0.95
    report = evaluate.evaluate([tmp_path / "run" / train.BEST], faces, tmp_path / "evaluation")
    measured = report["by_dataset"]["made"]
    assert (measured["real"], measured["fake"]) == (20, 20)
    assert measured["auc"] > 0.95
    assert measured["pair_accuracy"] > 0.95
    assert measured["log_loss"] < 0.4, "calibrated on other people"


def test_every_run_folder_has_its_files(recipe: Path, faces: Path, tmp_path: Path) -> None:
    rows = run(recipe, faces, tmp_path / "run", "train.epochs=2")
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        "recipe.json", "metrics.csv", "curves.png", train.LAST, train.BEST,
    }  # fmt: skip
    assert [row["epoch"] for row in rows] == [1, 2]
    assert {"loss", "log_loss", "accuracy", "auc", "val_log_loss", "val_accuracy", "val_auc", "lr"} < set(rows[0])
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["model"]["input_hw"] == [32, 32]
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_best_checkpoint_has_the_lowest_log_loss(recipe: Path, faces: Path, tmp_path: Path) -> None:
    # A rate that is far too high in the later epochs: what comes last is not best.
    rows = run(recipe, faces, tmp_path / "run", "train.epochs=5", "train.lr=0.02", "train.ema_decay=0")
    best = min(rows, key=lambda row: row["val_log_loss"])
    _, state = load_checkpoint(tmp_path / "run" / train.BEST)
    assert state["epochs"] == best["epoch"]
    assert state["validation"]["val_log_loss"] == pytest.approx(best["val_log_loss"])


def test_early_stop(recipe: Path, faces: Path, tmp_path: Path) -> None:
    # Nothing is learned at this rate, so that no epoch is better than the first by more than chance; 2 are waited for.
    rows = run(
        recipe, faces, tmp_path / "run", "train.epochs=30", "train.early_stop=2", "train.lr=1e-12",
        "train.optimizer=sgd", "train.ema_decay=0", "model.frozen=true",
    )  # fmt: skip
    best = int(np.argmin([row["val_log_loss"] for row in rows]))
    assert len(rows) == best + 3 < 30


# -- a run that goes on ------------------------------------------------------------------------------------------------

WAYS = {
    "adamw, cosine, average": ("train.schedule=cosine", "train.warm_up=0.2"),
    "sgd, onecycle, clipped": ("train.optimizer=sgd", "train.schedule=onecycle", "train.clip_norm=1.0"),
    "adam, plateau": (
        "train.optimizer=adam",
        "train.schedule=plateau",
        "train.plateau_patience=0",
        "train.label_smoothing=0.1",
    ),
    "bfloat16": ("train.amp=bf16",),
    "float16, scaled": ("train.amp=fp16", "train.clip_norm=1.0"),
    "pseudo-fakes, mask and order": (
        "fakes.ratio=1",
        "model.mask_head=true",
        "train.mask_weight=1",
        "train.order_weight=1",
        "augment.flip=0.5",
    ),
    "mixed": ("augment.mixup=0.5", "augment.cutmix=0.5", "data.per_video=0"),
}


class Stop(Exception):
    pass


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_run_stopped_anywhere_ends_with_the_same_numbers(
    recipe: Path, faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: tuple[str, ...]
) -> None:
    changes = (*way, "train.checkpoint_steps=2", "train.epochs=2")
    run(recipe, faces, tmp_path / "whole", *changes)
    step, save = train.Trainer.step, train.Trainer.save

    def stop_after(steps: int) -> None:
        taken = 0

        def counted(self: train.Trainer, batch: object) -> float:
            nonlocal taken
            taken += 1
            if taken > steps:
                raise Stop
            return step(self, batch)

        monkeypatch.setattr(train.Trainer, "step", counted)

    for steps in (1, 3, 2):  # before the first checkpoint, between two, and in the second epoch
        stop_after(steps)
        with contextlib.suppress(Stop):
            run(recipe, faces, tmp_path / "broken", *changes, resume=True)
    monkeypatch.setattr(train.Trainer, "step", step)

    def stopped(self: train.Trainer, path: Path) -> None:
        if self.done.step == 0:  # between the two files that an epoch ends with
            raise Stop
        save(self, path)

    monkeypatch.setattr(train.Trainer, "save", stopped)
    with pytest.raises(Stop):
        run(recipe, faces, tmp_path / "broken", *changes, resume=True)
    monkeypatch.setattr(train.Trainer, "save", save)
    run(recipe, faces, tmp_path / "broken", *changes, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


def test_a_run_goes_on_with_what_does_not_change_its_numbers(
    recipe: Path, faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(recipe, faces, tmp_path / "whole", "train.epochs=2")
    step = train.Trainer.step

    def stop_in_the_second_epoch(self: train.Trainer, batch: object) -> float:
        if self.done.epoch == 1 and self.done.step == 2:
            raise Stop
        return step(self, batch)

    monkeypatch.setattr(train.Trainer, "step", stop_in_the_second_epoch)
    with pytest.raises(Stop):
        run(recipe, faces, tmp_path / "broken", "train.epochs=2", "train.checkpoint_steps=1")
    monkeypatch.setattr(train.Trainer, "step", step)
    with pytest.raises(SystemExit, match=r"the run began with train\.lr = 0\.002, the recipe says 0\.1"):
        run(recipe, faces, tmp_path / "broken", "train.epochs=2", "train.lr=0.1", resume=True)
    run(recipe, faces, tmp_path / "broken", "train.epochs=2", "data.workers=2", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


def test_kill_9_and_resume(recipe: Path, faces: Path, tmp_path: Path) -> None:
    changes = ["--set", "train.checkpoint_steps=1", "--set", "train.epochs=4"]
    command = [sys.executable, "-m", "training.train", str(recipe), "--faces", str(faces), *changes, "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    run(recipe, faces, tmp_path / "whole", "train.checkpoint_steps=1", "train.epochs=4")
    out, rng = tmp_path / "killed", np.random.default_rng(0)
    kills = 0
    for _ in range(3):
        child = subprocess.Popen(
            [*command, "--out", str(out), "--resume"], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL
        )
        before = (out / train.LAST).stat().st_mtime_ns if (out / train.LAST).exists() else None
        limit = time.monotonic() + 120
        while child.poll() is None and time.monotonic() < limit:  # until it has got further than the last one
            if (out / train.LAST).exists() and (out / train.LAST).stat().st_mtime_ns != before:
                time.sleep(float(rng.uniform(0, 0.2)))
                break
            time.sleep(0.005)
        if child.poll() is None:
            child.send_signal(signal.SIGKILL)
            kills += 1
        child.wait()
    assert kills >= 2
    run(recipe, faces, out, "train.checkpoint_steps=1", "train.epochs=4", resume=True)
    assert history(out) == history(tmp_path / "whole")
    assert_same_run(tmp_path / "whole", out)


def test_a_finished_run_stays_as_it_is(recipe: Path, faces: Path, tmp_path: Path) -> None:
    run(recipe, faces, tmp_path / "run", "train.epochs=1")
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    run(recipe, faces, tmp_path / "run", "train.epochs=1", resume=True)
    assert {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()} == before


# -- several processes -------------------------------------------------------------------------------------------------


def test_two_processes_see_what_one_sees(faces: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "plain.toml"  # no batch statistics, no dropout
    recipe.write_text(
        '[data]\nworkers = 0\n[model]\nbackbone = "conv_pool"\ninput_hw = [16, 16]\nhead = ["linear:8", "relu"]\n'
        "[train]\nepochs = 3\nbatch = 8\nlr = 1e-3\nclip_norm = 1.0\norder_weight = 0.0\n"
    )
    arguments = [str(recipe), "--faces", str(faces), "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    train.main([*arguments, "--out", str(tmp_path / "one")])
    run = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            "-m", "training.train", *arguments, "--out", str(tmp_path / "two"),
        ],
        cwd=ROOT, env=environment, check=True, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.stdout.count("epoch 3 ") == 1  # one process reports
    one, two = history(tmp_path / "one"), history(tmp_path / "two")
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, abs=1e-4)
    ours, theirs = (load_file(tmp_path / name / train.BEST) for name in ("one", "two"))
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=1e-4)


def test_what_several_processes_validate_is_what_is_saved(faces: Path, tmp_path: Path) -> None:
    """Batch statistics are each process's own until they share them."""
    recipe = tmp_path / "norm.toml"
    recipe.write_text(
        '[data]\nworkers = 0\n[model]\nbackbone = "conv_pool"\ninput_hw = [16, 16]\nhead = ["norm"]\n'
        "[train]\nepochs = 1\nbatch = 8\nlr = 1e-3\nema_decay = 0.5\n"
    )
    subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            "-m", "training.train", str(recipe), "--faces", str(faces), "--out", str(tmp_path / "two"),
            "--device", "cpu",
        ],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, capture_output=True, timeout=300,
    )  # fmt: skip
    trained = scoring.load_trained(tmp_path / "two" / train.BEST)
    table = FaceTable.load(faces)
    found = scoring.predict(trained.network, scoring.make_evaluation_batches(table, trained, "val").epoch(0))
    bundle = scoring.make_bundle([trained], [trained.spec])
    scored = scoring.score_videos(table.split("val").faces, {"norm": found}, bundle)
    (row,) = history(tmp_path / "two")
    assert row["val_log_loss"] == pytest.approx(
        metrics.log_loss(scored.label, scored.logits.p_fake(Calibration())), abs=1e-6
    )


# -- the parts ---------------------------------------------------------------------------------------------------------


def test_the_cosine() -> None:
    assert cosine_factor(0.0, 0.1, 0.0) < 0.02
    assert cosine_factor(0.1, 0.1, 0.0) == 1.0
    assert cosine_factor(0.55, 0.1, 0.0) == pytest.approx(0.5)
    assert cosine_factor(1.0, 0.1, 0.2) == pytest.approx(0.2)
    assert cosine_factor(0.0, 0.0, 0.2) == 1.0


@pytest.mark.parametrize("schedule", ["constant", "cosine", "onecycle", "plateau"])
def test_a_schedule_as_it_is_used(schedule: str) -> None:
    settings = TrainSettings(schedule=schedule, lr=1.0, optimizer="sgd", plateau_patience=1, min_lr=0.01)
    optimiser = make_optimiser(torch.nn.Linear(1, 1), settings)
    made = train.Schedule(optimiser, settings, 20)
    rates = []
    for _ in range(4):
        for _ in range(5):
            rates.append(optimiser.param_groups[0]["lr"])
            optimiser.step()
            made.after_step()
        made.after_epoch(1.0)
    json.dumps(made.state_dict())
    if schedule == "constant":
        assert set(rates) == {1.0}
    elif schedule == "cosine":
        assert rates[0] == 1.0
        assert rates == sorted(rates, reverse=True)
        assert optimiser.param_groups[0]["lr"] == pytest.approx(0.01)
    elif schedule == "onecycle":
        assert max(rates) == pytest.approx(1.0, abs=0.02)
        assert 3 <= int(np.argmax(rates)) <= 7
    else:
        assert rates[-1] == 0.5  # no epoch was better than the first; one is forgiven


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_label_loss_against_its_definition(smoothing: float) -> None:
    logits, y = torch.tensor([-2.0, 0.5, 3.0]), torch.tensor([0.0, 0.3, 1.0])
    wanted = []
    for z, t in zip(logits.tolist(), y.tolist(), strict=True):
        p, t = 1 / (1 + math.exp(-z)), t * (1 - smoothing) + smoothing / 2
        wanted.append(-t * math.log(p) - (1 - t) * math.log(1 - p))
    assert label_loss(logits, y, smoothing).tolist() == pytest.approx(wanted, rel=1e-5)


def test_mask_loss_leaves_out_what_nobody_knows() -> None:
    mask = torch.tensor([[0.0, 1.0], [0.5, 0.5], [float("nan")] * 2])[:, None, :, None]
    losses = mask_loss(torch.zeros(3, 1, 2, 1), mask)
    assert losses.tolist() == pytest.approx([math.log(2), math.log(2), 0.0])


def test_order_loss_against_a_loop() -> None:
    logits, y = torch.tensor([0.3, -1.0, 2.0, 0.7, 1.0]), torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0])
    source = ["a", "a", "b", "b", "b"]
    pairs = [(0, 1), (3, 2), (3, 4)]
    wanted = np.mean([math.log1p(math.exp(float(logits[r] - logits[f]))) for r, f in pairs])
    assert float(order_loss(logits, y, source)) == pytest.approx(wanted, rel=1e-6)
    assert float(order_loss(logits, torch.zeros(5), source)) == 0.0


def test_class_weights_move_the_loss(recipe: Path, faces: Path, tmp_path: Path) -> None:
    rows = run(recipe, faces, tmp_path / "run", "data.balance=weights", "train.epochs=1")
    assert np.isfinite(rows[0]["loss"])


# -- checkpoints -------------------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_former_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "last.safetensors"
    save_checkpoint(path, {"x": torch.arange(4.0)}, {"step": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # what a disk with 100 kB left does
        with pytest.raises(
            CheckpointError,
            match=r"last\.safetensors: could not be written \(.*, 4\.0 MB\); the former one is kept; make room",
        ):
            save_checkpoint(path, {"x": torch.zeros(1_000_000)}, {"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    tensors, state = load_checkpoint(path)
    assert state == {"step": 1}
    assert tensors["x"].tolist() == [0, 1, 2, 3]
    assert [p.name for p in tmp_path.iterdir()] == ["last.safetensors"]


def test_a_folder_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"could not be written \(No such file .*; there is no former one"):
        save_checkpoint(tmp_path / "gone" / "last.safetensors", {"x": torch.zeros(1)}, {})


def test_tensors_without_a_state(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    for header in (None, {"dfengine": "[]"}, {"dfengine": "null"}, {"dfengine": "[" * 100_000}):
        save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors", header)
        with pytest.raises(CheckpointError, match=r"x\.safetensors: these are tensors without the state of a run"):
            load_checkpoint(tmp_path / "x.safetensors")


def test_a_pickle_in_the_place_of_a_checkpoint_is_refused_and_not_run(
    recipe: Path, faces: Path, tmp_path: Path
) -> None:
    class Bomb:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "exploded"),)

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / train.LAST).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(SystemExit, match=r"error: .*last\.safetensors: this is no safetensors file"):
        run(recipe, faces, tmp_path / "run", resume=True)
    with pytest.raises(CheckpointError, match="this is no safetensors file"):
        scoring.load_trained(tmp_path / "run" / train.LAST)
    assert not (tmp_path / "exploded").exists()


def test_a_checkpoint_of_another_network(tmp_path: Path) -> None:
    network = make_network(ModelSettings(), 0)
    with pytest.raises(
        CheckpointError,
        match=r"x: the checkpoint is of another network than the recipe's 'face_net': '.*' does not fit",
    ):
        scoring.load_weights(network, make_network(ModelSettings(backbone="conv_pool"), 0).state_dict(), Path("x"))
    wider = make_network(ModelSettings(head=("linear:7",)), 0).state_dict()
    with pytest.raises(CheckpointError, match=r"'head\.\d\.\w+' does not fit; use the recipe that it was trained with"):
        scoring.load_weights(network, wider, Path("x"))


def test_a_checkpoint_of_a_former_version_is_read() -> None:
    settings = ModelSettings(input_hw=(32, 32), lstm=LstmSettings(width=4), clip_frames=2, audio_width=3)
    network, other = make_network(settings, 0), make_network(settings, 1)
    former = {k.replace("audio_head.", "ears."): v.clone() for k, v in network.state_dict().items()}
    assert any(k.startswith("ears.") for k in former)
    scoring.load_weights(other, former, Path("x"))
    for key, value in network.state_dict().items():
        torch.testing.assert_close(other.state_dict()[key], value, rtol=0, atol=0)


# -- errors ------------------------------------------------------------------------------------------------------------


def test_a_run_that_is_there_already(recipe: Path, faces: Path, tmp_path: Path) -> None:
    run(recipe, faces, tmp_path / "run", "train.epochs=1")
    with pytest.raises(SystemExit, match=r"error: .*run: there is a run already; go on with --resume, or give another"):
        run(recipe, faces, tmp_path / "run", "train.epochs=1")
    with pytest.raises(
        SystemExit,
        match=r"last\.safetensors: the run began with train\.epochs = 1, the recipe says 2; go on with the same",
    ):
        run(recipe, faces, tmp_path / "run", "train.epochs=2", resume=True)
    others = write_faces(tmp_path / "others", sources={"train": 12, "val": 5})
    with pytest.raises(
        SystemExit, match=r"last\.safetensors: the run began with other faces \(faces\.parquet has changed"
    ):
        run(recipe, others, tmp_path / "run", "train.epochs=1", resume=True)
    (tmp_path / "run" / train.LAST).write_bytes((tmp_path / "run" / train.BEST).read_bytes())
    with pytest.raises(SystemExit, match=r"last\.safetensors: this is no state of a run to go on from"):
        run(recipe, faces, tmp_path / "run", "train.epochs=1", resume=True)


def test_the_state_of_a_run_is_not_what_is_evaluated(recipe: Path, faces: Path, tmp_path: Path) -> None:
    run(recipe, faces, tmp_path / "run", "train.epochs=1")
    with pytest.raises(CheckpointError, match=r"checkpoint of kind 'last'; give a run's best\.safetensors"):
        scoring.load_trained(tmp_path / "run" / train.LAST)


def test_a_set_of_one_class(recipe: Path, tmp_path: Path) -> None:
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    faces = write_faces(tmp_path / "faces", sources={"train": 8, "val": 2})
    table = pq.read_table(faces / "faces.parquet")
    pq.write_table(table.filter(pc.equal(table["label"], 0)), faces / "faces.parquet")
    with pytest.raises(SystemExit, match=r"training needs both classes, there are 8 real and 0 fake files"):
        run(recipe, faces, tmp_path / "run")


def test_masks_need_pseudo_fakes(recipe: Path, faces: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"train\.mask_weight needs pseudo-fakes, and the batch has none"):
        run(recipe, faces, tmp_path / "run", "model.mask_head=true", "train.mask_weight=1")


def test_a_loss_that_is_no_number(recipe: Path, faces: Path, tmp_path: Path) -> None:
    with pytest.raises(
        SystemExit, match=r"the loss is (nan|inf) at step \d+; lower train\.lr, or set train\.clip_norm"
    ):
        run(recipe, faces, tmp_path / "run", "train.lr=1e30", "train.optimizer=sgd")


def test_a_member_that_is_not_there(recipe: Path, faces: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"tiny\.toml: there is no member 'x', only tiny"):
        train.main([str(recipe), "--faces", str(faces), "--out", str(tmp_path / "run"), "--member", "x"])


def test_what_is_raised_is_typed() -> None:
    for error in (CheckpointError, TrainingError):
        assert issubclass(error, DfengineError)
        assert issubclass(error, ValueError)
    assert checkpoint.KEY == "dfengine"
