"""Files of results that are safe against an end at any moment, and that a later run can go on with.

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

import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from dfengine.errors import OptionError, OutputError, first_line
from dfengine.files import replacing
from dfengine.jobs.tables import FORMATS, Csv, NoRow, Row, to_line
from dfengine.types import VideoScore

# Errors that the same file gives again, with the same bundle and options. All others are tried again by --resume.
LASTING_ERRORS = frozenset({"NotAVideo", "UnsupportedVideo", "DecodeError"})

SYNC_SECONDS = 5.0

# What can be done about a file that --resume cannot go on with.
_REPLACE = "name another file, or leave out --resume to replace it"


class Done(NamedTuple):
    """The answer in a row of an earlier run."""

    status: str
    p_fake: float | None


class Journal(AbstractContextManager["Journal"]):
    """The file of results of one run: append with ``write``, complete with ``finish``.

    ``inputs``: path (as in the rows) by fingerprint, in the order that a table shall have. With ``resume``, ``done``
    has the fingerprints of rows that need not be made again, and their answers; without, what is there is replaced, in
    both cases not before the first new row is there. Without a ``table`` the journal serves to resume alone, and stays.

    Raises OptionError for a file that cannot be had, here; OutputError for a disk that is full or a folder that is
    gone, and for a file that is not dfengine's.
    """

    def __init__(self, path: Path, inputs: Mapping[str, str], *, resume: bool = False, table: bool = True) -> None:
        if table and path.suffix not in FORMATS:
            raise OptionError(f"the output {path.name!r} must end in {', '.join(FORMATS)}")
        check_folder(path)
        self._format = FORMATS[path.suffix](path) if table else Csv(path)
        self._has_table = table and self._format.journal != path
        self._inputs = inputs
        self.path = self._format.journal
        self.done: dict[str, Done] = {}
        if self._has_table and path.is_dir():
            raise OptionError(f"the output {str(path)!r} cannot be written (Is a directory)")
        self._kept: set[int] = set()  # lines of the old rows that stay
        self._begun = False  # whether what is at ``path`` is of this run
        try:
            self._file = _open_locked(self.path)
        except OSError as error:
            raise OptionError(f"the output {str(self.path)!r} cannot be written ({error.strerror})") from None
        try:
            if resume:
                self._find_done()
        except OutputError:
            self.__exit__()
            raise
        except OSError as error:
            self.__exit__()
            raise output_error(self.path, error) from None
        self._synced = time.monotonic()

    def __exit__(self, *error: object) -> None:
        with suppress(OSError):
            os.fsync(self._file)
            status = os.fstat(self._file)
            if not self._begun and status.st_size == 0 and status.st_nlink:
                self.path.unlink()  # made for its lock alone
        os.close(self._file)

    def write(self, score: VideoScore) -> None:
        """Adds one row. Raises OutputError; the rows before it stay."""
        data = _to_bytes(self._format.to_row(score))
        try:
            if not self._begun:
                self._begin(data)
                return
            if os.fstat(self._file).st_nlink == 0:
                raise OutputError("the file was removed while results were written to it", path=self.path)
            _append(self._file, data)
            if time.monotonic() - self._synced >= SYNC_SECONDS:
                os.fsync(self._file)
                self._synced = time.monotonic()
        except OutputError:
            raise
        except OSError as error:
            raise output_error(self.path, error) from None

    def finish(self) -> None:
        """All rows are there: makes the table and removes its journal. Raises OutputError, and the journal stays."""
        try:
            if not self._begun:
                self._begin(b"")
            if self._has_table:
                with replacing(self._format.path) as partial:
                    self._format.write_table(self._in_order(), partial)
                self.path.unlink(missing_ok=True)
        except OSError as error:
            raise output_error(self._format.path, error, f"; its rows are in {self.path}") from None

    def _find_done(self) -> None:
        """The last row of each path stays, but those to be made anew."""
        keep: dict[str, int] = {}  # line by path
        asked = {path: fingerprint for fingerprint, path in self._inputs.items()}
        for number, (row, _) in enumerate(self._old_rows()):
            path, fingerprint = row["path"], row["fingerprint"]
            if path not in asked:
                keep[path] = number
            elif fingerprint in self._inputs and _lasts(row):
                keep[path] = number
                self.done[fingerprint] = Done(row["status"], row["p_fake"])
            else:
                keep.pop(path, None)
                self.done.pop(asked[path], None)
        self._kept = set(keep.values())

    def _begin(self, first: bytes) -> None:
        """The old rows that stay, and the first new one, take the place of what was there."""
        new = -1
        try:
            with replacing(self.path) as partial:
                new = _open_locked(partial)
                with open(new, "wb", closefd=False) as file:
                    for number, (_, line) in enumerate(self._old_rows() if self._kept else ()):
                        if number in self._kept:
                            file.write(line)
                    file.write(first)
        except BaseException:
            if new >= 0:
                os.close(new)
            raise
        os.close(self._file)
        self._file, self._begun = new, True

    def _old_rows(self) -> Iterator[tuple[Row, bytes]]:
        """Each old row, and its line in a journal. Raises OutputError."""
        if os.fstat(self._file).st_size > 0:
            with self.path.open("rb") as file:
                for number, line in enumerate(file, 1):
                    if not line.endswith(b"\n") and line.lstrip(b"\0")[:1] in (b"{", b""):
                        return  # torn: the process or the machine ended in the middle of it
                    row = self._check(_parse(line), self.path, f"line {number}")
                    yield row, _to_bytes(row) if self._has_table else line
        elif self._has_table and self._format.path.exists():
            for number, read in enumerate(self._read_table(), 1):
                row = self._check(read, self._format.path, f"row {number}")
                yield row, _to_bytes(row)

    def _check(self, read: Any, path: Path, where: str) -> Row:
        try:
            return self._format.check(read)
        except NoRow as error:
            why = f" ({error})" if str(error) else ""
            raise OutputError(
                f"{where} is no row of scores that this version of dfengine wrote{why}; {_REPLACE}", path=path
            ) from None

    def _read_table(self) -> Iterator[Row]:
        path = self._format.path
        try:
            yield from self._format.read_table()
        except ValueError as error:  # not UTF-8, not Parquet
            raise OutputError(f"this is no table of results ({first_line(error)}); {_REPLACE}", path=path) from None
        except OSError as error:  # Arrow raises it for damage too, without a number
            why = f"the table cannot be read ({error.strerror})" if error.errno else "this is no table of results"
            raise OutputError(f"{why} ({first_line(error)}); {_REPLACE}", path=path) from None

    def _in_order(self) -> Iterator[Row]:
        """Rows of other runs first, then those of this one in the order of its inputs."""
        others, places = [], {}
        with self.path.open("rb") as file:
            at = 0
            for line in file:
                row = json.loads(line)
                if row["fingerprint"] in self._inputs:
                    places[row["fingerprint"]] = at
                else:
                    others.append(at)
                at += len(line)
            for place in (*others, *(places[fingerprint] for fingerprint in self._inputs if fingerprint in places)):
                file.seek(place)
                yield json.loads(file.readline())


def check_folder(path: Path) -> None:
    if not path.absolute().parent.is_dir():
        raise OptionError(f"the folder for the output {str(path)!r} does not exist; make it first")


def output_error(path: Path, error: OSError, note: str = "") -> OutputError:
    return OutputError(
        f"results cannot be written ({error.strerror or error}){note}; what was written before is kept: make room, "
        "then run again with --resume",
        path=path,
    )


def _lasts(row: Row) -> bool:
    """Whether an answer would be the same if it were made again."""
    error = row.get("error")
    kind = error.get("type") if isinstance(error, dict) else row.get("error_type")
    return row["status"] != "error" or (isinstance(kind, str) and kind in LASTING_ERRORS)


def _parse(line: bytes) -> Any:
    """The value of a line of JSON; None if it is something else."""
    try:
        return json.loads(line.decode("utf-8"), parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _to_bytes(row: Row) -> bytes:
    return (to_line(row) + "\n").encode("ascii")


def _open_locked(path: Path) -> int:
    """A file to append to, which no other run of dfengine writes to."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            raise OptionError(f"another run is writing to {str(path)!r}; wait for it, or end it") from None
        except OSError:  # a file system without locks
            return file
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), os.stat(path)):
                return file
        os.close(file)  # another run has just replaced or removed it


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
