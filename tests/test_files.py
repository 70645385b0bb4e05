"""Files that are replaced whole."""

from __future__ import annotations

import errno
import os
import resource
import stat
from pathlib import Path

import pytest

from dfengine import files
from dfengine.files import replacing


def test_the_name_holds_the_old_file_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    for text in ("one", "two"):
        with replacing(path) as partial:
            assert partial.parent == tmp_path, "or it could not be moved in one step"
            partial.write_text(text)
            assert not path.exists() if text == "one" else path.read_text() == "one"
        assert path.read_text() == text
    assert os.listdir(tmp_path) == ["a.txt"]


def test_what_is_raised_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def stop() -> None:
        with replacing(path) as partial:
            partial.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_full_disk(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        with pytest.raises(OSError, match="File too large"), replacing(path) as partial:
            partial.write_text("more than ten bytes")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_modes(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        for mode in (0o640, 0o604):
            with replacing(tmp_path / "a.txt") as partial:
                partial.write_text("x")
            assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == mode, "the umask's, then what it was"
            (tmp_path / "a.txt").chmod(0o604)
    finally:
        os.umask(before)


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "far" / "a.txt")
    with replacing(tmp_path / "link") as partial:
        partial.write_text("x")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "far" / "a.txt").read_text() == "x"


def test_two_writers_do_not_mix(tmp_path: Path) -> None:
    with replacing(tmp_path / "a.txt") as one:
        with replacing(tmp_path / "a.txt") as other:
            one.write_text("one")
            other.write_text("other")
        assert (tmp_path / "a.txt").read_text() == "other"
    assert (tmp_path / "a.txt").read_text() == "one"


def test_contents_are_on_the_disk_before_the_name_and_the_name_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")))
    with replacing(tmp_path / "a.txt") as partial:
        partial.write_text("x")
    assert synced == [str(partial), str(tmp_path)]


@pytest.mark.parametrize(("number", "matters"), [(errno.EINVAL, False), (errno.EIO, True)])
def test_folders_that_cannot_be_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, matters: bool
) -> None:
    """Not all file systems can; that a disk fails is another thing."""
    sync = files._sync

    def fail_on_folders(path: Path) -> None:
        if path.is_dir():
            raise OSError(number, os.strerror(number))
        sync(path)

    monkeypatch.setattr(files, "_sync", fail_on_folders)
    try:
        with replacing(tmp_path / "a.txt") as partial:
            partial.write_text("x")
    except OSError:
        assert matters
    else:
        assert not matters
    assert (tmp_path / "a.txt").read_text() == "x"
