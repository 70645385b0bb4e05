"""The loop from frames to people, with a detector that says what it is told."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from dfengine.bundle import DetectorSettings, TrackingSettings
from dfengine.sampling import Mode
from dfengine.stages.people import People
from dfengine.timing import Watch
from dfengine.types import Faces, Frames, Image

SETTINGS = TrackingSettings(min_detected_ratio=0.5, min_motion=0.0)
RGB = np.zeros((8, 8, 3), np.uint8)


class Told:
    """Finds in the n-th picture it is shown the boxes (x, side, confidence) of the n-th entry."""

    settings = DetectorSettings(stride=3)

    def __init__(self, faces: Sequence[Sequence[tuple[float, float, float]]]) -> None:
        self.faces = faces
        self.strides: list[int] = []
        self._shown = 0

    def detect(self, images: Sequence[Image], *, stride: int = 1, threads: int = 1) -> Faces:
        self.strides.append(stride)
        here = self.faces[self._shown : self._shown + len(images)]
        self._shown += len(images)
        rows = [(i, *face) for i, faces in enumerate(here) for face in faces]
        table = np.array(rows, np.float32).reshape(-1, 4)
        x, side = table[:, 1], table[:, 2]
        boxes = np.stack([x, 0 * x, x + side, side], axis=1)
        landmarks = np.repeat(boxes[:, None, :2], 5, axis=1)
        return Faces(table[:, 0].astype(np.int64), boxes, landmarks, table[:, 3].copy())


def chunks(sizes: Sequence[int]) -> list[Frames]:
    starts = np.cumsum([0, *sizes])
    return [
        Frames(
            tuple(Image.from_rgb(RGB) for _ in range(size)),
            np.arange(start, start + size) / 2,
            np.arange(start, start + size) * 15,
            is_last=i == len(sizes) - 1,
        )
        for i, (start, size) in enumerate(zip(starts, sizes, strict=False))
    ]


# Two people who stay, and one who passes in the second frame only.
STAYING, BESIDE, PASSING = (0.0, 50.0, 0.99), (200.0, 40.0, 0.95), (400.0, 50.0, 0.99)
SEEN = [[STAYING, BESIDE], [STAYING, BESIDE, PASSING], [STAYING, BESIDE], [STAYING, BESIDE]]


@pytest.mark.parametrize("sizes", [[4], [2, 2], [1, 1, 1, 1], [4, 0]])
def test_who_counts_does_not_depend_on_the_chunks(sizes: list[int]) -> None:
    people = People(Told(SEEN), SETTINGS, "exact")
    given = list(people.each(chunks(sizes)))
    rows, order = people.finish()
    assert rows.track_id.tolist() == [0, 0, 0, 0, 1, 1, 1, 1], "ordered by track, without who passed"
    assert rows.frame_index.tolist() == [0, 15, 30, 45] * 2
    together = np.concatenate([part.pts_seconds for _, part, _ in given])
    np.testing.assert_array_equal(together[order], rows.pts_seconds)
    assert len(together) == 8 + (1 if sizes != [4] else 0), "in the last Frames nobody is given who does not count"


@pytest.mark.parametrize(("mode", "stride"), [("exact", 1), ("reference", 3), ("keyframe", 3)])
def test_the_mode_says_which_frames_are_searched(mode: Mode, stride: int) -> None:
    detector = Told(SEEN)
    list(People(detector, SETTINGS, mode).each(chunks([2, 2])))
    assert detector.strides == [stride, stride]


def test_nobody() -> None:
    people = People(Told([[], []]), SETTINGS, "exact")
    ((_, rows, _),) = people.each(chunks([2]))
    assert len(rows) == 0
    rows, order = people.finish()
    assert (len(rows), len(order)) == (0, 0)


def test_time_is_counted_by_stage() -> None:
    watch = Watch()
    list(People(Told(SEEN), SETTINGS, "exact", watch=watch).each(chunks([4])))
    assert list(watch.seconds) == ["detect", "track"]
