"""What all tests share: the tolerances, the real clips, and a face.

Real clips come from ``$DFENGINE_TEST_DATA``, a folder with clips/, odd/ and portraits/. Tests that need them take
the fixture ``data_dir`` and skip without it.
"""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import numpy as np
import pytest

import dfengine

# The same examples on every run: a failure belongs to the change that made it.
hypothesis.settings.register_profile("fixed", derandomize=True)
hypothesis.settings.load_profile("fixed")

# The largest difference that counts as equal, by (op, dtype or what is compared). Colours are on the scale 0..255.
TOLERANCE = {
    # Sums of a few hundred float32 products, and a colour matrix whose terms reach 500 before they cancel.
    ("crop_resize", "float32"): 2e-3,
    # The tent's weights are ratios of float32 coordinates. At 2^12 px these are exact to 2^-12 px, and a step of
    # 255 between neighbours turns that into 0.06.
    ("crop_resize_far", "float32"): 0.15,
    # The powers of HDR's curves multiply rounding by some hundred, BT.709 colours are differences of BT.2020 ones, and
    # the slope of the last curve is infinite at black.
    ("crop_resize_hdr", "float32"): 0.1,
    # binary16 has 11 bits: half a step between 128 and 255 is 0.0625.
    ("crop_resize", "float16"): 0.0625 + 2e-3,
    # torch sums in another order, and its antialiasing weights are float32 too.
    ("crop_resize_torch", "float32"): 5e-3,
    # Against swscale to 8-bit RGB, then PIL, which rounds after each of its two passes. Mean over the crop, and the
    # 99.9th percentile. Formats that swscale converts exactly, up to rounding:
    ("crop_resize_swscale_mean", "exact"): 0.5,
    ("crop_resize_swscale_p999", "exact"): 2.0,
    # Subsampled ones go through its fast path, which truncates (by 1 to 2 in the mean) and repeats chroma samples.
    ("crop_resize_swscale_mean", "subsampled"): 2.0,
    ("crop_resize_swscale_p999", "subsampled"): 8.0,
    # That of crop_resize, over 255 and a std of at least 0.2.
    ("normalize", "float32"): 5e-5,
    # GPU against CPU, the whole engine. Asked for, not derived.
    ("p_fake", "float32"): 2e-3,
    ("p_fake", "float16"): 1e-2,
    # Pixels of the frame. OpenVINO's kernels depend on the batch size, and so does the last bit.
    ("detect_batch", "float32"): 1e-3,
    # Landmarks in widths of the face; boxes by IoU. facenet-pytorch: networks on torch, and pixels that were rounded.
    ("detect_facenet", "face width"): 0.01,
    # The same pixels, summed in another order.
    ("detect_same_pixels", "face width"): 0.001,
    ("detect_same_pixels", "1 - iou"): 0.001,
    # MTCNN's boxes move more than its landmarks. 4:2:0 has a quarter of the chroma, gray none, and a dark frame some
    # 15 levels, amplified with their noise.
    ("detect_yuv", "face width"): 0.05,
    ("detect_yuv", "1 - iou"): 0.15,
    # Other proposals lead to other boxes of the same face.
    ("detect_between", "face width"): 0.05,
    ("detect_between", "1 - iou"): 0.2,
    ("detect_gray", "face width"): 0.03,
    ("detect_gray", "1 - iou"): 0.2,
    ("detect_dark", "face width"): 0.05,
    ("detect_dark", "1 - iou"): 0.15,
    ("iou", "float32"): 1e-6,
    ("regress", "float32"): 1e-4,
    # Logits are float64 once they have left the network; np.exp and np.tanh differ in the last digits.
    ("aggregate", "float64"): 1e-9,
    # to_logit clips at 1e-7, so that a round trip through sigmoid loses digits near there.
    ("aggregate_extreme", "float64"): 1e-6,
    ("backbone", "float32"): 1e-5,
}


def pytest_report_header() -> list[str]:
    return [f"dfengine: {', '.join(f'{k} {v}' for k, v in dfengine.build_info().items())}"]


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder with the real clips. Skips without it."""
    value = os.environ.get("DFENGINE_TEST_DATA")
    if not value:
        pytest.skip("DFENGINE_TEST_DATA is not set: no real clips")
    folder = Path(value)
    missing = [name for name in ("clips", "odd", "portraits") if not (folder / name).is_dir()]
    if missing:  # set, but wrong: a skip would hide that nothing is tested
        pytest.fail(f"DFENGINE_TEST_DATA has no {', '.join(missing)}")
    return folder


@pytest.fixture(scope="session")
def astronaut() -> np.ndarray:
    """A public-domain portrait (NASA): RGB uint8 (512, 512, 3), one face of about 110 px at (225, 110)."""
    from skimage import data

    rgb: np.ndarray = data.astronaut()
    rgb.setflags(write=False)
    return rgb


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20240229)
