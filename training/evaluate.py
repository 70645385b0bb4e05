"""Measures checkpoints on videos they have not seen: ``python -m training.evaluate RUN/best.safetensors... --faces DIR
--out DIR``.

Several checkpoints are blended as their bundle will blend them. Frames become a video's score by
dfengine.stages.aggregate, with the rules of the recipe's [bundle]. Temperature and bias are fitted on the validation
split; training.export stores them in the bundle. Writes evaluation.json, predictions.csv, roc.png and reliability.png.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dfengine.errors import DfengineError

from .calibration import fit_calibration
from .report import THRESHOLD, make_report, print_report, read_evaluation, write_report
from .scoring import (
    Scored,
    check_same_pictures,
    load_trained,
    make_bundle,
    make_evaluation_batches,
    predict,
    score_videos,
)
from .table import FaceTable


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
