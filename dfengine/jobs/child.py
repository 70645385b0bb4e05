"""Inside a worker process: it scores what it is given until its parent goes away.

A process has one worker, which scores a video at a time; on a GPU it has many, since they share what is on it. A
process whose parent is gone ends by itself, also in the middle of a video.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import queue
import signal
import socket
import threading
import time
import traceback
from contextlib import suppress

from dfengine.bundle import Bundle
from dfengine.engine import Engine
from dfengine.errors import DfengineError
from dfengine.jobs.wire import Channel, Given, Log, Ready, Result, Scorer, Setup, Stage, StartFailed, Task

# A worker ends itself this long after its parent should have done so: the last resort if the parent is gone and the
# thread that would notice cannot run.
LAST_RESORT_SECONDS = 30.0

# Added to the worker's badness (0..1000), so that a kernel out of memory ends a worker and not the run.
OOM_SCORE_ADJ = 500


def engine_scorer(bundle: Bundle, device: str, threads: int) -> Scorer:
    """The scorer of real runs."""
    engine = Engine(bundle, device=device, threads=threads)
    return lambda path, plan, on_stage: engine.score(path, plan=plan, on_stage=on_stage)


def main(fd: int) -> None:
    """Scores what it is given until its parent goes away."""
    channel = Channel(socket.socket(fileno=fd))
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


def _work(channel: Channel, number: int, tasks: queue.SimpleQueue[Task], score: Scorer, alarm: _Alarm) -> None:
    """The main loop of a worker. Whatever is raised ends the process."""
    try:
        while True:
            task = tasks.get()
            alarm.set(number, task.timeout_seconds + LAST_RESORT_SECONDS)
            started = time.monotonic()
            result = score(task.path, task.plan, lambda stage: channel.send(Stage(number, stage)))
            alarm.set(number, 0)
            channel.send(Result(number, result, time.monotonic() - started))
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


def _feed(channel: Channel, tasks: list[queue.SimpleQueue[Task]]) -> None:
    """Takes in tasks; when the parent is gone, ends the process whatever it is doing."""
    try:
        while True:
            given: Given = channel.receive()
            tasks[given.worker].put(given.task)
    except (EOFError, OSError):
        os._exit(0)


def _prepare(channel: Channel, log_level: int) -> None:
    is_verbose = log_level <= logging.INFO
    logging.basicConfig(level=log_level, handlers=[_ToParent(channel, tracebacks=is_verbose)])
    if is_verbose:
        faulthandler.enable()  # where a native crash happened, for the report of it
    with suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
        file.write(str(OOM_SCORE_ADJ))


class _ToParent(logging.Handler):
    """``tracebacks``: of a defect that costs a video its score. Its row says the rest, so that without tracebacks
    nothing is sent: a defect may hit every video.
    """

    def __init__(self, channel: Channel, *, tracebacks: bool) -> None:
        super().__init__()
        self._tracebacks = tracebacks
        self.setFormatter(logging.Formatter("%(message)s"))  # the parent's handlers add the rest
        self._channel = channel

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and not self._tracebacks:
            return
        with suppress(OSError):
            self._channel.send(Log(record.name, record.levelno, self.format(record)))
