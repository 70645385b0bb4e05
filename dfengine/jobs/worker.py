"""Processes that score videos: their main loop, and their parent's handle on them.

A process has one Worker, which scores a video at a time; on a GPU it has many, since they share what is on it.

Native code that crashes, hangs or eats all memory costs only the process it is in. The two sides talk over a socket
pair; the parent never blocks on it, so that a worker in any state can be given up. A worker whose parent is gone ends
by itself, also in the middle of a video.

Note [Why not multiprocessing]
Its spawn runs the caller's main module again in every worker (a script without a guard would start itself), adds a
process that tracks resources, leaves workers in the terminal's foreground group, where Ctrl-C hits them, and its
pipes block on half a message. A subprocess in a session of its own does none of that.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import pickle
import queue
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from dfengine.bundle import Bundle
from dfengine.engine import Engine
from dfengine.errors import DfengineError
from dfengine.types import Plan, VideoScore

# What scores a video inside a worker: (path, plan, on_stage) -> VideoScore.
Scorer = Callable[[str, Plan, Callable[[str], None]], VideoScore]

# A worker ends itself this long after its parent should have done so: the last resort if the parent is gone and the
# thread that would notice cannot run.
LAST_RESORT_SECONDS = 30.0

# Added to the worker's badness (0..1000), so that a kernel out of memory ends a worker and not the run.
OOM_SCORE_ADJ = 500


@dataclass(frozen=True)
class Setup:
    """What a process needs to begin. ``make_scorer(bundle, device, threads)`` is called in it, once.

    What that returns is called by ``workers`` threads.
    """

    bundle: Bundle
    device: str
    threads: int
    make_scorer: Callable[[Bundle, str, int], Scorer]
    workers: int = 1
    log_level: int = logging.WARNING


@dataclass(frozen=True)
class Task:
    path: str
    plan: Plan
    timeout_seconds: float


@dataclass(frozen=True)
class Ready:
    """The workers wait for tasks."""


@dataclass(frozen=True)
class StartFailed:
    """The process cannot score anything, and says why."""

    error: DfengineError


@dataclass(frozen=True)
class Died:
    """The process is gone. ``how`` completes the sentence "it ..."."""

    how: str


@dataclass(frozen=True, eq=False)
class Scored:
    worker: Worker
    score: VideoScore
    seconds: float  # that the worker took


# What goes over the wire; ``worker`` is the number of one in its process.
@dataclass(frozen=True)
class _Given:
    worker: int
    task: Task


@dataclass(frozen=True)
class _Result:
    worker: int
    score: VideoScore
    seconds: float


@dataclass(frozen=True)
class _Stage:
    worker: int
    name: str


@dataclass(frozen=True)
class _Log:
    logger: str
    level: int
    text: str


Message = Ready | StartFailed | Died | Scored


def engine_scorer(bundle: Bundle, device: str, threads: int) -> Scorer:
    """The scorer of real runs."""
    engine = Engine(bundle, device=device, threads=threads)
    return lambda path, plan, on_stage: engine.score(path, plan=plan, on_stage=on_stage)


class Process:
    """The parent's handle. Starting one does not wait for it: a Ready or StartFailed follows from ``receive``."""

    def __init__(self, setup: Setup) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                # -P: nothing is imported from the folder that happens to be the current one.
                [sys.executable, "-P", "-c", f"from dfengine.jobs.worker import main; main({theirs.fileno()})"],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=sys.__stderr__ or subprocess.DEVNULL,  # stdout is for results
                start_new_session=True,
            )
        self._channel = _Channel(ours)
        self._channel.send(setup)
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
                case _Stage():
                    self.workers[message.worker].begin_stage(message.name)
                case _Log():
                    logging.getLogger(message.logger).log(message.level, "%s", message.text)
                case Ready():
                    self.ready = True
                    messages.append(message)
                case _Result():
                    worker = self.workers[message.worker]
                    worker.task = None
                    messages.append(Scored(worker, message.score, message.seconds))
                case StartFailed():
                    messages.append(message)
        if closed:
            self._count_stages()
            messages.append(Died(self._how_it_ended()))
        return messages

    def send(self, worker: Worker, task: Task) -> None:
        self.tasks_given += 1
        with suppress(OSError):
            self._channel.send(_Given(worker.number, task))

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


class _Channel:
    """Pickled objects over a socket, each behind its length. Sending is thread-safe."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._unread = bytearray()
        self._parsed: list[Any] = []
        self._lock = threading.Lock()

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def send(self, value: Any) -> None:
        data = pickle.dumps(value)
        with self._lock:
            self._socket.sendall(struct.pack(">Q", len(data)) + data)

    def receive(self) -> Any:
        """Waits for one object. Raises EOFError when the other side is gone."""
        while not self._parsed:
            self._read(0)
            self._parsed += self._parse()
        return self._parsed.pop(0)

    def receive_available(self) -> tuple[list[Any], bool]:
        """What has arrived, without waiting; and whether the other side is gone."""
        try:
            while True:
                self._read(socket.MSG_DONTWAIT)
        except BlockingIOError:
            return self._parse(), False
        except (EOFError, OSError):
            return self._parse(), True

    def _read(self, flags: int) -> None:
        chunk = self._socket.recv(1 << 16, flags)
        if not chunk:
            raise EOFError
        self._unread += chunk

    def _parse(self) -> list[Any]:
        values = []
        while len(self._unread) >= 8:
            (length,) = struct.unpack_from(">Q", self._unread)
            if len(self._unread) < 8 + length:
                break
            values.append(pickle.loads(self._unread[8 : 8 + length]))
            del self._unread[: 8 + length]
        return values


# -- inside the process ------------------------------------------------------------------------------------------------


def main(fd: int) -> None:
    """Scores what it is given until its parent goes away."""
    channel = _Channel(socket.socket(fileno=fd))
    try:
        setup: Setup = channel.receive()
        tasks = [queue.SimpleQueue[Task]() for _ in range(setup.workers)]
        threading.Thread(target=_feed, args=(channel, tasks), daemon=True).start()
        _prepare(channel, setup.log_level)
        try:
            score = setup.make_scorer(setup.bundle, setup.device, setup.threads)
        except DfengineError as error:
            channel.send(StartFailed(error))
            return
        channel.send(Ready())
    except (EOFError, BrokenPipeError, ConnectionResetError):  # there is nobody left to score for
        return
    alarm = _Alarm()
    for number in range(1, setup.workers):
        arguments = (channel, number, tasks[number], score, alarm)
        threading.Thread(target=_work, args=arguments, daemon=True, name=f"dfengine-{number}").start()
    _work(channel, 0, tasks[0], score, alarm)


def _work(channel: _Channel, number: int, tasks: queue.SimpleQueue[Task], score: Scorer, alarm: _Alarm) -> None:
    """The main loop of a worker. Whatever is raised ends the process."""
    try:
        while True:
            task = tasks.get()
            alarm.set(number, task.timeout_seconds + LAST_RESORT_SECONDS)
            started = time.monotonic()
            result = score(task.path, task.plan, lambda stage: channel.send(_Stage(number, stage)))
            alarm.set(number, 0)
            channel.send(_Result(number, result, time.monotonic() - started))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


class _Alarm:
    """Ends the process (SIGALRM) when the last of the times that its workers have set is over."""

    def __init__(self) -> None:
        self._at: dict[int, float] = {}
        self._lock = threading.Lock()

    def set(self, worker: int, seconds: float) -> None:
        """0: the worker is idle."""
        now = time.monotonic()
        with self._lock:
            self._at.pop(worker, None)
            if seconds:
                self._at[worker] = now + seconds
            signal.setitimer(signal.ITIMER_REAL, max(0.001, max(self._at.values()) - now) if self._at else 0.0)


def _feed(channel: _Channel, tasks: list[queue.SimpleQueue[Task]]) -> None:
    """Takes in tasks; when the parent is gone, ends the process whatever it is doing."""
    try:
        while True:
            given: _Given = channel.receive()
            tasks[given.worker].put(given.task)
    except (EOFError, OSError):
        os._exit(0)


def _prepare(channel: _Channel, log_level: int) -> None:
    logging.basicConfig(level=log_level, handlers=[_ToParent(channel)])
    if log_level <= logging.INFO:
        faulthandler.enable()  # where a native crash happened, for the report of it
    with suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
        file.write(str(OOM_SCORE_ADJ))


class _ToParent(logging.Handler):
    def __init__(self, channel: _Channel) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(message)s"))  # the parent's handlers add the rest
        self._channel = channel

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):
            self._channel.send(_Log(record.name, record.levelno, self.format(record)))
