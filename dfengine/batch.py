"""Many videos: which files are meant."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable
from pathlib import Path

# A folder stands for the files in it with one of these suffixes; a file that is named is always tried.
VIDEO_SUFFIXES = frozenset(
    {
        ".3g2", ".3gp", ".asf", ".avi", ".divx", ".dv", ".f4v", ".flv", ".gif", ".h264", ".hevc",
        ".ivf", ".m2ts", ".m2v", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".mxf",
        ".ogm", ".ogv", ".rm", ".rmvb", ".ts", ".vob", ".webm", ".wmv", ".y4m",
    }
)  # fmt: skip


def expand_inputs(paths: Iterable[str]) -> list[str]:
    """Files, folders and glob patterns -> files, in the order given, those of a folder sorted by name.

    Nothing is dropped: a folder without videos, an unreadable folder, and a pattern without a match stay in the list,
    so that each becomes a row that says what is wrong with it.
    """
    files: list[str] = []
    for path in paths:
        if os.path.isdir(path):
            files += _videos_in(path) or [path]
        elif glob.has_magic(path) and not os.path.lexists(path):
            matches = sorted(glob.glob(path, recursive=True))
            for match in matches or [path]:
                files += (_videos_in(match) or [match]) if os.path.isdir(match) else [match]
        else:
            files.append(path)
    return files


def _videos_in(folder: str) -> list[str]:
    found: list[str] = []
    unreadable: list[OSError] = []
    for root, folders, names in os.walk(folder, onerror=unreadable.append):
        folders.sort()
        found += [os.path.join(root, n) for n in sorted(names) if Path(n).suffix.lower() in VIDEO_SUFFIXES]
    return found + sorted(str(e.filename) for e in unreadable)
