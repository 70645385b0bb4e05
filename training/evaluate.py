"""Measures a run on the people held out: ``python -m training.evaluate --faces runs/faces.npz --run runs/default``.

Writes RUN/evaluation.json: AUC of real against self-blended and against swapped faces at three levels of degradation,
all of them reported, beside what sharpness alone achieves on the same crops; and the calibration.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor
from torch.nn import functional as F

from dfengine.aggregate import sigmoid
from dfengine.bundle import Calibration
from dfengine.types import F32

from .degrade import Codec, crop, jitter_boxes, shrink, store
from .faces import FACE_PX, FaceSet, split
from .fakes import make_pairs
from .metrics import auc, bootstrap_auc, interval
from .model import SPEC, FaceNet
from .train import load_average, photos, predict

# The full size of a face is what the stored crops have; levels are fixed so that later networks can be compared.
LEVELS = {
    "L1": (FACE_PX, Codec("jpeg", 90)),
    "L2": (FACE_PX, Codec("h264", 28)),
    "L3": (FACE_PX / 2, Codec("h264", 38)),
}
FAKES = ("self_blended", "swap")
DRAWS = 2  # fakes made of each photo: the chance in making them should add less to the interval than people do


@dataclass(frozen=True, eq=False)
class Scored:
    """Real and fake crops at one level: 2 B rows, reals first."""

    labels: F32
    logits: F32
    sharpness: F32
    identity: NDArray[np.str_]


def score_level(model: FaceNet, faces: FaceSet, fake: str, level: str, seed: int = 0) -> Scored:
    """Makes DRAWS pairs of every photo and scores them; a level sees the same pairs as every other."""
    face_px, codec = LEVELS[level]
    rng = Generator().manual_seed(seed)
    rows = np.tile(np.arange(len(faces)), DRAWS)
    donors = rows if fake == "self_blended" else _other_people(faces, rows, seed)
    logits, sharpness = [], []
    for start in range(0, len(rows), 32):  # bounds the memory; one encoder is opened for 64 images
        part = slice(start, start + 32)
        pairs = make_pairs(*photos(faces, rows[part]), *photos(faces, donors[part])[::2], rng)
        boxes = jitter_boxes(pairs.xyxy, rng)
        small, scale = shrink(torch.cat([pairs.real, pairs.fake]), face_px)
        crops = torch.from_numpy(crop(store(small, codec), boxes.repeat(2, 1) * scale, SPEC))
        logits.append(predict(model, crops).reshape(2, -1))
        sharpness.append(laplacian_variance(crops).reshape(2, -1))
    return Scored(
        np.repeat(np.float32([0, 1]), len(rows)),
        np.concatenate(logits, axis=1).reshape(-1),
        np.concatenate(sharpness, axis=1).reshape(-1),
        np.tile(faces.identity[rows], 2),
    )


def laplacian_variance(crops: Tensor) -> F32:
    """The usual measure of sharpness, on the grey crop: (B, 3, H, W) -> (B,)."""
    kernel = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])
    edges = F.conv2d(crops.mean(dim=1, keepdim=True), kernel[None, None])
    return edges.flatten(1).var(dim=1).numpy()


def compare(scored: Scored) -> dict[str, object]:
    """The network beside sharpness, each with its 95 % interval over people, and the difference of the two."""
    # A single score has no idea of what it looks for; sharpness may take whichever direction suits it better.
    sharp_is_fake = auc(scored.labels, scored.sharpness) >= 0.5
    sharpness = scored.sharpness if sharp_is_fake else -scored.sharpness
    values = bootstrap_auc(scored.labels, [scored.logits, sharpness], scored.identity)
    ours, baseline = auc(scored.labels, scored.logits), auc(scored.labels, sharpness)
    return {
        "auc": ours,
        "auc_95": interval(values[:, 0]),
        "sharpness_auc": baseline,
        "sharpness_auc_95": interval(values[:, 1]),
        "sharpness_direction": "sharp is fake" if sharp_is_fake else "soft is fake",
        "difference": ours - baseline,
        "difference_95": interval(values[:, 0] - values[:, 1]),
    }


def fit_calibration(logits: F32, labels: F32) -> Calibration:
    """Temperature and bias that make sigmoid(logit / temperature + bias) most likely, by Newton's method."""
    x = np.stack([logits, np.ones_like(logits)], axis=1).astype(np.float64)
    w = np.zeros(2)
    for _ in range(50):  # converges in about six
        p = sigmoid(x @ w)
        w -= np.linalg.solve(x.T @ (x * (p * (1 - p))[:, None]) + 1e-9 * np.eye(2), x.T @ (p - labels))
    if w[0] <= 0:
        raise ValueError(f"the logits do not rise with the label (slope {w[0]:.3g}); there is nothing to calibrate")
    return Calibration(temperature=float(1 / w[0]), bias=float(w[1]), fitted_on="held-out people, see provenance")


def calibration_error(p_fake: NDArray[np.floating], labels: F32, bins: int = 10) -> float:
    """Mean distance of probability and frequency over equally large groups."""
    groups = np.array_split(np.argsort(p_fake), bins)
    return float(sum(len(g) * abs(p_fake[g].mean() - labels[g].mean()) for g in groups) / len(labels))


def _other_people(faces: FaceSet, rows: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    rng = np.random.default_rng(seed)
    donors = [rng.choice(np.flatnonzero(faces.identity != faces.identity[r])) for r in rows]
    return np.array(donors, np.int64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faces", type=Path, required=True)
    parser.add_argument("--run", type=Path, required=True)
    args = parser.parse_args()

    torch.set_num_threads(1)
    _, held_out = split(FaceSet.load(args.faces))
    model = load_average(args.run)
    report: dict[str, object] = {
        "photos": len(held_out),
        "people": len(np.unique(held_out.identity)),
        "pairs_per_cell": len(held_out) * DRAWS,
        "levels": {name: {"face_px": px, **asdict(codec)} for name, (px, codec) in LEVELS.items()},
    }
    everything = []
    for fake in FAKES:
        cells = report[fake] = {}
        for level in LEVELS:
            scored = score_level(model, held_out, fake, level)
            everything.append(scored)
            cell = cells[level] = compare(scored)
            print(
                f"{fake:13} {level}  AUC {cell['auc']:.3f} [{cell['auc_95'][0]:.3f}, {cell['auc_95'][1]:.3f}]  "
                f"sharpness {cell['sharpness_auc']:.3f}  difference {cell['difference']:+.3f} "
                f"[{cell['difference_95'][0]:+.3f}, {cell['difference_95'][1]:+.3f}]",
                flush=True,
            )
    logits = np.concatenate([s.logits for s in everything])
    labels = np.concatenate([s.labels for s in everything])
    calibration = fit_calibration(logits, labels)
    p_fake = sigmoid(logits / calibration.temperature + calibration.bias)
    report["calibration"] = {
        "temperature": calibration.temperature,
        "bias": calibration.bias,
        "fitted_on": "all cells above together, the people it was measured on",
        "expected_calibration_error": calibration_error(p_fake, labels),
    }
    (args.run / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report["calibration"]))


if __name__ == "__main__":
    main()
