"""crop_resize in plain NumPy and float64: slow, and written from its contract instead of from its code.

The contract (csrc/crop_resize.h, csrc/resample.h):

* Output pixel i of an axis covers an equal share of the box. ``triangle`` weighs the samples of a component by a tent
  about the middle of that share, of half width max(1 sample, one share); ``bilinear`` by a tent of half width 1 sample.
  ``area`` rounds the box to whole pixels, gives output pixel i the pixels from floor(i * n / out) to
  ceil((i + 1) * n / out), as torch's adaptive average does, and takes their mean, where a pixel's chroma is that of
  the chroma sample that covers it.
* Chroma sample c covers the luma pixels [c * s, (c + 1) * s) of the *coded* picture.
* Outside the picture each component has its nearest sample (edge), or the sample of black (zero).
* Colour is converted, and clamped to 0..255, after filtering.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dfengine.types import Image

# ITU-T H.273 table 4: Kr, Kb.
LUMA_WEIGHTS = {
    "bt601": (0.299, 0.114),
    "bt709": (0.2126, 0.0722),
    "fcc": (0.30, 0.11),
    "smpte240m": (0.212, 0.087),
    "bt2020": (0.2627, 0.0593),
}


def crop_resize(
    images: Sequence[Image],
    boxes: np.ndarray,
    image_index: np.ndarray,
    *,
    out_hw: tuple[int, int],
    mean: Sequence[float] = (0.0, 0.0, 0.0),
    std: Sequence[float] = (1.0, 1.0, 1.0),
    resize: str = "triangle",
    padding: str = "edge",
) -> np.ndarray:
    """(N, 3, H, W) float64."""
    out = np.zeros((len(boxes), 3, *out_hw))
    for n, (box, i) in enumerate(zip(boxes, image_index, strict=True)):
        rgb = crop_rgb(images[i], box, out_hw, resize, padding)
        for c in range(3):
            out[n, c] = (rgb[c] / 255 - mean[c]) / std[c]
    return out


def crop_rgb(image: Image, box: np.ndarray, out_hw: tuple[int, int], resize: str, padding: str) -> np.ndarray:
    """One crop: RGB on the scale 0..255, (3, H, W) float64."""
    x1, y1, x2, y2 = (float(v) for v in box)
    black = black_sample(image)
    filtered = []
    for j in range(len(image.components)):
        plane, sub_xy, origin_xy = upright_plane(image, j)
        columns, wx = axis_weights(x1, x2, out_hw[1], sub_xy[0], origin_xy[0], resize)
        rows, wy = axis_weights(y1, y2, out_hw[0], sub_xy[1], origin_xy[1], resize)
        samples = gather(plane, rows, columns, black[j] if padding == "zero" else None)
        filtered.append(wy @ samples @ wx.T)
    rgb = np.clip(to_rgb(image, filtered), 0, 255)
    return rgb if image.transfer == "sdr" else 255 * to_sdr(rgb / 255, image.transfer)


def to_sdr(rgb: np.ndarray, transfer: str) -> np.ndarray:
    """(3, ...) on the scale 0..1, of ITU-R BT.2100 -> of BT.709: 203 cd/m2 (BT.2408) become white, more is clipped."""
    if transfer == "pq":
        power = rgb ** (32 / 2523)
        nits = 10000 * (np.maximum(power - 107 / 128, 0) / (2413 / 128 - 2392 / 128 * power)) ** (16384 / 2610)
    else:
        scene = np.where(rgb <= 0.5, rgb**2 / 3, (np.exp((rgb - 0.55991073) / 0.17883277) + 0.28466892) / 12)
        nits = 1000 * scene * np.tensordot([0.2627, 0.6780, 0.0593], scene, 1) ** 0.2
    to_709 = [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]]
    return np.clip(np.tensordot(to_709, nits / 203, 1), 0, 1) ** (1 / 2.4)


def upright_plane(image: Image, j: int) -> tuple[np.ndarray, tuple[int, int], tuple[int, int]]:
    """A component turned upright: samples, luma pixels per sample (x, y), and where its first sample begins (x, y).

    The last chroma sample of an odd side sticks out of the picture by a pixel. Where the turn brings that sample
    to the front, the component begins at -1.
    """
    plane = image.components[j]
    sx, sy = (1, 1) if j == 0 else image.subsampling_xy
    h, w = image.components[0].shape
    behind_x = plane.shape[1] * sx - w  # how far the component sticks out, at the end of the coded picture
    behind_y = plane.shape[0] * sy - h
    left, right = 0, behind_x  # how far it sticks out there
    if image.mirrored:
        plane, left, right = plane[:, ::-1], right, left
    turned = np.rot90(plane, -(image.rotation // 90))  # rot90 turns anticlockwise
    if image.rotation == 90:  # what was the bottom is at the left, what was the left is at the top
        return turned, (sy, sx), (-behind_y, -left)
    if image.rotation == 180:
        return turned, (sx, sy), (-right, -behind_y)
    if image.rotation == 270:  # what was the right is at the top, what was the top is at the left
        return turned, (sy, sx), (0, -right)
    return turned, (sx, sy), (-left, 0)


def axis_weights(
    begin: float, end: float, out: int, sub: int, origin: int, resize: str
) -> tuple[np.ndarray, np.ndarray]:
    """Samples (T,) that an axis reads, which may lie outside of the picture, and their weights (out, T)."""
    if resize == "area":
        first_px = int(np.floor(begin + 0.5))
        pixels = max(1, int(np.floor(end + 0.5)) - first_px)
        bins = [
            [(first_px + p - origin) // sub for p in range(i * pixels // out, -(-(i + 1) * pixels // out))]
            for i in range(out)
        ]
        samples = np.arange(min(min(b) for b in bins), max(max(b) for b in bins) + 1)
        weights = np.array([[b.count(s) for s in samples] for b in bins], np.float64)
    else:
        share = (end - begin) / out / sub
        reach = max(1.0, share) if resize == "triangle" else 1.0
        centres = [(begin - origin) / sub + (i + 0.5) * share for i in range(out)]
        samples = np.arange(int(np.floor(centres[0] - reach)) - 1, int(np.ceil(centres[-1] + reach)) + 2)
        weights = np.array([[max(0.0, 1 - abs(s + 0.5 - c) / reach) for s in samples] for c in centres])
    return samples, weights / weights.sum(axis=1, keepdims=True)


def gather(plane: np.ndarray, rows: np.ndarray, columns: np.ndarray, outside: float | None) -> np.ndarray:
    """Samples at rows x columns; those outside of the plane are ``outside``, or the nearest if it is None."""
    h, w = plane.shape
    samples = plane[np.clip(rows, 0, h - 1)][:, np.clip(columns, 0, w - 1)].astype(np.float64)
    if outside is not None:
        samples[(rows < 0) | (rows >= h), :] = outside
        samples[:, (columns < 0) | (columns >= w)] = outside
    return samples


def sample_range(image: Image) -> tuple[float, float, float, float]:
    """Luma of black, swing of luma, chroma of grey, swing of chroma, as samples."""
    step = 2.0 ** (image.bit_depth - 8)
    if image.full_range:
        peak = 2.0**image.bit_depth - 1
        return 0.0, peak, 128 * step, peak
    return 16 * step, 219 * step, 128 * step, 224 * step


def black_sample(image: Image) -> tuple[float, float, float]:
    luma, _, grey, _ = sample_range(image)
    return (luma, luma, luma) if image.matrix == "rgb" else (luma, grey, grey)


def to_rgb(image: Image, components: list[np.ndarray]) -> np.ndarray:
    """Filtered samples -> RGB on the scale 0..255, not clamped."""
    black, swing, grey, chroma_swing = sample_range(image)
    first = (components[0] - black) / swing
    if image.matrix == "gray":
        return 255 * np.stack([first] * 3)
    if image.matrix == "rgb":
        return 255 * np.stack([(c - black) / swing for c in components])
    u, v = ((c - grey) / chroma_swing for c in components[1:])
    if image.matrix == "ycgco":  # u is Cg, v is Co
        return 255 * np.stack([first - u + v, first + u, first - u - v])
    kr, kb = LUMA_WEIGHTS[image.matrix]
    red = first + 2 * (1 - kr) * v
    blue = first + 2 * (1 - kb) * u
    green = (first - kr * red - kb * blue) / (1 - kr - kb)
    return 255 * np.stack([red, green, blue])


def nms(
    boxes: np.ndarray,
    scores: np.ndarray,
    group: np.ndarray,
    max_overlap: float,
    *,
    of_smaller: bool = False,
    pixel: float = 0.0,
) -> list[int]:
    """Greedy suppression: the best box left kills what overlaps it, until none is left."""
    left = sorted(range(len(boxes)), key=lambda i: (-scores[i], i))
    kept = []
    while left:
        best = left.pop(0)
        kept.append(best)
        left = [
            i
            for i in left
            if group[i] != group[best] or overlap(boxes[best], boxes[i], of_smaller, pixel) <= max_overlap
        ]
    return kept


def overlap(a: np.ndarray, b: np.ndarray, of_smaller: bool = False, pixel: float = 0.0) -> float:
    a, b = np.float64(a), np.float64(b)
    w = min(a[2], b[2]) - max(a[0], b[0]) + pixel
    h = min(a[3], b[3]) - max(a[1], b[1]) + pixel
    if w <= 0 or h <= 0:
        return 0.0
    area_a = (a[2] - a[0] + pixel) * (a[3] - a[1] + pixel)
    area_b = (b[2] - b[0] + pixel) * (b[3] - b[1] + pixel)
    return float(w * h / (min(area_a, area_b) if of_smaller else area_a + area_b - w * h))
