"""Which frames to score, and which packets need not be decoded at all.

Timestamps decide, never frame counts: containers over-report their frames, and frame rates vary.

Policies (text, as on the command line and in a bundle):

    uniform:N      N times evenly spaced from the first frame to the last, both included; N frames evenly spaced by
                   number where fewer than half of these times have a frame of their own
    every:K        every K-th frame in the order of presentation
    first:N        the first N frames
    POLICY:MAX     any of the above, at most MAX frames: every:10:17 is every 10th frame until there are 17
    POLICY@SECONDS any of the above, as if the video ended SECONDS after its first frame: every:1@2, uniform:30@10

Three modes say which frame stands for a wanted time:

    exact          the frame presented nearest to it
    reference      the nearest frame that other frames depend on; frames nobody depends on are not decoded, which
                   halves the work on typical H.264 and leaves every kept frame bit-identical
    keyframe       as reference, after moving each wanted time back towards the key frame before it: a decoder must
                   begin there, and what lies far behind costs time. The times of one key frame come to lie close
                   together, so that the people are seen in a few short windows instead of all along
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from dfengine.errors import OptionError
from dfengine.types import F64, I64, Bool

Mode = Literal["exact", "reference", "keyframe"]


def parse_mode(text: str) -> Mode:
    """Raises OptionError."""
    for mode in get_args(Mode):
        if text == mode:
            return mode  # type: ignore[no-any-return]
    raise OptionError(f"sampling mode must be exact, reference or keyframe; got {text!r}")


# How many frames a wanted time may be moved. x264 and x265 allow at most 16 B-pictures in a row
# (X264_BFRAME_MAX, --bframes), so a frame that others depend on is at most 8 frames away; one that is
# farther is there because the frames between were lost.
MAX_SNAP_FRAMES = 8

# With more frames than this between a wanted time and the next key frame, those are left out. The frames that may stand
# for the wanted time then all come before any that is decoded after that key frame: MAX_SNAP_FRAMES and 16 B-pictures.
MIN_LEFT_OUT_FRAMES = MAX_SNAP_FRAMES + 16

# In keyframe mode the n-th wanted time behind a key frame lies at most n times this many frames behind it. 4 frames
# are two that others depend on, with the usual one B-picture in two: 17 times cost 34 decoded frames where a clip has
# few key frames, and span 2.3 s at 30 frames a second. Chosen for that cost.
KEYFRAME_STEP_FRAMES = 4


# Numbers in a policy stay below a million: 9 hours at 30 frames a second. More would be a slip, and cost memory.
_MAX_DIGITS = 6
_SECONDS = re.compile(rf"[0-9]{{1,{_MAX_DIGITS}}}(\.[0-9]{{1,3}})?")


@dataclass(frozen=True)
class Policy:
    """A parsed sampling policy."""

    kind: Literal["uniform", "every", "first"]
    count: int
    limit: int | None = None
    seconds: float | None = None  # frames this long after the first, and later ones, are not looked at

    @classmethod
    def parse(cls, text: str) -> Policy:
        """Raises OptionError. A bare number N means uniform:N."""
        counts, at, seconds = text.strip().partition("@")
        parts = counts.split(":")
        if len(parts) == 1 and parts[0].isdigit():
            parts = ["uniform", *parts]
        numbers = parts[1:]
        if (
            parts[0] not in ("uniform", "every", "first")
            or not 1 <= len(numbers) <= 2
            or not all(n.isascii() and n.isdigit() and 0 < len(n.lstrip("0")) <= _MAX_DIGITS for n in numbers)
            or (at and not (_SECONDS.fullmatch(seconds) and float(seconds) > 0))
        ):
            raise OptionError(
                f"sampling policy {text!r} is not understood; write uniform:N, every:K or first:N with a positive "
                "number below a million, :MAX behind it to limit the frames (every:10:17), and @SECONDS at the end to "
                "stay within the first seconds (every:6@10)"
            )
        limit = int(numbers[1]) if len(numbers) == 2 else None
        return cls(parts[0], int(numbers[0]), limit, float(seconds) if at else None)  # type: ignore[arg-type]

    def __str__(self) -> str:
        limit = f":{self.limit}" if self.limit is not None else ""
        return f"{self.kind}:{self.count}{limit}" + (f"@{self.seconds}" if self.seconds is not None else "")

    def wanted_seconds(self, timeline: F64) -> F64:
        """The times to sample, ascending, given the presentation times of all frames (seconds, ascending)."""
        if len(timeline) == 0:
            return np.zeros(0)
        if self.seconds is not None:
            # Less a tick of the finest clocks in use: the frame at 2.0 s is none of the first two seconds.
            timeline = timeline[timeline - timeline[0] < self.seconds - 1e-7]
        if self.kind == "every":
            wanted = timeline[:: self.count]
        elif self.kind == "first":
            wanted = timeline[: self.count]
        elif self.count == 1:
            wanted = np.array([(timeline[0] + timeline[-1]) / 2])
        else:
            wanted = np.linspace(timeline[0], timeline[-1], self.count)
            # Where most of these times have no frame of their own the clock jumps, and a gap would take them all.
            if 2 * len(np.unique(nearest(timeline, wanted))) < min(self.count, len(timeline)):
                wanted = timeline[np.linspace(0, len(timeline) - 1, self.count).round().astype(np.int64)]
        return wanted[: self.limit]


@dataclass(frozen=True)
class Sampling:
    """Which frames are scored: a policy that says the times, and the mode that says which frame stands for each."""

    policy: Policy
    mode: Mode = "reference"

    @classmethod
    def parse(cls, text: str, mode: str = "reference") -> Sampling:
        """From the texts that people write, both as this module describes them. Raises OptionError."""
        return cls(Policy.parse(text), parse_mode(mode))

    def __str__(self) -> str:
        return f"{self.policy}, {self.mode}"


def nearest(sorted_values: F64, wanted: F64) -> I64:
    """Index of the value nearest to each wanted one; a tie goes to the earlier. ``sorted_values`` is not empty."""
    right = np.clip(np.searchsorted(sorted_values, wanted), 0, len(sorted_values) - 1)
    left = np.maximum(right - 1, 0)
    take_left = wanted - sorted_values[left] <= sorted_values[right] - wanted
    return np.where(take_left, left, right).astype(np.int64)


def towards_key_frames(wanted: F64, timeline: F64, key_seconds: F64) -> F64:
    """Moves wanted times back towards the key frame before each, never forward; ascending like ``wanted``.

    ``timeline``: the times of all frames, ascending; ``key_seconds``: those of the key frames, ascending. Without key
    frames nothing is moved, nor is a wanted time behind the last frame.
    """
    if len(key_seconds) == 0:
        return wanted
    rank = nearest(timeline, wanted)
    keys = np.unique(nearest(timeline, key_seconds))
    group = np.searchsorted(keys, rank, side="right") - 1  # -1: before the first key frame
    position = np.arange(len(wanted)) - np.searchsorted(group, group)  # among the wanted times of its key frame
    near = keys[np.maximum(group, 0)] + KEYFRAME_STEP_FRAMES * position
    movable = (group >= 0) & (near < rank) & (wanted <= timeline[-1])
    return np.where(movable, timeline[np.minimum(near, rank)], wanted)


@dataclass(frozen=True)
class Segment:
    """Packets [first, end), in decoding order, that give the frames for wanted[segment.wanted].

    Frames presented before ``begin_seconds`` depend on packets before the segment and must not be used.
    """

    first: int
    end: int
    begin_seconds: float
    wanted: slice


def plan_segments(seconds: F64, is_key: Bool, wanted: F64) -> Iterator[Segment]:
    """Splits a stream at its key frames and yields the runs of packets that must be decoded.

    ``seconds``: presentation time of each packet in decoding order. ``wanted``: ascending. A run ends behind the
    next key frame and the packets that are decoded after it but presented before it, because they may be the right
    neighbours of a wanted time; or before that key frame, where the next run begins there.
    """
    keys = np.flatnonzero(is_key)
    if len(keys) == 0 or keys[0] != 0:
        keys = np.concatenate(([0], keys))
    key_seconds = seconds[keys]
    if np.any(np.diff(key_seconds) < 0):  # key frames out of order: no run can be trusted
        keys, key_seconds = keys[:1], key_seconds[:1]
    group = np.clip(np.searchsorted(key_seconds, wanted, side="right") - 1, 0, None)  # (wanted,)
    needed, first = np.unique(group, return_index=True)
    ascending = np.sort(seconds)
    last_wanted = wanted[np.append(first[1:], len(wanted)) - 1][:-1]  # of each needed key frame but the last
    unneeded = np.searchsorted(ascending, key_seconds[needed[1:]]) - np.searchsorted(ascending, last_wanted)
    runs = np.split(needed, np.flatnonzero((np.diff(needed) > 1) | (unneeded > MIN_LEFT_OUT_FRAMES)) + 1)
    starts = {int(run[0]) for run in runs}
    for run in runs:
        low, high = int(run[0]), int(run[-1])
        end = len(seconds)
        if high + 1 in starts:
            end = int(keys[high + 1])
        elif high + 1 < len(keys):
            end = int(keys[high + 1]) + 1
            while end < len(seconds) and seconds[end] < key_seconds[high + 1]:
                end += 1
        begin_seconds = float(key_seconds[low]) if low > 0 else -np.inf
        members = np.flatnonzero((group >= low) & (group <= high))
        yield Segment(int(keys[low]), end, begin_seconds, slice(int(members[0]), int(members[-1]) + 1))
