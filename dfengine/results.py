"""Writing scores to files: JSON lines, CSV, Parquet."""

from __future__ import annotations

import csv
import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any

from dfengine.errors import OptionError
from dfengine.types import VideoScore

# The flat columns of tables, in order: one row a video.
COLUMNS = (
    "path", "status", "p_fake", "logit", "error_type", "error_stage", "error_message", "warnings", "people",
    "frames_decoded", "frames_scored", "bundle", "device", "decoder", "seconds",
)  # fmt: skip


class Writer(AbstractContextManager["Writer"], ABC):
    """Takes scores one by one; a context manager whose end completes the file."""

    @abstractmethod
    def write(self, score: VideoScore) -> None:
        """Adds one score."""


def to_json(score: VideoScore) -> str:
    """One line of JSON, ASCII only, so that no name and no terminal can break it."""
    return json.dumps(score.to_dict(), ensure_ascii=True, allow_nan=False)


def to_row(score: VideoScore) -> dict[str, Any]:
    """The flat columns of a score."""
    error = score.error
    return {
        "path": score.path,
        "status": score.status,
        "p_fake": score.p_fake,
        "logit": score.logit,
        "error_type": error.type if error else None,
        "error_stage": error.stage if error else None,
        "error_message": error.message if error else None,
        "warnings": "; ".join(score.warnings) or None,
        "people": len(score.tracks),
        "frames_decoded": score.frames_decoded,
        "frames_scored": score.frames_scored,
        "bundle": score.bundle,
        "device": score.device,
        "decoder": score.decoder,
        "seconds": round(sum(score.timings.values()), 4),
    }


def open_writer(path: Path) -> Writer:
    """A writer for ``path`` by its suffix: .jsonl, .csv or .parquet.

    Raises OptionError for another suffix, a folder that is not there, or Parquet without pyarrow: before any video is
    scored, not after the last.
    """
    makers: dict[str, Callable[[Path], Writer]] = {".jsonl": _JsonLines, ".csv": _Csv, ".parquet": _Parquet}
    if path.suffix not in makers:
        raise OptionError(f"the output {path.name!r} must end in {', '.join(makers)}")
    if not path.absolute().parent.is_dir():
        raise OptionError(f"the folder for the output {str(path)!r} does not exist; make it first")
    try:
        return makers[path.suffix](path)
    except OSError as error:
        raise OptionError(f"the output {str(path)!r} cannot be written ({error.strerror})") from None


class _Text(Writer):
    """A text file that is complete after every row."""

    def __init__(self, path: Path) -> None:
        self._file: IO[str] = path.open("w", encoding="utf-8", newline="")

    def __exit__(self, *error: object) -> None:
        self._file.close()


class _JsonLines(_Text):
    def write(self, score: VideoScore) -> None:
        self._file.write(to_json(score) + "\n")
        self._file.flush()


class _Csv(_Text):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._rows = csv.DictWriter(self._file, COLUMNS, lineterminator="\n")
        self._rows.writeheader()

    def write(self, score: VideoScore) -> None:
        self._rows.writerow(to_row(score))
        self._file.flush()


class _Parquet(Writer):
    """Parquet has no rows to append: everything is written at the end, by way of a temporary file."""

    def __init__(self, path: Path) -> None:
        try:
            import pyarrow.parquet
        except ImportError:
            raise OptionError("Parquet needs pyarrow: pip install 'dfengine[parquet]'") from None
        self._arrow = pyarrow
        self._path = path
        self._rows: list[dict[str, Any]] = []

    def write(self, score: VideoScore) -> None:
        self._rows.append(to_row(score) | {"detail_json": to_json(score)})

    def __exit__(self, *error: object) -> None:
        arrow = self._arrow
        numbers = {"p_fake": arrow.float64(), "logit": arrow.float64(), "seconds": arrow.float64()}
        numbers |= dict.fromkeys(("people", "frames_decoded", "frames_scored"), arrow.int64())
        schema = arrow.schema([(name, numbers.get(name, arrow.string())) for name in (*COLUMNS, "detail_json")])
        partial = self._path.with_name(self._path.name + ".partial")
        arrow.parquet.write_table(arrow.Table.from_pylist(self._rows, schema), partial)
        partial.replace(self._path)
