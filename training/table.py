"""The table of faces: what training.faces writes and everything else reads. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image as PilImage

from dfengine.errors import DfengineError, first_line
from dfengine.types import F32, F64, I64

from .labels import SPLITS, check_disjoint

# What is known of one face, and of a file as a whole. Boxes are xyxy pixels of the upright frame.
FACE_FIELDS = pa.schema(
    [
        ("track", pa.int32()),
        ("pts_seconds", pa.float64()),
        ("index", pa.int64()),  # of the frame, in the order of presentation
        ("box", pa.list_(pa.float32(), 4)),
        ("landmarks", pa.list_(pa.float32(), 10)),  # x, y of five points; null where the box was filled in
        ("confidence", pa.float32()),
        ("crop", pa.string()),  # file of the stored region, relative to the folder
        ("crop_xyxy", pa.list_(pa.int32(), 4)),  # where that region lies in the frame, whole pixels
        ("crop_hw", pa.list_(pa.int32(), 2)),  # its stored size: smaller than the region if it was scaled down
        ("failure", pa.string()),  # why there is no face; all of the above is null then
    ]
)
SCHEMA = pa.schema(
    [
        ("path", pa.string()),  # of the video or photo, relative to the source
        ("label", pa.int8()),  # 1 fake, 0 real, null for photos, which are real
        ("source_id", pa.string()),  # what must stay in one split
        ("original", pa.string()),  # path of the video a fake was made from, if it is in the table
        ("dataset", pa.string()),
        ("split", pa.string()),
        *FACE_FIELDS,
    ]
)


class DataError(DfengineError, ValueError):
    """The faces cannot be used for what is asked."""


@dataclass(frozen=True, eq=False)
class FaceTable:
    """Faces and failed files, one row each, N in all. Failed rows have ``failure`` and NaN or 0 for the rest."""

    folder: Path
    source: Path  # what ``path`` is relative to
    path: NDArray[Any]  # (N,) str
    label: NDArray[np.int64]  # (N,), 1 fake; photos are real
    source_id: NDArray[Any]
    original: NDArray[Any]  # (N,) str or None
    dataset: NDArray[Any]
    split_name: NDArray[Any]
    track: I64
    pts_seconds: F64
    index: I64
    box: F32  # (N, 4), xyxy in the upright frame
    landmarks: F32  # (N, 5, 2), NaN where the box was filled in
    confidence: F32
    crop: NDArray[Any]
    crop_xyxy: F32  # (N, 4), whole pixels
    crop_hw: I64  # (N, 2)
    failure: NDArray[Any]  # (N,) str or None

    @classmethod
    def load(cls, folder: Path | str) -> FaceTable:
        """Reads what training.faces wrote. Raises DataError."""
        folder = Path(folder)
        file = folder / "faces.parquet"
        try:
            table = pq.read_table(file)
        except FileNotFoundError:
            raise DataError("there is no faces.parquet; make it with python -m training.faces", path=folder) from None
        except (OSError, pa.ArrowInvalid) as error:
            raise DataError(f"the table cannot be read ({first_line(error)}); make it again", path=file) from None
        about = {k.decode(): v.decode() for k, v in (table.schema.metadata or {}).items()}
        if missing := set(SCHEMA.names) - set(table.column_names):
            raise DataError(f"the table has no column {min(missing)!r}; make it again", path=file)

        def text(name: str) -> NDArray[Any]:
            return np.array(table[name].to_pylist(), object)

        def number(name: str, dtype: Any, fill: float = 0) -> NDArray[Any]:
            return np.asarray(table[name].fill_null(fill).to_numpy().astype(dtype))

        def vector(name: str, dtype: Any, width: int) -> NDArray[Any]:
            column = table[name].combine_chunks()
            values = column.values.to_numpy(zero_copy_only=False).reshape(-1, width)
            known = column.is_valid().to_numpy(zero_copy_only=False)[:, None]
            return np.where(known, values, np.nan if dtype is np.float32 else 0).astype(dtype)

        return cls(
            folder,
            Path(about.get("source", "")),
            text("path"),
            number("label", np.int64),
            text("source_id"),
            text("original"),
            text("dataset"),
            text("split"),
            number("track", np.int64),
            number("pts_seconds", np.float64),
            number("index", np.int64),
            vector("box", np.float32, 4),
            vector("landmarks", np.float32, 10).reshape(-1, 5, 2),
            number("confidence", np.float32),
            text("crop"),
            vector("crop_xyxy", np.float32, 4),
            vector("crop_hw", np.int64, 2),
            text("failure"),
        )

    def __len__(self) -> int:
        return len(self.path)

    def __getitem__(self, rows: NDArray[Any]) -> FaceTable:
        """Some of the rows, by mask or number."""
        columns = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: v[rows] for k, v in columns.items() if isinstance(v, np.ndarray)})

    def split(self, name: str) -> FaceTable:
        """The rows of "train", "val" or "test", failed ones too. Raises DataError; LabelsError if a source leaks."""
        check_disjoint(self.source_id, self.split_name)
        of_path = dict(zip(self.path, self.split_name, strict=True))
        for path, original, split in zip(self.path, self.original, self.split_name, strict=True):
            if original is not None and of_path.get(original, split) != split:
                raise DataError(
                    f"the fake {path!r} is in {split}, its original {original!r} in {of_path[original]}; "
                    "split by identity",
                    path=self.folder,
                )
        part = self[self.split_name == name]
        if not len(part.faces):
            known = ", ".join(s for s in SPLITS if (self.split_name == s).any())
            raise DataError(
                f"no face is in split {name!r}, only in {known or 'none'}; give it files with training.faces --split",
                path=self.folder,
            )
        return part

    @property
    def faces(self) -> FaceTable:
        return self[np.array([f is None for f in self.failure], bool)]

    @property
    def failures(self) -> dict[str, str]:
        """Why there is no face, by path."""
        return {p: f for p, f in zip(self.path, self.failure, strict=True) if f is not None}

    def rows_by_video(self) -> dict[str, I64]:
        """Row numbers of the faces of each video, in the order of the table."""
        rows: dict[str, list[int]] = {}
        for row, (path, failure) in enumerate(zip(self.path, self.failure, strict=True)):
            if failure is None:
                rows.setdefault(path, []).append(row)
        return {path: np.array(r, np.int64) for path, r in rows.items()}

    def read_crop(self, row: int) -> NDArray[np.uint8]:
        """The stored region, RGB (H, W, 3). Raises DataError."""
        file = self.folder / self.crop[row]
        try:
            with PilImage.open(file) as image:
                rgb = np.asarray(image.convert("RGB"))
        except (OSError, SyntaxError) as error:
            raise DataError(
                f"the crop cannot be read ({first_line(error)}); remove its table in parts/ and run training.faces",
                path=file,
            ) from None
        if rgb.shape[:2] != tuple(self.crop_hw[row]):
            raise DataError(f"the crop has size {rgb.shape[:2]}, the table says {tuple(self.crop_hw[row])}", path=file)
        return np.ascontiguousarray(rgb)

    def in_crop(self, row: int, points: F32) -> F32:
        """Points (..., 2) of the frame -> points of the stored region."""
        x1, y1, x2, y2 = self.crop_xyxy[row]
        h, w = self.crop_hw[row]
        scale = np.array([w / (x2 - x1), h / (y2 - y1)], np.float32)
        return ((points - np.array([x1, y1], np.float32)) * scale).astype(np.float32)

    def summary(self) -> str:
        """What is in it, by split, and what failed."""
        lines = []
        for split in SPLITS:
            rows = self[self.split_name == split]
            videos = rows.rows_by_video()
            fakes = sum(int(rows.label[r[0]]) for r in videos.values())
            if len(rows):
                lines.append(
                    f"{split}: {sum(map(len, videos.values()))} faces of {len(videos)} files "
                    f"({len(videos) - fakes} real, {fakes} fake), {len(set(rows.faces.source_id))} sources"
                )
        failures = self.failures
        if failures:
            path = min(failures)
            lines.append(f"{len(failures)} files failed, the first is {path}: {failures[path]}")
        return "\n".join(lines)
