"""Which files are meant by what was typed, and what a row must be about to stand for one of them."""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# A folder stands for the files in it with one of these suffixes; a file that is named is always tried.
VIDEO_SUFFIXES = frozenset(
    {
        ".3g2", ".3gp", ".asf", ".avi", ".divx", ".dv", ".f4v", ".flv", ".gif", ".h264", ".hevc",
        ".ivf", ".m2ts", ".m2v", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".mxf",
        ".ogm", ".ogv", ".rm", ".rmvb", ".ts", ".vob", ".webm", ".wmv", ".y4m",
    }
)  # fmt: skip

# What systems put beside videos, under their names: halves of files (AppleDouble, "._clip.mp4", in archives under
# __MACOSX), thumbnails (@eaDir, of Synology's storage), wastebaskets (freedesktop.org's .Trash-1000, macOS's .Trashes).
_COMPANIONS = ("._", ".Trash", "__MACOSX", "@eaDir")


def expand_inputs(paths: Iterable[str], *, patterns: bool = True) -> list[str]:
    """Files, folders and (by default) glob patterns -> files, in the order given, of a folder by name.

    Nothing is dropped: a folder without videos, an unreadable folder, and a pattern without a match stay in the list,
    so that each becomes a row that says what is wrong with it. Folders that are links are followed, each once. What
    operating systems put beside videos is passed over in folders.
    """
    files: list[str] = []
    for path in paths:
        if os.path.isdir(path):
            files += _videos_in(path) or [path]
        elif patterns and glob.has_magic(path) and not os.path.lexists(path):
            matches = sorted(glob.glob(path, recursive=True))
            for match in matches or [path]:
                files += (_videos_in(match) or [match]) if os.path.isdir(match) else [match]
        else:
            files.append(path)
    return files


def _videos_in(folder: str) -> list[str]:
    found: list[str] = []
    unreadable: list[OSError] = []
    seen = {os.path.realpath(folder)}
    for root, folders, names in os.walk(folder, onerror=unreadable.append, followlinks=True):
        folders[:] = [f for f in folders if not f.startswith(_COMPANIONS)]
        by_place = {os.path.realpath(os.path.join(root, f)): f for f in sorted(folders, reverse=True)}
        folders[:] = sorted(by_place[place] for place in by_place.keys() - seen)
        seen |= by_place.keys()  # a link may lead to where we have been
        found += [os.path.join(root, n) for n in sorted(names) if _is_video(n)]
    return found + sorted(str(e.filename) for e in unreadable)


def _is_video(name: str) -> bool:
    return Path(name).suffix.lower() in VIDEO_SUFFIXES and not name.startswith(_COMPANIONS)


@dataclass(frozen=True)
class Job:
    """One video to score. ``fingerprint`` is explained in VideoScore."""

    path: str
    size_bytes: int
    fingerprint: str


def make_jobs(paths: Iterable[str], asked: Sequence[Any]) -> tuple[list[Job], int]:
    """A job for each different file, and how many names were of one that had been named before.

    ``asked``: what the answers depend on beside the file, as values that JSON can hold.
    """
    paths = list(paths)
    different: dict[str, str] = {}
    for path in paths:
        different.setdefault(_place(path), path)
    return [_make_job(path, asked) for path in different.values()], len(paths) - len(different)


def _place(path: str) -> str:
    """The same for two names of one file; a link to a file is another file."""
    folder, name = os.path.split(path)
    try:
        return os.path.join(os.path.realpath(folder), name)
    except (OSError, ValueError):  # becomes a row that says why
        return path


def _make_job(path: str, asked: Sequence[Any]) -> Job:
    try:
        status = os.stat(path)
        size, changed_ns = status.st_size, status.st_mtime_ns
    except (OSError, ValueError):  # becomes a row that says why
        size, changed_ns = 0, 0
    key = json.dumps([path.encode("utf-8", "surrogatepass").hex(), size, changed_ns, *asked])
    return Job(path, size, hashlib.sha256(key.encode()).hexdigest()[:16])
