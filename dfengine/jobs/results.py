"""Files of scores: JSON lines, CSV, Parquet, the submission form; all safe against an end at any moment.

Note [Journals]
Rows are appended as they come, one line of JSON and one write() each: to the file itself if it is JSON lines, else to a
journal beside it (FILE.journal.jsonl), from which the table is made when all rows are there. The table appears in one
step (rename), and the journal goes. What has been written survives the end of the process as it is. Against the end
of the machine the journal is synced to disk every SYNC_SECONDS: more often would cost more than the videos that it
saves, less often would lose more than a user expects.

Resuming reads the journal, or the finished table if there is none, cuts a torn last line, drops the rows that are to be
made anew, and goes on behind the rest.
"""

from __future__ import annotations

import csv
import fcntl
import heapq
import json
import math
import os
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from dfengine.errors import OptionError, OutputError
from dfengine.files import replacing
from dfengine.types import VideoScore

# The flat columns of tables, in order: one row a video.
COLUMNS = (
    "path", "status", "p_fake", "logit", "error_type", "error_stage", "error_message", "warnings", "people",
    "frames_decoded", "frames_scored", "members", "sampling", "mode", "bundle", "device", "decoder", "seconds",
    "request",
)  # fmt: skip

# Errors that the same file gives again, with the same bundle and options. All others are tried again by --resume.
LASTING_ERRORS = frozenset({"NotAVideo", "UnsupportedVideo", "DecodeError"})

SYNC_SECONDS = 5.0

# How often the submission is written anew during a run: 4,000 lines take about 10 ms.
SUBMISSION_SECONDS = 5.0

PARQUET_ROWS = 1000  # written at a time

SLOWEST = 5  # videos named in a summary

Row = dict[str, Any]


class Done(NamedTuple):
    """The answer in a row of an earlier run."""

    status: str
    p_fake: float | None


def to_json(score: VideoScore) -> str:
    """One line of JSON, ASCII only, so that no name and no terminal can break it."""
    return _line(score.to_dict())


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


class _Csv(Format):
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


_FORMATS: dict[str, type[Format]] = {".jsonl": _JsonLines, ".csv": _Csv, ".parquet": _Parquet}


class Journal(AbstractContextManager["Journal"]):
    """The file of results of one run: append with ``write``, complete with ``finish``.

    ``inputs``: path (as in the rows) by request, in the order that a table shall have. With ``resume``, ``done`` has
    the requests that need not be made again, and their answers; without, what is there is replaced. Without a
    ``table`` the journal serves to resume alone, and stays.

    Raises OptionError for a file that cannot be had, here; OutputError for a disk that is full or a folder that is
    gone, and for a file that is not dfengine's.
    """

    def __init__(self, path: Path, inputs: Mapping[str, str], *, resume: bool = False, table: bool = True) -> None:
        if table and path.suffix not in _FORMATS:
            raise OptionError(f"the output {path.name!r} must end in {', '.join(_FORMATS)}")
        _check_folder(path)
        self._format = _FORMATS[path.suffix](path) if table else _Csv(path)
        self._has_table = table and self._format.journal != path
        self._inputs = inputs
        self.path = self._format.journal
        self.done: dict[str, Done] = {}
        if self._has_table and path.is_dir():
            raise OptionError(f"the output {str(path)!r} cannot be written (Is a directory)")
        try:
            self._file = _open_locked(self.path)
        except OSError as error:
            raise OptionError(f"the output {str(self.path)!r} cannot be written ({error.strerror})") from None
        try:
            if resume:
                self._resume()
            else:
                os.truncate(self._file, 0)
        except OutputError:
            os.close(self._file)
            raise
        except OSError as error:
            os.close(self._file)
            raise _output_error(self.path, error) from None
        self._synced = time.monotonic()

    def __exit__(self, *error: object) -> None:
        with suppress(OSError):
            os.fsync(self._file)
        os.close(self._file)

    def write(self, score: VideoScore) -> None:
        """Adds one row. Raises OutputError; the rows before it stay."""
        data = (_line(self._format.to_row(score)) + "\n").encode("ascii")
        try:
            if os.fstat(self._file).st_nlink == 0:
                raise OutputError("the file was removed while results were written to it", path=self.path)
            _append(self._file, data)
            if time.monotonic() - self._synced >= SYNC_SECONDS:
                os.fsync(self._file)
                self._synced = time.monotonic()
        except OutputError:
            raise
        except OSError as error:
            raise _output_error(self.path, error) from None

    def finish(self) -> None:
        """All rows are there: makes the table and removes its journal. Raises OutputError, and the journal stays."""
        try:
            if self._has_table:
                with replacing(self._format.path) as partial:
                    self._format.write_table(self._in_order(), partial)
                self.path.unlink(missing_ok=True)
        except OSError as error:
            raise _output_error(self._format.path, error, f"; its rows are in {self.path}") from None

    def _resume(self) -> None:
        """Keeps the last row of each path, but those to be made anew, in a journal that replaces the old one."""
        keep: dict[str, int] = {}  # line by path
        requested = {path: request for request, path in self._inputs.items()}
        for number, row in enumerate(self._old_rows()):
            path, request = row["path"], row["request"]
            if path not in requested:
                keep[path] = number
            elif request in self._inputs and _lasts(row):
                keep[path] = number
                self.done[request] = Done(row["status"], self._p_fake(row))
            else:
                keep.pop(path, None)
                self.done.pop(requested[path], None)
        lines = set(keep.values())
        with replacing(self.path) as partial:
            new = _open_locked(partial)
            try:
                with open(new, "wb", closefd=False) as file:
                    for number, row in enumerate(self._old_rows()):
                        if number in lines:
                            file.write((_line(row) + "\n").encode("ascii"))
            except BaseException:
                os.close(new)
                raise
        os.close(self._file)
        self._file = new

    def _p_fake(self, row: Row) -> float | None:
        try:
            return None if row["p_fake"] in (None, "") else float(row["p_fake"])
        except ValueError:
            raise OutputError(
                f"this is no table of results: p_fake of {row['path']!r} is {row['p_fake']!r}", path=self._format.path
            ) from None

    def _old_rows(self) -> Iterator[Row]:
        if os.fstat(self._file).st_size > 0:
            with self.path.open("rb") as file:
                yield from _parse(file, self.path)
        elif self._has_table and self._format.path.exists():
            for row in self._read_table():
                _check_row(row, self._format.path, "a row")
                yield row

    def _read_table(self) -> Iterator[Row]:
        try:
            yield from self._format.read_table()
        except ValueError as error:  # not UTF-8, not Parquet
            raise OutputError(f"this is no table of results ({error})", path=self._format.path) from None

    def _in_order(self) -> Iterator[Row]:
        """Rows of other runs first, then those of this one in the order of its inputs."""
        others, places = [], {}
        with self.path.open("rb") as file:
            at = 0
            for line in file:
                row = json.loads(line)
                if row["request"] in self._inputs:
                    places[row["request"]] = at
                else:
                    others.append(at)
                at += len(line)
            for place in (*others, *(places[request] for request in self._inputs if request in places)):
                file.seek(place)
                yield json.loads(file.readline())


class Submission:
    """A CSV of ``filename,label``, with all files at every moment, in the order of their names.

    A label is p_fake. Files without one (no face, error, not scored yet) have ``missing_label``: this form of file has
    no other way to say "could not tell", and it is the only place where such a number stands in for an answer.

    Raises OptionError when two files have the same name, OutputError when it cannot be written.
    """

    def __init__(self, path: Path, inputs: Iterable[str], *, missing_label: float) -> None:
        _check_folder(path)
        if not 0 <= missing_label <= 1:
            raise OptionError(f"the missing label must be in [0, 1], got {missing_label}")
        self._path = path
        self._missing = missing_label
        by_name: dict[str, str] = {}
        for file in inputs:
            name = _name(file)
            if name in by_name:
                raise OptionError(
                    f"a submission names files without their folders, and {by_name[name]!r} and {file!r} have the same "
                    "name; score the folders one by one"
                )
            by_name[name] = file
        self._labels: dict[str, float | None] = dict.fromkeys(sorted(by_name))
        self._saved = -math.inf

    def update(self, p_fake_by_path: Mapping[str, float | None]) -> None:
        """Takes answers, and does not write them yet."""
        self._labels |= {_name(path): p_fake for path, p_fake in p_fake_by_path.items()}

    def save_now_and_then(self) -> None:
        """Writes the file if that was long ago."""
        if time.monotonic() - self._saved >= SUBMISSION_SECONDS:
            self.save()

    def save(self) -> None:
        """Replaces the file in one step."""
        try:
            with replacing(self._path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerow(("filename", "label"))
                writer.writerows((n, self._missing if p is None else p) for n, p in self._labels.items())
        except OSError as error:
            raise _output_error(self._path, error) from None
        self._saved = time.monotonic()


def _name(path: str) -> str:
    """Of a file; of a folder without videos, which has a row too, its own."""
    return os.path.basename(os.path.normpath(path))


class Output(AbstractContextManager["Output"]):
    """Everything a run writes to files: results, a submission, both or nothing.

    ``inputs``: path (as in the rows) by request. ``done``: what an earlier run has answered, by request. ``failed``:
    rows with an error so far, those of the earlier run included.
    """

    def __init__(
        self,
        inputs: Mapping[str, str],
        *,
        out: Path | None = None,
        submission: Path | None = None,
        missing_label: float = 0.5,
        resume: bool = False,
    ) -> None:
        if out and submission and os.path.abspath(out) == os.path.abspath(submission):
            raise OptionError(f"--out and --submission name the same file {str(out)!r}; give each its own")
        if resume and not (out or submission):
            raise OptionError("--resume needs the file to go on with: give --out or --submission")
        self._submission: Submission | None = None
        self._journal: Journal | None = None
        if submission:
            self._submission = Submission(submission, inputs.values(), missing_label=missing_label)
        if target := out or submission:
            self._journal = Journal(target, inputs, resume=resume, table=out is not None)
        self.done = self._journal.done if self._journal else {}
        self.failed = sum(done.status == "error" for done in self.done.values())
        self.path = self._journal.path if self._journal else None
        if self._submission:
            self._submission.update({inputs[request]: done.p_fake for request, done in self.done.items()})
            self._submission.save()

    def __exit__(self, *error: object) -> None:
        if self._journal:
            self._journal.__exit__(*error)

    def write(self, score: VideoScore) -> None:
        """Adds one score. Raises OutputError."""
        self.failed += score.status == "error"
        if self._journal:
            self._journal.write(score)
        if self._submission:
            self._submission.update({score.path: score.p_fake})
            self._submission.save_now_and_then()

    def finish(self, *, complete: bool) -> None:
        """The run is over; ``complete``: with a row for every input, so that tables can be made."""
        if self._submission:
            self._submission.save()
        if self._journal and complete:
            self._journal.finish()


class Summary:
    """What a run came to, without keeping its rows."""

    def __init__(self) -> None:
        self.statuses: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.fallbacks: Counter[str] = Counter()
        self.spent: Counter[str] = Counter()  # mode, sampling and number of members, of answered videos
        self._slowest: list[tuple[float, str]] = []

    def add(self, score: VideoScore) -> None:
        self.statuses[score.status] += 1
        if score.error:
            self.errors[score.error.type] += 1
        if score.status == "ok":
            self.spent[f"{score.mode}, {score.sampling}, {len(score.members)} members"] += 1
        if score.fallback_reason:
            self.fallbacks[score.fallback_reason] += 1
        heapq.heappush(self._slowest, (sum(score.timings.values()), score.path))
        if len(self._slowest) > SLOWEST:
            heapq.heappop(self._slowest)

    def slowest(self) -> list[tuple[float, str]]:
        """(seconds, path), the slowest first."""
        return sorted(self._slowest, reverse=True)


# -- files -------------------------------------------------------------------------------------------------------------


def _line(row: Row) -> str:
    return json.dumps(row, ensure_ascii=True, allow_nan=False)


def _lasts(row: Row) -> bool:
    """Whether an answer would be the same if it were made again."""
    error = row.get("error") or {}
    kind = row.get("error_type") or error.get("type")
    return row["status"] != "error" or kind in LASTING_ERRORS


def _parse(file: BinaryIO, path: Path) -> Iterator[Row]:
    for number, line in enumerate(file, 1):
        if not line.endswith(b"\n"):
            return  # torn: the process ended in the middle of it
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        _check_row(row, path, f"line {number}")
        yield row


def _check_row(row: Any, path: Path, where: str) -> None:
    if not isinstance(row, dict) or not {"path", "status", "p_fake", "request"} <= row.keys():
        raise OutputError(
            f"{where} is no row of scores that this version of dfengine wrote; name another file, or leave out "
            "--resume to replace it",
            path=path,
        )


def _check_folder(path: Path) -> None:
    if not path.absolute().parent.is_dir():
        raise OptionError(f"the folder for the output {str(path)!r} does not exist; make it first")


def _open_locked(path: Path) -> int:
    """A file to append to, which no other run of dfengine writes to."""
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        raise OptionError(f"another run is writing to {str(path)!r}; wait for it, or end it") from None
    except OSError:  # a file system without locks
        pass
    return file


def _append(file: int, data: bytes) -> None:
    """One write. What a full disk took of it is taken back, so that the file ends with a whole line."""
    end = os.lseek(file, 0, os.SEEK_END)
    try:
        while data:  # a full disk takes a part first, and says why the second time
            data = data[os.write(file, data) :]
    except OSError:
        with suppress(OSError):
            os.ftruncate(file, end)
        raise


def _output_error(path: Path, error: OSError, note: str = "") -> OutputError:
    return OutputError(
        f"results cannot be written ({error.strerror or error}){note}; what was written before is kept: make room, "
        "then run again with --resume",
        path=path,
    )


def _in_parts(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    part: list[Row] = []
    for row in rows:
        part.append(row)
        if len(part) == size:
            yield part
            part = []
    if part:
        yield part
