"""Compiled engines on disk: built once, by whoever comes first, and rebuilt when they are damaged or out of date.

A file is a line of JSON, which says what the engine was made from and for, and the engine. Its name tells a person
what is inside; the JSON decides whether it is used.

Only TensorRT's are kept: OpenVINO compiles the default bundle and the detector in 2 s and an Xception in 2.2 s on two
cores, and a compiled blob would be bound to its exact version and the processor, to save that once a run.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from dfengine.errors import OutputError
from dfengine.files import replacing

log = logging.getLogger("dfengine")

T = TypeVar("T")
Key = Mapping[str, object]


def default_cache_dir() -> Path:
    """$DFENGINE_CACHE, or the usual place for such files."""
    chosen = os.environ.get("DFENGINE_CACHE")
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dfengine"


class EngineCache:
    """A folder of engines. Safe to share between processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, name: str, key: Key) -> Path:
        digest = hashlib.sha256(_to_json(key).encode()).hexdigest()[:16]
        return self.folder / f"{name.replace('/', '-')}-{key['backend']}-{key['precision']}-{digest}.engine"

    def load_or_build(self, name: str, key: Key, *, load: Callable[[bytes], T | None], build: Callable[[], bytes]) -> T:
        """What ``load`` makes of the engine that is there, or of a new one.

        ``load`` returns None for an engine it cannot use; one from disk is then built again, once. Only one process
        builds, others wait for it. A folder that cannot be written costs a warning, and the next process its time.
        Raises what ``build`` raises, and ValueError if the new engine cannot be used either.
        """
        path = self.path(name, key)
        with self._lock(path):
            plan = self.read(path, key)
            loaded = load(plan) if plan is not None else None
            if loaded is None:
                if plan is not None:
                    log.warning("%s: the runtime cannot use this engine; it is built again", path)
                plan = build()
                loaded = load(plan)
                if loaded is None:
                    raise ValueError("the runtime cannot use the engine it has just built")
                try:
                    self.write(path, key, plan)
                except OutputError as error:
                    log.warning("%s; engines are built anew by each process", error)
        return loaded

    def read(self, path: Path, key: Key) -> bytes | None:
        """The engine in a file; None if there is none, or one that was made for something else or damaged."""
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            log.warning("%s: cannot be read (%s); the engine is built again", path, error.strerror)
            return None
        line, _, plan = data.partition(b"\n")
        try:
            header = json.loads(line)
            fits = header["key"] == json.loads(_to_json(key))
            whole = header["sha256"] == hashlib.sha256(plan).hexdigest()
        except (ValueError, KeyError, TypeError):
            fits = whole = False
        if not (fits and whole):
            log.warning("%s: %s; it is built again", path, "made for something else" if whole else "damaged")
            return None
        return plan

    def write(self, path: Path, key: Key, plan: bytes) -> None:
        """Whole or not at all. Raises OutputError."""
        header = json.dumps({"key": json.loads(_to_json(key)), "sha256": hashlib.sha256(plan).hexdigest()})
        write_cached(path, header.encode() + b"\n" + plan)

    @contextmanager
    def _lock(self, path: Path) -> Iterator[None]:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = open(path.with_suffix(".lock"), "wb")  # noqa: SIM115
        except OSError:  # nothing can be written there, so there is nothing to be shared
            yield
            return
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def read_if_possible(path: Path) -> bytes:
    """What a file holds that only saves time; b"" if there is none. One that cannot be read costs a warning."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        log.warning("%s: cannot be read (%s); it is done without", path, error.strerror)
        return b""


def write_cached(path: Path, data: bytes) -> None:
    """Replaces a file of the cache, and makes its folder. Raises OutputError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            partial.write_bytes(data)
    except OSError as error:
        raise OutputError(f"cannot be written ({error.strerror})", path=path, stage="runtime") from None


def _to_json(key: Key) -> str:
    return json.dumps(key, sort_keys=True)
