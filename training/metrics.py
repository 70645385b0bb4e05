"""Numbers about scores: AUC, and its interval over people."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dfengine.types import F64


def auc(labels: NDArray[np.floating], scores: NDArray[np.floating]) -> float:
    """Share of (fake, real) pairs in which the fake has the higher score; equal scores count half."""
    real, fake = np.sort(scores[labels == 0]), scores[labels == 1]
    below = np.searchsorted(real, fake, side="left") + np.searchsorted(real, fake, side="right")
    return float(below.sum() / (2 * len(real) * len(fake)))


def bootstrap_auc(
    labels: NDArray[np.floating], scores: list[NDArray[np.floating]], identity: NDArray[np.str_], *, rounds: int = 1000
) -> F64:
    """AUCs of several scores on the same resampled people, (rounds, len(scores)).

    People are drawn, not images: images of one person are not independent.
    """
    rng = np.random.default_rng(0)
    _, person = np.unique(identity, return_inverse=True)
    rows_of = [np.flatnonzero(person == p) for p in range(person.max() + 1)]
    values = []
    for _ in range(rounds):
        drawn = np.concatenate([rows_of[p] for p in rng.integers(len(rows_of), size=len(rows_of))])
        values.append([auc(labels[drawn], s[drawn]) for s in scores])
    return np.array(values)


def interval(values: F64) -> tuple[float, float]:
    """The middle 95 %."""
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
