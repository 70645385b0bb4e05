from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dfengine.errors import OptionError
from dfengine.sampling import Policy, Sampling, nearest, parse_mode, plan_segments, towards_key_frames


def cfr(n: int, rate: float = 25.0) -> np.ndarray:
    return np.arange(n) / rate


def frames_of(policy: str, timeline: np.ndarray) -> list[int]:
    """Which frames a policy keeps, as exact mode does it."""
    wanted = Policy.parse(policy).wanted_seconds(timeline)
    return np.unique(nearest(timeline, wanted)).tolist() if len(timeline) else []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("uniform:17", Policy("uniform", 17)),
        ("17", Policy("uniform", 17)),
        (" every:6 ", Policy("every", 6)),
        ("every:10:17", Policy("every", 10, 17)),
        ("first:60", Policy("first", 60)),
        ("first:1:1", Policy("first", 1, 1)),
        ("uniform:007", Policy("uniform", 7)),
        ("every:999999:999999", Policy("every", 999999, 999999)),
        ("uniform:30@10", Policy("uniform", 30, None, 10.0)),
        ("30@10", Policy("uniform", 30, None, 10.0)),
        ("every:6:40@2.5", Policy("every", 6, 40, 2.5)),
        ("every:1@0.001", Policy("every", 1, None, 0.001)),
        ("every:1@999999.999", Policy("every", 1, None, 999999.999)),
    ],
)
def test_policy_parses(text: str, expected: Policy) -> None:
    policy = Policy.parse(text)
    assert policy == expected
    assert Policy.parse(str(policy)) == policy


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        "0",
        "-3",
        "1.5",
        "all",
        "uniform",
        "uniform:",
        "uniform:0",
        "uniform:-1",
        "uniform:x",
        "uniform:5:",
        "uniform:5:0",
        "uniform:5:5:5",
        "Every:3",
        "every :3",
        "every:٣",  # a digit to str.isdigit, but not ASCII
        "every:²",
        "5:every",
        "uniform:1000000",
        "uniform:5:1000000",
        "first:" + "9" * 5000,  # more digits than int() takes
        "@3",
        "every:1@",
        "every:1@0",
        "every:1@0.0",
        "every:1@-2",
        "every:1@2.5001",
        "every:1@1000000",
        "every:1@2@3",
        "every:1@inf",
        "every@2:1",
    ],
)
def test_policy_refuses(text: str) -> None:
    with pytest.raises(OptionError, match="is not understood; write uniform:N, every:K or first:N"):
        Policy.parse(text)


def test_first_seconds_count_from_the_first_frame() -> None:
    assert frames_of("every:1@0.2", 7.1 + cfr(60)) == [0, 1, 2, 3, 4]


def test_mode_parses() -> None:
    assert [parse_mode(m) for m in ("exact", "reference", "keyframe")] == ["exact", "reference", "keyframe"]
    with pytest.raises(OptionError, match="sampling mode must be exact, reference or keyframe; got 'Exact'"):
        parse_mode("Exact")


@pytest.mark.parametrize(
    ("policy", "n", "expected"),
    [
        ("uniform:5", 0, []),
        ("uniform:5", 1, [0]),
        ("uniform:5", 3, [0, 1, 2]),  # more wanted than there are: each once
        ("uniform:1", 5, [2]),
        ("uniform:2", 5, [0, 4]),
        ("uniform:5:2", 9, [0, 2]),
        ("every:3", 0, []),
        ("every:3", 1, [0]),
        ("every:3", 8, [0, 3, 6]),
        ("every:9", 8, [0]),
        ("every:3:2", 8, [0, 3]),
        ("first:3", 0, []),
        ("first:3", 2, [0, 1]),
        ("first:3", 8, [0, 1, 2]),
        ("first:3:1", 8, [0]),
        ("every:20@2", 100, [0, 20, 40]),  # the frame at 2.0 s does not belong to the first two seconds
        ("every:1@0.001", 5, [0]),
        ("uniform:3@1", 60, [0, 12, 24]),
        ("uniform:3@9", 5, [0, 2, 4]),
        ("first:5@0.1", 60, [0, 1, 2]),
        ("every:1:2@1", 60, [0, 1]),
        ("every:1@1", 0, []),
    ],
)
def test_wanted_frames(policy: str, n: int, expected: list[int]) -> None:
    assert frames_of(policy, cfr(n)) == expected


@pytest.mark.parametrize("rate", [25.0, 30000 / 1001])
@pytest.mark.parametrize("start", [0.0, 7.125])
@pytest.mark.parametrize(("n", "count"), [(1, 17), (2, 17), (17, 17), (40, 17), (300, 15), (300, 30), (301, 30)])
def test_uniform_is_linspace_over_the_frames_of_a_constant_rate(n: int, count: int, rate: float, start: float) -> None:
    timeline = start + cfr(n, rate)
    ideal = np.linspace(0, n - 1, count)
    got = nearest(timeline, Policy.parse(f"uniform:{count}").wanted_seconds(timeline))
    # A place half-way between two frames may go to either; all others have one answer.
    half_way = np.abs(ideal - np.floor(ideal) - 0.5) < 1e-6
    assert np.array_equal(got[~half_way], np.rint(ideal)[~half_way])
    assert (np.abs(got - ideal)[half_way] < 0.5 + 1e-6).all()


# The frames that five published systems take, as their code computes them: (policy, frames of a video of n).
SYSTEMS = [
    ("every:6", lambda n: range(0, n, 6)),
    ("every:2:1440", lambda n: list(range(0, n, 2))[:1440]),
    ("every:10:17", lambda n: list(range(0, n, 10))[:17]),
    ("first:60", lambda n: range(min(n, 60))),
    ("uniform:30", lambda n: np.unique(np.rint(np.linspace(0, n - 1, 30)).astype(int))),
    ("uniform:15", lambda n: np.unique(np.rint(np.linspace(0, n - 1, 15)).astype(int))),
]


# 300 frames are a DFDC clip; the other lengths avoid ties, and reach over the limits of the policies.
@pytest.mark.parametrize("n", [1, 2, 59, 61, 300, 3001])
@pytest.mark.parametrize(("policy", "frames"), SYSTEMS, ids=[p for p, _ in SYSTEMS])
def test_policies_express_the_frames_of_known_systems(policy: str, frames, n: int) -> None:
    assert frames_of(policy, cfr(n, 30000 / 1001)) == list(frames(n))


def test_variable_rate_is_sampled_by_time_and_counted_by_frame() -> None:
    # 20 frames in the first second, then one a second: half of the wanted times lie in the sparse part.
    timeline = np.concatenate([np.arange(20) / 20, np.arange(1.0, 11.0)])
    assert frames_of("uniform:11", timeline) == [0, *range(20, 29), 29]
    assert frames_of("every:10", timeline) == [0, 10, 20]
    assert frames_of("first:2", timeline) == [0, 1]


def test_a_clock_that_jumps_is_sampled_by_frame() -> None:
    half = np.arange(50) / 25
    gap = np.concatenate([half, half + 50_000])
    assert frames_of("uniform:9", gap) == [0, 12, 25, 37, 50, 62, 74, 87, 99]
    wild = np.append(np.arange(99) / 25, 1e6)
    assert frames_of("uniform:9", wild) == [0, 12, 25, 37, 50, 62, 74, 87, 99]
    assert frames_of("uniform:9:2", wild) == [0, 12]
    assert frames_of("uniform:9", np.array([0.0, 1.0, 2.0])) == [0, 1, 2], "few frames are no jump"


@pytest.mark.parametrize(
    ("values", "wanted", "expected"),
    [
        ([0.0, 1.0], [], []),
        ([3.0], [-1.0, 3.0, 9.0], [0, 0, 0]),
        ([0.0, 1.0, 2.0], [-5.0, 0.4, 0.6, 2.0, 7.0], [0, 0, 1, 2, 2]),
        ([0.0, 1.0, 2.0], [0.5, 1.5], [0, 1]),  # a tie goes to the earlier
    ],
)
def test_nearest(values: list[float], wanted: list[float], expected: list[int]) -> None:
    assert nearest(np.array(values), np.array(wanted)).tolist() == expected


@st.composite
def streams(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(seconds, is_key, wanted): packets in decoding order, with open groups and reordered pictures in them."""
    seconds: list[float] = []
    is_key: list[bool] = []
    shown = 0
    for _ in range(draw(st.integers(1, 6))):
        leading = draw(st.integers(0, 3)) if seconds else 0  # shown before their key frame, decoded after it
        trailing = draw(st.permutations(range(draw(st.integers(0, 6)))))
        trailing += range(len(trailing), len(trailing) + draw(st.sampled_from([0, 0, 40])))
        seconds += [shown + leading, *range(shown, shown + leading), *(shown + leading + 1 + t for t in trailing)]
        is_key += [True] + [False] * (leading + len(trailing))
        shown += leading + 1 + len(trailing)
    wanted = draw(st.lists(st.floats(-1, shown + 1), min_size=1, max_size=8))
    return np.array(seconds, float), np.array(is_key), np.sort(wanted)


@settings(max_examples=300, deadline=None)
@given(streams())
def test_segments_hold_what_the_wanted_times_need(stream: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    seconds, is_key, wanted = stream
    timeline = np.sort(seconds)
    segments = list(plan_segments(seconds, is_key, wanted))

    assert all(s.first < s.end for s in segments)
    assert all(a.end <= b.first for a, b in itertools.pairwise(segments)), "segments overlap"
    served = np.concatenate([np.arange(len(wanted))[s.wanted] for s in segments])
    assert served.tolist() == list(range(len(wanted))), "each wanted time belongs to one segment, in order"
    for segment in segments:
        assert is_key[segment.first]
        usable = seconds[segment.first : segment.end]
        usable = usable[usable >= segment.begin_seconds]
        for want in wanted[segment.wanted]:
            right = np.searchsorted(timeline, want)
            # The frame at the wanted time, or else those around it: whichever is nearer, it must be in the run.
            at = right < len(timeline) and timeline[right] == want
            around = timeline[right : right + 1] if at else timeline[max(right - 1, 0) : right + 1]
            assert np.isin(around, usable).all()


@pytest.mark.parametrize(
    ("is_key", "reason"),
    [
        ([False] * 6, "no key frame is known"),
        ([False, False, True, False, False, False], "the stream begins inside a group"),
    ],
)
def test_first_packets_are_used_also_without_a_key_frame(is_key: list[bool], reason: str) -> None:
    segments = list(plan_segments(np.arange(6.0), np.array(is_key), np.array([0.0, 1.0])))
    assert (segments[0].first, segments[0].begin_seconds) == (0, -np.inf), reason


def test_key_frames_out_of_order_are_not_trusted() -> None:
    seconds = np.array([4.0, 5.0, 0.0, 1.0, 2.0, 3.0])
    is_key = np.array([True, False, True, False, False, False])
    (segment,) = plan_segments(seconds, is_key, np.array([0.0, 5.0]))
    assert (segment.first, segment.end) == (0, 6)


def test_segments_leave_out_what_is_not_needed() -> None:
    is_key = np.arange(100) % 10 == 0
    segments = list(plan_segments(np.arange(100.0), is_key, np.array([0.0, 55.0, 99.0])))
    assert [(s.first, s.end) for s in segments] == [(0, 11), (50, 61), (90, 100)]


@pytest.mark.parametrize(("wanted", "runs"), [(74.0, [(0, 100), (100, 200)]), (77.0, [(0, 200)])])
def test_a_long_rest_before_the_next_key_frame_begins_a_new_run(wanted: float, runs: list[tuple[int, int]]) -> None:
    segments = list(plan_segments(np.arange(200.0), np.arange(200) % 100 == 0, np.array([3.0, wanted, 101.0])))
    assert [(s.first, s.end) for s in segments] == runs


@pytest.mark.parametrize(
    ("keys", "wanted", "moved"),
    [
        ([0, 250], [0, 60, 120, 180, 240, 299], [0, 4, 8, 12, 16, 250]),
        ([0, 250], [2, 3, 251, 290], [0, 3, 250, 254]),  # never forward
        ([100], [50, 99, 160, 170], [50, 99, 100, 104]),  # nothing to begin at before the first
        (range(300), [0, 60, 61, 299], [0, 60, 61, 299]),  # intra only: each is its own key frame
        ([], [0, 150, 299], [0, 150, 299]),
        ([0], [10, 100, 350], [0, 4, 350]),  # 350 was cut off and stays lost
        ([0], [], []),
    ],
)
def test_keyframe_mode_moves_wanted_times_back(keys: list[int], wanted: list[int], moved: list[int]) -> None:
    timeline = 7.125 + np.arange(300) / 25
    seconds = lambda frames: 7.125 + np.array(frames, float) / 25  # noqa: E731
    assert towards_key_frames(seconds(wanted), timeline, seconds(keys)) == pytest.approx(seconds(moved))


@given(st.sets(st.integers(0, 199)), st.lists(st.integers(0, 199), max_size=30))
def test_moved_times_stay_in_order_and_behind_their_key_frame(keys: set[int], frames: list[int]) -> None:
    timeline = np.arange(200.0)
    wanted, key_seconds = np.sort(np.array(frames, float)), np.array(sorted(keys), float)
    moved = towards_key_frames(wanted, timeline, key_seconds)
    assert (np.diff(moved) >= 0).all()
    assert (moved <= wanted).all()
    before = np.searchsorted(key_seconds, wanted, side="right")
    assert np.array_equal(np.searchsorted(key_seconds, moved, side="right"), before)


def test_a_policy_and_a_mode_are_one_value():
    sampling = Sampling.parse("every:10:17@2", "keyframe")
    assert sampling == Sampling(Policy("every", 10, 17, 2.0), "keyframe")
    assert str(sampling) == "every:10:17@2.0, keyframe"
    assert Sampling.parse("17").mode == "reference"
    with pytest.raises(OptionError, match="sampling policy 'some'"):
        Sampling.parse("some", "exact")
    with pytest.raises(OptionError, match="sampling mode must be"):
        Sampling.parse("17", "fast")
