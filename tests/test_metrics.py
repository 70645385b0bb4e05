"""Numbers about scores, against their definitions."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")  # the `train` extra

from scipy.optimize import brentq
from scipy.stats import mannwhitneyu

from training import metrics


@pytest.fixture
def scored(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    labels = (rng.random(60) < 0.4).astype(float)
    return labels, np.round(np.clip(0.3 * labels + rng.random(60) * 0.7, 0, 1), 2)  # rounded: some are equal


@pytest.mark.parametrize(
    ("scores", "expected"), [([0, 1, 2, 3], 1.0), ([3, 2, 1, 0], 0.0), ([1, 1, 1, 1], 0.5), ([0, 2, 1, 3], 0.75)]
)
def test_auc(scores: list[float], expected: float) -> None:
    assert metrics.auc(np.array([0, 0, 1, 1]), np.array(scores, float)) == expected


def test_auc_is_the_share_of_pairs_in_order(scored: tuple[np.ndarray, np.ndarray]) -> None:
    labels, p = scored
    pairs = [(f > r) + 0.5 * (f == r) for f in p[labels == 1] for r in p[labels == 0]]
    assert metrics.auc(labels, p) == pytest.approx(np.mean(pairs))
    fpr, tpr = metrics.roc(labels, p)
    assert np.trapezoid(tpr, fpr) == pytest.approx(np.mean(pairs))


@pytest.mark.parametrize("count", [7, 60, 500])
def test_the_same_numbers_as_scipy(rng: np.random.Generator, count: int) -> None:
    labels = (np.arange(count) % 3 == 0).astype(float)
    scores = np.round(rng.normal(0, 1, count) + labels, 1)  # rounded: some are equal
    u = mannwhitneyu(scores[labels == 1], scores[labels == 0]).statistic
    assert metrics.auc(labels, scores) == pytest.approx(u / (labels.sum() * (1 - labels).sum()), abs=1e-12)
    fpr, tpr = metrics.roc(labels, scores)
    # At vertical steps of the ROC interpolation is not unique; the rate as a function of the share on the curve is.
    at = np.arange(len(fpr))
    gap = lambda t: np.interp(t, at, fpr) - 1 + np.interp(t, at, tpr)  # noqa: E731
    assert metrics.eer(labels, scores) == pytest.approx(np.interp(brentq(gap, 0, at[-1]), at, fpr), abs=1e-9)


@pytest.mark.parametrize("count", [7, 60, 500])
def test_the_same_numbers_as_scikit_learn(rng: np.random.Generator, count: int) -> None:
    theirs = pytest.importorskip("sklearn.metrics")
    labels = (np.arange(count) % 3 == 0).astype(float)
    p = np.round(np.clip(0.3 * labels + rng.random(count) * 0.7, 0, 1), 2)
    assert metrics.auc(labels, p) == pytest.approx(theirs.roc_auc_score(labels, p), abs=1e-12)
    fpr, tpr, _ = theirs.roc_curve(labels, p, drop_intermediate=False)
    np.testing.assert_allclose(metrics.roc(labels, p), (fpr, tpr), rtol=0, atol=1e-12)
    assert metrics.accuracy(labels, p) == theirs.accuracy_score(labels, p >= 0.5)
    inside = np.clip(p, 0.01, 0.99)  # elsewhere they clip differently
    assert metrics.log_loss(labels, inside) == pytest.approx(theirs.log_loss(labels, inside), abs=1e-12)


def test_auc_of_one_class_is_no_number() -> None:
    assert np.isnan(metrics.auc(np.ones(3), np.arange(3.0)))
    assert np.isnan(metrics.eer(np.zeros(3), np.arange(3.0)))


def test_log_loss_and_accuracy(scored: tuple[np.ndarray, np.ndarray]) -> None:
    labels, p = scored
    inside = np.clip(p, 1e-7, 1 - 1e-7)
    want = -np.mean([np.log(x) if y else np.log(1 - x) for x, y in zip(inside, labels, strict=True)])
    assert metrics.log_loss(labels, p) == pytest.approx(want)
    assert metrics.log_loss(np.array([1.0, 0.0]), np.array([0.0, 0.5])) == pytest.approx(
        (7 * np.log(10) + np.log(2)) / 2
    )
    assert metrics.accuracy(labels, p, 0.6) == np.mean([(x >= 0.6) == bool(y) for x, y in zip(p, labels, strict=True)])
    assert metrics.accuracy(np.array([1.0]), np.array([0.5])) == 1.0


@pytest.mark.parametrize(
    ("labels", "scores", "expected"),
    [([0, 0, 1, 1], [1, 2, 3, 4], 0.0), ([0, 0, 1, 1], [3, 4, 1, 2], 1.0), ([0, 1, 0, 1], [1, 2, 3, 4], 0.5)],
)
def test_eer(labels: list[int], scores: list[float], expected: float) -> None:
    assert metrics.eer(np.array(labels), np.array(scores, float)) == pytest.approx(expected)


def test_eer_is_where_both_errors_meet(rng: np.random.Generator) -> None:
    labels = np.repeat([0.0, 1.0], 5000)
    scores = rng.normal(0, 1, 10000) + 1.5 * labels
    rate = metrics.eer(labels, scores)
    threshold = np.quantile(scores[labels == 0], 1 - rate)
    assert np.mean(scores[labels == 1] < threshold) == pytest.approx(rate, abs=2e-3)
    assert rate == pytest.approx(0.2266, abs=0.01)  # of two normal distributions 1.5 apart: Phi(-.75)


def test_calibration_error(rng: np.random.Generator) -> None:
    p = rng.random(20000)
    labels = (rng.random(20000) < p).astype(float)
    assert metrics.calibration_error(labels, p) < 0.02
    assert metrics.calibration_error(labels, np.clip(p + 0.2, 0, 1)) == pytest.approx(0.18, abs=0.02)
    assert metrics.calibration_error(np.array([1.0, 0.0]), np.array([0.9, 0.2])) == pytest.approx(0.15)


def test_equal_scores_are_one_group(rng: np.random.Generator) -> None:
    labels = np.repeat([0.0, 1.0], 50)  # in the order of files
    assert metrics.calibration_error(labels, np.full(100, 0.5)) == 0
    shuffled = rng.permutation(100)
    p = np.round(rng.random(100), 1)
    assert metrics.calibration_error(labels, p) == metrics.calibration_error(labels[shuffled], p[shuffled])
    _, _, count = metrics.reliability(labels, np.linspace(0, 1, 100))
    assert count.tolist() == [10] * 10


def test_pair_accuracy() -> None:
    video = ["a", "a1", "b", "b1", "b2", "c1", "d", "d1"]
    original = [None, "a", None, "b", "b", "c, which is not here", None, None]
    p = np.array([0.2, 0.3, 0.6, 0.5, 0.6, 0.9, 0.1, 0.2])
    share, count = metrics.pair_accuracy(p, video, original)
    assert count == 3
    assert share == pytest.approx((1 + 0 + 0.5) / 3)
    none, count = metrics.pair_accuracy(p[:1], video[:1], original[:1])
    assert np.isnan(none)
    assert count == 0


def test_the_bootstrap_draws_sources(rng: np.random.Generator) -> None:
    source = [f"s{i // 10}" for i in range(200)]
    value = np.repeat(rng.normal(0, 1, 20), 10)  # ten copies of twenty independent numbers
    rounds = metrics.bootstrap(lambda rows: value[rows].mean(), source)
    assert rounds.std() == pytest.approx(value.std() / np.sqrt(20), rel=0.15), "not sqrt(200)"
    low, high = metrics.interval(rounds)
    assert low < value.mean() < high
    np.testing.assert_array_equal(rounds, metrics.bootstrap(lambda rows: value[rows].mean(), source))


def test_an_interval_of_what_is_mostly_no_number() -> None:
    assert metrics.interval(np.array([np.nan, np.nan, np.nan, 0.5])) is None
    assert metrics.interval(np.array([np.nan, 0.5, 0.5, 0.5])) == (0.5, 0.5)
