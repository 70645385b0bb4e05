"""Everything a run writes to files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path

from dfengine.errors import OptionError
from dfengine.jobs.journal import Journal
from dfengine.jobs.submission import Submission
from dfengine.types import VideoScore


class Output(AbstractContextManager["Output"]):
    """Everything a run writes to files: results, a submission, both or nothing.

    ``inputs``: path (as in the rows) by fingerprint. ``done``: what an earlier run has answered, by fingerprint.
    ``failed``: rows with an error so far, those of the earlier run included. A file that is there is not replaced
    before the first new row.
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
        self._any_new = False
        if submission:
            self._submission = Submission(submission, inputs.values(), missing_label=missing_label)
        self._target = out or submission
        if self._target:
            self._journal = Journal(self._target, inputs, resume=resume, table=out is not None)
        self.done = self._journal.done if self._journal else {}
        self.failed = sum(done.status == "error" for done in self.done.values())
        if self._submission:
            self._submission.update({inputs[fingerprint]: done.p_fake for fingerprint, done in self.done.items()})
            if submission and not submission.exists():
                self._submission.save()

    def __exit__(self, *error: object) -> None:
        if self._journal:
            self._journal.__exit__(*error)

    @property
    def path(self) -> Path | None:
        """Where the rows are that --resume will find."""
        if self._journal is None or self._target is None:
            return None
        return self._journal.path if self._journal.path.exists() else self._target

    def write(self, score: VideoScore) -> None:
        """Adds one score. Raises OutputError."""
        self.failed += score.status == "error"
        self._any_new = True
        if self._journal:
            self._journal.write(score)
        if self._submission:
            self._submission.update({score.path: score.p_fake})
            self._submission.save_now_and_then()

    def finish(self, *, complete: bool) -> None:
        """The run is over; ``complete``: with a row for every input, so that tables can be made."""
        if self._submission and (complete or self._any_new):
            self._submission.save()
        if self._journal and complete:
            self._journal.finish()
