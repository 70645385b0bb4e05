"""A process that scores one video at a time: its own main loop, and its parent's handle on it.

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
    """What a worker needs to begin. ``make_scorer(bundle, device, threads)`` is called in the worker, once."""

    bundle: Bundle
    device: str
    threads: int
    make_scorer: Callable[[Bundle, str, int], Scorer]
    log_level: int = logging.WARNING


@dataclass(frozen=True)
class Task:
    path: str
    plan: Plan
    timeout_seconds: float


@dataclass(frozen=True)
class Ready:
    """The worker waits for a task."""


@dataclass(frozen=True)
class StartFailed:
    """The worker cannot score anything, and says why."""

    error: DfengineError


@dataclass(frozen=True)
class Died:
    """The worker is gone. ``how`` completes the sentence "the process ..."."""

    how: str


@dataclass(frozen=True)
class _Stage:
    name: str


@dataclass(frozen=True)
class _Log:
    logger: str
    level: int
    text: str


Message = Ready | StartFailed | Died | VideoScore


def engine_scorer(bundle: Bundle, device: str, threads: int) -> Scorer:
    """The scorer of real runs."""
    engine = Engine(bundle, device=device, threads=threads)
    return lambda path, plan, on_stage: engine.score(path, plan=plan, on_stage=on_stage)


class Worker:
    """The parent's handle. Starting one does not wait for it: a Ready or StartFailed follows from ``receive``."""

    def __init__(self, setup: Setup) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                # -P: nothing is imported from the folder that happens to be the current one.
                [sys.executable, "-P", "-c", f"from dfengine.worker import main; main({theirs.fileno()})"],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=sys.__stderr__ or subprocess.DEVNULL,  # stdout is for results
                start_new_session=True,
            )
        self._channel = _Channel(ours)
        self._channel.send(setup)
        self.ready = False
        self.task: Task | None = None
        self.tasks_given = 0
        self.stage = ""
        self.timings: dict[str, float] = {}
        self.started = self._stage_since = 0.0

    def fileno(self) -> int:
        return self._channel.fileno()

    @property
    def pid(self) -> int:
        return self._process.pid

    def give(self, task: Task) -> None:
        """Hands a task to an idle worker. If it is dead, ``receive`` will tell."""
        self.task, self.stage, self.timings = task, "", {}
        self.tasks_given += 1
        self.started = self._stage_since = time.monotonic()
        with suppress(OSError):
            self._channel.send(task)

    def seconds(self) -> float:
        """Since the last task was given."""
        return time.monotonic() - self.started

    def receive(self) -> list[Message]:
        """What the worker has said since; never blocks. The last one may be Died."""
        said, closed = self._channel.receive_available()
        messages: list[Message] = []
        for message in said:
            match message:
                case _Stage():
                    self._count_stage()
                    self.stage = message.name
                case _Log():
                    logging.getLogger(message.logger).log(message.level, "%s", message.text)
                case Ready():
                    self.ready = True
                    messages.append(message)
                case VideoScore():
                    self.task = None
                    messages.append(message)
                case StartFailed():
                    messages.append(message)
        if closed:
            self._count_stage()
            messages.append(Died(self._how_it_ended()))
        return messages

    def kill(self) -> None:
        """Ends the process now. One that cannot be killed (waiting for a dead file server) is left behind."""
        self._count_stage()
        self._process.kill()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(1)
        self._channel.close()

    def _count_stage(self) -> None:
        now = time.monotonic()
        if self.task is not None and self.stage:
            self.timings[self.stage] = self.timings.get(self.stage, 0.0) + now - self._stage_since
        self._stage_since = now

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


class _Channel:
    """Pickled objects over a socket, each behind its length. Sending is thread-safe."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._unread = bytearray()
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
        while not (values := self._parse()):
            self._read(0)
        (value,) = values  # the parent sends one task, then waits for its result
        return value

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


# -- inside the worker -------------------------------------------------------------------------------------------------


def main(fd: int) -> None:
    """Scores what it is given until its parent goes away."""
    channel = _Channel(socket.socket(fileno=fd))
    try:
        setup: Setup = channel.receive()
        tasks: queue.SimpleQueue[Task] = queue.SimpleQueue()
        threading.Thread(target=_feed, args=(channel, tasks), daemon=True).start()
        _prepare(channel, setup.log_level)
        try:
            score = setup.make_scorer(setup.bundle, setup.device, setup.threads)
        except DfengineError as error:
            channel.send(StartFailed(error))
            return
        channel.send(Ready())
        while True:
            task = tasks.get()
            signal.setitimer(signal.ITIMER_REAL, task.timeout_seconds + LAST_RESORT_SECONDS)  # SIGALRM kills
            result = score(task.path, task.plan, lambda stage: channel.send(_Stage(stage)))
            signal.setitimer(signal.ITIMER_REAL, 0)
            channel.send(result)
    except (EOFError, BrokenPipeError, ConnectionResetError):  # there is nobody left to score for
        return


def _feed(channel: _Channel, tasks: queue.SimpleQueue[Task]) -> None:
    """Takes in tasks; when the parent is gone, ends the process whatever it is doing."""
    try:
        while True:
            tasks.put(channel.receive())
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
