"""Temperature and bias: fitted so that the scores the engine gives are the likeliest.

Note [A fit without gradients]
A fit through ``dfengine.stages.aggregate.pool_tracks`` cannot differ from what is scored, whatever the bundle's rule
for several people is. With the mean of probabilities it is no logistic regression and need not be convex, so it is left
to the simplex search of SciPy; two parameters near 0 take it about a hundred steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.optimize import minimize

from dfengine.bundle import Calibration
from dfengine.stages.aggregate import pool_tracks, sigmoid
from dfengine.types import F64, I64

from .errors import TrainingError


@dataclass(frozen=True, eq=False)
class VideoLogits:
    """Uncalibrated logits of the tracks of N videos, and the rule that makes scores of videos of them."""

    tracks: Sequence[F64]  # N of (K,), K may differ
    sides: Sequence[F64]  # N of (K,), pixels; how large the faces of each track are
    rule: str  # Aggregation.tracks

    def __len__(self) -> int:
        return len(self.tracks)

    def take(self, rows: I64) -> VideoLogits:
        return VideoLogits([self.tracks[int(r)] for r in rows], [self.sides[int(r)] for r in rows], self.rule)

    @cached_property
    def _by_count(self) -> list[tuple[I64, F64, F64]]:
        """(rows, logits (n, K), sides (n, K)) of the videos of each number of tracks."""
        counts = np.array([len(t) for t in self.tracks])
        groups = [np.flatnonzero(counts == k) for k in np.unique(counts)]
        return [
            (g, np.stack([self.tracks[int(i)] for i in g]), np.stack([self.sides[int(i)] for i in g])) for g in groups
        ]

    def calibrated(self, calibration: Calibration) -> F64:
        """The engine's logits of the videos, (N,)."""
        logits = np.zeros(len(self))
        for rows, tracks, sides in self._by_count:
            logits[rows] = pool_tracks(tracks, sides, calibration, self.rule)
        return logits

    def p_fake(self, calibration: Calibration) -> F64:
        """The engine's scores of the videos, (N,)."""
        return sigmoid(self.calibrated(calibration))


def fit_calibration(logits: VideoLogits, labels: F64, fitted_on: str = "") -> Calibration:
    """The likeliest temperature and bias. See Note [A fit without gradients].

    With the targets of Platt (1999), (n + 1) / (n + 2) instead of 1: where the classes do not overlap the likeliest
    temperature would be 0. Raises TrainingError if the logits do not rise with the label.
    """
    fakes, reals = float((labels == 1).sum()), float((labels == 0).sum())
    if not (fakes and reals):
        raise TrainingError(f"calibration needs both classes, there are {reals:.0f} real and {fakes:.0f} fake videos")
    wanted = np.where(labels == 1, (fakes + 1) / (fakes + 2), 1 / (reals + 2))
    # With slopes near 0 the rule "mean" is the mean of logits; the others take the same track at any slope. Where the
    # likelihood falls as the slope leaves 0, no positive slope is worth having.
    if logits.rule == "mean":
        x = np.array([track.mean() for track in logits.tracks])
    else:
        x = logits.calibrated(Calibration())
    slope = float(np.mean((x - x.mean()) * (wanted - wanted.mean())))
    if slope <= 0:
        raise TrainingError(
            f"the logits do not rise with the label (their covariance is {slope:.3g}); there is nothing to calibrate"
        )
    centre, scale = float(x.mean()), float(x.std())

    def calibration(parameters: F64) -> Calibration:
        """From the logarithm of the slope and the bias, both for logits of mean 0 and deviation 1."""
        slope = float(np.exp(parameters[0])) / scale
        return Calibration(temperature=1 / slope, bias=float(parameters[1]) - slope * centre, fitted_on=fitted_on)

    def cost(parameters: F64) -> float:
        z = logits.calibrated(calibration(parameters))
        return float(np.mean(np.logaddexp(0, z) - wanted * z))

    # The likelihood is flat near its top: closer than the root of float64's precision nothing is seen of it.
    found = minimize(cost, np.zeros(2), method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-15, "maxiter": 2000})
    if not found.success:
        raise TrainingError(f"temperature and bias were not found ({found.message}); the logits may hold no numbers")
    return calibration(found.x)
