"""Many videos: a supervised run over them in worker processes."""

from __future__ import annotations

import dataclasses
import logging
import signal
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager

from dfengine.bundle import Bundle
from dfengine.devices import device_name, resolve_device
from dfengine.engine import make_plan
from dfengine.errors import OptionError
from dfengine.jobs.child import engine_scorer
from dfengine.jobs.deadline import Deadline, Step, ladder
from dfengine.jobs.inputs import make_jobs
from dfengine.jobs.supervisor import Stop, Supervisor
from dfengine.jobs.wire import Scorer, Setup
from dfengine.machine import default_workers, threads_each, usable_cores
from dfengine.types import VERSION, PathLikeStr, VideoScore

log = logging.getLogger("dfengine")


class Batch:
    """A run over many videos. Everything that can be wrong with the options is raised when it is made.

    ``workers``: videos at a time, each in a process of its own on the CPU, by default one a core or 16 on a GPU; fewer
    videos than that share the cores.
    ``timeout_seconds``: for each video, by default by its size. ``time_limit_seconds``: for the whole run, counted from
    now. A file that is named twice is scored once: ``jobs`` are the different ones, ``repeated`` the number of others.

    Raises BundleError, also for a bundle without a member that scores, DeviceError or OptionError.
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
        self._make_scorer = make_scorer
        self._stop = Stop()
        made_with = [VERSION, self.bundle.digest, self.bundle.detector.digest]
        answer = [*made_with, *dataclasses.astuple(asked), self.deadline is not None]
        self.jobs, self.repeated = make_jobs(paths, answer)

    @property
    def interrupted(self) -> bool:
        """Whether ``stop`` was called."""
        return self._stop.wanted

    def run(self, done: Collection[str] = ()) -> Iterator[VideoScore]:
        """Scores all jobs but those whose ``fingerprint`` is in ``done``, and yields each row as soon as it is known.

        With a time limit small files go first, without one the order is that of the input. Ends early only after
        ``stop``. Raises what the workers raise when they start (DeviceError, InferenceError, BundleError), and
        WorkerCrashed if none can be started.
        """
        jobs = [job for job in self.jobs if job.fingerprint not in done]
        if self.deadline is not None:
            jobs.sort(key=lambda job: job.size_bytes)
        if not jobs:
            return
        workers = min(self.workers, len(jobs))
        with Supervisor(
            jobs,
            self._setup(1 if self.device == "cpu" else workers),
            device=device_name(self.device),
            workers=workers,
            steps=self.steps,
            deadline=self.deadline,
            timeout_seconds=self.timeout_seconds,
            stop=self._stop,
        ) as supervisor:
            yield from supervisor.rows()

    def _setup(self, workers: int) -> Setup:
        # By all jobs, not by those that are left: decoding of damaged videos may depend on the number of threads, and a
        # resumed run must give what an unbroken one does.
        threads = threads_each(usable_cores(), min(self.workers, len(self.jobs)))
        return Setup(self.bundle, self.device, threads, self._make_scorer, workers, log.getEffectiveLevel())

    def stop(self) -> None:
        """Hands out no more videos. Those in work get some seconds to end, or none when this is called again."""
        self._stop.ask()

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
