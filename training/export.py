"""Makes a bundle from checkpoints: ``python -m training.export RUN/best.safetensors... --faces DIR --out BUNDLE``.

Writes nothing unless OpenVINO gives the logits of torch on real crops, and unless the whole engine on a video and the
training pipeline on the same frames come to the same score: what a network was trained on is what it will be given.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import hashlib
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.jit import TracerWarning  # type: ignore[attr-defined] # torch documents it and does not export it

from dfengine.bundle import Bundle, Calibration, ModelSpec, to_json
from dfengine.engine import Engine
from dfengine.errors import DfengineError
from dfengine.runtime import CpuDevice

from .data import Batches
from .errors import ExportError
from .faces import ExtractSettings, extract
from .report import read_evaluation
from .scoring import (
    Trained,
    load_trained,
    make_bundle,
    make_evaluation_batches,
    predict,
    score_videos,
)
from .table import FaceTable

OPSET = 17  # the newest that all three runtimes read
MAX_LOGIT_DIFFERENCE = 1e-3  # float32 sums in another order differ by about 1e-5
MAX_P_DIFFERENCE = 1e-3
CHECKED_BATCHES = 2  # of crops or clips
CHECKED_VIDEOS = 2
KEPT_OF_EVALUATION = ("split", "by_dataset", "calibrated_on_the_same_videos", "levels", "false_positives")


def export(
    checkpoints: Sequence[Path],
    out: Path,
    *,
    faces: Path,
    videos: Sequence[Path] = (),
    evaluation: Path | None = None,
) -> Bundle:
    """Makes the bundle ``out`` and returns it as it loads from there. Raises ExportError and CheckpointError.

    ``faces``: a table whose crops, and whose first videos unless ``videos`` are given, are checked with.
    ``evaluation``: an evaluation.json of the same checkpoints, whose calibration the bundle takes over.
    """
    trained = [load_trained(path) for path in checkpoints]
    table = FaceTable.load(faces)
    videos = list(videos) or find_videos(table)
    calibration, measured = Calibration(), {}
    if evaluation is not None:
        calibration, report = read_evaluation(evaluation, trained)
        measured = {"held_out": {k: report[k] for k in KEPT_OF_EVALUATION if k in report}}
    if out.exists() and not (out / "bundle.json").is_file():
        raise ExportError("there is something that is no bundle; give another folder", path=out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        folder = Path(scratch) / "bundle"
        folder.mkdir()
        members = [write_onnx(t, folder) for t in trained]
        provenance = describe(trained, measured)
        bundle = make_bundle(trained, members, calibration=calibration, provenance=provenance)
        (folder / "bundle.json").write_text(to_json(bundle), encoding="utf-8")
        bundle = Bundle.load(folder)
        for t in trained:
            check_logits(t, bundle, table)
        check_engine(trained, bundle, videos, Path(scratch))
        replace_folder(folder, out, former=Path(scratch) / "former")
    return Bundle.load(out)


def replace_folder(new: Path, out: Path, *, former: Path) -> None:
    """Moves ``new`` to ``out`` and what is there to ``former``; if that fails, what was there stays."""
    if out.exists():
        out.rename(former)
    try:
        new.rename(out)
    except BaseException:
        if former.exists():
            former.rename(out)
        raise


def write_onnx(trained: Trained, folder: Path) -> ModelSpec:
    """Writes the member's file and returns its spec with the hash."""
    spec, network = trained.spec, trained.network
    clip = (spec.clip_frames,) if spec.takes_clips else ()
    inputs: dict[str, torch.Tensor] = {"crops": torch.zeros(2, *clip, 3, *spec.crop.input_hw)}
    if spec.kind == "audio":
        inputs["log_mel"] = torch.zeros(2, spec.audio.bands, spec.audio.frames)
    with warnings.catch_warnings():
        # The new exporter writes opset 18 and converts downwards; the old one writes opset 17 itself, and its file
        # holds the weights. torch warns that it will go away, that the sizes of a padding are computed anew in each
        # call, and that an LSTM may not take other batch sizes: that it does is checked below.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", TracerWarning)
        warnings.filterwarnings("ignore", "Constant folding - Only steps=1", UserWarning)
        warnings.filterwarnings("ignore", "Exporting a model to ONNX with a batch_size other than 1", UserWarning)
        torch.onnx.export(
            network,
            tuple(inputs.values()),
            str(folder / spec.file),
            input_names=list(inputs),
            output_names=["logit"],
            dynamic_axes={name: {0: "batch"} for name in (*inputs, "logit")},
            opset_version=OPSET,
            dynamo=False,
        )
    return dataclasses.replace(spec, sha256=hashlib.sha256((folder / spec.file).read_bytes()).hexdigest())


@torch.no_grad()
def check_logits(trained: Trained, bundle: Bundle, table: FaceTable) -> float:
    """The largest difference of a logit between torch and OpenVINO on crops of the table. Raises ExportError."""
    batches = make_evaluation_batches(table, trained, _some_split(table))
    session = CpuDevice().session(bundle, trained.name, threads=1)
    largest = 0.0
    for batch, _ in zip(batches.epoch(0), range(CHECKED_BATCHES), strict=False):
        inputs = [batch.x.numpy()] + ([] if batch.audio is None else [batch.audio.numpy()])
        wanted = trained.network(batch.x, batch.audio).numpy()
        for rows in (slice(None), slice(0, 1)):  # a whole batch, and one alone
            (got,) = session.run(*(x[rows] for x in inputs))
            if got.shape != wanted[rows].shape:
                raise ExportError(
                    f"member {trained.name!r}: OpenVINO gives {got.shape}, torch {wanted[rows].shape}; the exported "
                    "graph does not take batches of any size"
                )
            difference = float(np.abs(got - wanted[rows]).max())
            if not difference <= MAX_LOGIT_DIFFERENCE:
                raise ExportError(
                    f"member {trained.name!r}: OpenVINO and torch differ by {difference:.2g} in a logit, allowed is "
                    f"{MAX_LOGIT_DIFFERENCE}; a layer of this network is not exported as it is trained"
                )
            largest = max(largest, difference)
    return largest


def check_engine(trained: Sequence[Trained], bundle: Bundle, videos: Sequence[Path], scratch: Path) -> float:
    """The largest difference of a video's p_fake between the engine and the training pipeline. Raises ExportError."""
    with Engine(bundle) as engine:
        p_fake = [score_video(engine, video) for video in videos]
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        folder = Path(name)
        files = [f"{i}{video.suffix}" for i, video in enumerate(videos)]
        for file, video in zip(files, videos, strict=True):
            (folder / file).symlink_to(video.resolve())
        (folder / "labels.csv").write_text("file,label\n" + "".join(f"{file},REAL\n" for file in files))
        settings = ExtractSettings(
            sampling=bundle.sampling,
            sampling_mode=bundle.sampling_mode,
            detector=bundle.detector,
            tracking=bundle.tracking,
        )
        table = extract(folder, folder / "faces", settings, split="val", workers=1)
        found = {t.name: predict(t.network, _without_fakes(table, t).epoch(0)) for t in trained}
        scored = score_videos(table.split("val").faces, found, bundle)
    trained_p = dict(zip(scored.video, scored.logits.p_fake(bundle.calibration), strict=True))
    largest = 0.0
    for file, video, p in zip(files, videos, p_fake, strict=True):
        difference = abs(float(trained_p[file]) - p)
        if not difference <= MAX_P_DIFFERENCE:
            raise ExportError(
                f"the engine gives p_fake {p:.5f}, the training pipeline on the same frames "
                f"{trained_p[file]:.5f}; allowed is a difference of {MAX_P_DIFFERENCE}: the network would not be given "
                "what it was trained on",
                path=video,
            )
        largest = max(largest, difference)
    return largest


def score_video(engine: Engine, video: Path) -> float:
    """The engine's p_fake. Raises ExportError if there is none."""
    score = engine.score(video)
    if score.p_fake is None:
        why = score.error.message if score.error else "no face was found"
        raise ExportError(
            f"the engine has no score to compare ({why}); give a video with a face by --video", path=video
        )
    return score.p_fake


def _without_fakes(table: FaceTable, trained: Trained) -> Batches:
    """The evaluation batches of the faces as they are."""
    recipe = trained.recipe
    plain = dataclasses.replace(recipe, fakes=dataclasses.replace(recipe.fakes, ratio=0.0))
    return make_evaluation_batches(table, dataclasses.replace(trained, recipe=plain), "val")


def find_videos(table: FaceTable) -> list[Path]:
    """The first videos of the table that are still there. Raises ExportError."""
    photos = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}
    paths = [table.source / p for p in table.rows_by_video()]
    videos = [p for p in paths if p.suffix.lower() not in photos and p.is_file()]
    if not videos:
        raise ExportError(
            "the engine is checked on a video, and these faces are of photos or of videos that are gone; "
            "give one by --video",
            path=table.folder,
        )
    return videos[:CHECKED_VIDEOS]


def describe(trained: Sequence[Trained], measured: dict[str, Any]) -> dict[str, Any]:
    """The bundle's provenance."""
    members = {}
    for t in trained:
        parameters = sum(p.numel() for p in t.network.parameters())
        keys = ("recipe", "data", "sources", "faces", "epochs", "steps", "validation", "torch")
        members[t.name] = {"checkpoint_sha256": t.sha256, "parameters": parameters} | {k: t.state[k] for k in keys}
    return {"date": datetime.datetime.now(datetime.UTC).date().isoformat(), "members": members} | measured


def _some_split(table: FaceTable) -> str:
    """Validation if there is any: its crops were not trained on."""
    names = {s for s, failure in zip(table.split_name, table.failure, strict=True) if failure is None}
    return next(s for s in ("val", "test", "train") if s in names)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.export", description=__doc__.split("\n\n")[0])
    parser.add_argument("checkpoints", type=Path, nargs="+", help="best.safetensors of the members, in their order")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--faces", type=Path, required=True, help="what training.faces wrote; its crops are checked with"
    )
    parser.add_argument(
        "--video", type=Path, action="append", default=[], help="check with this instead of the table's"
    )
    parser.add_argument("--evaluation", type=Path, help="evaluation.json of training.evaluate: calibration and numbers")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    try:
        bundle = export(args.checkpoints, args.out, faces=args.faces, videos=args.video, evaluation=args.evaluation)
    except DfengineError as error:
        sys.exit(f"error: {error}")
    size = sum(f.stat().st_size for f in args.out.iterdir())
    print(f"{args.out}: {bundle.name}, {', '.join(m.name for m in bundle.members)}, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
