from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dfengine.types import Dtype, Image

compiler: str
cuda_architectures: tuple[int, ...]  # compute capabilities times ten; () where it was compiled without CUDA

def crop_resize(
    images: Sequence[Image],
    boxes: NDArray[np.float32],
    image_index: NDArray[np.int32],
    *,
    out_hw: tuple[int, int],
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    resize: str = "triangle",
    padding: str = "edge",
    dtype: Dtype = "float32",
    threads: int = 1,
) -> NDArray[np.floating]: ...
def pyramid(
    images: Sequence[Image],
    sizes_hw: Sequence[tuple[int, int]],
    *,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    resize: str = "triangle",
    threads: int = 1,
) -> list[NDArray[np.float32]]: ...
def crop_resize_emulated(
    images: Sequence[Image],
    boxes: NDArray[np.float32],
    image_index: NDArray[np.int32],
    *,
    out: Any,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    resize: str = "triangle",
    padding: str = "edge",
) -> None: ...

# Only where it was compiled with CUDA.
def crop_resize_cuda(
    images: Sequence[Image],
    boxes: NDArray[np.float32],
    image_index: NDArray[np.int32],
    *,
    out: Any,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    resize: str = "triangle",
    padding: str = "edge",
    stream: int,
) -> None: ...
