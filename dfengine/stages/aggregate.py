"""Logits -> scores: per track, then per video. Pure functions; every constant comes from the bundle.

Label 1 is fake. Frames are pooled per member, members are blended, the blend is calibrated, and the video rule is
applied to the calibrated scores of the tracks.

Note [Calibrated, then pooled]
Each track is calibrated and then the tracks are pooled. The other way round is another number where a rule takes the
mean of probabilities, so who fits temperature and bias must pool as the engine does: both call ``pool_tracks``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from dfengine.bundle import Bundle, Calibration
from dfengine.types import F64, I64, FrameScore, Tracks, TrackScore

# Probabilities are kept this far from 0 and 1 before a logarithm is taken: float32, which networks compute in, has no
# number between 1 - 6e-8 and 1, so what lies beyond is rounding and no certainty.
EPSILON = 1e-7


@dataclass(frozen=True)
class Verdict:
    """The scored part of a VideoScore."""

    p_fake: float
    logit: float
    tracks: tuple[TrackScore, ...]
    members: Mapping[str, float]


def sigmoid(x: ArrayLike) -> F64:
    return np.asarray(0.5 * (1 + np.tanh(0.5 * np.asarray(x, np.float64))))


def clip_probability(p: ArrayLike) -> F64:
    """Keeps probabilities EPSILON away from 0 and 1."""
    return np.clip(np.asarray(p, np.float64), EPSILON, 1 - EPSILON)


def to_logit(p: ArrayLike) -> F64:
    p = clip_probability(p)
    return np.asarray(np.log(p) - np.log1p(-p))


def pool_frames(logits: F64, rule: str) -> float:
    """Logits of one track's frames, (R,), by one member -> the track's logit."""
    if rule == "mean":
        return float(to_logit(sigmoid(logits).mean()))
    if rule == "median":
        return float(np.median(logits))
    return float(logits.mean())


def blend_members(logits: F64, weights: F64, rule: str) -> F64:
    """Logits of the members, (M, ...), with their weights, (M,) -> blended logits, (...)."""
    share = weights / weights.sum()
    if rule == "mean":
        return to_logit(np.tensordot(share, sigmoid(logits), 1))
    if rule == "geometric_mean":
        # Only 0 has no logarithm; the other end is clipped by to_logit.
        return to_logit(np.exp(np.tensordot(share, np.log(sigmoid(logits).clip(min=EPSILON)), 1)))
    return np.asarray(np.tensordot(share, logits, 1))


def calibrate(logits: F64, calibration: Calibration) -> F64:
    """Uncalibrated logits of tracks or rows, any shape -> calibrated ones."""
    return np.asarray(logits / calibration.temperature + calibration.bias)


def pool_tracks(logits: F64, sides: F64, calibration: Calibration, rule: str) -> F64:
    """Uncalibrated logits of the K tracks of videos, (..., K) -> calibrated logits of the videos, (...).

    ``sides``: (K,) or (..., K), how large the faces of each track are, pixels; ``rule``: Aggregation.tracks.
    """
    calibrated = calibrate(logits, calibration)
    if rule == "mean":
        return to_logit(sigmoid(calibrated).mean(axis=-1))
    if rule == "largest":
        largest = np.broadcast_to(sides, calibrated.shape).argmax(axis=-1)
        return np.asarray(np.take_along_axis(calibrated, largest[..., None], axis=-1)[..., 0])
    return np.asarray(calibrated.max(axis=-1))


@dataclass(frozen=True, eq=False)
class PooledTracks:
    """The K tracks of a video, uncalibrated. M members ran."""

    ids: I64  # (K,)
    rows: tuple[I64, ...]  # of the Tracks they were made from, for each track
    names: tuple[str, ...]  # of the members
    members: F64  # (M, K), logits
    blend: F64  # (K,), logits
    sides: F64  # (K,), pixels: the median of the box's longer side


def pool_rows(tracks: Tracks, logits: Mapping[str, F64], bundle: Bundle) -> PooledTracks:
    """What is known of each track of a video with at least one row. ``logits``: as for ``judge``."""
    names, by_row, weights = _stack_members(logits, bundle)
    rules = bundle.aggregation
    ids = np.unique(tracks.track_id)
    rows = tuple(np.flatnonzero(tracks.track_id == i) for i in ids)
    pooled = np.array([[pool_frames(m[r], rules.frames) for r in rows] for m in by_row])
    sides = np.array([np.median((tracks.xyxy[r, 2:] - tracks.xyxy[r, :2]).max(axis=1)) for r in rows])
    return PooledTracks(ids, rows, names, pooled, blend_members(pooled, weights, rules.members), sides)


def judge(tracks: Tracks, logits: Mapping[str, F64], bundle: Bundle) -> Verdict:
    """Scores a video with at least one row. ``logits``: (R,) by member; members that did not run have no say."""
    _, by_row, weights = _stack_members(logits, bundle)
    rules, calibration = bundle.aggregation, bundle.calibration
    pooled = pool_rows(tracks, logits, bundle)
    frame_p = sigmoid(calibrate(blend_members(by_row, weights, rules.members), calibration))  # (R,)
    track_p = sigmoid(calibrate(pooled.blend, calibration))  # (K,)
    video_logit = float(pool_tracks(pooled.blend, pooled.sides, calibration, rules.tracks))
    member_p = sigmoid(pool_tracks(pooled.members, pooled.sides, calibration, rules.tracks))  # (M,)
    return Verdict(
        p_fake=float(sigmoid(video_logit)),
        logit=video_logit,
        tracks=tuple(
            TrackScore(int(i), float(p), tuple(_frame_score(tracks, int(row), float(frame_p[row])) for row in r))
            for i, p, r in zip(pooled.ids, track_p, pooled.rows, strict=True)
        ),
        members={name: float(p) for name, p in zip(pooled.names, member_p, strict=True)},
    )


def _stack_members(logits: Mapping[str, F64], bundle: Bundle) -> tuple[tuple[str, ...], F64, F64]:
    """(names, logits (M, R), weights (M,)) of the members that ran, in the bundle's order."""
    ran = [m for m in bundle.members if m.name in logits]
    return tuple(m.name for m in ran), np.stack([logits[m.name] for m in ran]), np.array([m.weight for m in ran])


def _frame_score(tracks: Tracks, row: int, p_fake: float) -> FrameScore:
    x1, y1, x2, y2 = (float(v) for v in tracks.xyxy[row])
    points = tuple((float(x), float(y)) for x, y in tracks.landmarks[row]) if tracks.detected[row] else None
    return FrameScore(int(tracks.frame_index[row]), float(tracks.pts_seconds[row]), (x1, y1, x2, y2), points, p_fake)
