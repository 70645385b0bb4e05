"""Measures checkpoints on videos they have not seen: ``python -m training.evaluate RUN/best.safetensors... --faces DIR
--out DIR``.

Several checkpoints are blended as their bundle will blend them. Frames become a video's score by
dfengine.stages.aggregate, with the rules of the recipe's [bundle]. Temperature and bias are fitted on the validation
split; training.export stores them in the bundle. Writes evaluation.json, predictions.csv, roc.png and reliability.png.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from dfengine.bundle import SCHEMA_VERSION, Bundle, Calibration, ModelSpec
from dfengine.errors import DfengineError
from dfengine.settings import from_plain
from dfengine.stages.aggregate import PooledTracks, pool_rows
from dfengine.stages.audio import load_log_mel
from dfengine.types import F32, F64, I64, Tracks

from . import metrics
from .calibration import VideoLogits, fit_calibration
from .checkpoint import load_checkpoint
from .data import Batch, Batches
from .errors import CheckpointError, RecipeError, TrainingError
from .models import Network
from .recipe import Recipe, build_recipe
from .table import FaceTable

THRESHOLD = 0.5  # of accuracy, on the calibrated score: where real and fake are equally likely
BATCH = 32

# What is measured of a set of videos, each with an interval over its sources. The last two: what the sharpness of the
# crops alone would reach, and how much more the network does.
NUMBERS = ("log_loss", "auc", "eer", "accuracy", "calibration_error", "sharpness_auc", "auc_above_sharpness")


@dataclass(frozen=True, eq=False)
class Trained:
    """A network from a checkpoint, in eval mode, and what is known of it."""

    name: str
    network: Network
    recipe: Recipe
    state: dict[str, Any]
    sha256: str  # of the checkpoint

    @property
    def spec(self) -> ModelSpec:
        return self.recipe.model.spec(self.name)


def load_trained(path: Path, device: torch.device | str = "cpu") -> Trained:
    """The network of a best.safetensors. Raises CheckpointError for anything else."""
    tensors, state = load_checkpoint(path)
    if state.get("kind") != "best":
        raise CheckpointError(
            f"this is a checkpoint of kind {state.get('kind')!r}; give a run's best.safetensors", path=path
        )
    plain: Any = state.get("recipe")  # build_recipe says what it should be
    try:
        recipe = build_recipe(plain, str(path))
    except RecipeError as error:
        raise CheckpointError(f"its recipe is none of this version ({error.message})", path=path) from None
    if not isinstance(state.get("name"), str):
        raise CheckpointError("the network has no name; give a checkpoint that training.train has written", path=path)
    network = Network(recipe.model, fetch=False)
    load_weights(network, tensors, path)
    network.requires_grad_(False).eval()
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Trained(state["name"], network.to(device), recipe, state, digest)


def load_weights(network: Network, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raises CheckpointError if they are of another network."""
    wanted = network.state_dict()
    wrong = sorted(k for k in wanted.keys() | tensors.keys() if k not in tensors or k not in wanted)
    wrong = wrong or [k for k, v in wanted.items() if tensors[k].shape != v.shape]
    if wrong:
        raise CheckpointError(
            f"the checkpoint is of another network than the recipe's {network.settings.backbone!r}: {wrong[0]!r} does "
            "not fit; use the recipe that it was trained with",
            path=path,
        )
    network.load_state_dict(dict(tensors))


# -- scoring -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Scored:
    """N videos, judged as the engine would. Pseudo-fakes count as videos of their own."""

    video: list[str]
    label: F64  # (N,), 1 fake
    source_id: list[str]
    original: list[str | None]  # what a fake was made from, if that is known
    dataset: list[str]
    logits: VideoLogits
    sharpness: F64  # (N,), what a score that knows nothing of fakes would go by

    def __len__(self) -> int:
        return len(self.video)


@dataclass(frozen=True, eq=False)
class ScoredVideo:
    """One of them."""

    video: str
    label: float
    source_id: str
    original: str | None
    dataset: str
    tracks: PooledTracks
    sharpness: float


def collect(videos: Sequence[ScoredVideo], rule: str) -> Scored:
    """``rule``: how the tracks of a video make its score, Aggregation.tracks."""
    return Scored(
        [v.video for v in videos],
        np.array([v.label for v in videos]),
        [v.source_id for v in videos],
        [v.original for v in videos],
        [v.dataset for v in videos],
        VideoLogits([v.tracks.blend for v in videos], [v.tracks.sides for v in videos], rule),
        np.array([v.sharpness for v in videos]),
    )


# By video: the label, and by row of the table the logit and the sharpness, each with where its clip begins.
Predictions = dict[str, tuple[float, dict[int, tuple[int, float, float]]]]


def make_evaluation_batches(
    table: FaceTable, trained: Trained, split: str, device: torch.device | str = "cpu", *, rank: int = 0, world: int = 1
) -> Batches:
    recipe = trained.recipe
    return Batches(
        table,
        trained.spec,
        recipe.data,
        recipe.augment,
        recipe.fakes,
        split=split,
        seed=0,  # the same pseudo-fakes for every network of the same fakes and augment
        batch=max(1, BATCH // trained.spec.clip_frames),
        device=device,
        audio=make_listener(trained.spec),
        training=False,
        rank=rank,
        world=world,
    )


def make_listener(spec: ModelSpec) -> Callable[[Path], F32] | None:
    """Path -> log-mel (bands, frames) for a network that hears, else None. Raises TrainingError if the file is gone."""
    if spec.kind != "audio":
        return None

    @lru_cache(64)  # the clips of one video follow each other
    def listen(path: Path) -> F32:
        if not Path(path).is_file():  # silence would be learned as if it were this video's sound
            raise TrainingError("the video is gone, and its sound is needed; put it back where it was", path=path)
        return load_log_mel(path, spec.audio).log_mel

    return listen


def check_same_pictures(batches: Mapping[str, Batches]) -> None:
    """Raises TrainingError if networks would see different pseudo-fakes: no engine blends such scores."""
    seen = {name: b.pictures for name, b in batches.items()}
    (first, wanted), *rest = seen.items()
    for name, pictures in rest:
        if pictures != wanted:
            raise TrainingError(
                f"the split has no fakes of its own, and {first!r} and {name!r} make different ones (their recipes "
                "differ in [fakes], [augment] or the size of crops); take them one by one, or training.heldout"
            )


@torch.no_grad()
def predict(network: Network, batches: Iterable[Batch]) -> Predictions:
    """Logits of all faces of a split. A row in two clips has the logit of the earlier one, as in the engine."""
    network.eval()
    found: Predictions = {}
    for batch in batches:
        logits = network(batch.x, batch.audio).float().squeeze(1).cpu().numpy()
        sharp = sharpness(batch.x.flatten(0, -4)).reshape(len(batch), -1)
        for i, video in enumerate(batch.video):
            _, rows = found.setdefault(video, (float(batch.y[i]), {}))
            for row, s in zip(batch.rows[i], sharp[i], strict=True):
                entry = (int(batch.rows[i][0]), float(logits[i]), float(s))
                rows[int(row)] = min(rows.get(int(row), entry), entry)
    return found


def sharpness(crops: Tensor) -> F32:
    """Variance of the Laplacian of the grey crops: (N, 3, H, W) -> (N,)."""
    kernel = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]], device=crops.device)
    return F.conv2d(crops.mean(dim=1, keepdim=True), kernel[None, None]).flatten(1).var(dim=1).cpu().numpy()


def score_videos(faces: FaceTable, predictions: Mapping[str, Predictions], bundle: Bundle) -> Scored:
    """Pools the members' predictions for ``faces`` by track, as the engine does, and leaves them uncalibrated."""
    first = next(iter(predictions.values()))
    scored: list[ScoredVideo] = []
    for video, (label, rows_of) in first.items():
        rows = np.array(sorted(rows_of), np.int64)
        tracks = make_tracks(faces, rows)
        order = np.lexsort((tracks.pts_seconds, tracks.track_id))
        logits = {
            name: np.array([found[video][1][int(r)][1] for r in rows[order]]) for name, found in predictions.items()
        }
        pooled = pool_rows(tracks[order], logits, bundle)
        sharp = float(np.mean([s for _, _, s in rows_of.values()]))
        path, row = video.removesuffix("#fake"), rows[0]
        original = path if path != video else faces.original[row]
        scored.append(ScoredVideo(video, label, faces.source_id[row], original, faces.dataset[row], pooled, sharp))
    return collect(scored, bundle.aggregation.tracks)


def make_tracks(faces: FaceTable, rows: I64) -> Tracks:
    """Rows of one video as the engine has them."""
    part = faces[rows]
    detected = np.asarray(np.isfinite(part.landmarks).all(axis=(1, 2)), np.bool_)
    frame = np.arange(len(rows), dtype=np.int64)
    return Tracks(part.track, frame, part.index, part.pts_seconds, part.box, part.landmarks, part.confidence, detected)


def make_bundle(trained: Sequence[Trained], members: Sequence[ModelSpec], **fields: Any) -> Bundle:
    """The bundle of some checkpoints. Raises CheckpointError if they do not belong together."""
    settings = trained[0].recipe.bundle
    for other in trained[1:]:
        if other.recipe.bundle != settings:
            raise CheckpointError(
                f"the checkpoints {trained[0].name!r} and {other.name!r} have different [bundle] tables; members of "
                "one bundle share one"
            )
    names = [t.name for t in trained]
    if len(set(names)) < len(names):
        raise CheckpointError(f"two checkpoints are of one name, got {names}; members of a bundle have different names")
    return Bundle(
        schema_version=SCHEMA_VERSION,
        members=tuple(members),
        **{k: getattr(settings, k) for k in settings.__dataclass_fields__},
        **fields,
    )


# -- numbers -----------------------------------------------------------------------------------------------------------


def measure(scored: Scored, calibration: Calibration, threshold: float = THRESHOLD) -> dict[str, Any]:
    """All numbers about one set of videos, with 95 % intervals over its sources."""
    labels, p = scored.label, scored.logits.p_fake(calibration)
    # A score that knows nothing may take whichever direction suits it better.
    side = 1.0 if not metrics.auc(labels, scored.sharpness) < 0.5 else -1.0

    def numbers(r: I64) -> list[float]:
        return [
            metrics.log_loss(labels[r], p[r]),
            area := metrics.auc(labels[r], p[r]),
            metrics.eer(labels[r], p[r]),
            metrics.accuracy(labels[r], p[r], threshold),
            metrics.calibration_error(labels[r], p[r]),
            sharp := metrics.auc(labels[r], side * scored.sharpness[r]),
            area - sharp,
        ]

    values = numbers(np.arange(len(scored)))
    rounds = metrics.bootstrap(numbers, scored.source_id)
    pairs, count = metrics.pair_accuracy(p, scored.video, scored.original)
    result: dict[str, Any] = {
        "real": int((labels == 0).sum()),
        "fake": int((labels == 1).sum()),
        "sources": len(set(scored.source_id)),
        "threshold": threshold,
    }
    for i, name in enumerate(NUMBERS):
        result[name] = _number(values[i])
        if name != "calibration_error":  # a sum of distances: every resample of a good one is worse
            result[f"{name}_95"] = metrics.interval(rounds[:, i])
    return result | {"pair_accuracy": _number(pairs), "pairs": count}


def measure_by_dataset(
    scored: Scored, calibration: Calibration, failures: Mapping[str, str], threshold: float = THRESHOLD
) -> dict[str, Any]:
    """``measure`` of each dataset, and of all together if there are several; ``failures``: dataset by unscored path."""
    datasets = np.array(scored.dataset)
    report = {}
    for name in sorted(set(scored.dataset) | set(failures.values())):
        rows = np.flatnonzero(datasets == name)
        report[name] = measure(_take(scored, rows), calibration, threshold) if len(rows) else {"real": 0, "fake": 0}
        report[name]["not_scored"] = sum(d == name for d in failures.values())
    if len(report) > 1:
        report["all datasets pooled"] = measure(scored, calibration, threshold) | {"not_scored": len(failures)}
    return report


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None  # JSON has no NaN


def _take(scored: Scored, rows: I64) -> Scored:
    def pick(values: list[Any]) -> list[Any]:
        return [values[r] for r in rows]

    return Scored(
        pick(scored.video),
        scored.label[rows],
        pick(scored.source_id),
        pick(scored.original),
        pick(scored.dataset),
        scored.logits.take(rows),
        scored.sharpness[rows],
    )


# -- drawings ----------------------------------------------------------------------------------------------------------


def draw_roc(scored: Scored, calibration: Calibration, file: Path) -> None:
    """ROC of each dataset that has both classes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.subplots()
    for name in sorted(set(scored.dataset)):
        part = _take(scored, np.flatnonzero(np.array(scored.dataset) == name))
        if len(set(part.label)) == 2:
            p = part.logits.p_fake(calibration)
            area = metrics.auc(part.label, p)
            axes.plot(*metrics.roc(part.label, p), label=f"{name}: AUC {area:.3f}, {len(part)} videos")
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=0.8)
    axes.set(xlabel="reals taken for fakes", ylabel="fakes found", xlim=(0, 1), ylim=(0, 1), aspect="equal")
    axes.legend(loc="lower right", fontsize="small") if axes.get_legend_handles_labels()[0] else None
    figure.savefig(file, dpi=120)


def draw_reliability(scored: Scored, calibration: Calibration, file: Path) -> None:
    """How often videos of a score are fake, by groups of equal size, before and after calibration."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.subplots()
    for name, how in (("uncalibrated", Calibration()), ("calibrated", calibration)):
        p = scored.logits.p_fake(how)
        error = metrics.calibration_error(scored.label, p)
        axes.plot(*metrics.reliability(scored.label, p)[:2], marker="o", label=f"{name}: ECE {error:.3f}")
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=0.8)
    axes.set(xlabel="mean p_fake of the group", ylabel="share of fakes in it", xlim=(0, 1), ylim=(0, 1), aspect="equal")
    axes.legend(loc="upper left", fontsize="small")
    figure.savefig(file, dpi=120)


# -- the command -------------------------------------------------------------------------------------------------------


def evaluate(
    checkpoints: Sequence[Path],
    faces: Path,
    out: Path,
    *,
    split: str = "test",
    threshold: float = THRESHOLD,
    device: str = "cpu",
    calibration: Path | None = None,
) -> dict[str, Any]:
    """What the command does; returns the content of evaluation.json.

    ``calibration``: an evaluation.json of the same checkpoints whose temperature and bias are taken.
    """
    table = FaceTable.load(faces)
    trained = [load_trained(path, device) for path in checkpoints]
    bundle = make_bundle(trained, [t.spec for t in trained])

    def score(name: str) -> Scored:
        batches = {t.name: make_evaluation_batches(table, t, name, device) for t in trained}
        check_same_pictures(batches)
        found = {t.name: predict(t.network, batches[t.name].epoch(0)) for t in trained}
        return score_videos(table.split(name).faces, found, bundle)

    scored = score(split)
    if calibration is not None:
        fitted, _ = read_evaluation(calibration, trained)
    else:
        validation = scored if split == "val" else score("val")
        reals, fakes = (int((validation.label == label).sum()) for label in (0, 1))
        fitted_on = f"validation split: {reals} real, {fakes} fake videos"
        fitted = fit_calibration(validation.logits, validation.label, fitted_on)
    same = split == "val" and calibration is None
    report = make_report(trained, table.split(split), scored, fitted, threshold=threshold, same=same)
    write_report(report, scored, fitted, out)
    return report


def make_report(
    trained: Sequence[Trained],
    part: FaceTable,
    scored: Scored,
    calibration: Calibration,
    *,
    threshold: float = THRESHOLD,
    same: bool,
) -> dict[str, Any]:
    """The content of evaluation.json.

    ``part``: the rows of the split that ``scored`` is of; ``same``: that ``calibration`` was fitted on these scores.
    """
    failed = part[np.array([f is not None for f in part.failure], bool)]
    failures = dict(zip(failed.path, failed.dataset, strict=True))
    return {
        "checkpoints": {t.name: t.sha256 for t in trained},
        "split": str(part.split_name[0]),
        "calibration": {k: getattr(calibration, k) for k in ("temperature", "bias", "fitted_on")},
        "calibrated_on_the_same_videos": same,
        "by_dataset": measure_by_dataset(scored, calibration, failures, threshold),
        "not_scored": part.failures,
    }


def write_report(report: Mapping[str, Any], scored: Scored, calibration: Calibration, out: Path) -> None:
    """Writes evaluation.json, predictions.csv, roc.png and reliability.png."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "evaluation.json").write_text(json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    with open(out / "predictions.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["video", "label", "source_id", "dataset", "logit", "p_fake", "sharpness"])
        columns = (scored.video, scored.label, scored.source_id, scored.dataset)
        uncalibrated = scored.logits.calibrated(Calibration())
        numbers = (uncalibrated, scored.logits.p_fake(calibration), scored.sharpness)
        for video, label, source, dataset, *values in zip(*columns, *numbers, strict=True):
            writer.writerow([video, int(label), source, dataset, *(f"{v:.6f}" for v in values)])
    draw_roc(scored, calibration, out / "roc.png")
    draw_reliability(scored, calibration, out / "reliability.png")


def read_evaluation(path: Path, trained: Sequence[Trained]) -> tuple[Calibration, dict[str, Any]]:
    """The calibration in an evaluation.json and all of its content. Raises TrainingError."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        checkpoints, calibration = report["checkpoints"], from_plain(Calibration, report["calibration"])
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise TrainingError(
            f"this is no evaluation of training.evaluate or training.heldout ({error!r})", path=path
        ) from None
    if checkpoints != {t.name: t.sha256 for t in trained}:
        raise TrainingError(
            f"the evaluation is of other checkpoints ({', '.join(checkpoints)}) than those that are given; evaluate "
            "these",
            path=path,
        )
    return calibration, report


def print_report(report: Mapping[str, Any]) -> None:
    datasets = report["by_dataset"]
    table = Table("", *datasets, title=f"split {report['split']}, with 95 % intervals over sources")
    for name in ("real", "fake", "not_scored"):
        table.add_row(name.replace("_", " "), *(str(row[name]) for row in datasets.values()))
    for name in (*NUMBERS, "pair_accuracy"):
        cells = []
        for row in datasets.values():
            value, between = row.get(name), row.get(f"{name}_95")
            text = "-" if value is None else f"{value:.3f}"
            cells.append(text if between is None else f"{text} ({between[0]:.3f} to {between[1]:.3f})")
        table.add_row(name.replace("_", " "), *cells)
    console = Console()
    console.print(table)
    fitted = report["calibration"]
    console.print(f"temperature {fitted['temperature']:.3f}, bias {fitted['bias']:+.3f}: {fitted['fitted_on']}")
    if report["calibrated_on_the_same_videos"]:
        console.print("log loss, accuracy and calibration error are of the very videos the calibration was fitted on")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.evaluate", description=__doc__.split("\n\n")[0])
    parser.add_argument("checkpoints", type=Path, nargs="+", help="best.safetensors of one or more runs")
    parser.add_argument("--faces", type=Path, required=True, help="what training.faces wrote")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--split", default="test", choices=["val", "test"])
    parser.add_argument(
        "--calibration", type=Path, help="evaluation.json to take it from, instead of fitting it on the split val"
    )
    parser.add_argument("--threshold", type=float, default=THRESHOLD, help="of accuracy, on the calibrated p_fake")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    try:
        report = evaluate(
            args.checkpoints,
            args.faces,
            args.out,
            split=args.split,
            threshold=args.threshold,
            device=args.device,
            calibration=args.calibration,
        )
    except DfengineError as error:
        sys.exit(f"error: {error}")
    print_report(report)


if __name__ == "__main__":
    main()
