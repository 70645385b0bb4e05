"""Which files are meant by what was typed, and supervised runs over many videos."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import fake_scorers
import pytest
from assets import write_bundle

import dfengine
from dfengine.bundle import Bundle
from dfengine.errors import BundleError, DeviceError, OptionError, WorkerCrashed
from dfengine.jobs.inputs import expand_inputs
from dfengine.jobs.run import Batch
from dfengine.jobs.wire import Setup, Task
from dfengine.jobs.worker import Died, Process, Scored
from dfengine.machine import usable_cores
from dfengine.sampling import Sampling
from dfengine.types import Plan, VideoScore


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


def test_what_systems_put_beside_videos_is_passed_over(tmp_path: Path) -> None:
    names = ["a/clip.mp4", "a/._clip.mp4", "__MACOSX/a/._clip.mp4", "a/@eaDir/clip.mp4", ".Trash-1000/files/clip.mp4"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert expand_inputs([str(tmp_path)]) == [str(tmp_path / "a/clip.mp4")]
    named = str(tmp_path / "a/._clip.mp4")
    assert expand_inputs([named]) == [named], "what is named is always tried"


def test_links_to_folders_are_followed_once(tree: Path) -> None:
    (tree / "far").mkdir()
    (tree / "far" / "d.mp4").write_bytes(b"x")
    (tree / "empty" / "link").symlink_to(tree / "far")
    (tree / "empty" / "again").symlink_to(tree / "far")
    (tree / "far" / "back").symlink_to(tree / "empty")
    assert expand_inputs(["empty"]) == ["empty/again/d.mp4"]


def test_names_that_were_listed_are_no_patterns(tree: Path) -> None:
    assert expand_inputs(["[ab].mp4"]) == ["b.mp4"]
    assert expand_inputs(["[ab].mp4", "deep"], patterns=False) == ["[ab].mp4", "deep/[x].mkv", "deep/er/c.webm"]


def test_a_way_through_a_link_is_another_way(bundle: Bundle, tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "a", tmp_path / "a" / "b"):
        make_files(folder, "x")
    (tmp_path / "link").symlink_to(tmp_path / "a" / "b")
    batch = Batch([str(tmp_path / "link" / ".." / "x"), str(tmp_path / "x"), str(tmp_path / "a" / "x")], bundle=bundle)
    assert [Path(job.path).parent.name for job in batch.jobs] == ["..", tmp_path.name]
    assert batch.repeated == 1


# -- a run over files, with workers that do what the names of the files say --------------------------------------------


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.load(write_bundle(tmp_path_factory.mktemp("bundle"), sampling="uniform:8"))


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Workers can import fake_scorers and log to the file that is returned."""
    path = tmp_path / "log.txt"
    path.touch()
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setenv("FAKE_LOG", str(path))
    return path


def make_files(folder: Path, *names: str, size: int = 10) -> list[str]:
    folder.mkdir(exist_ok=True)
    for name in names:
        with (folder / name).open("wb") as file:
            file.truncate(size)
    return [str(folder / name) for name in names]


def run(paths: list[str], bundle: Bundle, make_scorer=fake_scorers.make, **options: object) -> dict[str, VideoScore]:
    rows = list(Batch(paths, bundle=bundle, make_scorer=make_scorer, **options).run())
    by_name = {Path(row.path).name: row for row in rows}
    assert len(by_name) == len(rows), "one row a video"
    return by_name


def alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, "waited in vain"
        time.sleep(0.02)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_every_video_has_one_row(bundle: Bundle, fakes: Path, tmp_path: Path, workers: int) -> None:
    names = ["ok-1", "no_face-2", "error-3", "ok-4", "ok-5"]
    rows = run([*make_files(tmp_path / "v", *names), str(tmp_path / "ok-gone")], bundle, workers=workers)
    assert {n: r.status for n, r in rows.items()} == dict(
        zip([*names, "ok-gone"], ["ok", "no_face", "error", "ok", "ok", "ok"], strict=True)
    )
    assert len({r.fingerprint for r in rows.values()}) == 6
    assert all(len(r.fingerprint) == 16 for r in rows.values())


@pytest.mark.parametrize(
    ("name", "how", "hint"),
    [
        ("SIGSEGV-x", "was killed by SIGSEGV", "convert it, and please report this"),
        ("SIGABRT-x", "was killed by SIGABRT", "convert it, and please report this"),
        ("SIGKILL-x", "was killed by SIGKILL", "want of memory"),
        ("exit-x", "exited with code 3", "please report this"),
        ("raise-x", "exited with code 1", "please report this"),
    ],
)
def test_a_crash_costs_that_video_after_a_second_try_alone(
    bundle: Bundle, fakes: Path, tmp_path: Path, name: str, how: str, hint: str
) -> None:
    others = ["ok-1", "0.1s-2", "ok-3", "0.1s-4"]
    rows = run(make_files(tmp_path / "v", name, *others), bundle, workers=2)
    assert [rows[n].status for n in others] == ["ok"] * 4
    error = rows[name].error
    assert error is not None
    assert (error.type, error.stage) == ("WorkerCrashed", "decode")
    assert f"the process that scored it {how} during decode" in error.message
    assert hint in error.message
    assert "(twice, the second time alone)" in error.message
    assert (rows[name].bundle, rows[name].sampling, set(rows[name].timings)) == (bundle.name, "uniform:8", {"decode"})
    lines = [line.split()[:2] for line in fakes.read_text().splitlines()]
    assert [n for what, n in lines if what == "begin"].count(name) == 2
    assert lines[-1] == ["begin", name], "the second try comes when all others have ended"
    assert all(["end", n] in lines for n in others)


def test_a_video_that_crashes_once_is_scored(bundle: Bundle, fakes: Path, tmp_path: Path) -> None:
    rows = run(make_files(tmp_path / "v", "once-x", "ok-1"), bundle, workers=2)
    assert {n: r.status for n, r in rows.items()} == {"once-x": "ok", "ok-1": "ok"}


def test_a_hang_is_a_row(bundle: Bundle, fakes: Path, tmp_path: Path) -> None:
    rows = run(make_files(tmp_path / "v", "hang-x", "ok-1", "ok-2"), bundle, workers=2, timeout_seconds=0.5)
    error = rows["hang-x"].error
    assert error is not None
    assert (error.type, error.stage) == ("VideoTimeout", "decode")
    assert "no result after 0.5" in error.message
    assert "raise --timeout" in error.message
    assert rows["hang-x"].timings["decode"] >= 0.4
    assert [rows[n].status for n in ("ok-1", "ok-2")] == ["ok", "ok"]
    pids = {int(line.split()[2]) for line in fakes.read_text().splitlines()}
    wait_until(lambda: not any(alive(pid) for pid in pids))


def test_a_slow_reader_makes_no_timeouts(bundle: Bundle, fakes: Path, tmp_path: Path) -> None:
    paths = make_files(tmp_path / "v", "ok-1", "0.3s-2", "ok-3")
    rows = Batch(paths, bundle=bundle, workers=2, timeout_seconds=1, make_scorer=fake_scorers.make).run()
    found = [next(rows)]
    time.sleep(2)
    found += rows
    assert [r.status for r in found] == ["ok"] * 3
    assert fakes.read_text().count("begin") == 3, "nothing was tried twice"


def test_an_answer_that_came_while_nobody_listened_counts(
    bundle: Bundle, fakes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the run is stopped for a while (Ctrl-Z): it wakes up in the middle of waiting, and the time is over."""

    class Asleep(selectors.DefaultSelector):
        def select(self, timeout: float | None = None) -> list:
            if "begin" in fakes.read_text() and not slept:
                slept.append(True)
                time.sleep(2)
                return []
            return super().select(timeout)

    slept: list[bool] = []
    monkeypatch.setattr(selectors, "DefaultSelector", Asleep)
    rows = run(make_files(tmp_path / "v", "0.3s-1"), bundle, timeout_seconds=1)
    assert slept
    assert rows["0.3s-1"].status == "ok"
    assert fakes.read_text().count("begin") == 1, "nothing was tried twice"


def test_many_crashes_and_hangs(bundle: Bundle, fakes: Path, tmp_path: Path) -> None:
    names = [f"{kind}-{i}" for i in range(3) for kind in ("SIGSEGV", "ok", "hang", "once", "error")]
    rows = run(make_files(tmp_path / "v", *names), bundle, workers=3, timeout_seconds=0.5)
    got = {n: r.error.type if r.error else r.status for n, r in rows.items()}
    expected = {"SIGSEGV": "WorkerCrashed", "ok": "ok", "hang": "VideoTimeout", "once": "ok", "error": "DecodeError"}
    assert got == {n: expected[n.split("-")[0]] for n in names}


def test_a_result_that_was_sent_is_kept_when_its_worker_dies(bundle: Bundle, fakes: Path, tmp_path: Path) -> None:
    (path,) = make_files(tmp_path / "v", "ok-1")
    process = Process(Setup(bundle, "cpu", 1, fake_scorers.make))
    try:
        wait_until(lambda: bool(process.receive()))
        process.workers[0].give(Task(path, Plan(Sampling.parse("uniform:8"), ("mean",)), 60))
        with socket.socket(fileno=os.dup(process.fileno())) as arrived:
            wait_until(lambda: b"VideoScore" in arrived.recv(1 << 16, socket.MSG_PEEK))
        os.kill(process.pid, signal.SIGKILL)
        wait_until(lambda: not alive(process.pid))
        messages: list[object] = []
        wait_until(lambda: bool(messages.extend(process.receive())) or isinstance(messages[-1], Died))
        scored, died = messages
        assert isinstance(scored, Scored)
        assert scored.score.status == "ok"
        assert isinstance(died, Died)
        assert died.how == "was killed by SIGKILL"
    finally:
        process.kill()


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run believes that there is a GPU; the scorers are fakes."""
    monkeypatch.setattr("dfengine.jobs.run.resolve_device", lambda device: "cuda")


def pids_of(fakes: Path) -> set[int]:
    return {int(line.split()[2]) for line in fakes.read_text().splitlines()}


def test_on_a_gpu_one_process_scores_many_videos_at_a_time(
    bundle: Bundle, fakes: Path, tmp_path: Path, on_gpu: None
) -> None:
    names = [f"0.5s-{i}" for i in range(6)]
    rows = run(make_files(tmp_path / "v", *names), bundle, workers=6)
    assert {r.status for r in rows.values()} == {"ok"}
    assert set(rows) == set(names)
    assert len(pids_of(fakes)) == 1
    events = [line.split()[0] for line in fakes.read_text().splitlines()]
    assert events[:6] == ["begin"] * 6  # all at once


def test_on_a_gpu_16_videos_are_in_work_unless_told(bundle: Bundle, fakes: Path, on_gpu: None) -> None:
    assert Batch([], bundle=bundle, make_scorer=fake_scorers.make).workers == 16


def test_on_a_gpu_crashes_and_hangs_cost_only_their_own_videos(
    bundle: Bundle, fakes: Path, tmp_path: Path, on_gpu: None
) -> None:
    """Those that shared the process are scored again."""
    names = [f"{kind}-{i}" for i in range(2) for kind in ("SIGSEGV", "0.2s", "hang", "ok", "error")]
    rows = run(make_files(tmp_path / "v", *names), bundle, workers=4, timeout_seconds=1.5)
    got = {n: r.error.type if r.error else r.status for n, r in rows.items()}
    expected = {"SIGSEGV": "WorkerCrashed", "hang": "VideoTimeout", "error": "DecodeError"}
    assert got == {n: expected.get(n.split("-")[0], "ok") for n in names}
    assert {rows[n].device for n in ("SIGSEGV-0", "hang-0")} == {"cuda:0"}, "as the engine calls it"


def test_on_a_gpu_a_hang_is_no_fault_of_its_neighbours(
    bundle: Bundle, fakes: Path, tmp_path: Path, on_gpu: None
) -> None:
    names = ["hang-1", *(f"0.9s-{i}" for i in range(6))]
    rows = run(make_files(tmp_path / "v", *names), bundle, workers=2, timeout_seconds=2)
    assert [rows[n].status for n in names] == ["error"] + ["ok"] * 6
    log = fakes.read_text().splitlines()
    alone = [line for line in log if line.startswith("begin hang")]
    assert len(alone) == 2
    assert (
        sum(line.startswith("begin 0.9s") for line in log) == 7
    )  # one of them twice: it ran when the process was ended


def test_workers_end_when_their_parent_is_killed(bundle: Bundle, fakes: Path, tmp_path: Path) -> None:
    """Also in the middle of a video."""
    paths = make_files(tmp_path / "v", "hang-1", "hang-2")
    code = (
        "import fake_scorers; from dfengine.jobs.run import Batch; "
        f"list(Batch({paths}, bundle={str(bundle.folder)!r}, workers=2, make_scorer=fake_scorers.make).run())"
    )
    with subprocess.Popen([sys.executable, "-c", code]) as parent:
        wait_until(lambda: fakes.read_text().count("begin") == 2)
        pids = [int(line.split()[2]) for line in fakes.read_text().splitlines()]
        assert all(alive(pid) for pid in pids)
        parent.kill()
    wait_until(lambda: not any(alive(pid) for pid in pids))


def test_workers_are_replaced_after_some_videos(
    bundle: Bundle, fakes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dfengine.jobs.supervisor.VIDEOS_A_WORKER", 3)
    names = [f"ok-{i}" for i in range(14)]
    assert set(run(make_files(tmp_path / "v", *names), bundle, workers=2)) == set(names)
    pids = [line.split()[2] for line in fakes.read_text().splitlines() if line.startswith("begin")]
    assert max(Counter(pids).values()) == 3
    assert len(pids) == 14


def test_closing_a_run_early_ends_its_workers(bundle: Bundle, fakes: Path, tmp_path: Path) -> None:
    paths = make_files(tmp_path / "v", "hang-1", "0.5s-2", "ok-3")
    rows = Batch(paths, bundle=bundle, workers=2, make_scorer=fake_scorers.make).run()
    assert next(rows).status == "ok"
    wait_until(lambda: "hang" in fakes.read_text())
    rows.close()
    pids = {int(line.split()[2]) for line in fakes.read_text().splitlines()}
    wait_until(lambda: not any(alive(pid) for pid in pids))


def test_what_a_worker_logs_reaches_the_parents_logging(
    bundle: Bundle, fakes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(make_files(tmp_path / "v", "warn-1"), bundle)
    assert ("dfengine", logging.WARNING, f"said in the worker, with threads={usable_cores()}") in caplog.record_tuples


# -- start and options -------------------------------------------------------------------------------------------------


def test_an_error_at_the_start_of_a_worker_is_raised_as_it_is(bundle: Bundle, fakes: Path, tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="device 'cuda' cannot be had: test") as caught:
        run(make_files(tmp_path / "v", "ok-1", "ok-2"), bundle, fake_scorers.no_device, workers=2)
    assert (caught.value.message, caught.value.stage) == ("device 'cuda' cannot be had: test", "device")
    assert fakes.read_text() == ""


def test_workers_that_cannot_be_started_end_the_run(bundle: Bundle, fakes: Path, tmp_path: Path) -> None:
    with pytest.raises(
        WorkerCrashed, match="cannot be started: the last one was killed by SIGKILL before it was ready"
    ):
        run(make_files(tmp_path / "v", "ok-1", "ok-2"), bundle, fake_scorers.dies_at_start, workers=2)


HEAVY = functools.partial(fake_scorers.make_heavy, bytes(50_000_000))


def test_a_large_set_up_reaches_its_workers(bundle: Bundle, fakes: Path, tmp_path: Path) -> None:
    rows = run(make_files(tmp_path / "v", "ok-1", "once-2", "ok-3"), bundle, HEAVY, workers=2)
    assert {r.status for r in rows.values()} == {"ok"}


def be_python(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Worker processes run this shell script instead."""
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(path))


def test_a_process_that_never_reads_does_not_stop_its_parent(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    be_python("exec sleep 600", tmp_path, monkeypatch)
    process = Process(Setup(bundle, "cpu", 1, HEAVY))
    try:
        process.workers[0].give(Task("x", Plan(Sampling.parse("uniform:8"), ("mean",)), 60))
        process.flush()
        assert process.has_unsent
        assert process.receive() == []
    finally:
        process.kill()
    assert not alive(process.pid)


@pytest.mark.parametrize("make_scorer", [fake_scorers.make, HEAVY], ids=["light", "heavy"])
def test_processes_that_exit_at_once_end_the_run(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_scorer: object
) -> None:
    be_python("exit 3", tmp_path, monkeypatch)
    with pytest.raises(WorkerCrashed, match="cannot be started: the last one exited with code 3 before it was ready"):
        run(make_files(tmp_path / "v", "ok-1", "ok-2"), bundle, make_scorer, workers=2)


def test_what_cannot_be_sent_is_told_by_receive(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    be_python("exit 3", tmp_path, monkeypatch)
    process = Process(Setup(bundle, "cpu", 1, fake_scorers.make))
    try:
        wait_until(lambda: not alive(process.pid))
        process.workers[0].give(Task("x", Plan(Sampling.parse("uniform:8"), ("mean",)), 60))
        process.flush()
        assert not process.has_unsent
        assert process.receive() == [Died("exited with code 3")]
    finally:
        process.kill()


def test_a_worker_too_many_is_done_without(bundle: Bundle, fakes: Path, tmp_path: Path) -> None:
    names = ["0.3s-1", "0.3s-2", "0.3s-3", "0.3s-4"]
    rows = run(make_files(tmp_path / "v", *names), bundle, fake_scorers.dies_at_start_but_once, workers=3)
    assert {r.status for r in rows.values()} == {"ok"}
    assert len(rows) == 4


@pytest.mark.parametrize(
    ("videos", "workers", "threads"), [(1, None, "all"), (1, 4, "all"), (2, 2, "half"), (2, 1, "all")]
)
def test_few_videos_share_the_cores(
    bundle: Bundle, fakes: Path, tmp_path: Path, videos: int, workers: int | None, threads: str
) -> None:
    rows = run(make_files(tmp_path / "v", *(f"ok-{i}" for i in range(videos))), bundle, workers=workers)
    expected = usable_cores() if threads == "all" else max(1, usable_cores() // 2)
    assert {r.device for r in rows.values()} == {f"cpu*{expected}"}


def test_a_file_that_goes_away_during_the_run_is_a_row(bundle: Bundle, tmp_path: Path) -> None:
    """With the real engine: it was there when the run began."""
    (path,) = make_files(tmp_path / "v", "x.mp4")
    batch = Batch([path], bundle=bundle)
    os.unlink(path)
    (row,) = batch.run()
    assert row.error is not None
    assert (row.error.type, row.error.stage, row.path) == ("SourceNotFound", "open", path)
    assert row.bundle_digest == bundle.digest
    assert row.detector_digest == bundle.detector.digest != ""
    assert row.dfengine_version == dfengine.__version__
    assert row.fingerprint == batch.jobs[0].fingerprint


def test_nothing_to_do_starts_nothing(bundle: Bundle, fakes: Path) -> None:
    assert run([], bundle, fake_scorers.no_device) == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"frames": "all"}, "sampling policy 'all' is not understood"),
        ({"mode": "fast"}, "sampling mode must be"),
        ({"device": "tpu"}, "device must be one of"),
        ({"time_limit_seconds": 0}, "the time limit must be longer than zero, got 0 s"),
        ({"timeout_seconds": -1}, "the time-out must be longer than zero, got -1 s"),
    ],
)
def test_options_are_checked_before_anything_starts(bundle: Bundle, options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        Batch([], bundle=bundle, **options)
    assert message in str(caught.value)


def test_a_file_that_is_named_twice_is_scored_once(
    bundle: Bundle, fakes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_files(tmp_path, "ok-b", "ok-a")
    monkeypatch.chdir(tmp_path)
    batch = Batch(["ok-b", "./ok-a", "ok-b", str(tmp_path / "ok-a")], bundle=bundle)
    assert [job.path for job in batch.jobs] == ["ok-b", "./ok-a"]
    assert batch.repeated == 2


def test_a_name_that_no_file_can_have_is_a_row(bundle: Bundle) -> None:
    (row,) = Batch(["half \ud800 a pair"], bundle=bundle).run()
    assert row.error is not None
    assert row.error.type == "SourceNotFound"
    assert row.path == r"half \ud800 a pair"


def test_a_request_is_about_the_file_and_what_was_asked(bundle: Bundle, tmp_path: Path) -> None:
    (path,) = make_files(tmp_path / "v", "ok-1")

    def fingerprint(path: str = path, **options: object) -> str:
        (job,) = Batch([path], **{"bundle": bundle} | options).jobs
        return job.fingerprint

    first = fingerprint()
    assert first == fingerprint(workers=1, timeout_seconds=5)
    assert first == fingerprint(frames="uniform:8", mode=bundle.sampling_mode), "asked for what is the bundle's own"
    other_bundle = Bundle.load(write_bundle(tmp_path / "other", sampling="uniform:8", licence="other"))
    different = [
        fingerprint(frames=7), fingerprint(mode="exact"), fingerprint(time_limit_seconds=60),
        fingerprint(bundle=other_bundle), fingerprint(str(tmp_path / "v" / "gone")),
    ]  # fmt: skip
    make_files(tmp_path / "v", "ok-1", size=11)
    different.append(fingerprint())
    os.utime(path, ns=(1, 1))
    different.append(fingerprint())
    assert len({first, *different}) == 1 + len(different)


def test_a_detector_is_no_bundle_to_score_with() -> None:
    with pytest.raises(BundleError, match="'mtcnn' has no member that scores; it is a detector"):
        Batch(["clip.mp4"], bundle="mtcnn", device="cpu")


def test_rows_of_another_detector_or_version_are_not_kept(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path,) = make_files(tmp_path, "ok-1")
    (first,) = Batch([path], bundle=bundle).jobs
    other = dataclasses.replace(bundle, detector=dataclasses.replace(bundle.detector, digest="0" * 64))
    (by_another_detector,) = Batch([path], bundle=other).jobs
    monkeypatch.setattr("dfengine.jobs.run.VERSION", "99.0")
    (by_another_version,) = Batch([path], bundle=bundle).jobs
    assert len({first.fingerprint, by_another_detector.fingerprint, by_another_version.fingerprint}) == 3


def test_done_jobs_are_left_out(bundle: Bundle, fakes: Path, tmp_path: Path) -> None:
    batch = Batch(make_files(tmp_path / "v", "ok-1", "ok-2", "ok-3"), bundle=bundle, make_scorer=fake_scorers.make)
    rows = list(batch.run({batch.jobs[1].fingerprint}))
    assert sorted(Path(r.path).name for r in rows) == ["ok-1", "ok-3"]


# -- stopping ----------------------------------------------------------------------------------------------------------


def test_stop_lets_videos_in_work_end(bundle: Bundle, fakes: Path, tmp_path: Path) -> None:
    paths = make_files(tmp_path / "v", "ok-1", "0.5s-2", "ok-3", "ok-4")
    batch = Batch(paths, bundle=bundle, workers=1, make_scorer=fake_scorers.make)
    rows = batch.run()
    assert Path(next(rows).path).name == "ok-1"
    threading.Thread(target=lambda: (wait_until(lambda: "begin 0.5s" in fakes.read_text()), batch.stop())).start()
    assert [Path(r.path).name for r in rows] == ["0.5s-2"]
    assert batch.interrupted


def test_stop_twice_drops_videos_in_work(bundle: Bundle, fakes: Path, tmp_path: Path) -> None:
    batch = Batch(make_files(tmp_path / "v", "ok-1", "hang-2"), bundle=bundle, workers=1, make_scorer=fake_scorers.make)
    rows = batch.run()
    next(rows)
    batch.stop()
    batch.stop()
    assert list(rows) == []


# -- a time limit ------------------------------------------------------------------------------------------------------


def test_ample_time_gives_what_was_asked(bundle: Bundle, fakes: Path, tmp_path: Path) -> None:
    names = [f"0.01s-{i}" for i in range(10)]
    rows = run(make_files(tmp_path / "v", *names), bundle, workers=2, time_limit_seconds=600)
    assert {(r.status, r.sampling, r.mode, r.warnings) for r in rows.values()} == {("ok", "uniform:8", "reference", ())}


def test_a_slow_machine_spends_less_on_each_and_ends_in_time(bundle: Bundle, fakes: Path, tmp_path: Path) -> None:
    """30 videos of .6 s on two workers would take 9 s; there are less than 7."""
    names = [f"0.6s-{i}" for i in range(30)]
    started = time.monotonic()
    rows = run(make_files(tmp_path / "v", *names), bundle, workers=2, time_limit_seconds=8)
    assert time.monotonic() - started < 8
    assert set(rows) == set(names)
    reduced = [r for r in rows.values() if r.status == "ok" and r.sampling != "uniform:8"]
    assert reduced, "some had to give up frames"
    for row in reduced:
        assert row.warnings[-1].startswith("less than asked, to keep the time limit: ")
    assert sum(r.status == "ok" for r in rows.values()) >= 15


def test_a_few_huge_videos_do_not_starve_the_rest(bundle: Bundle, fakes: Path, tmp_path: Path) -> None:
    small = make_files(tmp_path / "v", *(f"0.02s-{i}" for i in range(12)))
    huge = make_files(tmp_path / "v", *(f"500s-{i}" for i in range(2)), size=200_000_000)
    started = time.monotonic()
    rows = run([*huge, *small], bundle, workers=2, time_limit_seconds=6)
    assert time.monotonic() - started < 6
    assert {rows[Path(p).name].status for p in small} == {"ok"}
    for path in huge:
        error = rows[Path(path).name].error
        assert error is not None
        assert error.type == "DeadlineExceeded"
        assert "give a longer --time-limit, or run again with --resume" in error.message


@pytest.mark.parametrize("limit", [0.1, 1.0, 2.5])
def test_no_time_is_an_answer_too(bundle: Bundle, fakes: Path, tmp_path: Path, limit: float) -> None:
    names = [f"100s-{i}" for i in range(5)]
    started = time.monotonic()
    rows = run(make_files(tmp_path / "v", *names), bundle, workers=2, time_limit_seconds=limit)
    assert time.monotonic() - started < limit + 1
    assert {(r.error.type if r.error else None) for r in rows.values()} == {"DeadlineExceeded"}
    assert set(rows) == set(names)


def test_crashes_and_hangs_within_a_time_limit(bundle: Bundle, fakes: Path, tmp_path: Path) -> None:
    names = ["SIGSEGV-1", "hang-2", "ok-3", "ok-4", "once-5"]
    started = time.monotonic()
    paths = make_files(tmp_path / "v", *names)
    rows = run(paths, bundle, workers=2, time_limit_seconds=20, timeout_seconds=1)
    assert time.monotonic() - started < 20
    got = {n: r.error.type if r.error else r.status for n, r in rows.items()}
    assert got == {
        "SIGSEGV-1": "WorkerCrashed", "hang-2": "VideoTimeout", "ok-3": "ok", "ok-4": "ok", "once-5": "ok",
    }  # fmt: skip
