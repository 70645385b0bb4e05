"""Every rule against numbers worked out by hand."""

from __future__ import annotations

from math import exp, log

import numpy as np
import pytest
from conftest import TOLERANCE

from dfengine.bundle import SCHEMA_VERSION, Aggregation, Bundle, Calibration, CropSpec, ModelSpec
from dfengine.stages.aggregate import blend_members, judge, pool_frames, sigmoid, to_logit
from dfengine.types import Tracks

CLOSE = TOLERANCE["aggregate", "float64"]
LN3 = log(3)  # sigmoid(ln 3) = 3/4, sigmoid(-ln 3) = 1/4
LN9 = log(9)  # 9/10


def approx(value):
    return pytest.approx(value, abs=CLOSE)


def make_bundle(weights=(1.0,), *, frames="logit_mean", members="logit_mean", tracks="max", temperature=1.0, bias=0.0):
    specs = tuple(
        ModelSpec(name=f"m{i}", file=f"m{i}.onnx", sha256="", crop=CropSpec(input_hw=(8, 8)), weight=w)
        for i, w in enumerate(weights)
    )
    return Bundle(
        schema_version=SCHEMA_VERSION, name="test", licence="MIT", members=specs,
        aggregation=Aggregation(frames=frames, members=members, tracks=tracks),
        calibration=Calibration(temperature=temperature, bias=bias),
    )  # fmt: skip


def make_tracks(ids, sides=None, detected=None):
    n = len(ids)
    sides = [100] * n if sides is None else sides
    xyxy = np.array([(10, 20, 10 + s, 20 + s / 2) for s in sides], np.float32).reshape(-1, 4)
    return Tracks(
        np.array(ids, np.int64),
        np.arange(n, dtype=np.int64) * 10,
        np.arange(n, dtype=np.float64) / 2,
        xyxy,
        np.zeros((n, 5, 2), np.float32),
        np.ones(n, np.float32),
        np.ones(n, np.bool_) if detected is None else np.array(detected),
    )


# -- the parts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("x", "p"), [(0, 0.5), (LN3, 0.75), (-LN3, 0.25), (LN9, 0.9), (800, 1.0), (-800, 0.0)])
def test_sigmoid(x, p):
    assert sigmoid(x) == approx(p)


@pytest.mark.parametrize(("p", "x"), [(0.5, 0), (0.75, LN3), (0.25, -LN3), (0.1, -LN9)])
def test_to_logit(p, x):
    assert to_logit(p) == approx(x)
    assert sigmoid(to_logit(p)) == approx(p)


def test_logits_are_always_finite():
    assert np.isfinite(to_logit([0.0, 1.0, 1e-300, 1 - 1e-17])).all()
    assert to_logit(0.0) == pytest.approx(-to_logit(1.0), abs=TOLERANCE["aggregate_extreme", "float64"])


@pytest.mark.parametrize(
    ("rule", "logits", "pooled"),
    [
        ("logit_mean", [1, 2, 6], 3),
        ("median", [1, 2, 6], 2),
        ("median", [1, 2, 4, 6], 3),
        ("mean", [LN3, -LN3], 0),  # (3/4 + 1/4) / 2
        ("mean", [LN3, LN9, LN9, LN9], log((0.75 + 2.7) / 4 / (1 - (0.75 + 2.7) / 4))),
        ("logit_mean", [2.5], 2.5),
        ("median", [2.5], 2.5),
        ("mean", [2.5], 2.5),
    ],
)
def test_pool_frames(rule, logits, pooled):
    assert pool_frames(np.array(logits, np.float64), rule) == approx(pooled)


@pytest.mark.parametrize(
    ("rule", "logits", "weights", "blended"),
    [
        ("logit_mean", [1, 4], [1, 1], 2.5),
        ("logit_mean", [1, 4], [2, 1], 2),
        ("mean", [LN3, -LN3], [1, 1], 0),
        ("mean", [LN3, -LN3], [3, 1], log(0.625 / 0.375)),  # .75 * 3/4 + .25 * 1/4
        ("geometric_mean", [LN3, -LN3], [1, 1], log((3**0.5 / 4) / (1 - 3**0.5 / 4))),  # sqrt(3/4 * 1/4)
        ("geometric_mean", [LN9, 0], [1, 3], log((p := 0.9**0.25 * 0.5**0.75) / (1 - p))),
    ],
)
def test_blend_members(rule, logits, weights, blended):
    logits, weights = np.array(logits, np.float64), np.array(weights, np.float64)
    assert blend_members(logits, weights, rule) == approx(blended)
    assert blend_members(logits, weights * 17, rule) == approx(blended)  # only shares count
    assert blend_members(logits[::-1], weights[::-1], rule) == approx(blended)


@pytest.mark.parametrize("rule", ["logit_mean", "mean", "geometric_mean"])
def test_blend_of_a_single_member_is_that_member(rule):
    logits = np.array([[-3.0, 0.0, 2.5]])
    got = blend_members(logits, np.array([0.3]), rule)
    assert got.shape == (3,)
    np.testing.assert_allclose(got, logits[0], rtol=0, atol=CLOSE)


@pytest.mark.parametrize("rule", ["logit_mean", "mean", "geometric_mean"])
@pytest.mark.parametrize("shape", [(3,), (3, 5), (3, 0)], ids=str)
def test_blend_keeps_the_shape_of_the_rest(rng, rule, shape):
    got = blend_members(rng.normal(size=shape), np.array([1.0, 2.0, 0.5]), rule)
    assert got.shape == shape[1:]
    assert got.dtype == np.float64


@pytest.mark.parametrize("rule", ["logit_mean", "mean", "geometric_mean"])
@pytest.mark.parametrize("logit", [-60.0, -10.0, 0.0, 10.0, 60.0])
def test_members_that_agree_are_believed(rule, logit):
    got = sigmoid(blend_members(np.full(3, logit), np.array([1.0, 2.0, 0.5]), rule))
    assert got == pytest.approx(sigmoid(logit), abs=TOLERANCE["aggregate_extreme", "float64"])


# -- judge -------------------------------------------------------------------------------------------------------------


def test_one_row():
    verdict = judge(make_tracks([4]), {"m0": np.array([LN3])}, make_bundle())
    assert verdict.p_fake == approx(0.75)
    assert verdict.logit == approx(LN3)
    assert verdict.members == {"m0": approx(0.75)}
    (track,) = verdict.tracks
    assert track.track_id == 4
    assert track.p_fake == approx(0.75)
    (frame,) = track.frames
    assert frame.p_fake == approx(0.75)
    assert (frame.frame_index, frame.pts_seconds, frame.box) == (0, 0.0, (10.0, 20.0, 110.0, 70.0))
    assert frame.landmarks == ((0.0, 0.0),) * 5


def test_members_that_did_not_run_have_no_say():
    tracks = make_tracks([0, 0, 1], sides=[50, 50, 80])
    logits = {"m0": np.array([1.0, 3.0, -4.0]), "m2": np.array([5.0, 1.0, 0.0])}
    got = judge(tracks, logits, make_bundle((3, 100, 1)))
    assert list(got.members) == ["m0", "m2"]
    assert got.p_fake == approx(judge(tracks, {"m0": logits["m0"], "m1": logits["m2"]}, make_bundle((3, 1))).p_fake)


def test_by_hand():
    """Two people, two members of weights 3 and 1, temperature 2 and bias 0.5; logit means throughout."""
    tracks = make_tracks([0, 0, 1], sides=[50, 50, 80], detected=[True, False, True])
    logits = {"m0": np.array([1.0, 3.0, -4.0]), "m1": np.array([5.0, 1.0, 0.0])}
    verdict = judge(tracks, logits, make_bundle((3, 1), temperature=2, bias=0.5))
    # Pooled: m0 2 and -4, m1 3 and 0. Blended: 2.25 and -3. Calibrated: 1.625 and -1.
    assert verdict.logit == approx(1.625)
    assert verdict.p_fake == approx(1 / (1 + exp(-1.625)))
    assert [t.track_id for t in verdict.tracks] == [0, 1]
    assert [t.p_fake for t in verdict.tracks] == [approx(1 / (1 + exp(-1.625))), approx(1 / (1 + exp(1)))]
    # Frames: blended 2, 2.5, -3; calibrated 1.5, 1.75, -1.
    assert [f.p_fake for t in verdict.tracks for f in t.frames] == [
        approx(1 / (1 + exp(-1.5))),
        approx(1 / (1 + exp(-1.75))),
        approx(1 / (1 + exp(1))),
    ]
    # Members alone: m0 2 -> 1.5, m1 3 -> 2; the larger person of each.
    assert verdict.members == {"m0": approx(1 / (1 + exp(-1.5))), "m1": approx(1 / (1 + exp(-2)))}
    assert verdict.tracks[0].frames[0].landmarks is not None
    assert verdict.tracks[0].frames[1].landmarks is None  # filled from the past
    assert [f.frame_index for t in verdict.tracks for f in t.frames] == [0, 10, 20]


@pytest.mark.parametrize(
    ("rule", "logit"),
    [
        ("max", LN9),
        ("mean", log((0.25 + 0.9 + 0.75) / 3 / (1 - (0.25 + 0.9 + 0.75) / 3))),
        ("largest", LN3),
    ],
)
def test_rules_for_several_people(rule, logit):
    tracks = make_tracks([0, 1, 2], sides=[60, 70, 80])
    verdict = judge(tracks, {"m0": np.array([-LN3, LN9, LN3])}, make_bundle(tracks=rule))
    assert verdict.logit == approx(logit)
    assert verdict.members["m0"] == approx(verdict.p_fake)


def test_the_largest_is_the_largest_most_of_the_time():
    # Person 1 comes close for a moment; the longer side counts.
    tracks = make_tracks([0, 0, 0, 1, 1, 1], sides=[70, 70, 70, 60, 60, 900])
    verdict = judge(tracks, {"m0": np.array([-2.0] * 3 + [2.0] * 3)}, make_bundle(tracks="largest"))
    assert verdict.logit == approx(-2)


@pytest.mark.parametrize("frames", ["mean", "logit_mean", "median"])
@pytest.mark.parametrize("members", ["mean", "geometric_mean", "logit_mean"])
@pytest.mark.parametrize("tracks", ["max", "mean", "largest"])
def test_invariances(rng, frames, members, tracks):
    rules = {"frames": frames, "members": members, "tracks": tracks}
    ids = [0, 0, 0, 2, 2, 5]
    rows = make_tracks(ids, sides=[50, 51, 52, 90, 91, 30])
    logits = {f"m{i}": rng.normal(size=6) * 3 for i in range(3)}
    want = judge(rows, logits, make_bundle((1, 2, 5), temperature=1.3, bias=-0.2, **rules))

    # The order of the members, with their weights.
    turned = {f"m{2 - i}": column for i, column in enumerate(logits.values())}
    got = judge(rows, turned, make_bundle((5, 2, 1), temperature=1.3, bias=-0.2, **rules))
    assert got.p_fake == approx(want.p_fake)

    # All weights times a factor.
    got = judge(rows, logits, make_bundle((10, 20, 50), temperature=1.3, bias=-0.2, **rules))
    assert got.p_fake == approx(want.p_fake)

    # The order of the rows, and the numbers of the tracks.
    order = rng.permutation(6)
    shuffled = {name: column[order] for name, column in logits.items()}
    got = judge(rows[order], shuffled, make_bundle((1, 2, 5), temperature=1.3, bias=-0.2, **rules))
    assert got.p_fake == approx(want.p_fake)

    # The inputs are left alone, and an extra column is not looked at.
    got = judge(
        rows, logits | {"other": np.full(6, np.nan)}, make_bundle((1, 2, 5), temperature=1.3, bias=-0.2, **rules)
    )
    assert got == want
    assert sigmoid(got.logit) == approx(got.p_fake)


@pytest.mark.parametrize("frames", ["mean", "logit_mean", "median"])
@pytest.mark.parametrize("tracks", ["max", "mean", "largest"])
@pytest.mark.parametrize("logit", [-1e4, -100.0, 100.0, 1e4])
def test_extreme_logits_stay_scores(frames, tracks, logit):
    rows = make_tracks([0, 0, 1])
    verdict = judge(rows, {"m0": np.full(3, logit)}, make_bundle(frames=frames, tracks=tracks, temperature=0.5))
    assert 0 <= verdict.p_fake <= 1
    assert np.isfinite(verdict.logit)
    assert (verdict.p_fake > 0.5) == (logit > 0)
    assert type(verdict.p_fake) is type(verdict.logit) is float


def test_calibration_keeps_the_order():
    rows = make_tracks([0])
    logits = np.linspace(-5, 5, 11)
    scores = [judge(rows, {"m0": np.array([x])}, make_bundle(temperature=3, bias=1)).p_fake for x in logits]
    assert scores == sorted(scores)
    assert scores[0] == approx(1 / (1 + exp(5 / 3 - 1)))
