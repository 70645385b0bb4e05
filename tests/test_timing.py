"""The watch over the stages, with a clock of its own."""

from __future__ import annotations

import pytest

from dfengine.timing import Watch


class Clock:
    now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("dfengine.timing.time", clock)
    return clock


def test_nested_stages_count_once(clock: Clock) -> None:
    told: list[str] = []
    watch = Watch(told.append)
    with watch("backbone"):
        clock.now += 1
        with watch("crop"):
            clock.now += 2
        clock.now += 4
    with watch("backbone"):
        clock.now += 8
    assert watch.seconds == {"backbone": 13.0, "crop": 2.0}
    assert told == ["backbone", "crop", "backbone", "", "backbone", ""]
    assert (watch.stage, watch.failed) == ("", "")


def fail(watch: Watch, clock: Clock) -> None:
    with watch("crop"):
        clock.now += 1
        raise MemoryError


def test_what_is_tried_again_counts_as_what_it_is(clock: Clock) -> None:
    watch = Watch()
    with watch("backbone"):
        for _ in range(2):
            with pytest.raises(MemoryError):
                fail(watch, clock)
            assert watch.stage == "backbone"
        with watch("crop"):
            clock.now += 2
        clock.now += 4
    assert watch.seconds == {"backbone": 4.0, "crop": 4.0}
    assert (watch.stage, watch.failed) == ("", "")


def test_an_error_tells_the_innermost_stage_it_came_from(clock: Clock) -> None:
    watch = Watch()
    with pytest.raises(MemoryError), watch("backbone"):
        fail(watch, clock)
    assert watch.failed == "crop"


def test_an_error_that_was_dealt_with_is_not_blamed_for_a_later_one(clock: Clock) -> None:
    watch = Watch()

    def fail_later() -> None:
        with watch("backbone"):
            with pytest.raises(MemoryError):
                fail(watch, clock)
            with watch("crop"):
                clock.now += 1
            raise ValueError("later")

    with pytest.raises(ValueError, match="later"):
        fail_later()
    assert watch.failed == "backbone"


def test_items_cost_what_it_takes_to_make_them(clock: Clock) -> None:
    def make() -> object:
        for i in range(2):
            clock.now += 1
            yield i
        clock.now += 1

    watch = Watch()
    for _ in watch.each("decode", make()):
        clock.now += 10
    assert watch.seconds == {"decode": 3.0}
