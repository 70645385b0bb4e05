"""Sessions on a GPU: many threads share few execution contexts, and what waits is run together.

Note [Who waits is served together]
A network has a few executors (execution contexts), a video has a few dozen rows, and there are as many callers as
videos in work. A caller that finds an executor idle takes it at once: nobody ever waits for a batch to fill. Callers
that find none wait in line, and whoever gets the next one takes all in line whose rows fit into one batch with it. So
batches are small while the GPU is idle and large when it is busy, without a timer, and no thread but the callers' own.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dfengine.errors import DeviceMemoryError, InferenceError
from dfengine.types import Array, on_device

Outputs = list[NDArray[np.float32]]


class Executor(Protocol):
    """One execution context of one network; used by one thread at a time, by any."""

    max_batch: int

    def run(self, parts: Sequence[tuple[Array, ...]], ready: Sequence[Any]) -> Outputs:
        """Runs the rows of several callers as one batch, at most ``max_batch`` rows, and waits for it.

        ``parts``: the network's inputs of each caller, (rows, ...), of equal trailing shapes. ``ready``: events that
        the inputs are complete after. Returns the outputs for all rows, in order, in main memory. Raises InferenceError
        and DeviceMemoryError.
        """

    def close(self) -> None: ...


class _Call:
    """Some rows that one caller waits for: all of ``run``, or as many as a batch may hold."""

    def __init__(self, inputs: tuple[Array, ...], ready: Any) -> None:
        self.inputs = inputs
        self.ready = ready  # None where the inputs are in main memory
        self.rows = len(inputs[0])
        self.key = tuple(x.shape[1:] for x in inputs)
        self.outputs: Outputs | None = None
        self.error: BaseException | None = None

    @property
    def done(self) -> bool:
        return self.outputs is not None or self.error is not None


class BatchingSession:
    """A Session over executors. See Note [Who waits is served together]. Thread-safe.

    When a batch runs out of memory, batches are at most half as large from then on, and its rows are tried once more
    that way. Where that fails too, its callers get the DeviceMemoryError; no other does.
    """

    def __init__(self, name: str, executors: Sequence[Executor]) -> None:
        self.name = name
        self.max_batch = min(e.max_batch for e in executors)
        self._executors = tuple(executors)
        self._idle = list(executors)
        self._line: deque[_Call] = deque()
        self._changed = threading.Condition()
        self._nothing: Outputs | None = None

    def run(self, *inputs: Array) -> Outputs:
        """See Session.run."""
        count = len(inputs[0])
        if count == 0:
            if self._nothing is None:  # only the network knows the shapes of its outputs
                one_row = (np.zeros((1, *x.shape[1:]), x.dtype) for x in inputs)
                self._nothing = [y[:0] for y in self.run(*one_row)]
            return self._nothing
        device = next((x for x in inputs if on_device(x)), None)
        ready = device.lane.record() if device is not None else None
        calls = _cut(inputs, ready, self.max_batch)
        with self._changed:
            self._line.extend(calls)
        for call in calls:
            self._finish(call)
        for call in calls:
            if call.error is not None:
                raise call.error
        return _join(r.outputs or [] for r in calls)

    def close(self) -> None:
        for executor in self._executors:
            executor.close()

    def _finish(self, call: _Call) -> None:
        """Runs batches, whoever is first in line, until ``call`` is done, by this thread or another."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: call.done or (self._idle and self._line))
                if call.done:
                    return
                executor, batch = self._idle.pop(), self._next_batch()
            try:
                self._run_batch(executor, batch)
            finally:
                with self._changed:
                    self._idle.append(executor)
                    self._changed.notify_all()

    def _next_batch(self) -> list[_Call]:
        """Removes the first in line, and those behind it that fit into one batch with it."""
        batch = [self._line.popleft()]
        rows, waiting = batch[0].rows, list(self._line)
        for call in waiting:
            if call.key == batch[0].key and rows + call.rows <= self.max_batch:
                batch.append(call)
                rows += call.rows
                self._line.remove(call)
        return batch

    def _run_batch(self, executor: Executor, batch: list[_Call]) -> None:
        try:
            try:
                outputs = _execute(executor, batch)
            except DeviceMemoryError:
                rows = sum(r.rows for r in batch)
                if rows == 1:
                    raise
                self.max_batch = min(self.max_batch, max(1, rows // 2))
                self._run_apart(executor, batch)
                return
        except BaseException as error:  # the others must not wait for ever, whatever it is
            for call in batch:
                call.error = error
            if not isinstance(error, Exception):
                raise
            return
        at = 0
        for call in batch:
            call.outputs = [out[at : at + call.rows] for out in outputs]
            at += call.rows

    def _run_apart(self, executor: Executor, batch: list[_Call]) -> None:
        """Each caller's rows on their own, and no more than ``max_batch`` of them at a time."""
        for call in batch:
            pieces = _cut(call.inputs, call.ready, self.max_batch)
            try:
                call.outputs = _join(_execute(executor, [piece]) for piece in pieces)
            except (DeviceMemoryError, InferenceError) as error:
                call.error = error


def _cut(inputs: tuple[Array, ...], ready: Any, size: int) -> list[_Call]:
    """The rows of one caller, at most ``size`` at a time."""
    starts = range(0, len(inputs[0]), size)
    return [_Call(tuple(x[i : i + size] for x in inputs), ready) for i in starts]  # type: ignore[index]


def _join(outputs: Iterable[Outputs]) -> Outputs:
    """Outputs for some rows after the other -> those for all."""
    return [np.concatenate(parts) for parts in zip(*outputs, strict=True)]


def _execute(executor: Executor, batch: list[_Call]) -> Outputs:
    return executor.run([r.inputs for r in batch], [r.ready for r in batch if r.ready is not None])
