"""Files that are replaced whole: whoever reads the name sees all of the old or all of the new one."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# What a file system says that cannot sync a folder, or a folder that may be written to but not be read.
_NO_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EACCES}


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """An empty file beside ``path`` to write to; at the end it takes its place in one step.

    When the block is left, ``path`` is on the disk, also if the power fails then. If anything is raised, ``path`` is
    as before and the other file is gone; only an end of the process (SIGKILL) leaves a NAME.*.partial. ``path`` keeps
    its mode if it was there, and a link stays a link. Several processes may replace one file: one of them is the last.
    Raises OSError.
    """
    path = Path(os.path.realpath(path))
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    try:
        with suppress(FileNotFoundError):
            partial.chmod(stat.S_IMODE(path.stat().st_mode))
        yield partial
        _sync(partial)
        partial.replace(path)
    except BaseException:
        with suppress(OSError):  # what was raised says more
            partial.unlink()
        raise
    try:
        _sync(path.parent)  # the move itself
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
