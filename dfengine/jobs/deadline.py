"""A run with a time limit: how much work each video gets, so that the run ends in time with an answer for every video.

The ladder, from what was asked down to nothing. Each step keeps what the steps above it gave up:

    as asked            the policy, the mode and all members that were asked for
    reference frames    mode reference instead of exact
    key frames          mode keyframe instead of reference
    fewer members       half of the members, then half of these, ..., then one: the smallest networks are kept
    fewer frames        half of the frames, a quarter of them, one frame in the middle
    (not scored)        a row with the error DeadlineExceeded

Note [Who gives up what]
Of a video only its size is known before it is scored. What a size costs at each step is measured on the way. The time
left is shared out by a level: the highest amount of work such that all videos that still wait fit, if none costs more
than that (or is at the bottom of the ladder). Equal videos therefore get the same step, and of a set with a few huge
ones these give up first. Small ones go first; what they leave over goes to the others, because the level is found anew
for every video.
"""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from dfengine.bundle import Bundle
from dfengine.errors import OptionError
from dfengine.sampling import Mode, Policy, Sampling
from dfengine.types import F64, Plan

# Seconds that a video costs before anything is known: a constant and a part by size, the shape of which stays true
# while its scale is measured. Fitted by eye to 16 clips of 0.2 to 4 MB, 17 frames, mode reference, one core of an AMD
# EPYC, 2026-11: 0.3 to 1.2 s.
FIXED_SECONDS = 0.3
SECONDS_PER_BYTE = 0.2e-6

# Cost of a step relative to the one above it, until both were measured. The same clips, CPU seconds in total: 16.4
# exact, 13.6 reference, 10.0 key frames; with key frames 4.8, 2.8 and 1.1 for 8, 4 and 1 frames. Members: of the
# first default's one network .3 s of 14; larger ones cost more and save more.
REFERENCE_COST, KEYFRAME_COST, MEMBERS_COST = 0.83, 0.73, 0.9
HALF_COST, QUARTER_COST, ONE_FRAME_COST = 0.48, 0.59, 0.38

# Factors on estimates, chosen, not fitted: an unknown machine may be this much slower than the one above, and videos
# of one size differ in length and in people.
UNKNOWN_MACHINE = 4.0
MARGIN = 1.25

# A video is given up, to be tried once more at the bottom of the ladder, after this multiple of its fair share of the
# time left. Chosen: videos of one size differ by less than that in the clips above.
PATIENCE = 4.0

# Videos by which a step is judged. The last ones: those that wait are of about their size, because small ones go first.
WINDOW = 32
ENOUGH = 3

# Of more waiting videos than this only a sample of sizes is looked at, so that a decision takes milliseconds.
MAX_SIZES = 1000

# Kept back for writing tables and ending processes: a tenth of the limit, within these bounds. Writing 4,000 rows as
# Parquet takes less than a second, on a disk that is not busy.
RESERVE_RATIO, RESERVE_MIN_SECONDS, RESERVE_MAX_SECONDS = 0.1, 1.0, 60.0

_N = r"(\d+(?:\.\d+)?)"
_DURATION = re.compile(rf"(?:{_N}h)?(?:{_N}m)?(?:{_N}s)?|{_N}", re.ASCII)


def parse_duration(text: str) -> float:
    """Seconds of "9h", "1h30m", "90s" or "90". Raises OptionError."""
    match = _DURATION.fullmatch(text.strip())
    hours, minutes, seconds, bare = (float(g or 0) for g in match.groups()) if match else (0.0,) * 4
    total = 3600 * hours + 60 * minutes + seconds + bare
    if not 0 < total < float("inf"):
        raise OptionError(f"a duration is written like 9h, 1h30m, 90m or 45s, and longer than zero; got {text!r}")
    return total


@dataclass(frozen=True)
class Step:
    """A rung of the ladder. ``cost`` is relative to the first one, until it is measured."""

    name: str
    plan: Plan
    cost: float


def ladder(asked: Plan, bundle: Bundle) -> tuple[Step, ...]:
    """The steps for what was asked, the most expensive first; those that would change nothing are left out."""
    steps = [Step("as asked", asked, 1.0)]

    def add(
        name: str, cost: float, *, policy: Policy | None = None, mode: Mode | None = None, members: Sequence[str] = ()
    ) -> None:
        last = steps[-1]
        before = last.plan.sampling
        sampling = Sampling(policy or before.policy, mode or before.mode)
        plan = Plan(sampling, tuple(members) or last.plan.members)
        if plan != last.plan:
            steps.append(Step(name, plan, last.cost * cost))

    if asked.sampling.mode == "exact":
        add("reference frames", REFERENCE_COST, mode="reference")
    add("key frames", KEYFRAME_COST, mode="keyframe")
    members = _smallest_first(asked.members, bundle)
    while len(members) > 1:
        members = members[: len(members) // 2]
        kept = tuple(name for name in asked.members if name in members)
        add(f"{len(kept)} of {len(asked.members)} members", MEMBERS_COST, members=kept)
    policy = asked.sampling.policy
    add("half of the frames", HALF_COST, policy=_sparser(policy, 2))
    add("a quarter of the frames", QUARTER_COST, policy=_sparser(policy, 4))
    add("one frame", ONE_FRAME_COST, policy=Policy("uniform", 1, seconds=policy.seconds))
    return tuple(steps)


def _smallest_first(names: Sequence[str], bundle: Bundle) -> list[str]:
    """By the size of the network, which goes with its time; ones that look at frames before all others."""

    def size(name: str) -> tuple[bool, int]:
        member = bundle.member(name)
        return member.kind != "frame", (bundle.folder / member.file).stat().st_size

    return sorted(names, key=size)


def _sparser(policy: Policy, divisor: int) -> Policy:
    """A policy of the same kind over the same part of the video, with about 1 / divisor of the frames, at least 1."""
    limit = max(1, policy.limit // divisor) if policy.limit is not None else None
    count = policy.count * divisor if policy.kind == "every" else max(1, policy.count // divisor)
    return replace(policy, count=count, limit=limit)


@dataclass(frozen=True)
class Share:
    """What one video gets: a step of the ladder, and the seconds after which it is given up."""

    step: int
    seconds: float


class Deadline:
    """Decides what each video gets. Knows no processes and no files; the clock is passed in.

    Raises OptionError if ``limit_seconds`` is not positive.
    """

    def __init__(
        self,
        limit_seconds: float,
        costs: Sequence[float],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not limit_seconds > 0:
            raise OptionError(f"the time limit must be longer than zero, got {limit_seconds} s")
        reserve = min(max(RESERVE_RATIO * limit_seconds, RESERVE_MIN_SECONDS), RESERVE_MAX_SECONDS)
        self._clock = clock
        self._ends = clock() + limit_seconds - reserve
        self._relative = np.array(costs, np.float64)  # (S,)
        self._seen: list[deque[tuple[float, float]]] = [deque(maxlen=WINDOW) for _ in costs]  # (guess, seconds)
        self._quickest = 0.0

    def left(self) -> float:
        """Seconds until nothing may run any more; the reserve is not in them."""
        return max(0.0, self._ends - self._clock())

    def observe(self, step: int, size_bytes: float, seconds: float) -> None:
        """What a video cost. One that was given up cost at least that."""
        self._seen[step].append((float(_guess(size_bytes)), seconds))
        if step == len(self._seen) - 1:
            self._quickest = min(self._quickest or seconds, seconds)

    def expected(self, step: int, size_bytes: float) -> float:
        """Seconds that a video of that size is expected to take at a step, without a margin."""
        return float(self._scale(step) * _guess(size_bytes))

    def share(
        self, size_bytes: float, others_bytes: ArrayLike = (), busy_seconds: float = 0.0, workers: int = 1
    ) -> Share | None:
        """What the next video gets; None if there is no time for it at any step.

        ``others_bytes``: sizes of the videos that wait behind it; ``busy_seconds``: what the running ones still need,
        in total. Beyond the last step nothing is promised: the smallest videos get it, and the rest no time.
        """
        left = self.left()
        if left <= self._quickest:
            return None
        others = np.sort(np.asarray(others_bytes, np.float64).reshape(-1))
        stride = -(-len(others) // MAX_SIZES) or 1
        others = others[::-1][::stride]  # each stands for itself and the smaller ones next to it
        sizes = np.concatenate([[float(size_bytes)], others])
        weights = np.concatenate([[1.0], np.full(len(others), float(stride))])
        scales = np.array([self._scale(s) for s in range(len(self._seen))])
        # A step is never taken for dearer than the one above it: few measurements may say so by chance.
        costs = np.minimum.accumulate(MARGIN * scales)[:, None] * _guess(sizes)[None]  # (S, N)
        columns = np.arange(len(sizes))
        capacity = left - busy_seconds / workers

        def spend(level: float) -> tuple[F64, F64]:
            chosen = np.where((costs <= level).any(axis=0), (costs <= level).argmax(axis=0), len(costs) - 1)
            return chosen, costs[chosen, columns]

        def fits(level: float) -> bool:
            spent = spend(level)[1]
            # Graham's bound for any order of work on several machines.
            return bool((spent * weights).sum() / workers + (1 - 1 / workers) * np.max(spent) <= capacity)

        levels = np.unique(costs)
        low, high = 0, len(levels)  # levels[:low] fit, levels[high:] do not
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if fits(levels[middle]) else (low, middle)
        chosen, spent = spend(levels[low - 1] if low else 0.0)
        fair = spent[0] * max(1.0, capacity * workers / (spent * weights).sum())
        return Share(int(chosen[0]), min(left, PATIENCE * float(fair)))

    def _scale(self, step: int) -> float:
        """Measured over guessed seconds at a step; by the nearest step that was measured if it was not itself."""
        counts = np.array([len(seen) for seen in self._seen])
        measured = np.flatnonzero(counts >= min(ENOUGH, max(1, counts.max())))
        if len(measured) == 0:
            return float(UNKNOWN_MACHINE / MARGIN * self._relative[step])
        nearest = measured[np.argmin(np.abs(measured - step))]
        guesses, seconds = np.array(self._seen[nearest]).sum(axis=0)
        return float(seconds / guesses * self._relative[step] / self._relative[nearest])


def _guess(size_bytes: ArrayLike) -> F64:
    return np.asarray(FIXED_SECONDS + SECONDS_PER_BYTE * np.asarray(size_bytes, np.float64))
