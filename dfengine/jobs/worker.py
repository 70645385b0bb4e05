"""Worker processes as their parent sees them.

Native code that crashes, hangs or eats all memory costs only the process it is in. The two sides talk over a socket
pair; the parent never blocks on it, neither reading nor writing, so that a worker in any state can be given up.

Note [Why not multiprocessing]
Its spawn runs the caller's main module again in every worker (a script without a guard would start itself), adds a
process that tracks resources, leaves workers in the terminal's foreground group, where Ctrl-C hits them, and its
pipes block on half a message. A subprocess in a session of its own does none of that.
"""

from __future__ import annotations

import logging
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass

from dfengine.jobs.wire import Channel, Given, Log, Ready, Result, Setup, Stage, StartFailed, Task
from dfengine.types import VideoScore


@dataclass(frozen=True)
class Died:
    """The process is gone. ``how`` completes the sentence "it ..."."""

    how: str


@dataclass(frozen=True, eq=False)
class Scored:
    worker: Worker
    score: VideoScore
    seconds: float  # that the worker took


Message = Ready | StartFailed | Died | Scored


class Process:
    """The parent's handle. Starting one does not wait for it: a Ready or StartFailed follows from ``receive``."""

    def __init__(self, setup: Setup) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                # -P: nothing is imported from the folder that happens to be the current one.
                [sys.executable, "-P", "-c", f"from dfengine.jobs.child import main; main({theirs.fileno()})"],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=sys.__stderr__ or subprocess.DEVNULL,  # stdout is for results
                start_new_session=True,
            )
        self._channel = Channel(ours)
        self._channel.post(setup)
        self.ready = False
        self.tasks_given = 0
        self.workers = tuple(Worker(self, number) for number in range(setup.workers))

    def fileno(self) -> int:
        return self._channel.fileno()

    @property
    def pid(self) -> int:
        return self._process.pid

    def receive(self) -> list[Message]:
        """What it has said since; never blocks. The last message may be Died."""
        said, closed = self._channel.receive_available()
        messages: list[Message] = []
        for message in said:
            match message:
                case Stage():
                    self.workers[message.worker].begin_stage(message.name)
                case Log():
                    logging.getLogger(message.logger).log(message.level, "%s", message.text)
                case Ready():
                    self.ready = True
                    messages.append(message)
                case Result():
                    worker = self.workers[message.worker]
                    worker.task = None
                    messages.append(Scored(worker, message.score, message.seconds))
                case StartFailed():
                    messages.append(message)
        if closed:
            self._count_stages()
            messages.append(Died(self._how_it_ended()))
        return messages

    @property
    def has_unsent(self) -> bool:
        """Whether ``flush`` is to be called when this can be written to."""
        return self._channel.has_unsent

    def flush(self) -> None:
        self._channel.flush()

    def send(self, worker: Worker, task: Task) -> None:
        self.tasks_given += 1
        self._channel.post(Given(worker.number, task))

    def kill(self) -> None:
        """Ends the process now. One that cannot be killed (waiting for a dead file server) is left behind."""
        self._count_stages()
        self._process.kill()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(1)
        self._channel.close()

    def _count_stages(self) -> None:
        for worker in self.workers:
            worker.begin_stage(worker.stage)

    def _how_it_ended(self) -> str:
        try:
            code = self._process.wait(1)
        except subprocess.TimeoutExpired:
            return "closed its connection"
        if code >= 0:
            return f"exited with code {code}"
        try:
            return f"was killed by {signal.Signals(-code).name}"
        except ValueError:
            return f"was killed by signal {-code}"


class Worker:
    """What scores one video at a time in a process."""

    def __init__(self, process: Process, number: int) -> None:
        self.process = process
        self.number = number
        self.task: Task | None = None
        self.stage = ""
        self.timings: dict[str, float] = {}
        self._started = self._stage_since = 0.0

    def give(self, task: Task) -> None:
        """Hands a task to an idle worker. If its process is dead, ``receive`` will tell."""
        self.task, self.stage, self.timings = task, "", {}
        self._started = self._stage_since = time.monotonic()
        self.process.send(self, task)

    def seconds(self) -> float:
        """Since the last task was given."""
        return time.monotonic() - self._started

    def begin_stage(self, name: str) -> None:
        now = time.monotonic()
        if self.task is not None and self.stage:
            self.timings[self.stage] = self.timings.get(self.stage, 0.0) + now - self._stage_since
        self._stage_since, self.stage = now, name
