"""Where the time of one video goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


class Watch:
    """Wall-clock seconds by stage. Nested stages count once, in the inner one. Not thread-safe.

    ``stage``: the one that goes on, "" between two. ``failed``: the innermost stage that an error on its way up came
    from, "" without one. ``on_stage`` is called with the name of each stage that begins or goes on, "" between two.
    """

    def __init__(self, on_stage: Callable[[str], None] | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self.stage = self.failed = ""
        self._on_stage = on_stage or (lambda stage: None)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Counts what happens inside it as ``stage``."""
        outer, self.stage = self.stage, stage
        self.failed = ""  # an error before this was dealt with
        self._on_stage(stage)
        started = time.perf_counter()
        try:
            yield
        except BaseException:
            self.failed = self.failed or stage
            raise
        else:
            self.failed = ""
        finally:
            spent = time.perf_counter() - started
            self.seconds[stage] = self.seconds.get(stage, 0.0) + spent
            if outer:
                self.seconds[outer] = self.seconds.get(outer, 0.0) - spent
            self.stage = outer
            self._on_stage(outer)

    def each(self, stage: str, items: Iterator[T]) -> Iterator[T]:
        """Passes items on and counts the time it took to make them."""
        while True:
            with self(stage):
                item = next(items, None)
            if item is None:
                return
            yield item
