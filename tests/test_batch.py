"""Which files are meant by what was typed."""

from __future__ import annotations

from pathlib import Path

import pytest

from dfengine.batch import expand_inputs


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("b.mp4", "a.MOV", "notes.txt", "deep/er/c.webm", "deep/[x].mkv", "empty/readme.md"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ([], []),
        (["b.mp4"], ["b.mp4"]),
        (["notes.txt"], ["notes.txt"]),  # named, so it is tried
        (["missing.mp4"], ["missing.mp4"]),  # and so it becomes a row
        (["b.mp4", "b.mp4"], ["b.mp4", "b.mp4"]),
        (["."], ["./a.MOV", "./b.mp4", "./deep/[x].mkv", "./deep/er/c.webm"]),
        (["empty"], ["empty"]),
        (["deep", "b.mp4"], ["deep/[x].mkv", "deep/er/c.webm", "b.mp4"]),
        (["*.mp4"], ["b.mp4"]),
        (["**/*.webm"], ["deep/er/c.webm"]),
        (["d*"], ["deep/[x].mkv", "deep/er/c.webm"]),
        (["*.nothing"], ["*.nothing"]),
        (["deep/[x].mkv"], ["deep/[x].mkv"]),  # a name that looks like a pattern is a name if it exists
    ],
)
def test_inputs(tree: Path, typed: list[str], meant: list[str]) -> None:
    assert expand_inputs(typed) == meant
