"""The formats of files of results (JSON lines, CSV, Parquet), and the columns of tables: one row a video."""

from __future__ import annotations

import csv
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from dfengine.errors import OptionError
from dfengine.types import VideoScore

# The flat columns, in order.
COLUMNS = (
    "path", "status", "p_fake", "logit", "error_type", "error_stage", "error_message", "warnings", "people",
    "frames_decoded", "frames_scored", "members", "sampling", "mode", "bundle", "device", "decoder", "seconds",
    "request",
)  # fmt: skip

PARQUET_ROWS = 1000  # written at a time

Row = dict[str, Any]


def to_json(score: VideoScore) -> str:
    """A score with everything in it, as ``to_line`` has it."""
    return to_line(score.to_dict())


def to_line(row: Row) -> str:
    """One line of JSON, ASCII only, so that no name and no terminal can break it."""
    return json.dumps(row, ensure_ascii=True, allow_nan=False)


def to_row(score: VideoScore) -> Row:
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
        "members": "; ".join(score.members) or None,
        "sampling": score.sampling,
        "mode": score.mode,
        "bundle": score.bundle,
        "device": score.device,
        "decoder": score.decoder,
        "seconds": round(sum(score.timings.values()), 4),
        "request": score.request,
    }


class Format(ABC):
    """One kind of file. Rows are dicts with at least path, status, p_fake and request, ready for JSON."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.journal = path.with_name(path.name + ".journal.jsonl")

    @abstractmethod
    def to_row(self, score: VideoScore) -> Row:
        """What the journal keeps of a score."""

    @abstractmethod
    def write_table(self, rows: Iterable[Row], path: Path) -> None:
        """Makes the whole file from the journal's rows, at ``path``."""

    @abstractmethod
    def read_table(self) -> Iterator[Row]:
        """The rows of a finished file."""


class _JsonLines(Format):
    """Its own journal."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.journal = path

    def to_row(self, score: VideoScore) -> Row:
        return score.to_dict()

    def write_table(self, rows: Iterable[Row], path: Path) -> None:
        raise NotImplementedError

    def read_table(self) -> Iterator[Row]:
        return iter(())


class Csv(Format):
    def to_row(self, score: VideoScore) -> Row:
        return to_row(score)

    def write_table(self, rows: Iterable[Row], path: Path) -> None:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n", extrasaction="ignore")  # columns of the user
            writer.writeheader()
            writer.writerows(rows)

    def read_table(self) -> Iterator[Row]:
        with self.path.open(encoding="utf-8", newline="") as file:
            yield from csv.DictReader(file)


class _Parquet(Format):
    """With a column more than CSV: the whole score as JSON."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            import pyarrow.parquet
        except ImportError:
            raise OptionError("Parquet needs pyarrow: pip install 'dfengine[parquet]'") from None
        self._arrow = pyarrow

    def to_row(self, score: VideoScore) -> Row:
        return to_row(score) | {"detail_json": to_json(score)}

    def write_table(self, rows: Iterable[Row], path: Path) -> None:
        arrow = self._arrow
        numbers = {"p_fake": arrow.float64(), "logit": arrow.float64(), "seconds": arrow.float64()}
        numbers |= dict.fromkeys(("people", "frames_decoded", "frames_scored"), arrow.int64())
        schema = arrow.schema([(name, numbers.get(name, arrow.string())) for name in (*COLUMNS, "detail_json")])
        with arrow.parquet.ParquetWriter(path, schema) as writer:
            for part in _in_parts(rows, PARQUET_ROWS):
                writer.write_table(arrow.Table.from_pylist(part, schema))

    def read_table(self) -> Iterator[Row]:
        with self._arrow.parquet.ParquetFile(self.path) as file:  # ArrowInvalid is a ValueError
            for batch in file.iter_batches(PARQUET_ROWS):
                yield from batch.to_pylist()


FORMATS: dict[str, type[Format]] = {".jsonl": _JsonLines, ".csv": Csv, ".parquet": _Parquet}


def _in_parts(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    part: list[Row] = []
    for row in rows:
        part.append(row)
        if len(part) == size:
            yield part
            part = []
    if part:
        yield part
