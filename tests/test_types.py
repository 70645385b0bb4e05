from __future__ import annotations

import dataclasses
import json
import pickle

import numpy as np
import pytest

from dfengine.types import ErrorInfo, Faces, Frames, FrameScore, Image, Tracks, TrackScore, VideoScore


def faces(n=2, **change):
    columns = {
        "image_index": np.arange(n, dtype=np.int64),
        "xyxy": np.zeros((n, 4), np.float32),
        "landmarks": np.zeros((n, 5, 2), np.float32),
        "confidence": np.linspace(1, 0, n, dtype=np.float32),
    }
    return Faces(**columns | change)


def tracks(n=3, **change):
    columns = {
        "track_id": np.zeros(n, np.int64),
        "frame_index": np.arange(n, dtype=np.int64) * 10,
        "pts_seconds": np.arange(n, dtype=np.float64),
        "xyxy": np.zeros((n, 4), np.float32),
        "landmarks": np.zeros((n, 5, 2), np.float32),
        "confidence": np.ones(n, np.float32),
        "detected": np.ones(n, np.bool_),
    }
    return Tracks(**columns | change)


def frames(n=2, **change):
    columns = {
        "images": tuple(Image((np.zeros((2, 2), np.uint8),), matrix="gray") for _ in range(n)),
        "pts_seconds": np.arange(n, dtype=np.float64),
        "frame_index": np.arange(n, dtype=np.int64),
    }
    return Frames(**columns | change)


@pytest.mark.parametrize("make", [faces, tracks, frames])
@pytest.mark.parametrize("n", [0, 1, 5])
def test_columns_of_one_length(make, n):
    assert len(make(n)) == n


@pytest.mark.parametrize("make", [faces, tracks, frames])
def test_values_are_frozen(make):
    value = make(1)
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign"):
        setattr(value, dataclasses.fields(value)[0].name, None)


@pytest.mark.parametrize(
    ("make", "change", "message"),
    [
        (faces, {"image_index": np.zeros(2, np.int32)}, r"image_index must be int64 with 1 axes, got int32 \(2,\)"),
        (faces, {"xyxy": np.zeros((2, 4))}, r"xyxy must be float32 with 2 axes, got float64 \(2, 4\)"),
        (faces, {"xyxy": np.zeros((2, 5), np.float32)}, r"xyxy must have shape \(2, 4\) .*got \(2, 5\)"),
        (faces, {"xyxy": np.zeros((3, 4), np.float32)}, r"xyxy must have shape \(2, 4\) .*got \(3, 4\)"),
        (faces, {"landmarks": np.zeros((2, 10), np.float32)}, r"landmarks must be float32 with 3 axes"),
        (faces, {"landmarks": np.zeros((2, 6, 2), np.float32)}, r"landmarks must have shape \(2, 5, 2\)"),
        (faces, {"confidence": np.zeros(1, np.float32)}, r"confidence must have shape \(2,\)"),
        (faces, {"image_index": np.zeros(0, np.int64)}, r"xyxy must have shape \(0, 4\)"),
        (tracks, {"track_id": np.zeros(3, np.int32)}, "track_id must be int64"),
        (tracks, {"frame_index": np.zeros(2, np.int64)}, r"frame_index must have shape \(3,\)"),
        (tracks, {"pts_seconds": np.zeros(3, np.float32)}, "pts_seconds must be float64"),
        (tracks, {"detected": np.zeros(3, np.uint8)}, "detected must be bool"),
        (tracks, {"landmarks": np.zeros((3, 5, 3), np.float32)}, r"landmarks must have shape \(3, 5, 2\)"),
        (tracks, {"confidence": np.zeros(3)}, "confidence must be float32"),
        (frames, {"pts_seconds": np.zeros(3)}, r"pts_seconds must have shape \(2,\)"),
        (frames, {"frame_index": np.zeros(2, np.int32)}, "frame_index must be int64"),
    ],
)
def test_columns_are_checked(make, change, message):
    with pytest.raises(ValueError, match=message):
        make(**change)


def test_rows_of_faces():
    some = faces(4)
    assert some[some.confidence > 0.5].image_index.tolist() == [0, 1]
    assert some[np.array([3, 1])].image_index.tolist() == [3, 1]
    assert some[1:3].image_index.tolist() == [1, 2]
    assert len(some[np.zeros(4, bool)]) == 0
    assert len(Faces.empty()) == 0


def test_rows_of_tracks():
    some = tracks(4)
    assert some[some.frame_index > 10].frame_index.tolist() == [20, 30]
    assert some[::-1].pts_seconds.tolist() == [3, 2, 1, 0]
    assert len(some[np.zeros(4, bool)]) == 0


def test_tracks_are_joined_one_behind_the_other():
    joined = Tracks.concatenate([tracks(2), tracks(0), tracks(3, track_id=np.full(3, 7))])
    assert joined.track_id.tolist() == [0, 0, 7, 7, 7]
    assert joined.frame_index.tolist() == [0, 10, 0, 10, 20]
    assert len(Tracks.concatenate([tracks(0)])) == 0


def test_values_print_their_shapes():
    many, picture = 500, Image((np.zeros((1080, 1920), np.uint8), *[np.zeros((540, 960), np.uint8)] * 2), rotation=90)
    assert repr(faces(many)) == (
        "Faces(image_index=int64[500], xyxy=float32[500, 4], landmarks=float32[500, 5, 2], confidence=float32[500])"
    )
    assert repr(tracks(many)) == (
        "Tracks(track_id=int64[500], frame_index=int64[500], pts_seconds=float64[500], "
        "xyxy=float32[500, 4], landmarks=float32[500, 5, 2], confidence=float32[500], detected=bool[500])"
    )
    assert repr(picture) == (
        "Image(components=(uint8[1080, 1920], uint8[540, 960], uint8[540, 960]), bit_depth=8, matrix='bt601', "
        "full_range=False, subsampling_xy=(1, 1), rotation=90, mirrored=False, pixel_aspect=1.0, transfer='sdr')"
    )
    assert repr(frames(3, images=(picture,) * 3)) == (
        "Frames(images=<3 of 1920x1080>, pts_seconds=float64[3], frame_index=int64[3], is_last=True)"
    )
    assert repr(frames(0)).startswith("Frames(images=(), ")


# -- Image -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rotation", "hw"), [(0, (4, 6)), (90, (6, 4)), (180, (4, 6)), (270, (6, 4))])
def test_upright_size(rotation, hw):
    assert Image((np.zeros((4, 6), np.uint8),), matrix="gray", rotation=rotation).upright_hw == hw


def test_bytes_of_an_image():
    planes = (np.zeros((4, 6), np.uint16), np.zeros((2, 3), np.uint16), np.zeros((2, 3), np.uint16))
    assert Image(planes, 10, subsampling_xy=(2, 2)).nbytes == 2 * (24 + 6 + 6)


def test_rgb_is_wrapped_not_copied():
    rgb = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    image = Image.from_rgb(rgb)
    assert (image.matrix, image.full_range, image.subsampling_xy) == ("rgb", True, (1, 1))
    for c in range(3):
        assert np.shares_memory(image.components[c], rgb)
        np.testing.assert_array_equal(image.components[c], rgb[..., c])


@pytest.mark.parametrize(
    ("rgb", "message"),
    [
        (np.zeros((4, 4), np.uint8), "rgb must be uint8 with 3 axes"),
        (np.zeros((4, 4, 4), np.uint8), r"rgb must have shape \(None, None, 3\) \(None: any\), got \(4, 4, 4\)"),
        (np.zeros((4, 4, 3), np.float32), "rgb must be uint8 with 3 axes, got float32"),
    ],
)
def test_what_is_no_rgb_picture(rgb, message):
    with pytest.raises(ValueError, match=message):
        Image.from_rgb(rgb)


# -- VideoScore --------------------------------------------------------------------------------------------------------

FAILED = ErrorInfo("DecodeError", "decode", "damaged")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"status": "ok"}, "p_fake is given exactly when status is 'ok', got 'ok' and None"),
        ({"status": "no_face", "p_fake": 0.5}, "p_fake is given exactly when status is 'ok'"),
        ({"status": "error", "p_fake": 0.5, "error": FAILED}, "p_fake is given exactly when status is 'ok'"),
        ({"status": "ok", "p_fake": 1.01}, r"p_fake must be in \[0, 1\], got 1.01"),
        ({"status": "ok", "p_fake": -0.01}, r"p_fake must be in \[0, 1\], got -0.01"),
        ({"status": "ok", "p_fake": float("nan")}, r"p_fake must be in \[0, 1\], got nan"),
        ({"status": "error"}, "error is given exactly when status is 'error', got 'error' and None"),
        ({"status": "ok", "p_fake": 0.5, "error": FAILED}, "error is given exactly when status is 'error'"),
        ({"status": "no_face", "error": FAILED}, "error is given exactly when status is 'error'"),
        ({"status": "ok", "p_fake": 1.0, "logit": float("inf")}, "logit must be finite, got inf"),
        ({"status": "ok", "p_fake": 1.0, "logit": float("nan")}, "logit must be finite, got nan"),
    ],
)
def test_scores_that_contradict_themselves(fields, message):
    with pytest.raises(ValueError, match=message):
        VideoScore("a.mp4", **fields)


@pytest.mark.parametrize("p_fake", [0.0, 0.5, 1.0])
def test_all_probabilities_are_scores(p_fake):
    assert VideoScore("a.mp4", "ok", p_fake).p_fake == p_fake


def test_to_dict_is_plain_and_in_the_order_of_the_fields():
    frame = FrameScore(3, 0.12, (1.0, 2.0, 3.0, 4.0), ((1.0, 2.0),) * 5, 0.75)
    filled = dataclasses.replace(frame, frame_index=4, landmarks=None)
    score = VideoScore(
        "a.mp4", "ok", 0.75, 1.1, None, ("truncated",), (TrackScore(0, 0.75, (frame, filled)),), {"m": 0.75},
        17, 2, "default", "cpu", "pyav", None, {"decode": 0.5},
    )  # fmt: skip
    plain = score.to_dict()
    assert list(plain) == [f.name for f in dataclasses.fields(VideoScore)]
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain  # lists, numbers and strings only
    assert plain["tracks"][0]["frames"][0]["box"] == [1.0, 2.0, 3.0, 4.0]
    assert plain["tracks"][0]["frames"][0]["landmarks"] == [[1.0, 2.0]] * 5
    assert plain["tracks"][0]["frames"][1]["landmarks"] is None
    assert plain["members"] == {"m": 0.75}
    assert plain["error"] is None


def test_scores_print_in_a_line():
    frame = FrameScore(3, 0.12, (1.0, 2.0, 3.0, 4.0), ((1.0, 2.0),) * 5, 0.75)
    track = TrackScore(0, 0.75, (frame,) * 17)
    assert repr(track) == "TrackScore(track_id=0, p_fake=0.7500, frames=<17>)"
    ok = VideoScore("a.mp4", "ok", 0.75, tracks=(track,), frames_scored=17, bundle="b", timings={"decode": 0.5})
    assert repr(ok) == (
        "VideoScore(path='a.mp4', status='ok', p_fake=0.7500, tracks=<1>, frames_scored=17, warnings=<0>, "
        "bundle='b', 0.50 s)"
    )
    failed = VideoScore("a.mp4", "error", error=FAILED, warnings=("truncated",))
    assert repr(failed) == (
        "VideoScore(path='a.mp4', status='error', error=ErrorInfo(type='DecodeError', stage='decode', "
        "message='damaged'), warnings=<1>, bundle='', 0.00 s)"
    )


def test_scores_pickle_and_compare():
    score = VideoScore("a.mp4", "ok", 0.75, members={"m": 0.75}, timings={"decode": 0.5})
    again = pickle.loads(pickle.dumps(score))
    assert again == score
    assert again.members == {"m": 0.75}
    assert again != dataclasses.replace(score, members={"m": 0.5})
    assert again != dataclasses.replace(score, timings={})


def test_to_dict_of_an_error():
    plain = VideoScore("a.mp4", "error", error=FAILED).to_dict()
    assert plain["error"] == {"type": "DecodeError", "stage": "decode", "message": "damaged"}
    assert plain["p_fake"] is None
    assert plain["tracks"] == []
