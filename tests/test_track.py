"""Linking and choosing, on made-up faces: a person is a box side, a path and what the detector saw of it."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from dfengine.bundle import TrackingSettings
from dfengine.stages.track import Linker, landmark_motion, select
from dfengine.types import Faces, Frames, Image, Tracks

PICTURE = Image((np.zeros((2, 2), np.uint8),), matrix="gray")
# Stated here, because the defaults are tuned.
SETTINGS = TrackingSettings(
    min_iou=0.3, max_gap_seconds=2.0, max_gap_frames=2,
    min_detected_ratio=0.15, min_confidence=0.9, min_relative_side=0.35, min_motion=0.01,
)  # fmt: skip
POINTS = np.float32([(0.3, 0.4), (0.7, 0.4), (0.5, 0.6), (0.35, 0.8), (0.65, 0.8)])  # of a face, in box sides


def make_frames(seconds, first_index=0, is_last=True):
    n = len(seconds)
    index = np.arange(first_index, first_index + n, dtype=np.int64) * 3
    return Frames((PICTURE,) * n, np.array(seconds, np.float64), index, is_last)


def make_faces(rows):
    """rows: (frame, x, y, side) or (frame, x, y, side, confidence) -> Faces, sorted as the detector sorts them."""
    rows = sorted(((*row, 0.99) if len(row) == 4 else row for row in rows), key=lambda row: (row[0], -row[4]))
    table = np.array(rows, np.float64).reshape(-1, 5)
    corner, side = table[:, 1:3], table[:, 3:4]
    return Faces(
        table[:, 0].astype(np.int64),
        np.concatenate([corner, corner + side], axis=1).astype(np.float32),
        (corner[:, None] + POINTS * side[:, None]).astype(np.float32),
        table[:, 4].astype(np.float32),
    )


def link(seconds, rows, **settings) -> Tracks:
    return Linker(dataclasses.replace(SETTINGS, **settings)).link(make_frames(seconds), make_faces(rows))[0]


def by_track(tracks):
    """{track: [(frame, detected)]}, where every third frame is sampled."""
    ids = np.unique(tracks.track_id)
    return {
        int(i): list(zip((tracks.frame_index[rows] // 3).tolist(), tracks.detected[rows].tolist(), strict=True))
        for i in ids
        for rows in [tracks.track_id == i]
    }


def seconds(n, step=0.5):
    return np.arange(n) * step


# -- pictures that change their size -----------------------------------------------------------------------------------


def test_boxes_follow_the_size_of_the_picture():
    """Some pictures are half as wide and a quarter as high; the face keeps its place in them, and is missed twice."""
    small = Image((np.zeros((25, 50), np.uint8),), matrix="gray")
    large = Image((np.zeros((100, 100), np.uint8),), matrix="gray")
    images = (large, small, small, large, small)
    whole = Faces.concatenate([make_faces([(i, 60, 60, 30)]) for i in (0, 1, 4)])
    scale = np.array([[1, 1], [0.5, 0.25], [0.5, 0.25]], np.float32)
    faces = dataclasses.replace(whole, xyxy=whole.xyxy * np.tile(scale, 2), landmarks=whole.landmarks * scale[:, None])
    frames = dataclasses.replace(make_frames(seconds(5)), images=images)
    tracks, image_index = Linker(SETTINGS).link(frames, faces)
    rows = [i for i in range(5) if i in image_index]
    assert set(tracks.track_id.tolist()) == {0}
    assert {0, 1, 4} <= set(rows)
    relative = tracks.xyxy / np.array([images[row].upright_hw[::-1] * 2 for row in rows])
    np.testing.assert_allclose(relative, [[0.6, 0.6, 0.9, 0.9]] * len(rows), atol=1e-6)


# -- linking -----------------------------------------------------------------------------------------------------------


def test_no_frames_and_no_faces():
    assert len(link([], [])) == 0
    assert len(link(seconds(3), [])) == 0


def test_one_frame():
    tracks = link([0.0], [(0, 10, 10, 50), (0, 200, 10, 60)])
    assert by_track(tracks) == {0: [(0, True)], 1: [(0, True)]}


def test_columns_of_a_track():
    rows = [(0, 10, 10, 50, 0.9), (1, 12, 11, 50, 0.8)]
    tracks, faces = link([0.0, 0.5], rows), make_faces(rows)
    assert tracks.track_id.tolist() == [0, 0]
    assert tracks.frame_index.tolist() == [0, 3]
    assert tracks.pts_seconds.tolist() == [0.0, 0.5]
    np.testing.assert_array_equal(tracks.xyxy, faces.xyxy)
    np.testing.assert_array_equal(tracks.landmarks, faces.landmarks)
    np.testing.assert_array_equal(tracks.confidence, faces.confidence)


def test_two_people_who_cross():
    n = 21
    walk = [(t, 10.0 * t, 0, 100) for t in range(n)] + [(t, 200 - 10.0 * t, 40, 100, 0.95) for t in range(n)]
    tracks = link(seconds(n), walk)
    assert np.unique(tracks.track_id).tolist() == [0, 1]
    for i, y in ((0, 0), (1, 40)):
        mine = tracks[tracks.track_id == i]
        assert len(mine) == n
        assert (mine.xyxy[:, 1] == y).all()


def test_the_best_pair_is_taken_first():
    # The second face overlaps with both tracks, and is nearer to the second one. Both find their own.
    tracks = link([0.0, 0.5], [(0, 0, 0, 100, 0.9), (0, 60, 0, 100, 0.8), (1, 50, 0, 100, 0.95), (1, 5, 0, 100, 0.7)])
    assert by_track(tracks) == {0: [(0, True), (1, True)], 1: [(0, True), (1, True)]}
    assert tracks.xyxy[:, 0].tolist() == [0, 5, 60, 50]


def test_a_track_takes_one_face_a_frame():
    tracks = link([0.0, 0.5], [(0, 0, 0, 100), (1, 0, 0, 100, 0.9), (1, 10, 0, 100, 0.8)])
    assert by_track(tracks) == {0: [(0, True), (1, True)], 1: [(1, True)]}


@pytest.mark.parametrize(("x", "people"), [(0, 1), (53, 1), (55, 2), (100, 2), (500, 2)])
def test_overlap_decides(x, people):
    # IoU of .307 at a shift of 53 % of the side, .290 at 55 %; the limit is .3.
    assert len(by_track(link([0.0, 0.5], [(0, 0, 0, 100), (1, x, 0, 100)]))) == people


@pytest.mark.parametrize("gap", [1, 2, 3])
def test_a_gap_is_filled_with_the_box_seen_before(gap):
    tracks = link(seconds(gap + 2), [(0, 10, 10, 50), (gap + 1, 20, 14, 50)])
    assert by_track(tracks) == {0: [(0, True), *((t, False) for t in range(1, gap + 1)), (gap + 1, True)]}
    filled = tracks[~tracks.detected]
    np.testing.assert_array_equal(filled.xyxy, np.tile(tracks.xyxy[:1], (gap, 1)))
    assert np.isnan(filled.landmarks).all()
    assert (filled.confidence == 0).all()
    assert filled.frame_index.tolist() == [3 * t for t in range(1, gap + 1)]
    assert not np.isnan(tracks.landmarks[tracks.detected]).any()


def test_nothing_is_filled_before_the_first_and_after_the_last_detection():
    assert by_track(link(seconds(6), [(2, 0, 0, 50), (3, 0, 0, 50)])) == {0: [(2, True), (3, True)]}


def test_two_gaps_of_one_track():
    rows = [(t, 0, 0, 50) for t in (0, 2, 3, 5)]
    assert by_track(link(seconds(6), rows)) == {0: [(t, t not in (1, 4)) for t in range(6)]}


def test_a_person_who_was_gone_too_long_is_a_new_one():
    # Gone from 0 s to 3 s, over 5 frames: longer than both limits.
    rows = [(0, 0, 0, 50), (6, 0, 0, 50)]
    assert by_track(link(seconds(7), rows)) == {0: [(0, True)], 1: [(6, True)]}
    assert len(by_track(link(seconds(7), rows, max_gap_seconds=3.0))) == 1
    assert len(by_track(link(seconds(7), rows, max_gap_frames=5))) == 1
    assert len(by_track(link(seconds(7), rows, max_gap_frames=4))) == 2


def test_the_rate_does_not_matter():
    """A track ends by time, where frames are dense: 1.9 s apart is one person, at any rate."""
    for rate in (2, 10, 30):
        last = int(1.9 * rate)
        assert len(by_track(link(np.arange(last + 1) / rate, [(0, 0, 0, 50), (last, 0, 0, 50)]))) == 1


def test_sparse_sampling_keeps_a_person():
    assert len(by_track(link(seconds(17, 60), [(t, 2 * t, 0, 50) for t in range(17)]))) == 1
    with_blinks = [(t, 0, 0, 50) for t in range(17) if t % 3 == 0]  # two frames, 120 s, without a detection
    assert len(by_track(link(seconds(17, 60), with_blinks))) == 1


def chunks(times, rows, borders, **settings):
    """Links in parts; rows of all parts, in the order of one part."""
    linker = Linker(dataclasses.replace(SETTINGS, **settings))
    parts = []
    edges = [0, *borders, len(times)]
    for a, b in itertools.pairwise(edges):
        frames = make_frames(times[a:b], a, is_last=b == len(times))
        parts.append(linker.link(frames, make_faces([(r[0] - a, *r[1:]) for r in rows if a <= r[0] < b]))[0])
    tracks = Tracks.concatenate(parts)
    return tracks[np.lexsort((tracks.pts_seconds, tracks.track_id))]


def assert_same(a, b):
    for name in ("track_id", "frame_index", "pts_seconds", "xyxy", "landmarks", "confidence", "detected"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)


@pytest.mark.parametrize("borders", [[1], [5], [9], [3, 6], [1, 2, 3, 4, 5, 6, 7, 8, 9], [5, 5]], ids=str)
def test_parts_link_as_one(borders):
    walk = [(t, 8.0 * t, 0, 100) for t in range(10)] + [(t, 300 - 8.0 * t, 40, 100, 0.9) for t in range(10)]
    walk += [(t, 600, 0, 40) for t in range(4, 10)]
    assert_same(chunks(seconds(10), walk, borders), link(seconds(10), walk))


@pytest.mark.parametrize("border", range(1, 8))
def test_a_gap_over_a_border_is_one_person_with_less_filled(border):
    rows = [(t, 0, 0, 50) for t in (0, 1, 4, 5, 7)]
    whole, parts = link(seconds(8), rows), chunks(seconds(8), rows, [border])
    assert np.unique(parts.track_id).tolist() == [0]
    assert_same(parts[parts.detected], whole[whole.detected])
    # Only frames that lie in the same part as the detection behind them can be filled.
    lost = {t for t in (2, 3) if t < border <= 4} | ({6} if border == 7 else set())
    assert parts[~parts.detected].frame_index.tolist() == [3 * t for t in (2, 3, 6) if t not in lost]


@pytest.mark.parametrize("step", [0.5, 60.0])
@pytest.mark.parametrize("gap", range(1, 9))
def test_who_is_who_does_not_depend_on_the_parts(gap, step):
    rows = [(0, 0, 0, 50), (gap + 1, 0, 0, 50), (gap + 2, 0, 0, 50)]
    n = gap + 3
    want = link(seconds(n, step), rows)
    want = want[want.detected]
    for border in range(1, n):
        parts = chunks(seconds(n, step), rows, [border])
        assert_same(parts[parts.detected], want)
    parts = chunks(seconds(n, step), rows, list(range(1, n)))
    assert_same(parts[parts.detected], want)


def test_an_empty_part():
    rows = [(t, 0, 0, 50) for t in range(4)]
    assert_same(chunks(seconds(4), rows, [0, 2]), link(seconds(4), rows))


def test_a_linker_serves_one_video_and_ids_go_on():
    linker = Linker(SETTINGS)
    first, _ = linker.link(make_frames([0.0]), make_faces([(0, 0, 0, 50)]))
    second, _ = linker.link(make_frames([0.5]), make_faces([(0, 500, 0, 50)]))
    assert (first.track_id.tolist(), second.track_id.tolist()) == ([0], [1])


def test_random_faces_keep_the_rules(rng):
    n = 30
    rows = [
        (t, *rng.uniform(0, 200, 2), rng.uniform(30, 90), rng.uniform(0.7, 1))
        for t in range(n)
        for _ in range(rng.integers(0, 5))
    ]
    tracks, faces = link(seconds(n, 0.3), rows), make_faces(rows)
    assert tracks.detected.sum() == len(faces)  # every face is in exactly one track
    keys = list(zip(tracks.track_id.tolist(), tracks.frame_index.tolist(), strict=True))
    assert len(set(keys)) == len(keys)  # at most once a frame
    assert keys == sorted(keys)  # by track, then by time
    for i in np.unique(tracks.track_id):
        mine = tracks[tracks.track_id == i]
        assert mine.detected[[0, -1]].all()
        assert (np.diff(mine.frame_index) == 3).all()  # no holes
    # Boxes are steadied, landmarks are as detected.
    seen = {tuple(points) for points in tracks.landmarks[tracks.detected].reshape(-1, 10).tolist()}
    assert seen == {tuple(points) for points in faces.landmarks.reshape(-1, 10).tolist()}


@pytest.mark.parametrize(("moved", "people"), [(7, 1), (7.01, 2)])
def test_an_overlap_that_equals_the_minimum_is_enough(moved, people):
    tracks = link([0.0, 0.5], [(0, 0, 0, 13), (1, moved, 0, 13)])  # (13 - 7) / (13 + 7) is .3
    assert len(np.unique(tracks.track_id)) == people


# -- choosing ----------------------------------------------------------------------------------------------------------


def moving(x, y, side, frames, confidence=0.99, step=3.0):
    """A person who sways: far above the limit of motion."""
    return [(t, x + step * (t % 5), y, side, confidence) for t in frames]


def choose(n, *people, settings=None):
    """The numbers, in the order given, of the people that count."""
    settings = settings or SETTINGS
    rows = [row for person in people for row in person]
    tracks, _ = Linker(settings).link(make_frames(seconds(n)), make_faces(rows))
    starts = []  # each person's track, by the box of its first row
    for person in people:
        x, y, side = person[0][1:4]
        here = np.isclose(tracks.xyxy, np.float32([x, y, x + side, y + side]), atol=1e-2).all(axis=1)
        match = here & (tracks.frame_index == 3 * person[0][0])
        starts.append(int(tracks.track_id[match][0]))
    ids = select(tracks, n, settings)
    assert ids.dtype == np.int64
    assert (np.diff(ids) > 0).all()
    return sorted(starts.index(i) for i in ids)


N = 20
MAIN = moving(0, 0, 100, range(N))


def test_people_count():
    assert choose(N, MAIN) == [0]
    assert choose(N, MAIN, moving(300, 0, 80, range(N), 0.95)) == [0, 1]


@pytest.mark.parametrize(
    ("other", "counts"),
    [
        (moving(300, 0, 100, range(2)), False),  # brief: 2 of 20 are 10 %
        (moving(300, 0, 100, range(5, 8)), True),  # 15 %
        (moving(300, 0, 34, range(N), step=1.0), False),  # small: .34 of the side
        (moving(300, 0, 36, range(N), step=1.0), True),
        (moving(300, 0, 100, range(N), 0.89), False),  # unsure
        (moving(300, 0, 100, range(N), 0.91), True),
        (moving(300, 0, 100, range(9), 0.85) + moving(300, 0, 100, range(9, N), 0.95), True),  # unsure at times
        ([(t, 300, 0, 100, 0.98) for t in range(N)], False),  # still
        ([(t, 300, 0, 100, 0.98) for t in range(3)], True),  # too few detections to call it still
    ],
)
def test_who_does_not_count_beside_a_person(other, counts):
    assert choose(N, MAIN, other) == ([0, 1] if counts else [0])


def jitter(rows, amount):
    """Moves each face by noise of `amount` box sides, as camera noise does."""
    noise = np.random.default_rng(1).normal(0, amount, (len(rows), 2))
    return [
        (t, x + dx * side, y + dy * side, side, c) for (t, x, y, side, c), (dx, dy) in zip(rows, noise, strict=True)
    ]


def test_a_print_in_the_noise_of_the_camera():
    still = [(t, 300, 0, 100, 0.98) for t in range(N)]
    assert choose(N, MAIN, jitter(still, 0.003)) == [0]
    assert choose(N, MAIN, jitter(still, 0.02)) == [0, 1]


@pytest.mark.parametrize(
    "lonely",
    [
        moving(0, 0, 100, range(1)),  # brief
        [(t, 0, 0, 100, 0.99) for t in range(N)],  # still
        moving(0, 0, 5, range(N), step=0.2),  # tiny
        moving(0, 0, 100, range(N), 0.9),  # just sure enough
    ],
)
def test_somebody_always_counts(lonely):
    assert choose(N, lonely) == [0]


def test_two_prints_and_nobody_else():
    assert choose(N, *([(t, x, 0, 100, 0.98) for t in range(N)] for x in (0, 300))) == [0, 1]


def test_only_being_unsure_leaves_nobody():
    assert choose(N, moving(0, 0, 100, range(N), 0.85), moving(300, 0, 100, range(N), 0.88)) == []


def test_the_largest_face_is_one_that_counts():
    # A huge false detection must not make a person small.
    huge = moving(0, 500, 400, range(N), 0.75)
    brief = moving(600, 0, 400, range(2))
    assert choose(N, MAIN, huge) == [0]
    assert choose(N, MAIN, brief) == [0]


def test_gaps_do_not_count_as_detections():
    # 3 detections of 20 frames are 15 %, whatever lies between them; 2 are not.
    assert choose(N, MAIN, moving(300, 0, 100, (0, 3, 6))) == [0, 1]
    assert choose(N, MAIN, moving(300, 0, 100, (0, 3))) == [0]


def test_nobody_at_all():
    empty = link(seconds(3), [])
    assert select(empty, 3, SETTINGS).tolist() == []
    assert select(empty, 0, SETTINGS).tolist() == []


def test_one_frame_video():
    assert choose(1, [(0, 0, 0, 100, 0.95)]) == [0]
    assert choose(1, [(0, 0, 0, 100, 0.95)], [(0, 300, 0, 60, 0.99)]) == [0, 1]
    assert choose(1, [(0, 0, 0, 100, 0.8)]) == []


def test_settings_are_obeyed():
    other = moving(300, 0, 34, range(2), 0.6, step=0.5)
    lenient = dataclasses.replace(SETTINGS, min_detected_ratio=0, min_confidence=0.5, min_relative_side=0, min_motion=0)
    assert choose(N, MAIN, other) == [0]
    assert choose(N, MAIN, other, settings=lenient) == [0, 1]


def test_landmark_motion():
    tracks = link(seconds(4), [(t, 10.0 * (t % 2), 0, 100) for t in range(4)])
    # x is 0, 10, 0, 10: standard deviation 5, that is .05 sides; y does not move. Mean of the squares: half.
    assert landmark_motion(tracks) == pytest.approx(0.05 / 2**0.5, abs=1e-6)
    assert landmark_motion(tracks[:3]) == float("inf")
    assert landmark_motion(tracks[:0]) == float("inf")


def test_boxes_are_steadied_by_the_landmarks():
    """One face 100 px wide walks by 9 px a frame; in frame 8 another candidate box won, the landmarks stayed."""
    true = np.stack([np.float32([100, 100, 200, 220]) + 9 * i for i in range(17)])
    seen = true.copy()
    seen[8] += np.float32([7, -5, 12, 3])
    landmarks = true[:, None, :2] + POINTS * np.float32([100, 120])
    frames = make_frames(np.arange(17) / 2)
    faces = Faces(np.arange(17), seen, landmarks.astype(np.float32), np.ones(17, np.float32))
    rows, _ = Linker(SETTINGS).link(frames, faces)
    np.testing.assert_allclose(rows.xyxy, true, atol=1e-3)


def test_steady_boxes_follow_a_face_that_grows():
    scale = np.linspace(1, 2, 17, dtype=np.float32)[:, None]
    boxes = np.concatenate([300 - 50 * scale, 300 - 60 * scale, 300 + 50 * scale, 300 + 60 * scale], axis=1)
    landmarks = boxes[:, None, :2] + POINTS * (boxes[:, None, 2:] - boxes[:, None, :2])
    rows, _ = Linker(SETTINGS).link(
        make_frames(np.arange(17) / 2), Faces(np.arange(17), boxes, landmarks, np.ones(17, np.float32))
    )
    width = rows.xyxy[:, 2] - rows.xyxy[:, 0]
    expected = (boxes[:, 2] - boxes[:, 0])[2:-2]  # the median of five on a line is the one two frames before
    np.testing.assert_allclose(width[4:], expected, atol=1e-3)
    np.testing.assert_allclose(rows.xyxy[:, :2] + rows.xyxy[:, 2:], 600, atol=3)  # and the centre does not lag
