"""Numbers about scores. Label 1 is fake; ``p_fake`` is a probability; higher scores are more fake.

Note [Why these are written out]
scikit-learn has most of them, but not quite these: its log loss clips at the precision of float64, the engine at
EPSILON; it has no equal error rate; its calibration curve does not tell how many videos a group has; and neither it nor
scipy.stats.bootstrap draws sources instead of videos. What is left is AUC and ROC, ten lines, for which training would
need one more package. scipy.stats.mannwhitneyu has the AUC too, with a p-value that takes twenty times as long, and the
bootstrap asks for 1,000 of each number. The tests hold them against SciPy, and against scikit-learn where there is one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dfengine.stages.aggregate import clip_probability
from dfengine.types import F64

Floats = NDArray[np.floating]

# Groups of the calibration error: few, so that some hundred videos leave dozens in each. Chosen, not measured.
BINS = 10


def auc(labels: Floats, scores: Floats) -> float:
    """Share of (fake, real) pairs in which the fake has the higher score, equal ones half; NaN for a single class."""
    real, fake = np.sort(scores[labels == 0]), scores[labels == 1]
    if len(real) == 0 or len(fake) == 0:
        return float("nan")
    below = np.searchsorted(real, fake, side="left") + np.searchsorted(real, fake, side="right")
    return float(below.sum() / (2 * len(real) * len(fake)))


def log_loss(labels: Floats, p_fake: Floats) -> float:
    """Mean negative log-likelihood, natural logarithm; probabilities are clipped as the engine's are."""
    p = clip_probability(p_fake)
    return float(-np.mean(np.where(labels == 1, np.log(p), np.log1p(-p))))


def accuracy(labels: Floats, p_fake: Floats, threshold: float = 0.5) -> float:
    """Share of videos on the right side; a score equal to the threshold counts as fake."""
    return float(np.mean((p_fake >= threshold) == (labels == 1)))


def roc(labels: Floats, scores: Floats) -> tuple[F64, F64]:
    """(false positive rate, true positive rate) at every distinct threshold, from (0, 0) to (1, 1)."""
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(order) - 1)
    fake = labels[order] == 1
    tpr, fpr = np.cumsum(fake)[ends] / fake.sum(), np.cumsum(~fake)[ends] / (~fake).sum()
    return np.append(0.0, fpr), np.append(0.0, tpr)


def eer(labels: Floats, scores: Floats) -> float:
    """The error rate where as many reals are taken for fakes as fakes for reals, on the ROC's straight lines."""
    if len(np.unique(labels)) < 2:
        return float("nan")
    fpr, tpr = roc(labels, scores)
    gap = fpr - (1 - tpr)  # rises from -1 to 1
    after = int(np.argmax(gap >= 0))
    before = after - 1
    share = -gap[before] / (gap[after] - gap[before])
    return float(fpr[before] + share * (fpr[after] - fpr[before]))


def reliability(labels: Floats, p_fake: Floats) -> tuple[F64, F64, NDArray[np.int64]]:
    """(mean p_fake, share of fakes, count) in groups of about equal size by p_fake; equal ones stay together."""
    order = np.argsort(p_fake, kind="stable")
    first = np.searchsorted(p_fake[order], p_fake[order])  # of the equal ones
    group = first * BINS // len(order)
    groups = np.split(order, np.flatnonzero(np.diff(group)) + 1)
    return (
        np.array([p_fake[g].mean() for g in groups], np.float64),
        np.array([(labels[g] == 1).mean() for g in groups], np.float64),
        np.array([len(g) for g in groups], np.int64),
    )


def calibration_error(labels: Floats, p_fake: Floats) -> float:
    """ECE: mean distance of probability and frequency over groups of equal size."""
    p, share, count = reliability(labels, p_fake)
    return float((count * abs(p - share)).sum() / count.sum())


def pair_accuracy(scores: Floats, video: Sequence[str], original: Sequence[str | None]) -> tuple[float, int]:
    """(share of fakes that score higher than the video they were made from, how many such pairs there are).

    ``original``: of each video what it was made from, None if it is real or nobody knows. Equal scores count half.
    """
    row = {name: i for i, name in enumerate(video)}
    pairs = [(scores[i], scores[row[o]]) for i, o in enumerate(original) if o is not None and o in row]
    right = [(fake > real) + 0.5 * (fake == real) for fake, real in pairs]
    return (float(np.mean(right)) if pairs else float("nan")), len(pairs)


def bootstrap(
    measure: Callable[[NDArray[np.int64]], ArrayLike], source_id: Sequence[str], *, rounds: int = 1000
) -> F64:
    """``measure(rows)`` on resampled sources, (rounds, ...).

    Sources are drawn, not videos: a fake and its original, or two videos of one person, are not independent.
    """
    rng = np.random.default_rng(0)
    _, person = np.unique(np.asarray(source_id), return_inverse=True)
    rows_of = [np.flatnonzero(person == p) for p in range(int(np.max(person)) + 1)]
    return np.array(
        [
            measure(np.concatenate([rows_of[p] for p in rng.integers(len(rows_of), size=len(rows_of))]))
            for _ in range(rounds)
        ],
        np.float64,
    )


def interval(values: F64) -> tuple[float, float] | None:
    """The middle 95 % of the rounds that gave a number; None if fewer than half did."""
    values = values[np.isfinite(values)] if np.isfinite(values).mean() > 0.5 else values[:0]
    if len(values) == 0:
        return None
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
