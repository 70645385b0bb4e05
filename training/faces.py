"""Portraits -> face crops: the only data that training sees, in one cache file.

``python -m training.faces --photos DIR --out runs/faces.npz``. DIR holds ``index.csv`` with the columns ``file`` and
``source_dataset``; photos without exactly one clear face are left out and counted.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PilImage

from dfengine.bundle import DetectorSettings, ModelSpec
from dfengine.crop import crop_boxes, crop_faces
from dfengine.detect import Detector
from dfengine.types import F32, Bool, Image

# Pixels on a side of the stored crop and its margin: the face box measures 240 / 1.6 = 150 px, more than the 120 px
# it has in a 144 px input with margin 0.2; the rest is room to turn, shift and scale it.
STORED = ModelSpec(name="stored", file="", sha256="", input_hw=(240, 240), margin_ratio=0.6)
FACE_PX = STORED.input_hw[0] / (1 + STORED.margin_ratio)

# The largest face of a portrait fills 27 % of it at least; looking for faces below 15 % would only find patterns.
DETECTOR = DetectorSettings(min_face_ratio=0.15)

HELD_OUT_RATIO = 0.15  # about 100 of the 700 people: enough for an interval of about .03 on an AUC


@dataclass(frozen=True, eq=False)
class FaceSet:
    """N face crops, one row a photo. Boxes and landmarks are in pixels of the crop."""

    rgb: NDArray[np.uint8]  # (N, 240, 240, 3)
    xyxy: F32  # (N, 4)
    landmarks: F32  # (N, 5, 2), xy, in the order of dfengine.types.Faces
    identity: NDArray[np.str_]  # (N,)
    dataset: NDArray[np.str_]  # (N,)
    photo: NDArray[np.str_]  # (N,), relative to the folder of the photos

    def __len__(self) -> int:
        return len(self.rgb)

    def __getitem__(self, rows: NDArray[np.bool_ | np.int64]) -> FaceSet:
        return FaceSet(*(getattr(self, f.name)[rows] for f in fields(self)))

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(path, **{f.name: getattr(self, f.name) for f in fields(self)})

    @classmethod
    def load(cls, path: Path) -> FaceSet:
        with np.load(path, allow_pickle=False) as data:
            return cls(*(data[f.name] for f in fields(cls)))


def identity_of(file: str) -> str:
    """Who is in the photo, judged by its file name; wrong, if at all, by taking two people for one.

    The Face Research Lab London Set numbers its people (``inst_smiling_front_018_08.jpg`` is person 018). The portraits
    of the US House and Senate are named after them, but not always in the same form when a person sat in both
    (``ben-ray-lujan``, ``ben-lujan``), so there everybody with one surname counts as one person.
    """
    path = Path(file)
    if path.parts[0] == "webmorphR.stim":
        return f"london-{path.stem.split('_')[3]}"
    return f"congress-{path.stem.lower().split('-')[-1]}"


def is_held_out(identity: NDArray[np.str_]) -> Bool:
    """Which rows are never trained on, (N,). Depends on the identity alone, so new photos move nobody."""
    digests = [hashlib.sha256(i.encode()).digest() for i in identity]
    return np.array([int.from_bytes(d[:4], "big") / 2**32 < HELD_OUT_RATIO for d in digests])


def check_disjoint(train: FaceSet, held_out: FaceSet) -> None:
    """Raises ValueError if a person is in both sets."""
    both = np.intersect1d(train.identity, held_out.identity)
    if len(both):
        raise ValueError(f"{len(both)} identities are in both splits, the first is {str(both[0])!r}; split by identity")


def split(faces: FaceSet) -> tuple[FaceSet, FaceSet]:
    """(train, held out), disjoint in identities."""
    held_out = is_held_out(faces.identity)
    parts = faces[~held_out], faces[held_out]
    check_disjoint(*parts)
    return parts


def cut_face(rgb: NDArray[np.uint8], detector: Detector) -> tuple[NDArray[np.uint8], F32, F32] | None:
    """RGB (H, W, 3) -> the crop around its largest face, box (4,) and landmarks (5, 2) in it; None without a face."""
    image = Image.from_rgb(np.ascontiguousarray(rgb))
    found = detector.detect([image])
    if len(found) == 0:
        return None
    row = int(np.argmax(np.prod(found.xyxy[:, 2:] - found.xyxy[:, :2], axis=1)))
    box = found.xyxy[row : row + 1]
    crop = crop_faces([image], box, np.zeros(1, np.int64), STORED)[0]
    x1, y1, x2, _ = crop_boxes(box, STORED)[0]
    origin, scale = np.array([x1, y1]), STORED.input_hw[0] / (x2 - x1)
    points = (np.concatenate([box.reshape(2, 2), found.landmarks[row]]) - origin) * scale
    points = points.astype(np.float32)
    return (crop.transpose(1, 2, 0) * 255).round().clip(0, 255).astype(np.uint8), points[:2].reshape(4), points[2:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    detector = Detector(DETECTOR)
    rows = []
    with open(args.photos / "index.csv", newline="") as index:
        listed = list(csv.DictReader(index))
    for entry in listed:
        rgb = np.asarray(PilImage.open(args.photos / entry["file"]).convert("RGB"))
        face = cut_face(rgb, detector)
        if face is not None:
            rows.append((*face, identity_of(entry["file"]), entry["source_dataset"], entry["file"]))
    faces = FaceSet(*(np.array(column) for column in zip(*rows, strict=True)))
    faces.save(args.out)
    train, held_out = split(faces)
    print(
        f"{len(faces)} faces in {len(listed)} photos; {len(train)} of {len(np.unique(train.identity))} people to train "
        f"on, {len(held_out)} of {len(np.unique(held_out.identity))} people held out"
    )


if __name__ == "__main__":
    main()
