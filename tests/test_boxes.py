from __future__ import annotations

import numpy as np
import pytest
import reference
from conftest import TOLERANCE

from dfengine.stages import _boxes


def random_boxes(rng, n, extent=100.0):
    xyxy = rng.uniform(0, extent, (n, 4)).astype(np.float32)
    xyxy[:, 2:] = xyxy[:, :2] + rng.uniform(0, extent / 2, (n, 2)).astype(np.float32)
    return xyxy


def nms(boxes, scores, group=None, max_overlap=0.5, **options):
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    group = np.zeros(len(boxes), np.int32) if group is None else np.array(group, np.int32)
    return _boxes.nms(boxes, np.array(scores, np.float32), group, max_overlap, **options)


# -- nms ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"of_smaller": True}, {"pixel": 1.0}, {"of_smaller": True, "pixel": 1.0}])
@pytest.mark.parametrize("max_overlap", [0.0, 0.3, 0.5, 0.7, 1.0])
@pytest.mark.parametrize(("n", "groups"), [(0, 1), (1, 1), (2, 1), (60, 1), (60, 7), (60, 60)])
def test_nms_equals_the_reference(rng, n, groups, max_overlap, options):
    boxes = random_boxes(rng, n)
    scores = rng.choice(np.linspace(0, 1, 25), n).astype(np.float32)  # with ties
    group = rng.integers(0, groups, n).astype(np.int32)
    kept = _boxes.nms(boxes, scores, group, max_overlap, **options)
    assert kept.dtype == np.int64
    assert kept.tolist() == reference.nms(boxes, scores, group, max_overlap, **options)


def test_nms_equals_torchvision(rng):
    import torch
    from torchvision.ops import batched_nms

    boxes = random_boxes(rng, 200)
    scores = rng.permutation(200).astype(np.float32)
    group = rng.integers(0, 5, 200).astype(np.int32)
    want = batched_nms(torch.from_numpy(boxes), torch.from_numpy(scores), torch.from_numpy(group), 0.4)
    assert _boxes.nms(boxes, scores, group, 0.4).tolist() == want.tolist()


def test_nms_of_views():
    rows = np.array([[9, 0, 0, 10, 10, 0.5], [9, 1, 1, 10, 10, 0.9], [9, 40, 40, 50, 50, 0.7]], np.float32)
    assert _boxes.nms(rows[:, 1:5], rows[:, 5], np.zeros(3, np.int32), 0.5).tolist() == [1, 2]
    read_only = rows.copy()
    read_only.setflags(write=False)
    assert _boxes.nms(read_only[::-1, 1:5], read_only[::-1, 5], np.zeros(3, np.int32), 0.5).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("boxes", "scores", "options", "kept"),
    [
        ([], [], {}, []),
        ([(0, 0, 10, 10)], [0.1], {}, [0]),
        # Equal scores: the earlier box wins, and the order is kept.
        ([(0, 0, 10, 10), (0, 0, 10, 10)], [0.5, 0.5], {}, [0]),
        ([(0, 0, 10, 10), (50, 0, 60, 10), (0, 0, 10, 10)], [0.5, 0.5, 0.5], {}, [0, 1]),
        # An overlap that equals the limit survives: intersection 50, union 100.
        ([(0, 0, 10, 10), (0, 0, 10, 5)], [0.9, 0.8], {"max_overlap": 0.5}, [0, 1]),
        ([(0, 0, 10, 10), (0, 0, 10, 5)], [0.9, 0.8], {"max_overlap": 0.49}, [0]),
        # A box within a box: all of the smaller one.
        ([(0, 0, 100, 100), (40, 40, 50, 50)], [0.9, 0.8], {}, [0, 1]),
        ([(0, 0, 100, 100), (40, 40, 50, 50)], [0.9, 0.8], {"of_smaller": True}, [0]),
        # Neighbours share an edge; as inclusive boxes they share a column of pixels.
        ([(0, 0, 10, 10), (10, 0, 20, 10)], [0.9, 0.8], {"max_overlap": 0.0}, [0, 1]),
        ([(0, 0, 10, 10), (10, 0, 20, 10)], [0.9, 0.8], {"max_overlap": 0.0, "pixel": 1.0}, [0]),
        # What was suppressed does not suppress: the first kills the second, the third is left alone.
        ([(0, 0, 10, 10), (4, 0, 14, 10), (8, 0, 18, 10)], [0.9, 0.8, 0.7], {"max_overlap": 0.4}, [0, 2]),
        # Boxes without area overlap nothing, not even themselves.
        ([(5, 5, 5, 5), (5, 5, 5, 5)], [0.9, 0.8], {"max_overlap": 0.0}, [0, 1]),
        # Far from the origin.
        ([(1e5, 1e5, 1e5 + 8, 1e5 + 8), (1e5 + 1, 1e5, 1e5 + 9, 1e5 + 8)], [0.1, 0.2], {}, [1]),
        # Negative scores sort as well.
        ([(0, 0, 10, 10), (0, 0, 10, 9), (20, 20, 30, 30)], [-3, -1, -2], {}, [1, 2]),
    ],
)
def test_nms_cases(boxes, scores, options, kept):
    assert nms(boxes, scores, **options).tolist() == kept


def test_nms_keeps_groups_apart():
    boxes = [(0, 0, 10, 10)] * 4
    assert nms(boxes, [0.1, 0.4, 0.3, 0.2], group=[1, 0, 1, 0]).tolist() == [1, 2]
    assert nms(boxes, [0.1, 0.4, 0.3, 0.2], group=[7, -5, 7, 2]).tolist() == [1, 2, 3]


def test_nms_of_many_groups_equals_one_by_one(rng):
    boxes, scores = random_boxes(rng, 80), rng.permutation(80).astype(np.float32)
    group = rng.integers(0, 4, 80).astype(np.int32)
    together = _boxes.nms(boxes, scores, group, 0.3)
    for g in range(4):
        rows = np.flatnonzero(group == g)
        alone = rows[_boxes.nms(boxes[rows], scores[rows], group[rows], 0.3)]
        assert together[group[together] == g].tolist() == alone.tolist()


# -- propose -----------------------------------------------------------------------------------------------------------


def propose_slowly(prob, reg, scale, threshold):
    image, rows = [], []
    for i, y, x in np.ndindex(prob.shape):
        if prob[i, y, x] >= np.float32(threshold):
            corners = np.float32([2 * x + 1, 2 * y + 1, 2 * x + 12, 2 * y + 12]) / np.float32(scale)
            image.append(i)
            rows.append([*np.floor(corners), prob[i, y, x], *reg[i, :, y, x]])
    return np.array(image, np.int32), np.array(rows, np.float32).reshape(-1, 9)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 5, 7), (3, 1, 9), (1, 0, 4), (0, 3, 3)], ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.6, 0.24 * 0.709**3])
@pytest.mark.parametrize("threshold", [0.0, 0.6, 1.0, 1.1])
def test_propose(rng, shape, scale, threshold):
    prob = rng.choice(np.float32([0, 0.3, 0.6, 0.61, 1.0]), shape)
    reg = rng.normal(size=(shape[0], 4, *shape[1:])).astype(np.float32)
    image, rows = _boxes.propose(prob, reg, scale, threshold)
    want_image, want_rows = propose_slowly(prob, reg, scale, threshold)
    assert image.dtype == np.int32
    assert rows.dtype == np.float32
    assert rows.shape == (len(image), 9)
    np.testing.assert_array_equal(image, want_image)
    np.testing.assert_array_equal(rows, want_rows)


# -- regress, make_square, iou_matrix ----------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 1, 20])
@pytest.mark.parametrize("pixel", [0.0, 1.0])
def test_regress(rng, n, pixel):
    boxes, reg = random_boxes(rng, n), rng.normal(size=(n, 4)).astype(np.float32)
    want = boxes.astype(np.float64)
    size = want[:, 2:] - want[:, :2] + pixel
    want = want + reg * np.concatenate([size, size], axis=1)
    assert _boxes.regress(boxes, reg, pixel) is None
    np.testing.assert_allclose(boxes, want, rtol=0, atol=TOLERANCE["regress", "float32"])


def test_regress_reads_columns_of_a_table(rng):
    rows = rng.normal(size=(6, 9)).astype(np.float32)
    boxes = random_boxes(rng, 6)
    want = boxes.copy()
    _boxes.regress(want, np.ascontiguousarray(rows[:, 5:]))
    _boxes.regress(boxes, rows[:, 5:])
    np.testing.assert_array_equal(boxes, want)


@pytest.mark.parametrize(
    ("box", "square"),
    [
        ((0, 0, 10, 10), (0, 0, 10, 10)),
        ((0, 0, 10, 4), (0, -3, 10, 7)),
        ((2, 10, 6, 30), (-6, 10, 14, 30)),
        ((5, 5, 5, 5), (5, 5, 5, 5)),
        ((0.5, 1.0, 3.5, 2.0), (0.5, 0.0, 3.5, 3.0)),
    ],
)
def test_make_square(box, square):
    boxes = np.array([box, box], np.float32)
    assert _boxes.make_square(boxes) is None
    np.testing.assert_array_equal(boxes, np.float32([square, square]))


def test_make_square_of_nothing():
    boxes = np.zeros((0, 4), np.float32)
    _boxes.make_square(boxes)
    assert boxes.shape == (0, 4)


@pytest.mark.parametrize(("n", "m"), [(0, 0), (0, 3), (3, 0), (1, 1), (12, 9)])
def test_iou_matrix(rng, n, m):
    a, b = random_boxes(rng, n), random_boxes(rng, m)
    got = _boxes.iou_matrix(a, b)
    want = np.array([[reference.overlap(x, y) for y in b] for x in a]).reshape(n, m)
    assert got.dtype == np.float32
    assert got.shape == (n, m)
    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE["iou", "float32"])


@pytest.mark.parametrize(
    ("a", "b", "iou"),
    [
        ((0, 0, 10, 10), (0, 0, 10, 10), 1.0),
        ((0, 0, 10, 10), (10, 0, 20, 10), 0.0),  # half-open: neighbours do not overlap
        ((0, 0, 10, 10), (5, 0, 15, 10), 1 / 3),
        ((0, 0, 10, 10), (2, 2, 7, 7), 0.25),
        ((5, 5, 5, 5), (0, 0, 10, 10), 0.0),
        ((5, 5, 5, 5), (5, 5, 5, 5), 0.0),
        ((-10, -10, 0, 0), (-5, -5, 5, 5), 25 / 175),
    ],
)
def test_iou_cases(a, b, iou):
    got = _boxes.iou_matrix(np.float32([a]), np.float32([b]))
    assert got[0, 0] == pytest.approx(iou, abs=TOLERANCE["iou", "float32"])
    assert got == _boxes.iou_matrix(np.float32([b]), np.float32([a]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: _boxes.iou_matrix(np.zeros((1, 4)), np.zeros((1, 4))), "Buffer dtype mismatch"),
        (lambda: _boxes.iou_matrix(np.zeros(4, np.float32), np.zeros((1, 4), np.float32)), "wrong number of dim"),
        (lambda: nms([(0, 0, 1, 1)], [[0.5]]), "wrong number of dimensions"),
        (lambda: _boxes.make_square(np.zeros((2, 8), np.float32)[:, :4]), "not C-contiguous"),
    ],
)
def test_arrays_of_another_kind(call, message):
    with pytest.raises(ValueError, match=message):
        call()
