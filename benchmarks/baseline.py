"""The opponent: the stack of this field's published systems, on the same weights.

OpenCV decodes, facenet-pytorch's MTCNN detects on full frames in batches, PIL crops with antialiasing, torch runs the
network. Crop geometry, tracking and aggregation are dfengine's own, so that scores can be compared: what differs is the
machinery, not the rules.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import onnx2torch
import PIL.Image
import torch
from facenet_pytorch import MTCNN
from numpy.typing import NDArray

from dfengine.aggregate import Verdict, judge
from dfengine.bundle import Bundle, ModelSpec
from dfengine.crop import crop_boxes
from dfengine.track import Linker, select
from dfengine.types import F32, Faces, Frames, Image

# Frames that MTCNN sees at a time. Of the published systems that batch, one takes 8 and one 60; on two cores 1 to 8
# took the same time a frame, and 60 frames of 1080p as float32 are 1.5 GB.
MTCNN_BATCH = 8


class Baseline:
    """Scores a video the usual way. ``min_face_px``: MTCNN's, None for the same as dfengine's."""

    def __init__(self, bundle: Bundle, *, frames: int = 17, min_face_px: float | None = None) -> None:
        self._bundle = bundle
        self._frames = frames
        self._min_face_px = min_face_px
        self._nets = {
            m.name: onnx2torch.convert(onnx.load_from_string(bundle.onnx_bytes(m))).eval() for m in bundle.members
        }
        self._mtcnn = MTCNN(keep_all=True, thresholds=list(bundle.detector.thresholds), device="cpu")

    @torch.inference_mode()
    def score(self, path: Path) -> Verdict | None:
        """None if there is no face."""
        pictures, frames = self._decode(path)
        faces = self._detect(pictures)
        rows = Linker(self._bundle.tracking).link(frames, faces)
        rows = rows[np.isin(rows.track_id, select(rows, len(frames), self._bundle.tracking))]
        if len(rows) == 0:
            return None
        logits = {}
        for member in self._bundle.members:
            boxes = crop_boxes(rows.xyxy, member)
            batch = np.stack([crop_pil(pictures[f], b, member) for f, b in zip(rows.frame, boxes, strict=True)])
            logits[member.name] = self._nets[member.name](torch.from_numpy(batch)).double().numpy().reshape(-1)
        return judge(rows, logits, self._bundle)

    def _decode(self, path: Path) -> tuple[list[NDArray[np.uint8]], Frames]:
        """Evenly spaced frames, RGB uint8 (H, W, 3), read in sequence as the seed systems do."""
        capture = cv2.VideoCapture(str(path))
        count = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        rate = capture.get(cv2.CAP_PROP_FPS)
        wanted = np.unique(np.round(np.linspace(0, count - 1, self._frames)).astype(int))
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
        images = tuple(Image.from_rgb(p) for p in pictures)
        return pictures, Frames(images, order / rate, order)

    def _detect(self, pictures: list[NDArray[np.uint8]]) -> Faces:
        h, w = pictures[0].shape[:2]
        self._mtcnn.min_face_size = self._min_face_px or max(20, self._bundle.detector.min_face_ratio * min(h, w))
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


def crop_pil(picture: NDArray[np.uint8], box: F32, spec: ModelSpec) -> F32:
    """One crop, (3, H, W), with PIL's antialiased bilinear resize; the rim of the frame is repeated outside it."""
    h, w = picture.shape[:2]
    left, top = max(0, int(np.ceil(-box[0])) + 1), max(0, int(np.ceil(-box[1])) + 1)
    right, bottom = max(0, int(np.ceil(box[2] - w)) + 1), max(0, int(np.ceil(box[3] - h)) + 1)
    if left or top or right or bottom:
        picture = np.pad(picture, ((top, bottom), (left, right), (0, 0)), "edge")
        box = box + np.array([left, top, left, top], np.float32)
    size = (spec.input_hw[1], spec.input_hw[0])
    face = PIL.Image.fromarray(picture).resize(size, PIL.Image.Resampling.BILINEAR, box=tuple(float(v) for v in box))
    rgb = np.asarray(face, np.float32) / 255
    return ((rgb - np.array(spec.mean, np.float32)) / np.array(spec.std, np.float32)).transpose(2, 0, 1)
