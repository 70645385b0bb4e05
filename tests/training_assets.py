"""Small sets to train on: a table of faces written directly, and real clips of one portrait that plays many people."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from assets import FACE, RGB, moving_face, with_sound, write_clip, x264
from PIL import Image as PilImage

from training.data import SCHEMA

LANDMARKS = ((0.3, 0.4), (0.7, 0.4), (0.5, 0.6), (0.35, 0.8), (0.65, 0.8))  # of the face box


def plant(picture: RGB, strength: int = 24) -> RGB:
    """A trace that a convolution can find: faint vertical stripes, two pixels wide."""
    stripes = strength * (np.arange(picture.shape[1]) // 2 % 2)
    return (picture.astype(int) + stripes[None, :, None] - strength // 2).clip(0, 255).astype(np.uint8)


def person(rng: np.random.Generator, side: int) -> RGB:
    """A picture that nobody would take for a face, but everybody for another than the next: smooth random colours."""
    coarse = rng.integers(30, 226, (5, 5, 3), np.uint8)
    return np.asarray(PilImage.fromarray(coarse).resize((side, side), PilImage.Resampling.BICUBIC))


def write_faces(
    folder: Path, *, sources: dict[str, int], frames: int = 3, side: int = 48, strength: int = 24, seed: int = 0
) -> Path:
    """A table as training.faces writes it: of each source a real video and a fake one with a planted trace.

    ``sources``: how many by split. A frame is ``side`` px wide and is stored whole; the face fills its middle.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for split, count in sources.items():
        for s in range(count):
            real = person(rng, side)
            for label in (0, 1):
                path = f"{split}{s:03}_{('real', 'fake')[label]}.mp4"
                for i in range(frames):
                    moved = np.roll(real, 2 * i, axis=0).astype(int) + rng.integers(-6, 7, real.shape)
                    picture = moved.clip(0, 255).astype(np.uint8)
                    crop = Path("crops") / f"{Path(path).stem}-{i}.png"
                    (folder / crop).parent.mkdir(parents=True, exist_ok=True)
                    PilImage.fromarray(plant(picture, strength) if label else picture).save(folder / crop)
                    box = np.array([side / 6, side / 6, side * 5 / 6, side * 5 / 6], np.float32)
                    points = [b for p in LANDMARKS for b in (box[:2] + np.array(p) * (box[2:] - box[:2])).tolist()]
                    row = dict.fromkeys(SCHEMA.names) | {
                        "path": path, "label": label, "source_id": f"{split}{s}", "dataset": "planted", "split": split,
                        "track": 0, "pts_seconds": i * 0.5, "index": 10 * i, "box": box, "landmarks": points,
                        "confidence": 1.0, "crop": crop.as_posix(), "crop_xyxy": [0, 0, side, side],
                        "crop_hw": [side, side],
                    }  # fmt: skip
                    if label:
                        row["original"] = f"{split}{s:03}_real.mp4"
                    rows.append({k: v for k, v in row.items() if k in SCHEMA.names})
    table = pa.Table.from_pylist(rows, SCHEMA).replace_schema_metadata({"source": str(folder)})
    pq.write_table(table, folder / "faces.parquet")
    return folder


def write_videos(folder: Path, *, people: int = 4, frames: int = 24, sound: bool = False) -> Path:
    """Clips of the astronaut in other light, each with a fake made from it; labels.csv says which is which."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(people):
        gain = np.linspace(0.75, 1.15, people)[i]

        def lit(t: int, w: int, h: int, gain: float = gain, mirrored: bool = bool(i % 2)) -> RGB:
            picture = moving_face(t, w, h)
            picture = picture[:, ::-1] if mirrored else picture
            return (picture * gain).clip(0, 255).astype(np.uint8)

        def forged(t: int, w: int, h: int, real: object = lit) -> RGB:
            return plant(real(t, w, h), 40)  # type: ignore[operator]

        split = ("train", "train", "val", "test")[i % 4]
        for name, picture in ((f"p{i}_real.mp4", lit), (f"p{i}_fake.mp4", forged)):
            clip = x264(name, "keyint=12:bframes=2", wh=FACE.wh, frames=frames, picture=picture)
            path = write_clip(clip, folder)
            if sound and i % 2 == 0:  # and the others have none
                tone = 0.4 * np.sin(np.arange(16000) * (0.1 + 0.05 * i))
                path = with_sound(path, tone, path.with_suffix(".mkv"))
            rows.append([path.name, int("fake" in name), f"p{i}", split])
    with open(folder / "labels.csv", "w", newline="") as file:
        csv.writer(file).writerows([["file", "label", "source_id", "split"], *rows])
    return folder
