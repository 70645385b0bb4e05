"""The pixel op of dfengine, wherever the pictures are: the C++ loop for pictures in main memory, the CUDA kernel else.

Both come from one header (csrc/resample.h) and give the same numbers but for rounding, so no stage needs to know.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dfengine.errors import InferenceError, first_line
from dfengine.stages import _kernels
from dfengine.types import F32, Array, Dtype, Image, on_device


def crop_resize(
    images: Sequence[Image],
    boxes: F32,
    image_index: NDArray[np.int32],
    *,
    out_hw: tuple[int, int],
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    resize: str,
    padding: str = "edge",
    dtype: Dtype = "float32",
    threads: int = 1,
) -> Array:
    """Crops boxes of many images into one array (N, 3, *out_hw) that lies where the images lie.

    RGB, (rgb / 255 - mean) / std; see ``_kernels.crop_resize`` for the arguments. Images on a GPU are all of one lane:
    the array is ready there in the order of its stream. Raises ValueError, and DeviceMemoryError or InferenceError on
    a GPU. ``threads`` is for the CPU.
    """
    options: dict[str, Any] = {"mean": mean, "std": std, "resize": resize, "padding": padding}
    if not images or not on_device(images[0].components[0]):
        return _kernels.crop_resize(images, boxes, image_index, out_hw=out_hw, dtype=dtype, threads=threads, **options)
    lane = images[0].components[0].lane
    out: Array = lane.empty((len(boxes), 3, *out_hw), np.dtype(dtype))
    if len(boxes):
        try:
            _kernels.crop_resize_cuda(images, boxes, image_index, out=out, stream=lane.stream, **options)
        except RuntimeError as error:
            raise InferenceError(first_line(error), stage="crop") from None
    return out


def pyramid(
    images: Sequence[Image],
    sizes_hw: Sequence[tuple[int, int]],
    *,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    resize: str,
    dtype: Dtype = "float32",
    threads: int = 1,
) -> list[Array]:
    """The images, of one size, whole, at several sizes: what ``crop_resize`` gives for each of them, as one array each.

    On the CPU picture by picture, so that each comes from memory once.
    """
    if not on_device(images[0].components[0]) and dtype == "float32":
        return list(_kernels.pyramid(images, sizes_hw, mean=mean, std=std, resize=resize, threads=threads))
    h, w = images[0].upright_hw
    whole = np.tile(np.array([0, 0, w, h], np.float32), (len(images), 1))
    order = np.arange(len(images), dtype=np.int32)
    options: dict[str, Any] = {"mean": mean, "std": std, "resize": resize, "dtype": dtype, "threads": threads}
    return [crop_resize(images, whole, order, out_hw=hw, **options) for hw in sizes_hw]


def to_host(array: Array) -> NDArray[Any]:
    """The same array in main memory; copied only from a GPU."""
    if isinstance(array, np.ndarray):
        return array
    copy: NDArray[Any] = array.lane.download(array)
    return copy
