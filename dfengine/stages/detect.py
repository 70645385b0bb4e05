"""Finding faces: MTCNN, three networks in a cascade (Zhang et al. 2016, arXiv:1604.02878).

P-Net slides over a pyramid of the frame and proposes boxes; R-Net and O-Net look at each proposal again, reject most
and move the rest. The weights and the arithmetic are those of facenet-pytorch, one-based inclusive boxes of the
original included, so that detections can be compared; what enters the networks comes straight from the YUV planes.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dfengine.bundle import DetectorSettings, load_nets
from dfengine.runtime import CpuDevice, Device, run_or_halve
from dfengine.stages import _boxes
from dfengine.stages.kernels import crop_resize, pyramid, to_host
from dfengine.types import F32, Dtype, Faces, Image

# Frames that go through the cascade together. Their pyramids take 40 MB as network input; on two cores 4, 8 and 48
# were no faster.
BATCH_FRAMES = 16

# GPU memory for that: 16 frames at the largest level of the pyramid and their proposals, 20 MiB as a rule.
DETECTOR_BYTES = 64 << 20

# No network of the cascade is asked for smaller faces: facenet-pytorch's own default.
MIN_FACE_PX = 20.0

_CELL = 12  # P-Net's field of view, in pixels
# Overlaps at which a weaker box is dropped: within a level, between levels, after R-Net, after O-Net (there of the
# smaller box). From the reference implementation.
_NMS_LEVEL, _NMS_PYRAMID, _NMS_RNET, _NMS_ONET = 0.5, 0.7, 0.7, 0.7

# Frames that are looked at, turned three ways, for faces that lie on their side: together no more than the default of
# 17, in which nobody was found. Chosen.
_LOOK_FRAMES = 5

# IoU from which boxes in two frames may be one face. As for tracks, and for the reason given at
# TrackingSettings.min_iou.
_SAME_FACE = 0.1


@dataclass(frozen=True, eq=False, kw_only=True)
class Cutter:
    """How network input is cut out of pictures: normalised, after brightening by ``gain``, on ``threads`` cores."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    dtype: Dtype
    gain: float = 1.0
    threads: int = 1

    def crop(self, images: Sequence[Image], boxes: F32, image_index: NDArray[np.int32], hw: tuple[int, int]) -> Any:
        """Boxes (N, 4) of the images that ``image_index``, (N,), names -> (N, 3, *hw)."""
        return crop_resize(images, boxes, image_index, out_hw=hw, **self._options())

    def pyramid(self, images: Sequence[Image], sizes_hw: list[tuple[int, int]]) -> Sequence[Any]:
        """The whole images, which are of one size, at each of the sizes."""
        return pyramid(images, sizes_hw, **self._options())

    def _options(self) -> dict[str, Any]:
        # Brightening before normalising, (gain * x - mean) / std, costs nothing this way.
        mean, std = (tuple(value / self.gain for value in values) for values in (self.mean, self.std))
        return {"mean": mean, "std": std, "resize": "area", "dtype": self.dtype, "threads": self.threads}


class Detector:
    """The cascade, compiled for a device, to run on up to ``threads`` cores at a time. Thread-safe.

    ``folder``: that of the bundle with these settings, if there is one. Raises BundleError.
    """

    def __init__(
        self,
        settings: DetectorSettings,
        *,
        folder: Path | None = None,
        device: Device | None = None,
        threads: int = 1,
    ) -> None:
        device = CpuDevice() if device is None else device
        nets = load_nets(settings, folder)
        self.settings = settings
        self._dtype = device.dtype
        self._pnet, self._rnet, self._onet = (
            device.session(nets, name, threads=threads, detector=settings) for name in ("pnet", "rnet", "onet")
        )
        self._input = nets.member("pnet").crop

    def detect(self, images: Sequence[Image], *, stride: int = 1, threads: int = 1) -> Faces:
        """Finds the faces of each image; ``Faces.image_index`` counts in ``images``.

        Sorted by image, then by falling confidence. An image without a face has no row. Images of one size share
        batches; with a ``stride`` of 1 the others change the result for an image by rounding only (below 1e-3 pixels).

        A larger ``stride`` is for the frames of one video in order of time: every stride-th goes through the whole
        cascade, and those between are searched where their neighbours have faces (Note [Frames between]).

        ``threads``: cores that cut network input out of the images.
        """
        cutter = self._cutter(threads)
        found = [self._detect_sized(images, rows, cutter, stride) for rows in _by_size(images)]
        empty = np.setdiff1d(np.arange(len(images)), np.concatenate([f.image_index for f in found]) if found else [])
        for gain, rows in self._group_by_gain(images, empty):
            brighter = dataclasses.replace(cutter, gain=gain)
            found += [
                self._detect_sized(images, rows[sized], brighter, stride)
                for sized in _by_size([images[i] for i in rows])
            ]
        faces = Faces.concatenate(found)
        return faces[np.lexsort((-faces.confidence, faces.image_index))]

    def lying(self, images: Sequence[Image], min_confidence: float) -> int:
        """The turn clockwise, 90, 180 or 270 degrees, that shows faces in a video in which nobody was found; else 0.

        For videos that were recorded with the camera on its side and lost the note of it. A few of the images, which
        are of one video, are looked at; faces below ``min_confidence`` do not count, and most images must show one.
        """
        places = np.unique(np.linspace(0, len(images) - 1, min(_LOOK_FRAMES, len(images))).round().astype(np.int64))
        for degrees in (90, 270, 180):
            turned = [dataclasses.replace(images[i], rotation=(images[i].rotation + degrees) % 360) for i in places]
            faces = self.detect(turned)
            if 2 * len(np.unique(faces.image_index[faces.confidence >= min_confidence])) > len(places):
                return degrees
        return 0

    def _group_by_gain(self, images: Sequence[Image], rows: NDArray[Any]) -> Iterator[tuple[float, NDArray[np.int64]]]:
        """Groups dark images by the gain that brings their brightest pixels near 255."""
        gains: dict[float, list[int]] = {}
        for i in rows:
            brightest = _brightest_luma(images[i])
            if brightest < self.settings.dark_below:
                # Steps of sqrt(2) let frames share a batch, and rounding down keeps highlights from clipping.
                step = np.floor(2 * np.log2(255 / max(brightest, 1.0))) / 2
                gains.setdefault(min(float(2**step), self.settings.max_gain), []).append(int(i))
        for gain, group in gains.items():
            if gain > 1:
                yield gain, np.array(group, np.int64)

    def _detect_sized(self, images: Sequence[Image], rows: NDArray[np.int64], cutter: Cutter, stride: int) -> Faces:
        """Runs images of one size: every ``stride``-th and the last through the whole cascade, the others if need be.

        Note [Frames between]
        Samples of a video are alike, and proposing is what costs: P-Net sees the whole frame. Where two neighbours show
        the same faces, each overlapping with itself, R-Net and O-Net are given those boxes, and where each would be if
        it moved evenly, instead of proposals. The frame counts as searched only if they confirm as many faces there as
        the neighbours have; any other frame goes through the whole cascade. So faces that come and go are found, and
        what R-Net and O-Net do not confirm is not carried along. Missed is who appears beside others in these frames
        only, for less than ``stride`` samples.
        """
        whole = np.union1d(rows[::stride], rows[-1:])
        faces = self._search(images, whole, cutter)
        followed = self._follow(images, rows, faces, whole, cutter)
        rest = np.setdiff1d(rows, np.concatenate([whole, followed.image_index]))
        return Faces.concatenate([faces, followed, self._search(images, rest, cutter)])

    def _search(self, images: Sequence[Image], rows: NDArray[np.int64], cutter: Cutter) -> Faces:
        """The whole cascade, in batches."""
        parts: list[Faces] = []

        def run(start: int, stop: int) -> None:
            batch = rows[start:stop]
            faces = self._cascade([images[i] for i in batch], cutter)
            parts.append(dataclasses.replace(faces, image_index=batch[faces.image_index]))

        for start in range(0, len(rows), BATCH_FRAMES):
            run_or_halve(run, start, min(start + BATCH_FRAMES, len(rows)))
        return Faces.concatenate(parts)

    def _follow(
        self, images: Sequence[Image], rows: NDArray[np.int64], faces: Faces, whole: NDArray[np.int64], cutter: Cutter
    ) -> Faces:
        """The faces of ``rows`` that lie between rows of ``whole``, which have ``faces``; all of a row's or none."""
        expected = np.zeros(len(images), np.int64)
        at: list[int] = []
        boxes: list[F32] = [np.zeros((0, 4), np.float32)]
        for before, after in itertools.pairwise(whole):
            a, b = faces.xyxy[faces.image_index == before], faces.xyxy[faces.image_index == after]
            i, j = np.nonzero(_boxes.iou_matrix(a, b) >= _SAME_FACE)
            if not len(a) == len(b) == len(i) == len(np.unique(i)) == len(np.unique(j)):
                continue
            for row in rows[(rows > before) & (rows < after)]:
                moved = a[i] + np.float32((row - before) / (after - before)) * (b[j] - a[i])
                boxes += [a, b, moved]
                at += [row] * (3 * len(a))
                expected[row] = len(a)
        image, candidates = np.array(at, np.int32), np.concatenate(boxes)
        _boxes.make_square(candidates)
        found = self._run_onet(images, *self._run_rnet(images, image, candidates, cutter), cutter)
        confirmed = np.bincount(found.image_index, minlength=len(images)) == expected
        return found[confirmed[found.image_index]]

    def _cutter(self, threads: int) -> Cutter:
        return Cutter(mean=self._input.mean, std=self._input.std, dtype=self._dtype, threads=threads)

    def _cascade(self, images: Sequence[Image], cutter: Cutter) -> Faces:
        """The three networks on images of one size."""
        return self._run_onet(images, *self._run_rnet(images, *self._run_pnet(images, cutter), cutter), cutter)

    def _run_rnet(
        self, images: Sequence[Image], image: NDArray[np.int32], boxes: F32, cutter: Cutter
    ) -> tuple[NDArray[np.int32], F32]:
        """R-Net: (image, square xyxy boxes) of what it takes for faces, moved towards them."""
        image, boxes, crops = self._crop_proposals(images, image, boxes, 24, cutter)
        score, shift = self._rnet.run(crops)
        image, boxes, score, shift = _select(score >= self.settings.thresholds[1], image, boxes, score, shift)
        kept = _boxes.nms(boxes, score, image, _NMS_RNET)
        image, boxes, shift = image[kept], boxes[kept], shift[kept]
        _boxes.regress(boxes, shift, 1.0)
        _boxes.make_square(boxes)
        return image, boxes

    def _run_onet(self, images: Sequence[Image], image: NDArray[np.int32], boxes: F32, cutter: Cutter) -> Faces:
        """O-Net: what it takes for a face, with landmarks, each face once."""
        image, boxes, crops = self._crop_proposals(images, image, boxes, 48, cutter)
        score, shift, points = self._onet.run(crops)
        taken = score >= self.settings.thresholds[2]
        image, boxes, score, shift, points = _select(taken, image, boxes, score, shift, points)
        size = boxes[:, None, 2:] - boxes[:, None, :2] + 1  # (F, 1, 2)
        landmarks = points.reshape(-1, 2, 5).transpose(0, 2, 1) * size + boxes[:, None, :2] - 1  # (F, 5, 2)
        _boxes.regress(boxes, shift, 1.0)
        kept = _boxes.nms(boxes, score, image, _NMS_ONET, of_smaller=True, pixel=1.0)
        return Faces(image[kept].astype(np.int64), boxes[kept], landmarks[kept].astype(np.float32), score[kept])

    def _run_pnet(self, images: Sequence[Image], cutter: Cutter) -> tuple[NDArray[np.int32], F32]:
        """P-Net over the pyramid: (image, square xyxy boxes)."""
        h, w = images[0].upright_hw
        scales = self._scales(h, w)
        levels = cutter.pyramid(images, [(int(h * scale + 1), int(w * scale + 1)) for scale in scales])
        found: list[tuple[NDArray[np.int32], F32]] = []
        for scale, level in zip(scales, levels, strict=True):
            prob, shift = self._pnet.run(level)
            image, rows = _boxes.propose(prob, shift, scale, self.settings.thresholds[0])
            kept = _boxes.nms(rows[:, :4], rows[:, 4], image, _NMS_LEVEL)
            found.append((image[kept], rows[kept]))
        if not found:  # the frame is smaller than the smallest face that is looked for
            return np.zeros(0, np.int32), np.zeros((0, 4), np.float32)
        image = np.concatenate([f[0] for f in found])
        rows = np.concatenate([f[1] for f in found])
        kept = _boxes.nms(rows[:, :4], rows[:, 4], image, _NMS_PYRAMID)
        image, boxes, shift = image[kept], np.ascontiguousarray(rows[kept, :4]), rows[kept, 5:]
        _boxes.regress(boxes, shift)
        _boxes.make_square(boxes)
        return image, boxes

    def _scales(self, h: int, w: int) -> list[float]:
        scale = _CELL / max(MIN_FACE_PX, self.settings.min_face_ratio * min(h, w))
        scales = []
        while min(h, w) * scale >= _CELL:
            scales.append(scale)
            scale *= self.settings.pyramid_factor
        return scales

    def _crop_proposals(
        self, images: Sequence[Image], image: NDArray[np.int32], boxes: F32, size: int, cutter: Cutter
    ) -> tuple[NDArray[np.int32], F32, Any]:
        """Cuts proposals out at whole pixels, clipped to the frame; drops those that lie outside it."""
        h, w = images[0].upright_hw
        whole = np.trunc(boxes)
        whole[:, :2] = np.maximum(whole[:, :2], 1) - 1  # one-based, inclusive -> half-open
        whole[:, 2:] = np.minimum(whole[:, 2:], (w, h))
        inside = np.all(whole[:, 2:] > whole[:, :2], axis=1)
        image, boxes, whole = _select(inside, image, boxes, whole)
        return image, boxes, cutter.crop(images, whole, image, (size, size))


def _by_size(images: Sequence[Image]) -> list[NDArray[np.int64]]:
    """Row numbers of the images, grouped by upright size."""
    groups: dict[tuple[int, int], list[int]] = {}
    for i, image in enumerate(images):
        groups.setdefault(image.upright_hw, []).append(i)
    return [np.array(g, np.int64) for g in groups.values()]


def _select(mask: Any, *columns: Any) -> Any:
    return tuple(np.ascontiguousarray(c[mask]) for c in columns)


def _brightest_luma(image: Image) -> float:
    """99th percentile of the first component, on the scale 0..255 of full range. Every 4th pixel will do."""
    luma = to_host(image.components[0])[::4, ::4]
    value: float = float(np.percentile(luma, 99)) / float(1 << (image.bit_depth - 8))
    return value if image.full_range else (value - 16.0) * 255 / 219
