"""Joining faces in time, and deciding who counts.

A track is one person in one shot. Linking goes frame by frame, so that a video of any length needs only the tracks that
are alive; ``select`` looks back at whole tracks once the video is over.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from dfengine import _boxes
from dfengine.bundle import TrackingSettings
from dfengine.types import F32, I64, LANDMARKS, Bool, Faces, Frames, Tracks

# Fewer detections than this say nothing about motion.
_MIN_ROWS_FOR_MOTION = 4


@dataclass
class _Live:
    """A track that may go on."""

    track_id: int
    box: F32  # (4,), the last one seen
    seen_seconds: float
    frames_missed: int = 0  # since then
    gap: list[int] = field(default_factory=list)  # those of them that are in the current Frames


class Linker:
    """Links the faces of one video, one Frames after the other. Not thread-safe."""

    def __init__(self, settings: TrackingSettings) -> None:
        self._settings = settings
        self._live: list[_Live] = []
        self._next_id = 0

    def link(self, frames: Frames, faces: Faces) -> Tracks:
        """Joins the faces of ``frames`` to the video's tracks, greedily by IoU, best pairs first.

        Frames between two detections of a track in which it was not found are filled with the box seen before; before
        the first and after the last detection nothing is filled, because the person may not be there.
        """
        rows: list[tuple[int, int, int]] = []  # track, frame, row in faces (-1: filled)
        boxes: list[F32] = []
        for live in self._live:
            live.gap.clear()  # pixels of frames gone by are not there to be filled
        starts = np.searchsorted(faces.frame, np.arange(len(frames) + 1))
        for frame in range(len(frames)):
            now = float(frames.pts_seconds[frame])
            here = np.arange(starts[frame], starts[frame + 1])
            pairs = self._match(faces.xyxy[here])
            for live, column in pairs:
                for missed in live.gap:
                    rows.append((live.track_id, missed, -1))
                    boxes.append(live.box)
                self._see(live, faces.xyxy[here[column]], now)
                rows.append((live.track_id, frame, int(here[column])))
                boxes.append(live.box)
            matched = {id(live) for live, _ in pairs}
            taken = {column for _, column in pairs}
            for live in self._live:
                if id(live) not in matched:
                    live.gap.append(frame)
                    live.frames_missed += 1
            for column, face in enumerate(here):
                if column not in taken:
                    live = _Live(self._next_id, faces.xyxy[face], now)
                    self._next_id += 1
                    self._live.append(live)
                    rows.append((live.track_id, frame, int(face)))
                    boxes.append(live.box)
            self._live = [live for live in self._live if self._goes_on(live, now)]
        return _make_tracks(rows, boxes, frames, faces)

    def _match(self, boxes: F32) -> list[tuple[_Live, int]]:
        if not self._live or len(boxes) == 0:
            return []
        iou = _boxes.iou_matrix(np.stack([live.box for live in self._live]), boxes)
        pairs: list[tuple[_Live, int]] = []
        while iou.flat[best := int(np.argmax(iou))] >= self._settings.min_iou:
            i, j = divmod(best, iou.shape[1])
            pairs.append((self._live[i], j))
            iou[i, :] = iou[:, j] = -1  # both are taken
        return pairs

    @staticmethod
    def _see(live: _Live, box: F32, now: float) -> None:
        live.box, live.seen_seconds, live.frames_missed = box, now, 0
        live.gap.clear()

    def _goes_on(self, live: _Live, now: float) -> bool:
        s = self._settings
        return now - live.seen_seconds <= s.max_gap_seconds or live.frames_missed <= s.max_gap_frames


def _make_tracks(rows: list[tuple[int, int, int]], boxes: list[F32], frames: Frames, faces: Faces) -> Tracks:
    table = np.array(rows, np.int64).reshape(-1, 3)
    frame, face = table[:, 1], table[:, 2]
    detected = face >= 0
    landmarks = np.full((len(table), LANDMARKS, 2), np.nan, np.float32)
    landmarks[detected] = faces.landmarks[face[detected]]
    confidence = np.zeros(len(table), np.float32)
    confidence[detected] = faces.confidence[face[detected]]
    xyxy = np.array(boxes, np.float32).reshape(-1, 4)
    tracks = Tracks(
        table[:, 0],
        frame,
        frames.index[frame],
        frames.pts_seconds[frame],
        xyxy,
        landmarks,
        confidence,
        detected,
    )
    return tracks[np.lexsort((tracks.pts_seconds, tracks.track_id))]


def select(tracks: Tracks, frames_sampled: int, settings: TrackingSettings) -> I64:
    """The ids of the tracks that are people who count, given all rows of a video.

    Drops tracks that are unsure, too brief, too small against the largest face, or still as a print. Only being unsure
    can leave nobody: a rule that compares people with each other says nothing when it would drop them all.
    """
    ids = np.unique(tracks.track_id)
    by_id = [tracks[(tracks.track_id == i) & tracks.detected] for i in ids]
    kept = np.array([np.median(t.confidence) >= settings.min_confidence for t in by_id], np.bool_)
    detected = np.array([len(t) for t in by_id])
    side = np.array([np.median((t.xyxy[:, 2:] - t.xyxy[:, :2]).max(axis=1)) for t in by_id])
    kept = _unless_all(kept, detected >= settings.min_detected_ratio * frames_sampled)
    kept = _unless_all(kept, side >= settings.min_relative_side * side[kept].max(initial=0))
    kept = _unless_all(kept, np.array([landmark_motion(t) >= settings.min_motion for t in by_id], np.bool_))
    return ids[kept]


def landmark_motion(track: Tracks) -> float:
    """How much a face moves: root mean square over landmarks of their standard deviation in time, in box sides.

    A print or a painting before a fixed camera keeps its place; nobody holds that still. Before a moving camera the two
    look alike, and nothing is dropped. Too few detections give infinity: nothing can be said.
    """
    if len(track) < _MIN_ROWS_FOR_MOTION:
        return float("inf")
    side = np.median((track.xyxy[:, 2:] - track.xyxy[:, :2]).max(axis=1))
    return float(np.sqrt((track.landmarks / side).var(axis=0).mean()))


def _unless_all(kept: Bool, rule: Bool) -> Bool:
    return kept & rule if (kept & rule).any() else kept
