"""Logits -> scores: per track, then per video. Pure functions; every constant comes from the bundle.

Label 1 is fake. Frames are pooled per member, members are blended, the blend is calibrated, and the video rule is
applied to the calibrated scores of the tracks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from dfengine.bundle import Bundle
from dfengine.types import F64, FrameScore, Tracks, TrackScore

# Probabilities are kept this far from 0 and 1 when they become logits: float32 sigmoids round there.
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


def to_logit(p: ArrayLike) -> F64:
    p = np.clip(np.asarray(p, np.float64), EPSILON, 1 - EPSILON)
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
        return to_logit(np.exp(np.tensordot(share, np.log(np.clip(sigmoid(logits), EPSILON, 1)), 1)))
    return np.asarray(np.tensordot(share, logits, 1))


def judge(tracks: Tracks, logits: Mapping[str, F64], bundle: Bundle) -> Verdict:
    """Scores a video with at least one row. ``logits``: (R,) by member; members that did not run have no say."""
    ran = [m for m in bundle.members if m.name in logits]
    names, weights = [m.name for m in ran], np.array([m.weight for m in ran])
    by_row = np.stack([logits[n] for n in names])  # (M, R)
    ids = np.unique(tracks.track_id)
    rows = [np.flatnonzero(tracks.track_id == i) for i in ids]
    pooled = np.array([[pool_frames(m[r], bundle.aggregation.frames) for r in rows] for m in by_row])  # (M, K)
    sides = np.array([np.median((tracks.xyxy[r, 2:] - tracks.xyxy[r, :2]).max(axis=1)) for r in rows])

    track_logits = _calibrate(blend_members(pooled, weights, bundle.aggregation.members), bundle)  # (K,)
    frame_p = sigmoid(_calibrate(blend_members(by_row, weights, bundle.aggregation.members), bundle))  # (R,)
    video_logit = _video(track_logits, sides, bundle)
    return Verdict(
        p_fake=float(sigmoid(video_logit)),
        logit=video_logit,
        tracks=tuple(
            TrackScore(int(i), float(p), tuple(_frame_score(tracks, int(row), float(frame_p[row])) for row in r))
            for i, p, r in zip(ids, sigmoid(track_logits), rows, strict=True)
        ),
        members={
            n: float(sigmoid(_video(_calibrate(m, bundle), sides, bundle))) for n, m in zip(names, pooled, strict=True)
        },
    )


def _calibrate(logits: F64, bundle: Bundle) -> F64:
    return np.asarray(logits / bundle.calibration.temperature + bundle.calibration.bias)


def _video(track_logits: F64, sides: F64, bundle: Bundle) -> float:
    rule = bundle.aggregation.tracks
    if rule == "mean":
        return float(to_logit(sigmoid(track_logits).mean()))
    if rule == "largest":
        return float(track_logits[np.argmax(sides)])
    return float(track_logits.max())


def _frame_score(tracks: Tracks, row: int, p_fake: float) -> FrameScore:
    x1, y1, x2, y2 = (float(v) for v in tracks.xyxy[row])
    points = tuple((float(x), float(y)) for x, y in tracks.landmarks[row]) if tracks.detected[row] else None
    return FrameScore(int(tracks.index[row]), float(tracks.pts_seconds[row]), (x1, y1, x2, y2), points, p_fake)
