"""Joining faces in time, and deciding who counts.

A track is one person in one shot. Linking goes frame by frame, so that a video of any length needs only the tracks that
are alive; ``select`` looks back at whole tracks once the video is over.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from dfengine.bundle import TrackingSettings
from dfengine.stages import _boxes
from dfengine.types import F32, I64, LANDMARKS, Bool, Faces, Frames, Tracks

# Detections whose median steadies a box: itself and those before it. Of 1, 3, 5 and 9, five gave the least noise.
_STEADY_DETECTIONS = 5

# Fewer detections than this say nothing about motion.
_MIN_ROWS_FOR_MOTION = 4


class _OpenTrack:
    """A track that may go on.

    Note [Steady boxes]
    Which of several overlapping candidates survives as *the* box turns on the last digit of a confidence: one grey
    level in the picture moves a box by 3 % of its side, and the score of that frame by up to .1. The five landmarks
    hardly move. So a box is placed by them: their centre, plus the offset from there to the box in box sizes and the
    size of the box, both medians over the last detections - the last, so that it does not matter where a video is cut
    into Frames. Over 16 clips this lowered the largest difference between scores of the same frames from two colour
    conversions from .032 to .020, and the mean from .0063 to .0049.
    """

    def __init__(self, track_id: int) -> None:
        self.track_id = track_id
        self.box: F32 = np.zeros(4, np.float32)  # xyxy, as last detected: what the next one is matched with
        self.steady_box: F32 = self.box
        self.seen_seconds = 0.0
        self.frames_missed = 0  # since then
        self.gap: list[tuple[int, F32]] = []  # those of them that are in the current Frames, and the box there
        self._sizes: deque[F32] = deque(maxlen=_STEADY_DETECTIONS)
        self._offsets: deque[F32] = deque(maxlen=_STEADY_DETECTIONS)

    def see(self, box: F32, landmarks: F32, now: float) -> None:
        """Takes a detection: box (4,), landmarks (5, 2)."""
        self.box, self.seen_seconds, self.frames_missed = box, now, 0
        self.gap.clear()
        middle = landmarks.mean(axis=0)
        self._sizes.append(box[2:] - box[:2])
        self._offsets.append(np.asarray(((box[2:] + box[:2]) / 2 - middle) / self._sizes[-1], np.float32))
        size = np.median(self._sizes, axis=0)  # (2,)
        centre = middle + np.median(self._offsets, axis=0) * size
        self.steady_box = np.concatenate([centre - size / 2, centre + size / 2]).astype(np.float32)

    def stretch(self, before_hw: tuple[int, int], now_hw: tuple[int, int]) -> None:
        """The size of the picture changes, and what is in it stays: so do boxes, against the picture."""
        scale = np.array([now_hw[1] / before_hw[1], now_hw[0] / before_hw[0]], np.float32)
        self.box = self.box * np.tile(scale, 2)
        self.steady_box = self.steady_box * np.tile(scale, 2)
        self._sizes = deque((size * scale for size in self._sizes), maxlen=_STEADY_DETECTIONS)


class Linker:
    """Links the faces of one video, one Frames after the other. Not thread-safe."""

    def __init__(self, settings: TrackingSettings) -> None:
        self._settings = settings
        self._open_tracks: list[_OpenTrack] = []
        self._next_id = 0
        self._hw: tuple[int, int] | None = None  # of the picture last seen

    def link(self, frames: Frames, faces: Faces) -> tuple[Tracks, I64]:
        """Joins the faces of ``frames`` to the video's tracks, greedily by IoU, best pairs first.

        Returns the rows, and which of ``frames.images`` each is in, (R,).

        Frames between two detections of a track in which it was not found are filled with the box seen before; before
        the first and after the last detection nothing is filled, because the person may not be there.
        """
        rows: list[tuple[int, int, int]] = []  # track, image, row in faces (-1: filled)
        boxes: list[F32] = []
        for track in self._open_tracks:
            track.gap.clear()  # pixels of frames gone by are not there to be filled
        starts = np.searchsorted(faces.image_index, np.arange(len(frames) + 1))
        for image in range(len(frames)):
            now = float(frames.pts_seconds[image])
            here = np.arange(starts[image], starts[image + 1])
            self._follow_size(frames.images[image].upright_hw)
            pairs = self._match(faces.xyxy[here])
            for track, _ in pairs:
                rows += [(track.track_id, missed, -1) for missed, _ in track.gap]
                boxes += [box for _, box in track.gap]
            taken = {column for _, column in pairs}
            pairs += [(self._start(), column) for column in range(len(here)) if column not in taken]
            for track, column in pairs:
                face = int(here[column])
                track.see(faces.xyxy[face], faces.landmarks[face], now)
                rows.append((track.track_id, image, face))
                boxes.append(track.steady_box)
            matched = {id(track) for track, _ in pairs}
            for track in self._open_tracks:
                if id(track) not in matched:
                    track.gap.append((image, track.steady_box))
                    track.frames_missed += 1
            self._open_tracks = [track for track in self._open_tracks if self._goes_on(track, now)]
        return _make_tracks(rows, boxes, frames, faces)

    def _follow_size(self, hw: tuple[int, int]) -> None:
        if self._hw is not None and hw != self._hw:
            for track in self._open_tracks:
                track.stretch(self._hw, hw)
        self._hw = hw

    def _match(self, boxes: F32) -> list[tuple[_OpenTrack, int]]:
        if not self._open_tracks or len(boxes) == 0:
            return []
        iou = _boxes.iou_matrix(np.stack([track.box for track in self._open_tracks]), boxes)
        pairs: list[tuple[_OpenTrack, int]] = []
        while iou.flat[best := int(np.argmax(iou))] >= self._settings.min_iou:
            i, j = divmod(best, iou.shape[1])
            pairs.append((self._open_tracks[i], j))
            iou[i, :] = iou[:, j] = -1  # both are taken
        return pairs

    def _start(self) -> _OpenTrack:
        track = _OpenTrack(self._next_id)
        self._next_id += 1
        self._open_tracks.append(track)
        return track

    def _goes_on(self, track: _OpenTrack, now: float) -> bool:
        s = self._settings
        return now - track.seen_seconds <= s.max_gap_seconds or track.frames_missed <= s.max_gap_frames


def _make_tracks(
    rows: list[tuple[int, int, int]], boxes: list[F32], frames: Frames, faces: Faces
) -> tuple[Tracks, I64]:
    table = np.array(rows, np.int64).reshape(-1, 3)
    image_index, face = table[:, 1], table[:, 2]
    detected = face >= 0
    landmarks = np.full((len(table), LANDMARKS, 2), np.nan, np.float32)
    landmarks[detected] = faces.landmarks[face[detected]]
    confidence = np.zeros(len(table), np.float32)
    confidence[detected] = faces.confidence[face[detected]]
    xyxy = np.array(boxes, np.float32).reshape(-1, 4)
    tracks = Tracks(
        table[:, 0],
        frames.frame_index[image_index],
        frames.pts_seconds[image_index],
        xyxy,
        landmarks,
        confidence,
        detected,
    )
    order = np.lexsort((tracks.pts_seconds, tracks.track_id))
    return tracks[order], image_index[order]


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
