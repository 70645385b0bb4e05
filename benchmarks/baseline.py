"""The opponents: the stack of this field's published systems, and the same made fair, on the same weights.

Crop geometry, tracking and aggregation are dfengine's own, so that scores can be compared: what differs is the
machinery, not the rules.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import PIL.Image
import torch
from facenet_pytorch import MTCNN
from numpy.typing import NDArray

from dfengine.bundle import Bundle, CropSpec, ModelSpec
from dfengine.gpu.torch import to_module
from dfengine.machine import usable_cores
from dfengine.runtime import CpuDevice
from dfengine.stages.aggregate import Verdict, judge
from dfengine.stages.crop import crop_boxes
from dfengine.stages.detect import Cutter, Detector
from dfengine.stages.people import People
from dfengine.types import F32, Faces, Frames, Image

# Frames that MTCNN sees at a time. Of the published systems that batch, one takes 8 and one 60; on two cores 1 to 8
# took the same time a frame, and 60 frames of 1080p as float32 are 1.5 GB.
MTCNN_BATCH = 8

Picture = NDArray[np.uint8]  # RGB, (H, W, 3)


class Baseline:
    """The usual way: OpenCV decodes, facenet-pytorch's MTCNN detects on full frames in batches, PIL crops with
    antialiasing, torch runs the network. One video at a time, with torch's and OpenCV's own threads.

    ``min_face_px``: MTCNN's, None for the same as dfengine's. ``device``: "cuda" is the naive way to use a GPU: the
    same with the networks moved there.
    """

    def __init__(
        self, bundle: Bundle, *, frames: int = 17, min_face_px: float | None = None, device: str = "cpu"
    ) -> None:
        torch.set_num_threads(usable_cores())
        self._device = device
        self._threads = 1  # torch has threads of its own
        self._bundle = bundle
        self.settings = bundle.detector
        self._frames = frames
        self._min_face_px = min_face_px
        # dfengine's conversion, for the few operators that onnx2torch lacks; in the layout of people's own models.
        self._nets = {
            m.name: to_module(bundle.onnx_bytes(m), m.name, device).to(memory_format=torch.contiguous_format)
            for m in bundle.members
        }
        self._mtcnn = MTCNN(keep_all=True, thresholds=list(bundle.detector.thresholds), device=device)

    @torch.inference_mode()
    def score(self, path: Path) -> Verdict | None:
        """None if there is no face."""
        pictures, seconds, index = self._decode(path)
        frames = Frames(tuple(_RgbImage.of(p) for p in pictures), seconds, index)
        ((_, rows, image_index),) = People(self, self._bundle.tracking, "exact", threads=self._threads).each([frames])
        if len(rows) == 0:
            return None
        logits = {}
        for member in self._bundle.members:
            boxes = crop_boxes(rows.xyxy, member.crop)
            batch = np.stack([crop_pil(pictures[i], b, member.crop) for i, b in zip(image_index, boxes, strict=True)])
            logits[member.name] = self._run(member, batch).astype(np.float64).reshape(-1)
        return judge(rows, logits, self._bundle)

    def _decode(self, path: Path) -> tuple[list[Picture], NDArray[np.float64], NDArray[np.int64]]:
        """Evenly spaced frames, read in sequence as published systems do; their seconds and numbers."""
        capture = cv2.VideoCapture(str(path))
        count = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        rate = capture.get(cv2.CAP_PROP_FPS)
        wanted = set(np.round(np.linspace(0, count - 1, self._frames)).astype(int))
        pictures, index = [], []
        for i in range(count):
            if not capture.grab():
                break
            if i in wanted:
                read, bgr = capture.retrieve()
                if read:
                    pictures.append(np.ascontiguousarray(bgr[..., ::-1]))
                    index.append(i)
        capture.release()
        order = np.array(index, np.int64)
        return pictures, order / rate, order

    def detect(self, images: Sequence[Image], *, stride: int = 1, threads: int = 1) -> Faces:
        """All frames are searched, whatever the stride. See dfengine.stages.people.FaceDetector."""
        pictures = [image.picture for image in images]  # type: ignore[attr-defined]
        h, w = pictures[0].shape[:2]
        self._mtcnn.min_face_size = self._min_face_px or max(20, self.settings.min_face_ratio * min(h, w))
        columns: list[list[Any]] = [[], [], [], []]
        for start in range(0, len(pictures), MTCNN_BATCH):
            found = self._mtcnn.detect(np.stack(pictures[start : start + MTCNN_BATCH]), landmarks=True)
            for i, (boxes, confidences, points) in enumerate(zip(*found, strict=True)):
                if boxes is None:
                    continue
                for values, column in zip(([start + i] * len(boxes), boxes, points, confidences), columns, strict=True):
                    column.extend(values)
        if not columns[0]:
            return Faces.empty()
        frame, boxes, points, confidence = columns
        return Faces(
            np.array(frame, np.int64), np.array(boxes, np.float32), np.array(points, np.float32),
            np.array(confidence, np.float32),
        )  # fmt: skip

    def _run(self, member: ModelSpec, batch: F32) -> NDArray[np.floating[Any]]:
        return self._nets[member.name](torch.from_numpy(batch).to(self._device)).cpu().numpy()


class FairBaseline(Baseline):
    """The usual way with what a careful person would change in an afternoon: PyAV decodes, all networks run on
    OpenVINO, the three of MTCNN on all frames of a video at once, with dfengine's box work. Pictures are RGB and are
    cut and resized with OpenCV and PIL. One per thread, so that several videos can be scored at a time.
    """

    def __init__(self, bundle: Bundle, *, frames: int = 17, threads: int = 1) -> None:
        self._bundle = bundle
        self.settings = bundle.detector
        self._frames = frames
        self._threads = threads
        self._detector = _RgbDetector(bundle.detector, threads=threads)
        self._sessions = {m.name: CpuDevice().session(bundle, m.name, threads=threads) for m in bundle.members}

    def _decode(self, path: Path) -> tuple[list[Picture], NDArray[np.float64], NDArray[np.int64]]:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            stream.codec_context.thread_count = self._threads
            count = stream.frames or sum(1 for p in container.demux(stream) if p.size)
            container.seek(0)
            wanted = set(np.round(np.linspace(0, count - 1, self._frames)).astype(int))
            kept = [
                (frame.to_ndarray(format="rgb24"), float(frame.pts * stream.time_base), i)
                for i, frame in enumerate(container.decode(stream))
                if i in wanted
            ]
        pictures, seconds, index = zip(*kept, strict=True)
        return list(pictures), np.array(seconds), np.array(index, np.int64)

    def detect(self, images: Sequence[Image], *, stride: int = 1, threads: int = 1) -> Faces:
        return self._detector.detect(images, stride=stride, threads=threads)

    def _run(self, member: ModelSpec, batch: F32) -> NDArray[np.floating[Any]]:
        return self._sessions[member.name].run(batch)[0]


class _RgbImage(Image):
    """An Image that knows the picture it was made of."""

    picture: Picture

    @classmethod
    def of(cls, picture: Picture) -> Image:
        image = cls.from_rgb(picture)
        object.__setattr__(image, "picture", picture)  # Image is frozen
        return image


class _RgbDetector(Detector):
    """The cascade fed by OpenCV."""

    def _cutter(self, threads: int) -> Cutter:
        return _RgbCutter(mean=self._input.mean, std=self._input.std, dtype="float32", threads=threads)


class _RgbCutter(Cutter):
    def pyramid(self, images: Any, sizes_hw: list[tuple[int, int]]) -> list[F32]:
        h, w = images[0].upright_hw
        whole, order = np.tile(np.array([0, 0, w, h], np.float32), (len(images), 1)), np.arange(len(images))
        return [self.crop(images, whole, order, hw) for hw in sizes_hw]

    def crop(self, images: Any, boxes: F32, image_index: Any, hw: tuple[int, int]) -> F32:
        pictures = [i.picture for i in images]
        out = np.empty((len(boxes), *hw, 3), np.float32)
        for row, (at, (x0, y0, x1, y1)) in enumerate(zip(image_index, boxes.astype(int), strict=True)):
            cut = pictures[at][y0:y1, x0:x1]
            out[row] = cv2.resize(cut, hw[::-1], interpolation=cv2.INTER_AREA)
        out = (out * (self.gain / 255) - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        return np.ascontiguousarray(out.transpose(0, 3, 1, 2))


def crop_pil(picture: Picture, box: F32, crop: CropSpec) -> F32:
    """One crop, (3, H, W), with PIL's antialiased bilinear resize; the rim of the frame is repeated outside it."""
    h, w = picture.shape[:2]
    left, top = max(0, int(np.ceil(-box[0])) + 1), max(0, int(np.ceil(-box[1])) + 1)
    right, bottom = max(0, int(np.ceil(box[2] - w)) + 1), max(0, int(np.ceil(box[3] - h)) + 1)
    if left or top or right or bottom:
        picture = np.pad(picture, ((top, bottom), (left, right), (0, 0)), "edge")
        box = box + np.array([left, top, left, top], np.float32)
    size = (crop.input_hw[1], crop.input_hw[0])
    face = PIL.Image.fromarray(picture).resize(size, PIL.Image.Resampling.BILINEAR, box=tuple(float(v) for v in box))
    rgb = np.asarray(face, np.float32) / 255
    return ((rgb - np.array(crop.mean, np.float32)) / np.array(crop.std, np.float32)).transpose(2, 0, 1)
