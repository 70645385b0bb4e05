"""The state of a run over many videos in worker processes.

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
import logging
import math
import selectors
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dfengine.errors import WorkerCrashed, display_path
from dfengine.jobs.deadline import Deadline, Step
from dfengine.jobs.inputs import Job
from dfengine.jobs.wire import Ready, Setup, StartFailed, Task
from dfengine.jobs.worker import Died, Process, Scored, Worker
from dfengine.types import VERSION, ErrorInfo, VideoScore

log = logging.getLogger("dfengine")

# Time that one video may take by default: a minute, and 20 s for each MB. On 16 clips of 0.2 to 4 MB one core of an
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


class Stop:
    """The wish that a run end. It may be made at any time, also by the handler of a signal."""

    def __init__(self) -> None:
        self.wanted = False
        self._drop_at = math.inf

    def ask(self) -> None:
        """No more videos are handed out. Those in work get some seconds to end, or none when this is called again."""
        self._drop_at = time.monotonic() + (0.0 if self.wanted else GRACE_SECONDS)
        self.wanted = True

    def is_over(self) -> bool:
        """Whether videos in work have had their time."""
        return time.monotonic() >= self._drop_at


@dataclass(eq=False)
class _Attempt:
    """A job on its way: what it gets next, and what became of it before."""

    job: Job
    step: int = 0
    timeout_seconds: float = math.inf
    share_seconds: float = math.inf  # with a time limit: when it is given up in favour of the others
    at_bottom: bool = False  # it took more than its share before
    failure: ErrorInfo | None = None  # of the first try


class Supervisor:
    """Scores jobs; a context manager, which ends its processes.

    ``setup``: of every process. ``workers``: videos in work at a time. ``steps``: what a video can get, the first one
    unless ``deadline`` decides otherwise. ``timeout_seconds``: for each video, by default by its size. ``device``: as
    rows name it.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        setup: Setup,
        *,
        device: str,
        workers: int,
        steps: Sequence[Step],
        deadline: Deadline | None,
        timeout_seconds: float | None,
        stop: Stop,
    ) -> None:
        self._setup = setup
        self._device = device
        self._steps = steps
        self._deadline = deadline
        self._timeout_seconds = timeout_seconds
        self._stop = stop
        self._waiting = deque(_Attempt(job) for job in jobs)
        self._alone: deque[_Attempt] = deque()  # to be tried again when nothing else runs
        self._running: dict[Worker, _Attempt] = {}
        self._processes: list[Process] = []
        self._most_workers = workers
        self._failed_starts = 0
        self._any_started = False
        self._selector = selectors.DefaultSelector()

    def __enter__(self) -> Supervisor:
        return self

    def __exit__(self, *error: object) -> None:
        for process in list(self._processes):
            self._remove(process)
        self._selector.close()

    def rows(self) -> Iterator[VideoScore]:
        """Each row as soon as it is known. Raises what Batch.run does."""
        while self._waiting or self._alone or self._running:
            if self._stop.wanted:
                if not self._running or self._stop.is_over():
                    return
            elif self._deadline is not None and self._deadline.left() <= 0:
                yield from self._end()
                return
            else:
                yield from self._hand_out()
            # All at once: while a row is handed on the clock runs, and nothing is received.
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
            idle.give(Task(attempt.job.path, self._steps[attempt.step].plan, attempt.timeout_seconds))
            self._running[idle] = attempt

    def _allot(self, attempt: _Attempt) -> bool:
        """Decides how much work a video gets; False if there is no time for it."""
        size = attempt.job.size_bytes
        attempt.timeout_seconds = self._timeout_seconds or TIMEOUT_SECONDS + TIMEOUT_SECONDS_PER_BYTE * size
        if self._deadline is None:
            return True
        others = [other.job.size_bytes for other in (*self._waiting, *self._alone)]
        share = self._deadline.share(size, others, self._busy_seconds(), self._most_workers)
        if share is None:
            return False
        attempt.step = len(self._steps) - 1 if attempt.at_bottom else share.step
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
        for process in self._processes:
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if process.has_unsent else 0)
            if self._selector.get_key(process).events != events:
                self._selector.modify(process, events)
        for key, events in self._selector.select(POLL_SECONDS):
            assert isinstance(key.fileobj, Process)
            if events & selectors.EVENT_WRITE:
                key.fileobj.flush()
            if events & selectors.EVENT_READ:
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
            if attempt.step == len(self._steps) - 1:
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
            warnings += (f"less than asked, to keep the time limit: {self._steps[attempt.step].name}",)
        return dataclasses.replace(score, warnings=warnings, fingerprint=attempt.job.fingerprint)

    def _failed(self, attempt: _Attempt, worker: Worker, kind: str, what: str) -> Iterator[VideoScore]:
        """The first time a video is put aside to be tried alone, the second time its row is made."""
        log.info("%s: %s", display_path(attempt.job.path), what)
        if attempt.failure is None:
            attempt.failure = ErrorInfo(kind, worker.stage, what)
            self._alone.append(attempt)
        else:
            yield self._row(attempt, ErrorInfo(kind, worker.stage, f"{what} (twice, the second time alone)"), worker)

    def _stopped(self, attempt: _Attempt, worker: Worker) -> VideoScore:
        step = self._steps[attempt.step].name
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
        plan = self._steps[attempt.step].plan
        return VideoScore(
            path=display_path(attempt.job.path),
            status="error",
            error=error,
            sampling=str(plan.sampling.policy) if worker else "",
            mode=plan.sampling.mode if worker else "",
            bundle=self._setup.bundle.name,
            bundle_digest=self._setup.bundle.digest,
            detector_digest=self._setup.bundle.detector.digest or "",
            dfengine_version=VERSION,
            device=self._device,
            timings=worker.timings if worker else {},
            fingerprint=attempt.job.fingerprint,
        )


def _crash(died: Died, worker: Worker) -> str:
    during = f"during {worker.stage}" if worker.stage else "between two stages"
    hint = (
        "if the kernel ended it for want of memory (see dmesg), score with fewer --workers"
        if died.how.endswith("SIGKILL")
        else "leave the file out or convert it, and please report this"
    )
    return f"the process that scored it {died.how} {during}; {hint}"
