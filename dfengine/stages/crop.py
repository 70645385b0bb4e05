"""From boxes to network input. The only crop geometry there is: the engine and the training package both use it.

Note [Why crops are square]
A network input is square; a face box is not. Resizing the box itself stretches narrow faces more than wide ones, and
the stretch would depend on how the detector saw the face. ``crop_shape="square"`` therefore takes the longer side for
both axes, about the same centre. ``"box"`` keeps the stretch, for models that were trained with it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dfengine.bundle import CropSpec
from dfengine.stages.kernels import crop_resize
from dfengine.types import F32, I64, Array, Dtype, Image, Tracks


def crop_boxes(boxes: F32, crop: CropSpec) -> F32:
    """Face boxes (N, 4) -> the boxes that are cropped, (N, 4); they may leave the frame."""
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    size = boxes[:, 2:] - boxes[:, :2]
    if crop.crop_shape == "square":
        size = np.repeat(size.max(axis=1, keepdims=True), 2, axis=1)
    half = size * (1 + crop.margin_ratio) / 2
    return np.concatenate([centre - half, centre + half], axis=1).astype(np.float32)


def crop_faces(
    images: Sequence[Image],
    boxes: F32,
    image_index: I64,
    crop: CropSpec,
    *,
    dtype: Dtype = "float32",
    threads: int = 1,
) -> Array:
    """Crops face boxes as ``crop`` asks: (N, 3, H, W) RGB, (rgb / 255 - mean) / std, where the images lie.

    ``image_index``: (N,), the image of each box.
    """
    return crop_resize(
        images,
        crop_boxes(boxes, crop),
        image_index.astype(np.int32),
        out_hw=crop.input_hw,
        mean=crop.mean,
        std=crop.std,
        resize=crop.resize,
        padding=crop.padding,
        dtype=dtype,
        threads=threads,
    )


def crop_tracks(
    images: Sequence[Image],
    tracks: Tracks,
    image_index: I64,
    crop: CropSpec,
    *,
    dtype: Dtype = "float32",
    threads: int = 1,
) -> Array:
    """``crop_faces`` of the rows of a video's tracks. ``image_index``: (R,), the image of each row."""
    return crop_faces(images, tracks.xyxy, image_index, crop, dtype=dtype, threads=threads)
