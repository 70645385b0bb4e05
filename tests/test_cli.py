"""The command as a shell sees it: exit codes, stdout, stderr."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import pty
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import pytest
from assets import FACE, write_bundle, write_clip

import dfengine
from dfengine import cli
from dfengine.jobs.tables import COLUMNS


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
    assert tuple(rows[0]) == COLUMNS
    assert 0 <= float(rows[0]["p_fake"]) <= 1
    assert done.returncode == 0


def test_names_come_from_standard_input(folder: Path) -> None:
    done = score(folder, "-", "--json", stdin=b"clips/face.mp4\n\nclips/caf\xe9.mp4\n")
    rows = {r["path"]: r for r in map(json.loads, done.stdout.splitlines())}
    assert rows["clips/face.mp4"]["status"] == "ok"
    assert rows["clips/caf\\xe9.mp4"]["error"]["type"] == "SourceNotFound"
    assert len(rows) == 2


def test_a_pattern_on_standard_input_is_a_name(folder: Path) -> None:
    done = score(folder, "-", "--json", stdin=b"clips/fac[e].mp4\n")
    assert json.loads(done.stdout)["error"]["type"] == "SourceNotFound"


def test_a_folder_that_may_not_be_read(folder: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    (folder / "locked").mkdir(exist_ok=True, mode=0)
    assert json.loads(score(folder, "locked", "--json").stdout)["error"]["type"] == "SourceNotReadable"


def test_standard_output_that_is_closed(folder: Path) -> None:
    command = (
        f"exec {shlex.quote(sys.executable)} -m dfengine score clips/face.mp4 --bundle bundle --out closed.jsonl >&-"
    )
    done = subprocess.run(["sh", "-c", command], cwd=folder, stderr=subprocess.PIPE, timeout=120)
    assert (done.returncode, done.stderr) == (0, b"")
    assert len((folder / "closed.jsonl").read_text().splitlines()) == 1


def test_a_name_that_the_output_has_no_letters_for(folder: Path) -> None:
    (folder / "über.mp4").symlink_to("clips/face.mp4")
    command = [sys.executable, "-m", "dfengine", "score", "über.mp4", "clips/face.mp4", "--bundle", "bundle", "-q"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, cwd=folder, capture_output=True, timeout=120, env=environment)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"\\xfcber.mp4\tok" in done.stdout
    assert len(done.stdout.splitlines()) == 3


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
        (["score", "clips/face.mp4", "--bundle", "mtcnn"], "'mtcnn' has no member that scores; it is a detector"),
        (["score", "clips/face.mp4", "--bundle", "bundle", "--device", "cuda"], "device 'cuda' cannot be had"),
        (["score", "clips/face.mp4", "--bundle", "bundle", "--device", "tpu"], "device must be one of auto, cpu, cuda"),
        (["score", "clips/face.mp4", "--bundle", "bundle", "--frames", "some"], "sampling policy 'some'"),
        (
            ["score", "clips/face.mp4", "--bundle", "bundle", "--mode", "fast"],
            "must be exact, reference or keyframe; got 'fast'",
        ),
        (["score", "clips/face.mp4", "--bundle", "bundle", "--out", "x.txt"], "must end in .jsonl, .csv, .parquet"),
        (["score", "clips/face.mp4", "--bundle", "bundle", "--time-limit", "soon"], "a duration is written like 9h"),
        (["score", "clips/face.mp4", "--bundle", "bundle", "--timeout", "0"], "longer than zero; got '0'"),
        (["score", "clips/face.mp4", "--bundle", "bundle", "--resume"], "give --out or --submission"),
        (["score", "a/x.mp4", "b/x.mp4", "--bundle", "bundle", "--submission", "s.csv"], "have the same name"),
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


def test_a_bar_on_the_terminal_leaves_results_in_the_pipe(folder: Path, tmp_path: Path) -> None:
    with (tmp_path / "rows.jsonl").open("wb") as file:
        words = ["score", "clips", "--bundle", "bundle", "--json", "--time-limit", "60s"]
        shown, status = _in_terminal(folder, words, {"TERM": "xterm-256color", "COLUMNS": "120"}, stdout=file)
    assert [json.loads(line)["path"] for line in (tmp_path / "rows.jsonl").read_text().splitlines()] != []
    assert "1 failed" in shown
    assert "videos/s" in shown
    assert "limit in 0:00:5" in shown
    assert "eta" in shown
    assert status == 1


def _in_terminal(
    folder: Path, words: list[str], env: dict[str, str], *, stdout: IO[bytes] | None = None
) -> tuple[str, int]:
    """Runs the command with a terminal as stderr, and as stdout if not told: what it showed, and its exit code."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "dfengine", *words],
        cwd=folder,
        env=os.environ | env,
        stdout=stdout or theirs,
        stderr=theirs,
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


# -- long runs ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many(folder: Path) -> Path:
    """many/: 11 faces under different names, and a text."""
    target = folder / "many"
    target.mkdir()
    for i in range(11):
        shutil.copy(folder / "clips" / "face.mp4", target / f"face{i:02}.mp4")
    (target / "text.mp4").write_text("not a video\n")
    return target


def table(path: Path) -> dict[str, tuple[str, float | None]]:
    """Status and p_fake by path; fails if a path is there twice."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({r["path"] for r in rows}) == len(rows)
    return {r["path"]: (r["status"], r["p_fake"]) for r in rows}


def start(folder: Path, *words: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "dfengine", "score", *words, "--bundle", "bundle"],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def wait_for_lines(path: Path, count: int) -> None:
    ends = time.monotonic() + 60
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert time.monotonic() < ends
        time.sleep(0.01)


def test_a_run_that_is_killed_over_and_over_ends_in_the_same_table(folder: Path, many: Path) -> None:
    assert score(folder, "many", "--out", "unbroken.jsonl").returncode == 1
    expected = table(folder / "unbroken.jsonl")
    assert len(expected) == 12
    path = folder / "broken.jsonl"
    for lines in (1, 4, 7):
        with start(folder, "many", "--out", "broken.jsonl", "--resume") as process:
            wait_for_lines(path, lines)
            process.kill()
    torn = path.read_bytes()
    assert lines <= torn.count(b"\n") < 12
    done = score(folder, "many", "--out", "broken.jsonl", "--resume", "--json")
    assert done.returncode == 1
    assert len(done.stdout.splitlines()) == 12 - torn.count(b"\n"), "only what was missing is scored"
    got = table(path)
    assert {p: s for p, (s, _) in got.items()} == {p: s for p, (s, _) in expected.items()}
    for name, (_, p_fake) in expected.items():
        assert got[name][1] == (None if p_fake is None else pytest.approx(p_fake, abs=1e-5))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_how_to_go_on(folder: Path, many: Path, number: signal.Signals) -> None:
    name = f"stopped {number.name}.csv"
    with start(folder, "many", "--out", name, "--submission", f"sub{number.name}.csv", "--workers", "1") as process:
        wait_for_lines(folder / f"{name}.journal.jsonl", 2)
        os.killpg(process.pid, number)  # as a terminal does it
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in err
    assert b"interrupted; the rows so far are in stopped SIG" in err
    assert not (folder / name).exists()
    assert len((folder / f"sub{number.name}.csv").read_text().splitlines()) == 13
    command = err.decode().split("go on with:\n")[1].strip()
    assert "--resume" in command
    done = subprocess.run(shlex.split(command), cwd=folder, capture_output=True, timeout=120)
    assert done.returncode == 1
    assert len(out.splitlines()) + len(done.stdout.splitlines()) == 12 + 2, "two headers, and no row twice"
    with (folder / name).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [r["path"] for r in rows] == sorted(f"many/{p.name}" for p in many.iterdir())
    with (folder / f"sub{number.name}.csv").open(newline="") as file:
        labels = {r["filename"]: r["label"] for r in csv.DictReader(file)}
    assert labels == {Path(r["path"]).name: r["p_fake"] or "0.5" for r in rows}
    assert not (folder / f"{name}.journal.jsonl").exists()


@pytest.mark.parametrize(
    ("words", "again"),
    [
        (["score", "a", "--out", "x.csv"], ["score", "--resume", "a", "--out", "x.csv"]),
        (["score", "a", "--resume", "--out", "x.csv"], ["score", "--resume", "a", "--out", "x.csv"]),
        (["score", "--out", "x.csv", "--", "-odd.mp4"], ["score", "--resume", "--out", "x.csv", "--", "-odd.mp4"]),
        (
            ["score", "--resume", "--out=x.csv", "--", "--resume"],
            ["score", "--resume", "--out=x.csv", "--", "--resume"],
        ),
    ],
)
def test_the_command_that_goes_on(words: list[str], again: list[str]) -> None:
    assert cli._resume_command(["dfengine", *words]) == ["dfengine", *again]


DEFECT = """
from dfengine.stages.detect import Detector

def detect(*args, **more):
    raise ZeroDivisionError("a defect")

Detector.detect = detect
"""


def test_a_defect_that_hits_every_video_ends_the_run_in_one_line(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(DEFECT)
    for name in ("a.mp4", "b.mp4"):
        shutil.copy(folder / "clips" / "face.mp4", tmp_path / name)
    words = ["a.mp4", "b.mp4", "--bundle", str(folder / "bundle"), "--json", "--out", "out.jsonl"]
    done = run(tmp_path, "score", *words, PYTHONPATH=str(tmp_path))
    expected = (
        b"dfengine: error: all 2 videos failed, the first with ZeroDivisionError: unexpected: a defect; please report"
    )
    assert done.stderr.startswith(expected)
    assert len(done.stderr.splitlines()) == 1
    assert done.returncode == 2
    assert len(done.stdout.splitlines()) == 2, "they are rows all the same"
    some = run(tmp_path, "score", *words, "nothing.mp4", PYTHONPATH=str(tmp_path))
    assert (some.returncode, some.stderr) == (1, b"")
    told = run(tmp_path, "score", *words, "--verbose", PYTHONPATH=str(tmp_path))
    assert b"Traceback" in told.stderr
    assert b"ZeroDivisionError: a defect" in told.stderr


def test_a_time_limit_with_every_kind_of_file(folder: Path, many: Path) -> None:
    started = time.monotonic()
    done = score(folder, "many", "missing.mp4", "--time-limit", "60s", "--submission", "sub.csv", "--json")
    assert time.monotonic() - started < 60
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 13
    assert all(r["status"] == "ok" for r in rows if "face" in r["path"])
    assert len((folder / "sub.csv").read_text().splitlines()) == 14
    assert done.returncode == 1


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_a_network_that_does_not_compile_costs_no_old_row(folder: Path, tmp_path: Path, suffix: str) -> None:
    damaged = write_bundle(tmp_path / "damaged")
    spec = json.loads((damaged / "bundle.json").read_text())
    (damaged / "mean.onnx").write_bytes(b"no network")
    spec["members"][0]["sha256"] = hashlib.sha256(b"no network").hexdigest()
    (damaged / "bundle.json").write_text(json.dumps(spec))
    out, submission = tmp_path / f"out{suffix}", tmp_path / "sub.csv"
    words = ["clips/face.mp4", "--out", str(out), "--submission", str(submission)]
    assert score(folder, *words).returncode == 0
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.*")}
    assert set(before) == {out.name, "sub.csv"}
    for resume in ([], ["--resume"]):
        done = run(folder, "score", *words, *resume, "--bundle", str(damaged))
        assert done.returncode == 2
        assert done.stderr.startswith(b"dfengine: error: network development/mean cannot be compiled: OpenVINO ")
        assert len(done.stderr.splitlines()) == 1
        assert {path.name: path.read_bytes() for path in tmp_path.glob("*.*")} == before


def test_a_full_disk_ends_the_run_and_keeps_the_rows(folder: Path, many: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))

    command = [sys.executable, "-m", "dfengine", "score", "many", "--bundle", "bundle", "--out", "full.jsonl"]
    done = subprocess.run(command, cwd=folder, capture_output=True, timeout=120, preexec_fn=limit)
    assert done.returncode == 2
    assert b"Traceback" not in done.stderr
    assert b"full.jsonl: results cannot be written (File too large)" in done.stderr
    kept = table(folder / "full.jsonl")
    assert 1 <= len(kept) < 12
    assert score(folder, "many", "--out", "full.jsonl", "--resume").returncode == 1
    assert len(table(folder / "full.jsonl")) == 12


def test_standard_output_that_is_full(folder: Path) -> None:
    with open("/dev/full", "wb") as full:
        command = [sys.executable, "-m", "dfengine", "score", "clips", "--bundle", "bundle", "--json"]
        done = subprocess.run(command, cwd=folder, stdout=full, stderr=subprocess.PIPE, timeout=120)
    assert done.returncode == 2
    assert b"standard output cannot be written (No space left on device)" in done.stderr
    assert b"Traceback" not in done.stderr


def test_a_summary_for_people(folder: Path, many: Path) -> None:
    (folder / "again.mp4").symlink_to(many / "face00.mp4")
    done = score(folder, "many", "many/face00.mp4", "again.mp4", "missing.mp4", "--mode", "exact")
    err = done.stderr.decode()
    assert "videos    12 ok, 0 no face, 2 failed" in err
    assert {"1 SourceNotFound", "1 NotAVideo"} <= {line[9:].strip() for line in err.splitlines()}
    slowest = [float(words[0]) for line in err.splitlines() if len(words := line[9:].split()) > 2 and words[1] == "s"]
    assert len(slowest) == 5
    assert slowest == sorted(slowest, reverse=True)
    assert "repeated  1 named again, scored once" in err
    assert score(folder, "many", "--quiet").stderr == b""
