"""The command as a shell sees it: exit codes, stdout, stderr."""

from __future__ import annotations

import csv
import io
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from assets import FACE, write_bundle, write_clip

import dfengine
from dfengine import results


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle and some videos: clips/face.mp4, clips/text.mp4 (not a video), clips/notes.txt."""
    root = tmp_path_factory.mktemp("cli")
    write_bundle(root / "bundle", sampling="uniform:3")
    (root / "clips").mkdir()
    write_clip(FACE, root / "clips").rename(root / "clips" / "face.mp4")
    (root / "clips" / "text.mp4").write_text("not a video\n")
    (root / "clips" / "notes.txt").write_text("left alone\n")
    return root


def run(folder: Path, *words: str | bytes, stdin: bytes = b"", **env: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "dfengine", *words]
    return subprocess.run(command, cwd=folder, input=stdin, capture_output=True, env=os.environ | env, timeout=120)


def score(folder: Path, *words: str | bytes, **more: object) -> subprocess.CompletedProcess[bytes]:
    return run(folder, "score", *words, "--bundle", "bundle", **more)


def test_json_is_one_object_a_line_and_nothing_else(folder: Path) -> None:
    done = score(folder, "clips", "missing.mp4", "--json")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {r["path"]: r["status"] for r in rows} == {
        "clips/face.mp4": "ok",
        "clips/text.mp4": "error",
        "missing.mp4": "error",
    }
    assert done.returncode == 1
    assert done.stderr == b""
    assert list(rows[0]) == list(dfengine.VideoScore.__dataclass_fields__)


def test_a_pipe_gets_tab_separated_text(folder: Path) -> None:
    done = score(folder, "clips/face.mp4")
    rows = list(csv.DictReader(io.StringIO(done.stdout.decode()), delimiter="\t"))
    assert [(r["path"], r["status"]) for r in rows] == [("clips/face.mp4", "ok")]
    assert tuple(rows[0]) == results.COLUMNS
    assert 0 <= float(rows[0]["p_fake"]) <= 1
    assert done.returncode == 0


def test_names_come_from_standard_input(folder: Path) -> None:
    done = score(folder, "-", "--json", stdin=b"clips/face.mp4\n\nclips/caf\xe9.mp4\n")
    rows = {r["path"]: r for r in map(json.loads, done.stdout.splitlines())}
    assert rows["clips/face.mp4"]["status"] == "ok"
    assert rows["clips/caf\\xe9.mp4"]["error"]["type"] == "SourceNotFound"
    assert len(rows) == 2


def test_a_folder_without_videos_is_a_row(folder: Path) -> None:
    (folder / "empty").mkdir(exist_ok=True)
    done = score(folder, "empty", "--json")
    row = json.loads(done.stdout)
    assert (row["path"], row["error"]["type"], row["error"]["stage"]) == ("empty", "NotAVideo", "open")
    assert "folder" in row["error"]["message"]
    assert done.returncode == 1


def test_out_writes_a_file_as_well(folder: Path) -> None:
    done = score(folder, "clips/face.mp4", "--out", "scores.jsonl", "--json", "--frames", "first:2", "--mode", "exact")
    assert (folder / "scores.jsonl").read_bytes() == done.stdout
    assert json.loads(done.stdout)["frames_scored"] == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["score", "clips/face.mp4", "--bundle", "nowhere"], "nowhere: there is no such bundle"),
        (["score", "clips/face.mp4", "--bundle", "bundle", "--device", "cuda"], "device 'cuda' cannot be had"),
        (["score", "clips/face.mp4", "--bundle", "bundle", "--device", "tpu"], "device must be one of auto, cpu, cuda"),
        (["score", "clips/face.mp4", "--bundle", "bundle", "--frames", "some"], "sampling policy 'some'"),
        (["score", "clips/face.mp4", "--bundle", "bundle", "--mode", "fast"], "must be exact or reference, got 'fast'"),
        (["score", "clips/face.mp4", "--bundle", "bundle", "--out", "x.txt"], "must end in .jsonl, .csv, .parquet"),
        (["score"], "Missing argument"),
        (["scroe"], "No such command"),
    ],
)
def test_usage_is_one_clear_error_and_exit_code_2(folder: Path, words: list[str], message: str) -> None:
    done = run(folder, *words, NO_COLOR="1", COLUMNS="200")
    assert message in done.stderr.decode()
    assert b"Traceback" not in done.stderr
    assert done.stdout == b""
    assert done.returncode == 2


def test_version_and_info(folder: Path) -> None:
    assert run(folder, "--version").stdout.decode() == f"dfengine {dfengine.__version__}\n"
    shown = run(folder, "info").stdout.decode()
    assert "cuda" in shown
    assert "mtcnn" in shown
    parsed = json.loads(run(folder, "info", "--json").stdout)
    assert parsed["build"]["dfengine"] == dfengine.__version__
    assert parsed["devices"]["cpu"].startswith("usable")


def test_the_reader_may_go_away(folder: Path) -> None:
    command = f"{sys.executable} -m dfengine score clips clips clips --json --bundle bundle | head -n 1"
    done = subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, timeout=120)
    assert json.loads(done.stdout)["path"].startswith("clips/")
    assert b"Traceback" not in done.stderr
    assert b"BrokenPipe" not in done.stderr


@pytest.mark.parametrize("color", [True, False])
def test_a_terminal_gets_a_table(folder: Path, color: bool) -> None:
    env = {"TERM": "xterm-256color", "COLUMNS": "100"} | ({} if color else {"NO_COLOR": "1"})
    shown, status = _in_terminal(folder, ["score", "clips", "--bundle", "bundle", "--quiet"], env)
    lines = shown.splitlines()
    assert any(line.startswith("face.mp4") and " ok " in line for line in lines)
    assert any(line.startswith("text.mp4") and "NotAVideo" in line for line in lines)
    assert ("\x1b[1m" in shown) == color or not color
    assert "\x1b[3" not in shown  # no colours asked for anywhere
    assert status == 1


def _in_terminal(folder: Path, words: list[str], env: dict[str, str]) -> tuple[str, int]:
    """Runs the command with a terminal as stdout and stderr: what it showed, and its exit code."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "dfengine", *words], cwd=folder, env=os.environ | env, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            chunk = os.read(ours, 65536)
        except OSError:  # Linux's way to say that the other end was closed
            break
        if not chunk:
            break
        shown += chunk
    os.close(ours)
    return shown.decode().replace("\r\n", "\n"), process.wait(60)
