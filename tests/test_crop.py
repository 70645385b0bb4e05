from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import reference
from conftest import TOLERANCE

from dfengine.bundle import CropSpec
from dfengine.stages.crop import crop_boxes, crop_faces, crop_tracks
from dfengine.types import Image, Tracks

SPEC = CropSpec(input_hw=(6, 5), mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))


def spec(**change):
    return dataclasses.replace(SPEC, **change)


@pytest.fixture
def images(rng):
    return [Image.from_rgb(rng.integers(0, 256, hw, dtype=np.uint8)) for hw in ((40, 60, 3), (33, 21, 3))]


def make_tracks(rows):
    """rows: (track_id, image, frame_index, box) -> Tracks, and the image of each row"""
    n = len(rows)
    tracks = Tracks(
        np.array([r[0] for r in rows], np.int64),
        np.array([r[2] for r in rows], np.int64),
        np.arange(n, dtype=np.float64),
        np.array([r[3] for r in rows], np.float32).reshape(-1, 4),
        np.zeros((n, 5, 2), np.float32),
        np.ones(n, np.float32),
        np.ones(n, np.bool_),
    )
    return tracks, np.array([r[1] for r in rows], np.int64)


@pytest.mark.parametrize(
    ("box", "change", "cropped"),
    [
        ((10, 20, 30, 40), {}, (10, 20, 30, 40)),
        ((10, 20, 30, 60), {}, (0, 20, 40, 60)),  # the longer side, about the same centre
        ((10, 20, 50, 40), {}, (10, 10, 50, 50)),
        ((10, 20, 30, 60), {"crop_shape": "box"}, (10, 20, 30, 60)),
        ((10, 20, 30, 60), {"margin_ratio": 0.5}, (-10, 10, 50, 70)),  # 40 * 1.5 = 60: 10 more on each side
        ((10, 20, 30, 60), {"margin_ratio": 0.5, "crop_shape": "box"}, (5, 10, 35, 70)),
        ((10, 20, 30, 40), {"margin_ratio": -0.5}, (15, 25, 25, 35)),
        ((-8, -8, 8, 8), {"margin_ratio": 1.0}, (-16, -16, 16, 16)),
        ((0, 0, 0.5, 0.25), {}, (0, -0.125, 0.5, 0.375)),
        ((7, 7, 7, 9), {"crop_shape": "square"}, (6, 7, 8, 9)),  # a box without width has a height
    ],
)
def test_crop_boxes(box, change, cropped):
    got = crop_boxes(np.float32([box, box]), spec(**change))
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, np.float32([cropped, cropped]))


def test_crop_boxes_of_nothing():
    got = crop_boxes(np.zeros((0, 4), np.float32), SPEC)
    assert got.shape == (0, 4)
    assert got.dtype == np.float32


def test_crops_are_square_about_the_centre_of_the_box(rng):
    boxes = rng.uniform(-20, 200, (50, 4)).astype(np.float32)
    boxes[:, 2:] = boxes[:, :2] + rng.uniform(1, 90, (50, 2)).astype(np.float32)
    got = crop_boxes(boxes, spec(margin_ratio=0.3))
    size = got[:, 2:] - got[:, :2]
    longest = (boxes[:, 2:] - boxes[:, :2]).max(axis=1)
    np.testing.assert_allclose(size[:, 0], size[:, 1], rtol=1e-5)
    np.testing.assert_allclose(size[:, 0], 1.3 * longest, rtol=1e-5)
    np.testing.assert_allclose(got[:, :2] + got[:, 2:], boxes[:, :2] + boxes[:, 2:], rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("resize", ["triangle", "area", "bilinear"])
@pytest.mark.parametrize("padding", ["edge", "zero"])
@pytest.mark.parametrize("shape", ["square", "box"])
def test_crop_faces_obeys_the_spec(images, resize, padding, shape):
    asked = spec(margin_ratio=0.4, resize=resize, padding=padding, crop_shape=shape)
    boxes = np.float32([(5, 6, 25, 31), (-4, 2, 9, 30), (40, 20, 59, 39), (2, 3, 12, 30)])
    index = np.array([0, 1, 0, 1], np.int64)
    got = crop_faces(images, boxes, index, asked)
    want = reference.crop_resize(
        images, crop_boxes(boxes, asked), index, out_hw=asked.input_hw, mean=asked.mean, std=asked.std,
        resize=resize, padding=padding,
    )  # fmt: skip
    assert got.shape == (4, 3, 6, 5)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE["normalize", "float32"])


def test_crop_faces_of_nothing(images):
    for some in (images, []):
        assert crop_faces(some, np.zeros((0, 4), np.float32), np.zeros(0, np.int64), SPEC).shape == (0, 3, 6, 5)


def test_crop_tracks_goes_by_the_row_of_the_frame(images):
    rows = [(0, 0, 12, (5, 6, 25, 31)), (0, 1, 24, (2, 3, 12, 30)), (7, 0, 12, (30, 10, 50, 30))]
    tracks, image_index = make_tracks(rows)
    want = crop_faces(images, tracks.xyxy, np.array([0, 1, 0]), SPEC)  # by the image, not by the place of the frame
    np.testing.assert_array_equal(crop_tracks(images, tracks, image_index, SPEC), want)


def test_crop_tracks_of_a_part_equals_the_part_of_all(images):
    rows = [(i, i % 2, i, (i, i, 10 + 2 * i, 15 + i)) for i in range(5)]
    tracks, image_index = make_tracks(rows)
    whole = crop_tracks(images, tracks, image_index, SPEC, threads=2)
    for part in (slice(0, 0), slice(1, 2), slice(2, 5)):
        np.testing.assert_array_equal(crop_tracks(images, tracks[part], image_index[part], SPEC), whole[part])


def test_a_box_without_area_is_an_error(images):
    with pytest.raises(ValueError, match="box 0 is empty"):
        crop_faces(images, np.float32([(5, 5, 5, 5)]), np.zeros(1, np.int64), SPEC)
