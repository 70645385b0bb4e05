"""Small sets to train on: a table of faces written directly, and real clips of one portrait that plays many people."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from assets import FACE, RGB, moving_face, with_sound, write_clip, write_face_table, x264


def write_faces(folder: Path, *, sources: dict[str, int], frames: int = 3) -> Path:
    """A table as training.faces writes it: of each source a real video and a fake, whose trace is planted.

    ``sources``: how many there are in each split.
    """
    videos = []
    for split, count in sources.items():
        for s in range(count):
            videos += [
                (f"{split}{s:03}_{('real', 'fake')[label]}.mp4", label, f"{split}{s}", split) for label in (0, 1)
            ]
    write_face_table(folder, videos, frames=frames)
    table = pq.read_table(folder / "faces.parquet")
    originals = [p.replace("fake", "real") if "fake" in p else None for p in table["path"].to_pylist()]
    at = table.column_names.index("original")
    pq.write_table(table.set_column(at, "original", pa.array(originals, pa.string())), folder / "faces.parquet")
    return folder


def plant(picture: RGB, strength: int = 40) -> RGB:
    """A trace that a convolution can find: vertical stripes, two pixels wide."""
    stripes = strength * (np.arange(picture.shape[1]) // 2 % 2)
    return (picture.astype(int) + stripes[None, :, None] - strength // 2).clip(0, 255).astype(np.uint8)


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
            return plant(real(t, w, h))  # type: ignore[operator]

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
