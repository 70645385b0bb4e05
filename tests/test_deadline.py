"""Who gets how much of a limited time, on a simulated clock and simulated machines."""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from assets import write_bundle
from hypothesis import given, settings
from hypothesis import strategies as st

from dfengine.bundle import Bundle
from dfengine.errors import OptionError
from dfengine.jobs.deadline import RESERVE_MIN_SECONDS, Deadline, ladder, parse_duration
from dfengine.sampling import Sampling
from dfengine.types import Plan

COSTS = (1.0, 0.8, 0.56, 0.42, 0.38, 0.17)
BOTTOM = len(COSTS) - 1
MB = 1_000_000


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("9h", 32400), ("1h30m", 5400), ("90m", 5400), ("45s", 45), ("45", 45), ("1h0m1s", 3601), (" 2.5s ", 2.5),
     ("0.5h", 1800)],
)  # fmt: skip
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "0", "0s", "h", "-1h", "9 h", "30m1h", "1d", "inf", "nan", "1e9", "9h9h", "1h30", "5m5"]
)
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(OptionError, match="a duration is written like 9h, 1h30m, 90m or 45s, and longer than zero"):
        parse_duration(text)


# -- the ladder --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.load(write_bundle(tmp_path_factory.mktemp("bundle")))


@pytest.fixture
def ensemble(tmp_path: Path, bundle: Bundle) -> Bundle:
    """Five members whose networks have 50, 10, 40, 20 and 30 bytes; only the sizes of the files are looked at."""
    members = []
    for name, size in (("a", 50), ("b", 10), ("c", 40), ("d", 20), ("e", 30)):
        (tmp_path / f"{name}.onnx").write_bytes(bytes(size))
        members.append(replace(bundle.members[0], name=name, file=f"{name}.onnx"))
    return replace(bundle, members=tuple(members), folder=tmp_path)


def test_the_ladder_in_full(ensemble: Bundle) -> None:
    asked = Plan(Sampling.parse("uniform:16", "exact"), ("a", "b", "c", "d", "e"))
    steps = ladder(asked, ensemble)
    assert [(s.name, str(s.plan.sampling.policy), "".join(s.plan.members)) for s in steps] == [
        ("as asked", "uniform:16", "abcde"),
        ("reference frames", "uniform:16", "abcde"),
        ("key frames", "uniform:16", "abcde"),
        ("2 of 5 members", "uniform:16", "bd"),
        ("1 of 5 members", "uniform:16", "b"),
        ("half of the frames", "uniform:8", "b"),
        ("a quarter of the frames", "uniform:4", "b"),
        ("one frame", "uniform:1", "b"),
    ]
    assert steps[0].plan == asked
    assert [s.plan.sampling.mode for s in steps] == ["exact", "reference"] + ["keyframe"] * 6
    assert all(a.cost > b.cost > 0 for a, b in itertools.pairwise(steps))


@pytest.mark.parametrize(
    ("sampling", "samplings"),
    [
        ("uniform:17", ["uniform:17", "uniform:8", "uniform:4", "uniform:1"]),
        ("uniform:3", ["uniform:3", "uniform:1"]),
        ("uniform:1", ["uniform:1"]),
        ("uniform:40:10", ["uniform:40:10", "uniform:20:5", "uniform:10:2", "uniform:1"]),
        ("uniform:30@10.0", ["uniform:30@10.0", "uniform:15@10.0", "uniform:7@10.0", "uniform:1@10.0"]),
        ("every:6@10.0", ["every:6@10.0", "every:12@10.0", "every:24@10.0", "uniform:1@10.0"]),
        ("first:10", ["first:10", "first:5", "first:2", "uniform:1"]),
        ("every:10", ["every:10", "every:20", "every:40", "uniform:1"]),
        ("every:10:9", ["every:10:9", "every:20:4", "every:40:2", "uniform:1"]),
    ],
)
def test_steps_that_change_nothing_are_left_out(bundle: Bundle, sampling: str, samplings: list[str]) -> None:
    steps = ladder(Plan(Sampling.parse(sampling, "keyframe"), ("mean",)), bundle)
    assert [str(s.plan.sampling.policy) for s in steps] == samplings


# -- decisions ---------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    ended_seconds: float = 0.0
    steps: dict[int, int] = field(default_factory=dict)  # by video, of those that were scored
    stopped: set[int] = field(default_factory=set)
    refused: set[int] = field(default_factory=set)

    def count(self) -> Counter[int]:
        return Counter(self.steps.values())


def simulate(
    sizes: list[float], seconds: Callable[[int, int], float], limit: float, *, workers: int = 2, costs=COSTS
) -> Outcome:
    """Runs a batch on a machine on which video i takes ``seconds(i, step)``, the way Batch does."""
    now = 0.0
    deadline = Deadline(limit, costs, clock=lambda: now)
    hard_end = deadline.left()
    waiting = sorted(range(len(sizes)), key=lambda i: sizes[i])
    at_bottom: set[int] = set()
    running: list[tuple[float, int, int, float, float, bool]] = []  # ends, video, step, started, expected, finished
    outcome = Outcome()
    while waiting or running:
        while waiting and len(running) < workers:
            video = waiting.pop(0)
            busy = sum(max(r[4] - (now - r[3]), r[4] / 4) for r in running)
            share = deadline.share(sizes[video], [sizes[w] for w in waiting], busy, workers)
            if share is None:
                outcome.refused.add(video)
                continue
            step = len(costs) - 1 if video in at_bottom else share.step
            takes, expected = seconds(video, step), deadline.expected(step, sizes[video])
            assert 0 < share.seconds <= hard_end - now
            heapq.heappush(
                running, (now + min(takes, share.seconds), video, step, now, expected, takes <= share.seconds)
            )
        if not running:
            break
        now, video, step, started, _, finished = heapq.heappop(running)
        deadline.observe(step, sizes[video], now - started)
        if finished:
            outcome.steps[video] = step
        elif step == len(costs) - 1 or now >= hard_end:
            outcome.stopped.add(video)
        else:
            at_bottom.add(video)
            waiting.insert(0, video)
    outcome.ended_seconds = now
    assert outcome.ended_seconds <= limit
    assert sorted([*outcome.steps, *outcome.stopped, *outcome.refused]) == list(range(len(sizes)))
    return outcome


def test_ample_time_gives_everything(rng: np.random.Generator) -> None:
    sizes = list(rng.uniform(0.2, 4, 500) * MB)
    outcome = simulate(sizes, lambda i, step: (0.3 + 0.2e-6 * sizes[i]) * COSTS[step], 3600)
    assert outcome.count() == {0: 500}


@pytest.mark.parametrize("slower", [1, 10, 100])
@pytest.mark.parametrize("share", [0.9, 0.7, 0.5, 0.3])
def test_too_little_time_lowers_all_alike(rng: np.random.Generator, slower: float, share: float) -> None:
    """Time for a share of what was asked, on machines of any speed: all are answered, most near the step that fits."""
    sizes = [MB] * 400
    noise = rng.uniform(0.5, 1.5, 400)
    outcome = simulate(sizes, lambda i, step: slower * COSTS[step] * noise[i], slower * 400 * share / 2)
    assert len(outcome.steps) == 400
    spent = sum(COSTS[step] for step in outcome.steps.values()) / 400
    assert spent >= share * 0.6, "the time is used"
    assert sum(step in (0, BOTTOM) for step in outcome.steps.values()) < 320 or share == 0.9


def test_less_time_than_the_bottom_needs_scores_what_it_can(rng: np.random.Generator) -> None:
    sizes = list(rng.uniform(1, 2, 300) * MB)
    limit = 300 * 10 * COSTS[BOTTOM] / 2 / 3
    outcome = simulate(sizes, lambda i, step: 10 * COSTS[step], limit)
    assert 50 <= len(outcome.steps) <= 100
    assert len(outcome.count()) <= 3
    largest_scored = max(sizes[i] for i in outcome.steps)
    assert all(sizes[i] >= largest_scored for i in outcome.refused), "small ones go first"


def test_a_few_huge_videos_give_up_first() -> None:
    """100 clips of a second and three films of ten minutes, in six minutes on two cores."""
    sizes = [MB] * 100 + [600 * MB] * 3
    outcome = simulate(sizes, lambda i, step: sizes[i] / MB * COSTS[step], 360)
    assert [outcome.steps[i] for i in range(100)].count(0) >= 95
    assert all(outcome.steps.get(i, BOTTOM) >= 3 for i in (100, 101, 102))
    assert len(outcome.steps) >= 102


def test_a_small_file_that_never_ends_costs_its_share_only() -> None:
    sizes = [MB] * 50
    outcome = simulate(sizes, lambda i, step: 1e9 if i == 0 else COSTS[step], 60)
    assert outcome.stopped == {0}
    assert len(outcome.steps) == 49
    assert [outcome.steps[i] for i in range(1, 50)].count(0) > 20


def test_a_machine_that_slows_down_midway(rng: np.random.Generator) -> None:
    sizes = [MB] * 200
    order = itertools.count()
    outcome = simulate(sizes, lambda i, step: COSTS[step] * (1 if next(order) < 100 else 4), 150)
    assert len(outcome.steps) >= 190


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.lists(st.floats(0, 1e10), max_size=40),
    speeds=st.lists(st.floats(1e-4, 1e4), min_size=1, max_size=40),
    limit=st.floats(0.01, 1e5),
    workers=st.integers(1, 5),
)
def test_every_video_has_an_outcome_within_the_limit(
    sizes: list[float], speeds: list[float], limit: float, workers: int
) -> None:
    """Whatever the sizes say and the machine does; the assertions are in ``simulate``."""
    simulate(sizes, lambda i, step: speeds[i % len(speeds)] * COSTS[step], max(limit, 1e-9), workers=workers)


def test_thousands_of_waiting_videos_are_weighed_by_a_sample() -> None:
    def choose(count: int) -> int:
        deadline = Deadline(1000, COSTS, clock=lambda: 0.0)
        for _ in range(5):
            deadline.observe(0, MB, 1.0)
        share = deadline.share(MB, np.full(count, MB), workers=10)
        assert share is not None
        return share.step

    assert [choose(n) for n in (100, 6000, 12000, 16000, 10**6)] == sorted(
        choose(n) for n in (100, 6000, 12000, 16000, 10**6)
    )
    assert choose(100) == 0
    assert choose(12000) in (2, 3)  # 10 workers x 940 s for 12000 videos: .63 s each, with the margin
    assert choose(10**6) == BOTTOM


def test_a_limit_below_the_reserve_leaves_no_time() -> None:
    deadline = Deadline(RESERVE_MIN_SECONDS / 2, COSTS, clock=lambda: 5.0)
    assert deadline.left() == 0
    assert deadline.share(MB) is None


def test_the_limit_must_be_positive() -> None:
    with pytest.raises(OptionError, match="the time limit must be longer than zero, got 0 s"):
        Deadline(0, COSTS)
