"""The form in which competitions want scores: a CSV of ``filename,label``."""

from __future__ import annotations

import csv
import math
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from dfengine.errors import OptionError
from dfengine.files import replacing
from dfengine.jobs.journal import check_folder, output_error

# How often the submission is written anew during a run: 4,000 lines take about 10 ms.
SUBMISSION_SECONDS = 5.0


class Submission:
    """A CSV of ``filename,label``, with all files at every moment, in the order of their names.

    A label is p_fake. Files without one (no face, error, not scored yet) have ``missing_label``: this form of file has
    no other way to say "could not tell", and it is the only place where such a number stands in for an answer.

    Raises OptionError when two files have the same name, OutputError when it cannot be written.
    """

    def __init__(self, path: Path, inputs: Iterable[str], *, missing_label: float) -> None:
        check_folder(path)
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
            raise output_error(self._path, error) from None
        self._saved = time.monotonic()


def _name(path: str) -> str:
    """Of a file; of a folder without videos, which has a row too, its own."""
    return os.path.basename(os.path.normpath(path))
