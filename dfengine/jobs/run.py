"""Many videos: which files are meant, and a supervised run over them in worker processes.

Note [What becomes of a video]
A worker has one video at a time, in a process of its own, on a GPU in one with the others. If the process dies, or a
video takes longer than it may, the process is replaced and the video is tried once more when nothing else is running:
memory that two videos ran out of together may suffice for one. If that fails too, its row says so. What else was in the
process begins anew, after a death as if it had been the cause, since nobody can know. With a time limit
(dfengine.jobs.deadline) a video that takes far more than its share is tried once more at the bottom of the ladder, and
what still runs or waits when the time is over gets a row with DeadlineExceeded. So every video that was handed in has
exactly one row, whatever happens to it.
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import json
import logging
import math
import os
import selectors
import signal
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dfengine.bundle import Bundle
from dfengine.devices import resolve_device
from dfengine.engine import make_plan
from dfengine.errors import OptionError, WorkerCrashed, display_path
from dfengine.jobs.deadline import Deadline, Step, ladder
from dfengine.jobs.worker import Died, Process, Ready, Scored, Scorer, Setup, StartFailed, Task, Worker, engine_scorer
from dfengine.machine import default_workers, usable_cores
from dfengine.types import ErrorInfo, PathLikeStr, VideoScore

log = logging.getLogger("dfengine")

# A folder stands for the files in it with one of these suffixes; a file that is named is always tried.
VIDEO_SUFFIXES = frozenset(
    {
        ".3g2", ".3gp", ".asf", ".avi", ".divx", ".dv", ".f4v", ".flv", ".gif", ".h264", ".hevc",
        ".ivf", ".m2ts", ".m2v", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".mxf",
        ".ogm", ".ogv", ".rm", ".rmvb", ".ts", ".vob", ".webm", ".wmv", ".y4m",
    }
)  # fmt: skip

# Time that one video may take, unless told: a minute, and 20 s for each MB. On 16 clips of 0.2 to 4 MB one core of an
# AMD EPYC needs .3 to 4 s/MB (mode exact, 17 frames), so that a machine five times slower stays below it.
TIMEOUT_SECONDS = 60.0
TIMEOUT_SECONDS_PER_BYTE = 20e-6

# How often the clock is looked at while nothing happens.
POLL_SECONDS = 0.1

# After the first request to stop, videos in work get this long to end.
GRACE_SECONDS = 10.0

# What every DeadlineExceeded ends with.
MORE_TIME = "give a longer --time-limit, or run again with --resume"

# A process of one worker is replaced after this many videos. What it holds grows with the largest video that it has
# seen, and by fragments; over 1,000 mixed files two came to 2.4 GB without this. A new one costs half a second.
VIDEOS_A_WORKER = 200

# Processes that die one after the other before they are ready, with no other alive, end the run.
MAX_FAILED_STARTS = 3


def expand_inputs(paths: Iterable[str], *, patterns: bool = True) -> list[str]:
    """Files, folders and (unless told otherwise) glob patterns -> files, in the order given, of a folder by name.

    Nothing is dropped: a folder without videos, an unreadable folder, and a pattern without a match stay in the list,
    so that each becomes a row that says what is wrong with it. Folders that are links are followed, each once.
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
        by_place = {os.path.realpath(os.path.join(root, f)): f for f in sorted(folders, reverse=True)}
        folders[:] = sorted(by_place[place] for place in by_place.keys() - seen)
        seen |= by_place.keys()  # a link may lead to where we have been
        found += [os.path.join(root, n) for n in sorted(names) if Path(n).suffix.lower() in VIDEO_SUFFIXES]
    return found + sorted(str(e.filename) for e in unreadable)


@dataclass(frozen=True)
class Job:
    """One video to score. ``request`` is explained in VideoScore."""

    path: str
    size_bytes: int
    request: str


class Batch:
    """A run over many videos. Everything that can be wrong with the options is raised when it is made.

    ``workers``: videos at a time, each in a process of its own on the CPU, by default one a core or 16 on a GPU; fewer
    videos than that share the cores.
    ``timeout_seconds``: for each video, by default by its size. ``time_limit_seconds``: for the whole run, counted from
    now. A file that is named twice is scored once: ``jobs`` are the different ones, ``repeated`` the number of others.

    Raises BundleError, DeviceError or OptionError.
    """

    def __init__(
        self,
        paths: Iterable[str],
        *,
        bundle: PathLikeStr | Bundle = "default",
        device: str = "auto",
        frames: str | int | None = None,
        mode: str | None = None,
        workers: int | None = None,
        timeout_seconds: float | None = None,
        time_limit_seconds: float | None = None,
        make_scorer: Callable[[Bundle, str, int], Scorer] = engine_scorer,
    ) -> None:
        if workers is not None and workers < 1:
            raise OptionError(f"workers must be at least 1, got {workers}")
        if timeout_seconds is not None and not timeout_seconds > 0:
            raise OptionError(f"the time-out must be longer than zero, got {timeout_seconds} s")
        self.timeout_seconds = timeout_seconds
        self.bundle = Bundle.load(bundle)
        self.device = resolve_device(device)
        self.workers = workers or default_workers(self.device != "cpu", usable_cores())
        asked = make_plan(self.bundle, frames=frames, mode=mode)
        self.steps: tuple[Step, ...] = (Step("as asked", asked, 1.0),)
        self.deadline: Deadline | None = None
        if time_limit_seconds is not None:
            self.steps = ladder(asked, self.bundle)
            self.deadline = Deadline(time_limit_seconds, [step.cost for step in self.steps])
        self.make_scorer = make_scorer
        self.interrupted = False
        self._drop_at = math.inf

        paths = list(paths)
        different: dict[str, str] = {}
        for path in paths:
            different.setdefault(_place(path), path)
        self.repeated = len(paths) - len(different)
        what = [self.bundle.digest, *dataclasses.astuple(asked), self.deadline is not None]
        self.jobs = [_make_job(path, what) for path in different.values()]

    def run(self, done: Collection[str] = ()) -> Iterator[VideoScore]:
        """Scores all jobs but those whose ``request`` is in ``done``, and yields each row as soon as it is known.

        With a time limit small files go first, without one the order is that of the input. Ends early only after
        ``stop``. Raises what the workers raise when they start (DeviceError, InferenceError, BundleError), and
        WorkerCrashed if none can be started.
        """
        jobs = [job for job in self.jobs if job.request not in done]
        if self.deadline is not None:
            jobs.sort(key=lambda job: job.size_bytes)
        if jobs:
            with _Run(self, jobs) as run:
                yield from run.rows()

    def stop(self) -> None:
        """Hands out no more videos. Those in work get some seconds to end, or none when this is called again."""
        self._drop_at = time.monotonic() + (0.0 if self.interrupted else GRACE_SECONDS)
        self.interrupted = True

    @contextmanager
    def stopping_on_signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM call ``stop``. For the main thread only."""
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = [signal.signal(number, lambda *_: self.stop()) for number in numbers]
        try:
            yield
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)

    def must_drop(self) -> bool:
        """Whether videos in work have had their time after ``stop``."""
        return time.monotonic() >= self._drop_at


def _place(path: str) -> str:
    """The same for two names of one file; a link to a file is another file."""
    folder, name = os.path.split(path)
    try:
        return os.path.join(os.path.realpath(folder), name)
    except (OSError, ValueError):  # becomes a row that says why
        return path


def _make_job(path: str, what: list[Any]) -> Job:
    try:
        status = os.stat(path)
        size, changed_ns = status.st_size, status.st_mtime_ns
    except (OSError, ValueError):  # becomes a row that says why
        size, changed_ns = 0, 0
    key = json.dumps([path.encode("utf-8", "surrogatepass").hex(), size, changed_ns, *what])
    return Job(path, size, hashlib.sha256(key.encode()).hexdigest()[:16])


@dataclass(eq=False)
class _Attempt:
    """A job on its way: what it gets next, and what became of it before."""

    job: Job
    step: int = 0
    timeout_seconds: float = math.inf
    share_seconds: float = math.inf  # with a time limit: when it is given up in favour of the others
    at_bottom: bool = False  # it took more than its share before
    failure: ErrorInfo | None = None  # of the first try


class _Run:
    """The state of ``Batch.run``."""

    def __init__(self, batch: Batch, jobs: list[Job]) -> None:
        self._batch = batch
        self._deadline = batch.deadline
        self._waiting = deque(_Attempt(job) for job in jobs)
        self._alone: deque[_Attempt] = deque()  # to be tried again when nothing else runs
        self._running: dict[Worker, _Attempt] = {}
        self._processes: list[Process] = []
        self._most_workers = min(batch.workers, len(jobs))
        self._failed_starts = 0
        self._any_started = False
        # By all jobs, not by those that are left: decoding of damaged videos may depend on the number of threads, and a
        # resumed run must give what an unbroken one does.
        threads = max(1, usable_cores() // min(batch.workers, len(batch.jobs)))
        together = 1 if batch.device == "cpu" else self._most_workers
        self._setup = Setup(batch.bundle, batch.device, threads, batch.make_scorer, together, log.getEffectiveLevel())
        self._selector = selectors.DefaultSelector()

    def __enter__(self) -> _Run:
        return self

    def __exit__(self, *error: object) -> None:
        for process in list(self._processes):
            self._remove(process)
        self._selector.close()

    def rows(self) -> Iterator[VideoScore]:
        while self._waiting or self._alone or self._running:
            if self._batch.interrupted:
                if not self._running or self._batch.must_drop():
                    return
            elif self._deadline is not None and self._deadline.left() <= 0:
                yield from self._end()
                return
            else:
                yield from self._hand_out()
            # All at once: while a row is handed on the clock runs, and nobody listens.
            yield from [*self._listen(), *self._watch()]

    # -- handing out ---------------------------------------------------------------------------------------------------

    def _hand_out(self) -> Iterator[VideoScore]:
        """Gives videos to idle workers, and starts workers while there are too few."""
        while queue := self._waiting or (self._alone if not self._running else None):
            workers = (w for p in self._processes if p.ready for w in p.workers)
            idle = next((w for w in workers if w not in self._running), None)
            if idle is None:
                wanted = min(self._most_workers, len(self._running) + len(queue)) if self._waiting else 1
                while sum(len(p.workers) for p in self._processes) < wanted:
                    self._start()
                return
            if idle.process.tasks_given >= VIDEOS_A_WORKER and len(idle.process.workers) == 1:
                self._remove(idle.process)
                continue
            attempt = queue.popleft()
            if not self._allot(attempt):
                yield self._no_time(attempt)
                continue
            idle.give(Task(attempt.job.path, self._batch.steps[attempt.step].plan, attempt.timeout_seconds))
            self._running[idle] = attempt

    def _allot(self, attempt: _Attempt) -> bool:
        """Decides how much work a video gets; False if there is no time for it."""
        size = attempt.job.size_bytes
        attempt.timeout_seconds = self._batch.timeout_seconds or TIMEOUT_SECONDS + TIMEOUT_SECONDS_PER_BYTE * size
        if self._deadline is None:
            return True
        others = [other.job.size_bytes for other in (*self._waiting, *self._alone)]
        share = self._deadline.share(size, others, self._busy_seconds(), self._most_workers)
        if share is None:
            return False
        attempt.step = len(self._batch.steps) - 1 if attempt.at_bottom else share.step
        attempt.share_seconds = share.seconds
        return True

    def _busy_seconds(self) -> float:
        """What the videos in work still need. One that takes longer than expected may be anywhere."""
        assert self._deadline is not None
        seconds = 0.0
        for worker, attempt in self._running.items():
            expected = self._deadline.expected(attempt.step, attempt.job.size_bytes)
            seconds += max(expected - worker.seconds(), expected / 4)
        return seconds

    # -- processes -----------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        process = Process(self._setup)
        self._processes.append(process)
        self._selector.register(process, selectors.EVENT_READ)

    def _remove(self, process: Process) -> list[tuple[Worker, _Attempt]]:
        """Ends a process; returns what its workers were at."""
        self._processes.remove(process)
        self._selector.unregister(process)
        process.kill()
        return [(worker, self._running.pop(worker)) for worker in process.workers if worker in self._running]

    def _listen(self) -> Iterator[VideoScore]:
        for key, _ in self._selector.select(POLL_SECONDS):
            assert isinstance(key.fileobj, Process)
            yield from self._hear(key.fileobj)

    def _hear(self, process: Process) -> Iterator[VideoScore]:
        """Takes what a process has said."""
        for message in process.receive():
            match message:
                case Ready():
                    self._any_started, self._failed_starts = True, 0
                case Scored():
                    yield self._finished(self._running.pop(message.worker), message.score, message.seconds)
                case StartFailed():
                    if not self._any_started:
                        raise message.error
                    log.warning("a worker could not be started: %s", message.error)
                case Died():
                    for worker, attempt in self._remove(process):
                        yield from self._failed(attempt, worker, "WorkerCrashed", _crash(message, worker))
                    if not process.ready:
                        self._start_failed(message)

    def _start_failed(self, died: Died) -> None:
        """A process died before it was ready: go on with fewer, and give up when there are none."""
        if self._processes:
            self._most_workers = max(1, self._most_workers - 1)
            log.warning("a worker process %s when it started; going on with %d", died.how, self._most_workers)
            return
        self._failed_starts += 1
        if self._failed_starts == MAX_FAILED_STARTS:
            raise WorkerCrashed(
                f"worker processes cannot be started: the last one {died.how} before it was ready; see whether memory "
                "is short, and whether `dfengine info` works",
                stage="start",
            )

    def _watch(self) -> Iterator[VideoScore]:
        """Ends what takes too long."""
        for worker, attempt in list(self._running.items()):
            seconds = worker.seconds()
            if worker not in self._running or seconds < min(attempt.timeout_seconds, attempt.share_seconds):
                continue
            # Its answer may be here already: this process may have been stopped (Ctrl-Z) since it listened.
            yield from self._hear(worker.process)
            if self._running.get(worker) is not attempt:
                continue
            for other, waiting in self._remove(worker.process):
                if other is not worker:
                    self._waiting.appendleft(waiting)
            if seconds >= attempt.timeout_seconds:
                what = f"no result after {seconds:.3g} s; raise --timeout, or ask for fewer --frames"
                yield from self._failed(attempt, worker, "VideoTimeout", what)
                continue
            assert self._deadline is not None
            self._deadline.observe(attempt.step, attempt.job.size_bytes, seconds)
            if attempt.step == len(self._batch.steps) - 1:
                yield self._stopped(attempt, worker)
            else:
                attempt.at_bottom = True
                self._waiting.appendleft(attempt)

    # -- rows ----------------------------------------------------------------------------------------------------------

    def _finished(self, attempt: _Attempt, score: VideoScore, seconds: float) -> VideoScore:
        if self._deadline is not None and score.status != "error":  # what is no video says nothing of the others
            self._deadline.observe(attempt.step, attempt.job.size_bytes, seconds)
        warnings = score.warnings
        if attempt.step:
            warnings += (f"less than asked, to keep the time limit: {self._batch.steps[attempt.step].name}",)
        return dataclasses.replace(score, warnings=warnings, request=attempt.job.request)

    def _failed(self, attempt: _Attempt, worker: Worker, kind: str, what: str) -> Iterator[VideoScore]:
        """The first time a video is put aside to be tried alone, the second time its row is made."""
        log.info("%s: %s", display_path(attempt.job.path), what)
        if attempt.failure is None:
            attempt.failure = ErrorInfo(kind, worker.stage, what)
            self._alone.append(attempt)
        else:
            yield self._row(attempt, ErrorInfo(kind, worker.stage, f"{what} (twice, the second time alone)"), worker)

    def _stopped(self, attempt: _Attempt, worker: Worker) -> VideoScore:
        step = self._batch.steps[attempt.step].name
        what = f"stopped after {worker.seconds():.3g} s at step {step!r}: the time limit allows no more; "
        return self._row(attempt, ErrorInfo("DeadlineExceeded", worker.stage, what + MORE_TIME), worker)

    def _no_time(self, attempt: _Attempt) -> VideoScore:
        error = attempt.failure or ErrorInfo(
            "DeadlineExceeded", "", f"not scored: the time limit left no time for it; {MORE_TIME}"
        )
        return self._row(attempt, error)

    def _end(self) -> Iterator[VideoScore]:
        """The time is over: a row for each video that has none."""
        running = [pair for process in list(self._processes) for pair in self._remove(process)]
        yield from (self._stopped(attempt, worker) for worker, attempt in running)
        yield from (self._no_time(attempt) for attempt in (*self._waiting, *self._alone))
        self._waiting.clear()
        self._alone.clear()

    def _row(self, attempt: _Attempt, error: ErrorInfo, worker: Worker | None = None) -> VideoScore:
        """A row for a video that no worker has answered for."""
        plan = self._batch.steps[attempt.step].plan
        return VideoScore(
            path=display_path(attempt.job.path),
            status="error",
            error=error,
            sampling=plan.sampling if worker else "",
            mode=plan.mode if worker else "",
            bundle=self._batch.bundle.name,
            bundle_digest=self._batch.bundle.digest,
            device=self._batch.device,
            timings=worker.timings if worker else {},
            request=attempt.job.request,
        )


def _crash(died: Died, worker: Worker) -> str:
    during = f"during {worker.stage}" if worker.stage else "between two stages"
    hint = (
        "if the kernel ended it for want of memory (see dmesg), score with fewer --workers"
        if died.how.endswith("SIGKILL")
        else "leave the file out or convert it, and please report this"
    )
    return f"the process that scored it {died.how} {during}; {hint}"
