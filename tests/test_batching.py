"""Sessions that many threads share, over fake executors: nothing here needs a GPU."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from dfengine.errors import DeviceMemoryError, InferenceError
from dfengine.gpu.batching import BatchingSession, Outputs

WAIT_SECONDS = 20.0


class FakeExecutor:
    """Gives each row's sum and double, if it has the memory. Notes the rows of each caller in each batch."""

    def __init__(self, max_batch: int = 8, room: int = 1 << 30) -> None:
        self.max_batch = max_batch
        self.room = room  # rows that fit into its memory
        self.batches: list[list[int]] = []
        self.before: Callable[[], None] = lambda: None
        self.closed = False
        self._busy = threading.Lock()

    def run(self, parts: Sequence[tuple[Any, ...]], ready: Sequence[Any]) -> Outputs:
        assert self._busy.acquire(blocking=False), "two threads in one executor"
        try:
            self.batches.append([len(p[0]) for p in parts])
            self.before()
            whole = [np.concatenate(column) for column in zip(*parts, strict=True)]
            assert len(whole[0]) <= self.max_batch
            if len(whole[0]) > self.room:
                raise DeviceMemoryError("full")
            if (whole[0] < 0).any():
                raise InferenceError("below zero")
            flat = sum(x.reshape(len(x), -1).sum(axis=1) for x in whole)
            return [flat.astype(np.float32)[:, None], 2 * whole[0]]
        finally:
            self._busy.release()

    def close(self) -> None:
        self.closed = True


def rows(count: int, at: int = 0, width: int = 3) -> np.ndarray:
    return np.arange(at, at + count * width, dtype=np.float32).reshape(count, width)


def check(outputs: Outputs, x: np.ndarray) -> None:
    np.testing.assert_array_equal(outputs[0][:, 0], x.sum(axis=1))
    np.testing.assert_array_equal(outputs[1], 2 * x)


@pytest.mark.parametrize("count", [1, 7, 8, 9, 30])
def test_one_caller(count: int) -> None:
    executor = FakeExecutor()
    x = rows(count)
    check(BatchingSession("net", [executor]).run(x), x)
    assert executor.batches == [[min(8, count - at)] for at in range(0, count, 8)]


def test_no_rows() -> None:
    assert [o.shape for o in BatchingSession("net", [FakeExecutor()]).run(rows(0))] == [(0, 1), (0, 3)]


def test_several_inputs_stay_together() -> None:
    sums, _ = BatchingSession("net", [FakeExecutor(4)]).run(rows(6), rows(6, 100))
    np.testing.assert_array_equal(sums[:, 0], rows(6).sum(1) + rows(6, 100).sum(1))


def hold(executor: FakeExecutor) -> tuple[threading.Event, threading.Event]:
    """Makes the first batch wait: (it has begun, let it end)."""
    begun, go = threading.Event(), threading.Event()

    def before() -> None:
        if not begun.is_set():
            begun.set()
            assert go.wait(WAIT_SECONDS)

    executor.before = before
    return begun, go


def in_line(session: BatchingSession, count: int) -> None:
    """Waits until so many wait."""
    for _ in range(2000):
        if len(session._line) == count:
            return
        threading.Event().wait(0.01)
    raise AssertionError(f"{len(session._line)} wait, not {count}")


@contextmanager
def meeting(session: BatchingSession, executor: FakeExecutor, xs: list[np.ndarray]) -> Iterator[list[Future[Outputs]]]:
    """The first caller's batch runs until all the others wait in line, in their order; gives the future of each."""
    begun, go = hold(executor)
    with ThreadPoolExecutor(len(xs)) as pool:
        futures = [pool.submit(session.run, xs[0])]
        assert begun.wait(WAIT_SECONDS)
        for i, x in enumerate(xs[1:], 1):
            futures.append(pool.submit(session.run, x))
            in_line(session, i)
        go.set()
        yield futures


def test_who_waits_is_served_together() -> None:
    executor = FakeExecutor(max_batch=8)
    session = BatchingSession("net", [executor])
    sizes = [2, 3, 3, 1, 5, 2]
    xs = [rows(n, at=100 * i) for i, n in enumerate(sizes)]
    with meeting(session, executor, xs) as futures:
        for future, x in zip(futures, xs, strict=True):
            check(future.result(WAIT_SECONDS), x)
    assert executor.batches[0] == [2]
    assert executor.batches[1] == [3, 3, 1]  # in the order they came, as many as fit...
    assert sorted(map(tuple, executor.batches[2:])) == [(5, 2)]
    assert sum(map(sum, executor.batches)) == sum(sizes)


def test_other_shapes_wait_for_their_own_batch() -> None:
    executor = FakeExecutor()
    session = BatchingSession("net", [executor])
    xs = [rows(1), rows(1, width=3), rows(1, width=5), rows(2, width=3)]
    with meeting(session, executor, xs) as futures:
        for future, x in zip(futures, xs, strict=True):
            check(future.result(WAIT_SECONDS), x)
    assert executor.batches == [[1], [1, 2], [1]]


def test_a_failure_reaches_those_who_shared_the_batch_and_nobody_else() -> None:
    executor = FakeExecutor(max_batch=2)
    session = BatchingSession("net", [executor])
    with pytest.raises(InferenceError, match="below zero"):
        session.run(-rows(1, at=1))
    check(session.run(rows(3)), rows(3))


def test_a_full_memory_makes_batches_smaller_from_then_on() -> None:
    executor = FakeExecutor(max_batch=8, room=4)
    session = BatchingSession("net", [executor])
    check(session.run(rows(8)), rows(8))
    assert executor.batches == [[8], [4], [4]]
    check(session.run(rows(8, at=9)), rows(8, at=9))
    assert executor.batches[3:] == [[4], [4]]


def test_a_memory_that_stays_full_fails_that_batch_and_no_other() -> None:
    executor = FakeExecutor(max_batch=8, room=1)
    session = BatchingSession("net", [executor])
    with pytest.raises(DeviceMemoryError, match="full"):
        session.run(rows(8))
    assert executor.batches == [[8], [4]]  # tried once more, half as large
    executor.room = 100
    check(session.run(rows(8)), rows(8))


def test_a_full_memory_costs_only_the_callers_that_do_not_fit() -> None:
    """Three share a batch; each is tried on its own."""
    executor = FakeExecutor(max_batch=8, room=3)
    session = BatchingSession("net", [executor])
    xs = [rows(1), rows(1, at=5), rows(3, at=50), rows(4, at=90)]
    with meeting(session, executor, xs) as futures:
        for future, x in zip(futures[:3], xs, strict=False):
            check(future.result(WAIT_SECONDS), x)
        with pytest.raises(DeviceMemoryError):
            futures[3].result(WAIT_SECONDS)
    assert executor.batches == [[1], [1, 3, 4], [1], [3], [4]]


@pytest.mark.parametrize("executors", [1, 2, 3])
def test_many_threads(executors: int) -> None:
    fakes = [FakeExecutor(max_batch=16) for _ in range(executors)]
    session = BatchingSession("net", fakes)

    def work(i: int) -> None:
        for n in range(40):
            x = rows(1 + (7 * i + n) % 20, at=1000 * i + n)
            check(session.run(x), x)

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(work, range(12)))
    assert not session._line
    assert len(session._idle) == executors
    session.close()
    assert all(f.closed for f in fakes)


def test_what_is_no_error_of_ours_frees_everybody() -> None:
    """A leader that is interrupted must not leave the others waiting."""
    executor = FakeExecutor()

    def interrupt() -> None:
        raise KeyboardInterrupt

    executor.before = interrupt
    session = BatchingSession("net", [executor])
    with pytest.raises(KeyboardInterrupt):
        session.run(rows(2))
    executor.before = lambda: None
    check(session.run(rows(2)), rows(2))
