"""The numbers of scored videos: evaluation.json, predictions.csv, roc.png and reliability.png."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from dfengine.bundle import Calibration
from dfengine.files import replacing
from dfengine.settings import from_plain
from dfengine.types import I64

from . import metrics
from .errors import TrainingError
from .scoring import Scored, Trained
from .table import FaceTable

THRESHOLD = 0.5  # of accuracy, on the calibrated score: where real and fake are equally likely

# What is measured of a set of videos, each with an interval over its sources. The last two: what the sharpness of the
# crops alone would reach, and how much more the network does.
NUMBERS = ("log_loss", "auc", "eer", "accuracy", "calibration_error", "sharpness_auc", "auc_above_sharpness")


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


# -- files and the screen ----------------------------------------------------------------------------------------------


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
    text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with replacing(out / "evaluation.json") as partial:  # training.export takes the calibration from it
        partial.write_text(text, encoding="utf-8")
    with replacing(out / "predictions.csv") as partial, partial.open("w", newline="", encoding="utf-8") as file:
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
