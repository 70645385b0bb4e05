"""Crop-and-resize against OpenCV's way to the same tensor, one thread each.

    python -m benchmarks.ops

OpenCV's way: cvtColor of the whole frame, slice, resize with INTER_AREA, normalise, transpose. It needs the whole frame
as RGB; the kernel reads only the planes under the box. Several faces in a frame share OpenCV's conversion, so that case
is shown too.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import save, time_calls
from dfengine.stages import _kernels
from dfengine.types import F32, Image

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet, as most models of this field have it
HEIGHT, WIDTH = 1080, 1920
CASES = (
    ("1 face of 400 px to 224 px", 1, 400, 224),
    ("1 face of 250 px to 224 px", 1, 250, 224),
    ("1 face of 600 px to 299 px", 1, 600, 299),
    ("3 faces of 300 px to 224 px", 3, 300, 224),
)
# Difference allowed before anything is timed, on the scale 0..255: INTER_AREA weighs pixels at the rim of a bin by
# their share, the kernel's area filter takes them whole (torch's rule), and OpenCV rounds to 8 bits twice.
MAX_MEAN_DIFFERENCE = 2.0


def make_i420() -> NDArray[np.uint8]:
    """A 1080p frame as one (H * 3 / 2, W) array, smooth with some noise."""
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (34, 60, 3), dtype=np.uint8)
    bgr = cv2.resize(small, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
    return np.asarray(cv2.cvtColor(bgr, cv2.COLOR_BGR2YUV_I420))


def opencv_way(i420: NDArray[np.uint8], boxes: F32, size: int) -> F32:
    rgb = cv2.cvtColor(i420, cv2.COLOR_YUV2RGB_I420)
    scale = (1 / (255 * np.array(STD))).astype(np.float32)
    bias = (-np.array(MEAN) / np.array(STD)).astype(np.float32)
    out = np.empty((len(boxes), 3, size, size), np.float32)
    for i, (x1, y1, x2, y2) in enumerate(boxes.astype(int)):
        face = cv2.resize(rgb[y1:y2, x1:x2], (size, size), interpolation=cv2.INTER_AREA)
        out[i] = (face.astype(np.float32) * scale + bias).transpose(2, 0, 1)
    return out


def main() -> None:
    cv2.setNumThreads(1)
    i420 = make_i420()
    luma = HEIGHT * WIDTH
    flat = i420.reshape(-1)
    quarter = (HEIGHT // 2, WIDTH // 2)
    image = Image(
        (
            flat[:luma].reshape(HEIGHT, WIDTH),
            flat[luma : luma + luma // 4].reshape(quarter),
            flat[luma + luma // 4 :].reshape(quarter),
        ),
        subsampling_xy=(2, 2),
    )
    rows = []
    for name, faces, box, size in CASES:
        corners = [(100 + 500 * i, 200 + 60 * i) for i in range(faces)]
        boxes = np.array([(x, y, x + box, y + box) for x, y in corners], np.float32)
        index = np.zeros(faces, np.int32)

        def ours(boxes: F32 = boxes, index: NDArray[np.int32] = index, size: int = size, resize: str = "area") -> F32:
            return _kernels.crop_resize(
                [image], boxes, index, out_hw=(size, size), mean=MEAN, std=STD, resize=resize, threads=1
            )

        def theirs(boxes: F32 = boxes, size: int = size) -> F32:
            return opencv_way(i420, boxes, size)

        difference = float(np.abs(ours() - theirs()).mean() * 255 * np.mean(STD))
        if difference > MAX_MEAN_DIFFERENCE:
            raise SystemExit(f"{name}: the two tensors differ by {difference:.2f} of 255 on average; nothing was timed")
        a, t, o = (
            time_calls(f, repeats=200, warm_up=10) for f in (ours, lambda ours=ours: ours(resize="triangle"), theirs)
        )
        ratio = o["median_s"] / a["median_s"]
        rows.append(
            {"case": name, "mean_difference_of_255": difference, "area": a, "triangle": t, "opencv": o, "ratio": ratio}
        )
        print(
            f"{name:<30} opencv {o['median_s'] * 1e3:.2f} ms, dfengine {a['median_s'] * 1e3:.2f} ms (area), "
            f"{t['median_s'] * 1e3:.2f} ms (triangle): {ratio:.1f}x; mean difference {difference:.2f} of 255"
        )
    print("wrote", save("ops", {"what": "crop_resize against OpenCV, one thread, 1080p I420", "rows": rows}).name)


if __name__ == "__main__":
    main()
