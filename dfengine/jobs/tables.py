"""The formats of files of results (JSON lines, CSV, Parquet), and the columns of tables: one row a video."""

from __future__ import annotations

import csv
import json
import reprlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from dfengine.errors import OptionError, first_line
from dfengine.types import VideoScore

# The flat columns, in order.
COLUMNS = (
    "path", "status", "p_fake", "logit", "error_type", "error_stage", "error_message", "warnings", "people",
    "frames_decoded", "frames_scored", "members", "sampling", "mode", "bundle", "detector_digest", "dfengine_version",
    "device", "decoder", "seconds", "fingerprint",
)  # fmt: skip

# What is in the columns that hold no text.
_NUMBERS: dict[str, type[float] | type[int]] = {
    "p_fake": float, "logit": float, "seconds": float, "people": int, "frames_decoded": int, "frames_scored": int,
}  # fmt: skip

# What a row cannot be without, whatever the format.
_NEEDED = ("path", "status", "p_fake", "fingerprint")

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
        "detector_digest": score.detector_digest,
        "dfengine_version": score.dfengine_version,
        "device": score.device,
        "decoder": score.decoder,
        "seconds": round(sum(score.timings.values(), 0.0), 4),
        "fingerprint": score.fingerprint,
    }


class NoRow(ValueError):
    """What was read is no row of scores. Says what is wrong if it looks like one."""


def _read_needed(row: Any) -> Row:
    """The values of ``_NEEDED``, as ``to_row`` has them. Raises NoRow."""
    if not isinstance(row, dict) or not row.keys() >= set(_NEEDED):
        raise NoRow
    path, status, fingerprint = (_text(row, name) for name in ("path", "status", "fingerprint"))
    if path is None or fingerprint is None or status not in ("ok", "no_face", "error"):
        raise NoRow
    p_fake = _number(row, "p_fake")
    if (status == "ok") != (p_fake is not None) or not 0 <= (p_fake or 0) <= 1:
        raise NoRow(f"p_fake of {reprlib.repr(path)} is {p_fake}, its status {status}")
    return {"path": path, "status": status, "p_fake": p_fake, "fingerprint": fingerprint}


def _read(row: Row, name: str) -> str | float | None:
    return _number(row, name) if name in _NUMBERS else _text(row, name)


def _text(row: Row, name: str) -> str | None:
    value = row.get(name)
    if value is None:
        return None
    if not isinstance(value, str) or not _can_be_encoded(value):
        raise _no_value(row, name)
    return value


def _can_be_encoded(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can hold and a table cannot
        return False
    return True


def _number(row: Row, name: str) -> float | None:
    value = row.get(name)
    if value is None or value == "":
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise _no_value(row, name)
    try:
        number = _NUMBERS[name](value)
    except (ValueError, OverflowError):  # of 400 digits
        raise _no_value(row, name) from None
    if not abs(number) < 2**63:  # not a number, infinite, or more than the column of a Parquet file holds
        raise _no_value(row, name)
    return number


def _no_value(row: Row, name: str) -> NoRow:
    return NoRow(f"{name} of {reprlib.repr(row.get('path'))} is {reprlib.repr(row[name])}")


class Format(ABC):
    """One kind of file. Rows are dicts with at least path, status, p_fake and fingerprint, ready for JSON."""

    columns: tuple[str, ...] = COLUMNS

    def __init__(self, path: Path) -> None:
        self.path = path
        self.journal = path.with_name(path.name + ".journal.jsonl")

    @abstractmethod
    def to_row(self, score: VideoScore) -> Row:
        """What the journal keeps of a score."""

    def check(self, row: Any) -> Row:
        """The row that ``to_row`` made, from what was read of a journal or a table. Raises NoRow."""
        needed = _read_needed(row)
        return {name: _read(row, name) for name in self.columns} | needed

    @abstractmethod
    def write_table(self, rows: Iterable[Row], path: Path) -> None:
        """Makes the whole file from the journal's rows, at ``path``."""

    @abstractmethod
    def read_table(self) -> Iterator[Row]:
        """The rows of a finished file, not checked. Raises ValueError if it is something else or damaged."""


class _JsonLines(Format):
    """Its own journal."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.journal = path

    def to_row(self, score: VideoScore) -> Row:
        return score.to_dict()

    def check(self, row: Any) -> Row:
        needed: Row = _read_needed(row)
        return {**row, **needed}

    def write_table(self, rows: Iterable[Row], path: Path) -> None:
        raise NotImplementedError

    def read_table(self) -> Iterator[Row]:
        return iter(())


class Csv(Format):
    def to_row(self, score: VideoScore) -> Row:
        return to_row(score)

    def write_table(self, rows: Iterable[Row], path: Path) -> None:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, self.columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)

    def read_table(self) -> Iterator[Row]:
        limit = csv.field_size_limit(sys.maxsize)  # 131,072 characters else, and warnings and paths may be longer
        try:
            with self.path.open(encoding="utf-8", newline="") as file:
                yield from csv.DictReader(file)
        except csv.Error as error:
            raise ValueError(error) from None
        finally:
            csv.field_size_limit(limit)


class _Parquet(Format):
    """With a column more than CSV: the whole score as JSON."""

    columns = (*COLUMNS, "detail_json")

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
        kinds = {str: arrow.string(), float: arrow.float64(), int: arrow.int64()}
        schema = arrow.schema([(name, kinds[_NUMBERS.get(name, str)]) for name in self.columns])
        with arrow.parquet.ParquetWriter(path, schema) as writer:
            for part in _in_parts(rows, PARQUET_ROWS):
                writer.write_table(arrow.Table.from_pylist(part, schema))

    def read_table(self) -> Iterator[Row]:
        try:
            with self._arrow.parquet.ParquetFile(self.path) as file:
                for batch in file.iter_batches(PARQUET_ROWS):
                    yield from batch.to_pylist()
        except (self._arrow.ArrowException, KeyError, OverflowError) as error:
            raise ValueError(first_line(error)) from None


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
