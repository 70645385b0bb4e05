"""Frames -> the people in them: detection, linking and the choice of who counts, as one loop over a video.

The engine, the training package and the benchmarks all go through it, so that what a network sees in training is what
it sees in use.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np

from dfengine.bundle import DetectorSettings, TrackingSettings
from dfengine.sampling import Mode
from dfengine.stages.track import Linker, select
from dfengine.timing import Watch
from dfengine.types import I64, Faces, Frames, Image, Tracks


class FaceDetector(Protocol):
    """What dfengine.stages.detect.Detector is here."""

    settings: DetectorSettings

    def detect(self, images: Sequence[Image], *, stride: int = 1, threads: int = 1) -> Faces: ...


class People:
    """The people of one video, found on ``threads`` cores. Not thread-safe.

    Go through ``each`` to its end, and keep what belongs to its rows; then ``finish`` says which of them count.
    """

    def __init__(
        self,
        detector: FaceDetector,
        tracking: TrackingSettings,
        mode: Mode,
        *,
        threads: int = 1,
        watch: Watch | None = None,
    ) -> None:
        self._detector, self._tracking = detector, tracking
        # In exact mode every frame is searched; DetectorSettings.stride says why not in the others.
        self._stride = 1 if mode == "exact" else detector.settings.stride
        self._threads = threads
        self._watch = watch if watch is not None else Watch()
        self._linker = Linker(tracking)
        self._parts: list[Tracks] = []
        self._frames_sampled = 0
        self._ids: I64 = np.zeros(0, np.int64)  # of the tracks that count

    def each(self, video: Iterable[Frames]) -> Iterator[tuple[Frames, Tracks, I64]]:
        """Each Frames of a video with the rows found in it, ordered by track and then by time, and which of its images
        each row is in, (R,).

        Who counts shows at the end of a video. Rows of the last Frames, which mostly is the only one, are of people who
        count; before, all are given.
        """
        for frames in video:
            self._frames_sampled += len(frames)
            with self._watch("detect"):
                faces = self._detector.detect(frames.images, stride=self._stride, threads=self._threads)
            with self._watch("track"):
                rows, image_index = self._linker.link(frames, faces)
                if frames.is_last:
                    everyone = Tracks.concatenate([*self._parts, rows])
                    self._ids = select(everyone, self._frames_sampled, self._tracking)
                    counts = np.isin(rows.track_id, self._ids)
                    rows, image_index = rows[counts], image_index[counts]
                self._parts.append(rows)
            yield frames, rows, image_index

    @property
    def count(self) -> int:
        """How many people count: known with the last Frames."""
        return len(self._ids)

    def finish(self) -> tuple[Tracks, I64]:
        """The rows of people who count, ordered by track and then by time, and the place of each among all rows that
        ``each`` gave."""
        everyone = Tracks.concatenate(self._parts)
        order = np.lexsort((everyone.pts_seconds, everyone.track_id))
        order = order[np.isin(everyone.track_id[order], self._ids)]
        return everyone[order], order
