"""From boxes to network input. The only crop geometry there is: the engine and the training package both use it.

Note [Why crops are square]
A network input is square; a face box is not. Resizing the box itself stretches narrow faces more than wide ones, and
the stretch would depend on how the detector saw the face. ``crop_shape="square"`` therefore takes the longer side for
both axes, about the same centre. ``"box"`` keeps the stretch, for models that were trained with it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dfengine.bundle import ModelSpec
from dfengine.stages.kernels import crop_resize
from dfengine.types import F32, I64, Array, Crops, Dtype, Image, Tracks


def crop_boxes(boxes: F32, spec: ModelSpec) -> F32:
    """Face boxes (N, 4) -> the boxes that are cropped, (N, 4); they may leave the frame."""
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    size = boxes[:, 2:] - boxes[:, :2]
    if spec.crop_shape == "square":
        size = np.repeat(size.max(axis=1, keepdims=True), 2, axis=1)
    half = size * (1 + spec.margin_ratio) / 2
    return np.concatenate([centre - half, centre + half], axis=1).astype(np.float32)


def crop_faces(
    images: Sequence[Image],
    boxes: F32,
    image_index: I64,
    spec: ModelSpec,
    *,
    dtype: Dtype = "float32",
    threads: int = 1,
) -> Array:
    """Crops face boxes as ``spec`` asks: (N, 3, H, W) RGB, (rgb / 255 - mean) / std, where the images lie.

    ``image_index``: (N,), the image of each box.
    """
    return crop_resize(
        images,
        crop_boxes(boxes, spec),
        image_index.astype(np.int32),
        out_hw=spec.input_hw,
        mean=spec.mean,
        std=spec.std,
        resize=spec.resize,
        padding=spec.padding,
        dtype=dtype,
        threads=threads,
    )


def crop_tracks(
    images: Sequence[Image],
    tracks: Tracks,
    spec: ModelSpec,
    *,
    video: int = 0,
    dtype: Dtype = "float32",
    threads: int = 1,
) -> Crops:
    """The rows of one video's tracks as network input, with their identity."""
    batch = crop_faces(images, tracks.xyxy, tracks.frame, spec, dtype=dtype, threads=threads)
    return Crops(batch, np.full(len(tracks), video, np.int64), tracks.track_id, tracks.index)
