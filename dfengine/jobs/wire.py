"""What the parent and its worker processes say to each other, and the channel for it."""

from __future__ import annotations

import logging
import pickle
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dfengine.bundle import Bundle
from dfengine.errors import DfengineError
from dfengine.types import Plan, VideoScore

# What scores a video inside a worker: (path, plan, on_stage) -> VideoScore.
Scorer = Callable[[str, Plan, Callable[[str], None]], VideoScore]


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


# From here on ``worker`` is the number of one in its process.
@dataclass(frozen=True)
class Given:
    worker: int
    task: Task


@dataclass(frozen=True)
class Ready:
    """The workers wait for tasks."""


@dataclass(frozen=True)
class StartFailed:
    """The process cannot score anything, and says why."""

    error: DfengineError


@dataclass(frozen=True)
class Result:
    worker: int
    score: VideoScore
    seconds: float


@dataclass(frozen=True)
class Stage:
    worker: int
    name: str


@dataclass(frozen=True)
class Log:
    logger: str
    level: int
    text: str


class Channel:
    """Pickled objects over a socket, each behind its length.

    The parent uses ``post``, ``flush`` and ``receive_available``, which never wait; a process ``send``, which is
    thread-safe, and ``receive``.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._unread = bytearray()
        self._parsed: list[Any] = []
        self._unsent: deque[memoryview] = deque()
        self._lock = threading.Lock()

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def send(self, value: Any) -> None:
        """Waits until the other side has room for it."""
        with self._lock:
            self._socket.sendall(_to_bytes(value))

    def post(self, value: Any) -> None:
        """Sends what the other side has room for; the rest goes with ``flush``."""
        self._unsent.append(memoryview(_to_bytes(value)))
        self.flush()

    @property
    def has_unsent(self) -> bool:
        return bool(self._unsent)

    def flush(self) -> None:
        """To be called when the socket can be written to, while something is unsent. ``receive_available`` tells if
        the other side is gone; then there is nothing left to send.
        """
        try:
            while self._unsent:
                sent = self._socket.send(self._unsent[0], socket.MSG_DONTWAIT)
                self._unsent[0] = self._unsent[0][sent:]
                if not self._unsent[0]:
                    self._unsent.popleft()
        except BlockingIOError:
            pass
        except OSError:
            self._unsent.clear()

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


def _to_bytes(value: Any) -> bytes:
    data = pickle.dumps(value)
    return struct.pack(">Q", len(data)) + data
