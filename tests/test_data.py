"""Batches: what an epoch holds, and that chance comes from seed, epoch and position alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")  # the `train` extra

from assets import write_face_table  # noqa: E402

from dfengine.bundle import CropSpec  # noqa: E402
from dfengine.errors import OptionError  # noqa: E402
from dfengine.stages.crop import crop_faces  # noqa: E402
from dfengine.types import Image  # noqa: E402
from training.augment import AugmentSettings  # noqa: E402
from training.data import Batch, Batches, DataError, DataSettings, FaceTable, _trim  # noqa: E402
from training.fakes import FakeSettings  # noqa: E402

torch.set_num_threads(1)
CROP = CropSpec(input_hw=(48, 48), margin_ratio=0.3, mean=(0.5,) * 3, std=(0.25,) * 3)
PLAIN = AugmentSettings()
ALL = AugmentSettings(
    flip=0.5, box_jitter=0.04, downscale=0.5, downscale_face_px=(20.0, 50.0), colour=0.5, blur=0.5, noise=0.5, jpeg=0.5,
    h264=0.3, mixup=0.3, cutmix=0.3,
)  # fmt: skip
NO_FAKES, PAIRS, SOME = FakeSettings(), FakeSettings(ratio=1.0, swap=0.5), FakeSettings(ratio=0.5)

REALS = [(f"r{i}.mp4", 0, f"p{i}", "train") for i in range(6)]
FAKES = [(f"f{i}.mp4", 1, f"p{i % 6}", "train") for i in range(14)]
HELD_OUT = [("vr.mp4", 0, "q0", "val"), ("vf.mp4", 1, "q0", "val"), ("tr.mp4", 0, "q1", "test")]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> FaceTable:
    folder = tmp_path_factory.mktemp("faces")
    return FaceTable.load(write_face_table(folder, REALS + FAKES + HELD_OUT, frames=3, tracks=2))


@pytest.fixture(scope="module")
def reals(table: FaceTable) -> FaceTable:
    return table[table.label == 0]


def make(
    table: FaceTable,
    augment: AugmentSettings = PLAIN,
    fakes: FakeSettings = NO_FAKES,
    *,
    crop: CropSpec = CROP,
    split: str = "train",
    batch: int = 4,
    balance: str = "undersample",
    per_video: int = 1,
    workers: int = 0,
    **others: object,
) -> Batches:
    data = DataSettings(balance=balance, per_video=per_video, workers=workers)
    return Batches(table, crop, data, augment, fakes, split=split, seed=7, batch=batch, **others)


def assert_same(one: Batch, other: Batch, atol: float = 0.0) -> None:
    assert one.video == other.video
    np.testing.assert_array_equal(one.rows, other.rows)
    for name in ("x", "y", "weight", "mask", "audio"):
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=0, atol=atol, equal_nan=True)


def part(batch: Batch, rank: int, world: int) -> Batch:
    """What one process gets."""
    tensors = {n: getattr(batch, n) for n in ("x", "y", "weight", "mask", "audio")}
    some = {n: None if t is None else t[rank::world] for n, t in tensors.items()}
    return replace(batch, **some, video=batch.video[rank::world], rows=batch.rows[rank::world])


# -- what an epoch holds -----------------------------------------------------------------------------------------------


def test_fakes_are_undersampled_anew_each_epoch(table: FaceTable) -> None:
    batches = make(table, per_video=1)
    epochs = [[v for b in batches.epoch(e) for v in b.video] for e in range(4)]
    assert len(batches) == 3  # 6 reals and 6 of 14 fakes
    for videos in epochs:
        assert Counter(v[0] for v in videos) == {"r": 6, "f": 6}
        assert max(Counter(videos).values()) == 1, "one face of a video"
    assert len({frozenset(videos) for videos in epochs}) == 4
    assert all(float(y) == (v[0] == "f") for b in batches.epoch(0) for v, y in zip(b.video, b.y, strict=True))


def test_reals_are_undersampled_where_they_are_more(table: FaceTable) -> None:
    few = table[(table.label == 0) | np.isin(table.path, ["f0.mp4", "f1.mp4"])]
    (batch,) = make(few).epoch(0)
    assert Counter(v[0] for v in batch.video) == {"r": 2, "f": 2}


def test_faces_of_a_video_take_turns(table: FaceTable) -> None:
    batches = make(table)
    rows = [int(r) for e in range(60) for b in batches.epoch(e) for v, r in zip(b.video, b.rows[:, 0], strict=True)
            if v == "r0.mp4"]  # fmt: skip
    assert len(rows) == 60
    assert len(set(rows)) == 6, "all three frames of both tracks"


@pytest.mark.parametrize(("per_video", "samples"), [(2, 24), (0, 72), (100, 72)])
def test_several_or_all_faces_of_a_video(table: FaceTable, per_video: int, samples: int) -> None:
    rows = [int(r) for b in make(table, per_video=per_video).epoch(0) for r in b.rows[:, 0]]
    assert len(rows) == len(set(rows)) == samples


def test_class_weights_make_up_for_the_shares(table: FaceTable) -> None:
    batches = make(table, balance="weights", batch=20)
    (batch,) = batches.epoch(0)
    assert Counter(v[0] for v in batch.video) == {"r": 6, "f": 14}
    assert batch.weight.mean() == pytest.approx(1)
    assert batch.weight[batch.y == 0].sum() == pytest.approx(10)
    (plain,) = make(table, balance="none", batch=20).epoch(0)
    assert plain.weight.unique().tolist() == [1]


def test_pairs_are_a_real_face_and_its_fake(reals: FaceTable) -> None:
    batches = make(reals, fakes=PAIRS)
    assert len(batches) == 3
    seen = []
    for batch in batches.epoch(0):
        assert batch.y.tolist() == [0, 0, 1, 1]
        assert batch.video[2:] == [f"{v}#fake" for v in batch.video[:2]]
        np.testing.assert_array_equal(batch.rows[:2], batch.rows[2:])
        assert batch.mask.shape == (4, 1, 3, 3)
        assert batch.mask[:2].sum() == 0
        assert (batch.mask[2:].amax(dim=(1, 2, 3)) > 0.02).all()
        within = (batch.x[:2] - batch.x[2:]).abs().mean(dim=(1, 2, 3))
        across = (batch.x[:2] - batch.x[2:].roll(1, 0)).abs().mean(dim=(1, 2, 3))
        assert (within < across).all()
        seen += batch.video[:2]
    assert sorted(seen) == [f"r{i}.mp4" for i in range(6)]


def test_pairs_share_their_augmentation(reals: FaceTable) -> None:
    nothing = FakeSettings(ratio=1.0, swap=0.0)
    augment = replace(ALL, mixup=0.0, cutmix=0.0)
    for batch in make(reals, augment, nothing).epoch(0):
        outside = (batch.mask[2:] == 0).float().repeat_interleave(16, 2).repeat_interleave(16, 3).expand(-1, 3, -1, -1)
        difference = ((batch.x[:2] - batch.x[2:]).abs() * outside).sum() / outside.sum()
        assert difference < 0.05, "of 4, where nothing was blended; codecs spread a little"


def test_views_are_one_pair_through_several_cameras(reals: FaceTable) -> None:
    plain = make(reals, fakes=replace(PAIRS, views=2))
    assert len(plain) == 6
    for batch in plain.epoch(0):
        assert batch.video[:2] == batch.video[:1] * 2, "views of one pair"
        torch.testing.assert_close(batch.x[:2], batch.x[[1, 0]], rtol=0, atol=0)
    for batch in make(reals, replace(ALL, mixup=0.0, cutmix=0.0), fakes=replace(PAIRS, views=2)).epoch(0):
        assert (batch.x[0] - batch.x[1]).abs().mean() > 0.02, "each has its own luck"
    shared = [
        b for rank in (0, 1) for b in make(reals, fakes=replace(PAIRS, views=2), batch=8, rank=rank, world=2).epoch(0)
    ]
    for batch in shared:
        assert len(set(batch.video)) == 2, "a process has all views of its pairs"
    with pytest.raises(DataError, match=r"a multiple of 8 \(2 \* fakes\.views \* processes\), got 4"):
        make(reals, fakes=replace(PAIRS, views=2), world=2)


def test_only_what_the_crop_shows_is_augmented(table: FaceTable) -> None:
    """And the crop is the same."""
    batches = make(table)
    pictures, box = [table.read_crop(0)], table.in_crop(0, table.box[0].reshape(2, 2)).reshape(1, 4)
    narrow = replace(batches.crop, margin_ratio=0.0)
    trimmed, moved = _trim(pictures, box, narrow)
    assert trimmed[0].shape[0] < pictures[0].shape[0]
    assert trimmed[0].shape[1] < pictures[0].shape[1]
    whole, part = (
        crop_faces([Image.from_rgb(p[0])], b, np.zeros(1, np.int64), narrow)
        for p, b in ((pictures, box), (trimmed, moved))
    )
    np.testing.assert_allclose(part, whole, rtol=0, atol=1e-4)


def test_pairs_of_evaluation_are_degraded_alike_every_time(table: FaceTable) -> None:
    no_fakes = table[table.label == 0]
    ramped = replace(ALL, ramp_epochs=100.0)
    (clean,), (plain,), (again,) = (
        make(no_fakes, augment, PAIRS, split="val", batch=100).epoch(0) for augment in (PLAIN, ramped, ramped)
    )
    assert plain.y.tolist() == clean.y.tolist() == [0.0, 1.0] * 6, "nothing is mixed"
    torch.testing.assert_close(plain.x, again.x, rtol=0, atol=0)
    assert (plain.x - clean.x).abs().mean() > 0.02
    pairs = plain.x.unflatten(0, (-1, 2))
    within, across = (pairs[:, 0] - pairs[:, 1]).abs().mean(), (pairs[:, 0] - pairs[:, 1].roll(1, 0)).abs().mean()
    assert within < 0.7 * across, "a real and its fake have been through the same"
    (labelled,) = make(table, ALL, PAIRS, split="val", batch=100).epoch(0)
    (bare,) = make(table, PLAIN, PAIRS, split="val", batch=100).epoch(0)
    torch.testing.assert_close(labelled.x, bare.x, rtol=0, atol=0, msg="what has fakes is evaluated as it is")


def test_labelled_fakes_fill_the_rest_and_their_masks_are_unknown(table: FaceTable) -> None:
    batches = make(table, fakes=SOME, per_video=4)
    kinds = Counter()
    for batch in batches.epoch(0):
        assert batch.y.tolist() == [0, 0, 1, 1]
        for video, mask in zip(batch.video[2:], batch.mask[2:], strict=True):
            kinds[video.endswith("#fake")] += 1
            assert mask.isnan().all() == (not video.endswith("#fake"))
    assert 4 <= kinds[True] <= 20
    assert kinds.total() == 24


def test_swaps_come_from_other_sources_of_the_same_split(reals: FaceTable) -> None:
    batches = make(reals, fakes=replace(PAIRS, swap=1.0))
    for n in range(40):
        row = np.array([n % len(batches.faces)])
        donor = batches.draw_donor(row, np.random.default_rng(n))
        assert batches.faces.source_id[donor[0]] != batches.faces.source_id[row[0]]
    assert set(batches.faces.split_name) == {"train"}


def test_a_face_that_was_filled_in_has_the_landmarks_seen_before(reals: FaceTable) -> None:
    landmarks = reals.landmarks.copy()
    landmarks[1] = landmarks[2] = np.nan
    batches = make(replace(reals, landmarks=landmarks), fakes=PAIRS, batch=2)
    np.testing.assert_array_equal(batches._landmarks[[0, 1, 2]], reals.landmarks[[0, 0, 0]])
    landmarks[3] = np.nan  # the first of the next track
    with pytest.raises(DataError, match="pseudo-fakes need landmarks, 1 faces have none; run training"):
        make(replace(reals, landmarks=landmarks), fakes=PAIRS)


@pytest.mark.parametrize("fakes", [NO_FAKES, SOME], ids=["labelled", "pairs"])
def test_every_epoch_has_as_many_full_batches(table: FaceTable, fakes: FakeSettings) -> None:
    """Also where videos have fewer faces than are asked for: the rate of learning is planned by their number."""
    uneven = table[(np.arange(len(table)) % 7 != 0) | (table.label == 0)]
    batches = make(uneven, fakes=fakes, per_video=5)
    for epoch in range(4):
        assert [len(b) for b in batches.epoch(epoch)] == [4] * len(batches)


# -- evaluation --------------------------------------------------------------------------------------------------------


def test_evaluation_sees_every_face_once_and_as_the_engine_cuts_it(table: FaceTable) -> None:
    batches = make(table, ALL, split="val", batch=5)
    found = list(batches.epoch(0))
    assert [len(b) for b in found] == [5, 5, 2]
    assert len(batches) == 3
    rows = np.concatenate([b.rows for b in found])[:, 0]
    faces = table.split("val").faces
    assert rows.tolist() == list(range(len(faces)))
    images = [Image.from_rgb(faces.read_crop(r)) for r in rows]
    boxes = np.stack([faces.in_crop(r, faces.box[r].reshape(2, 2)).reshape(4) for r in rows])
    wanted = crop_faces(images, boxes, np.arange(len(rows)), CROP)
    np.testing.assert_array_equal(torch.cat([b.x for b in found]).numpy(), wanted)
    assert_same(next(batches.epoch(5)), found[0])
    assert [b.mask for b in found] == [None] * 3


def test_evaluation_of_reals_alone_has_a_pseudo_fake_of_each(table: FaceTable) -> None:
    batches = make(table, ALL, PAIRS, split="test", batch=4)
    found = list(batches.epoch(0))
    assert [v for b in found for v in b.video] == ["tr.mp4", "tr.mp4#fake"] * 6
    assert torch.cat([b.y for b in found]).tolist() == [0, 1] * 6
    assert_same(next(batches.epoch(3)), found[0])
    assert "#fake" not in str([b.video for b in make(table, ALL, PAIRS, split="val").epoch(0)])


def test_the_training_split_can_be_evaluated(table: FaceTable) -> None:
    batches = make(table, ALL, split="train", training=False, batch=64)
    assert sum(len(b) for b in batches.epoch(0)) == len(table.split("train"))


# -- chance ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fakes", [NO_FAKES, SOME], ids=["labelled", "pairs"])
def test_processes_share_what_one_would_have_seen(table: FaceTable, fakes: FakeSettings) -> None:
    whole = list(make(table, ALL, fakes, batch=8, per_video=2).epoch(1))
    for rank in range(2):
        mine = list(make(table, ALL, fakes, batch=8, per_video=2, rank=rank, world=2, workers=1).epoch(1))
        assert len(mine) == len(whole) > 1
        for ours, theirs in zip(mine, whole, strict=True):
            assert_same(ours, part(theirs, rank, 2), atol=1e-5)


def test_a_run_goes_on_at_any_batch(table: FaceTable) -> None:
    whole = list(make(table, ALL, SOME).epoch(2))
    for start in range(len(whole) + 1):
        rest = list(make(table, ALL, SOME, workers=2).epoch(2, start))
        assert len(rest) == len(whole) - start
        for ours, theirs in zip(rest, whole[start:], strict=True):
            assert_same(ours, theirs)


def test_seeds_and_epochs_differ(table: FaceTable) -> None:
    first = next(make(table, ALL).epoch(0))
    batches = make(table, ALL)
    batches.seed = 8
    assert not torch.equal(first.x, next(batches.epoch(0)).x)
    assert not torch.equal(first.x, next(make(table, ALL).epoch(1)).x)


def test_evaluation_is_shared_too(table: FaceTable) -> None:
    whole = list(make(table, split="val", batch=5).epoch(0))
    for rank in range(2):
        mine = list(make(table, split="val", batch=5, rank=rank, world=2).epoch(0))
        for ours, theirs in zip(mine, whole, strict=True):
            assert_same(ours, part(theirs, rank, 2))


def test_threads_end_when_the_reader_stops_early(table: FaceTable) -> None:
    epoch = make(table, ALL, workers=2).epoch(0)
    next(epoch)
    epoch.close()


def test_strengths_grow_with_the_epochs(table: FaceTable) -> None:
    noise = AugmentSettings(noise=1.0, noise_sigma=(0.0, 0.3))

    def harm(augment: AugmentSettings, epoch: int) -> float:
        pairs = zip(make(table, augment).epoch(epoch), make(table).epoch(epoch), strict=True)
        return float(np.mean([float((a.x - b.x).abs().mean()) for a, b in pairs]))

    ramped = replace(noise, ramp_epochs=4.0)
    assert harm(ramped, 0) < 0.4 * harm(noise, 0)
    assert harm(ramped, 5) == harm(noise, 5)


# -- clips and sound ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fakes", [NO_FAKES, SOME], ids=["labelled", "pairs"])
def test_clips_are_consecutive_rows_of_one_track(table: FaceTable, fakes: FakeSettings) -> None:
    batches = make(table, ALL, fakes, clip_frames=2)
    starts = set()
    for epoch in range(3):
        for batch in batches.epoch(epoch):
            assert batch.x.shape == (4, 2, 3, 48, 48)
            for rows in batch.rows:
                assert rows[1] == rows[0] + 1
                assert batches.faces.track[rows[0]] == batches.faces.track[rows[1]]
                starts.add(int(rows[0]) % 3)
    assert starts == {0, 1}, "of three frames, two are starts"


def test_clips_of_evaluation_are_those_of_the_engine(table: FaceTable) -> None:
    rows = np.concatenate([b.rows for b in make(table, clip_frames=2, split="test").epoch(0)])
    assert rows.tolist() == [[0, 1], [1, 2], [3, 4], [4, 5]]


def test_a_short_track_repeats_its_last_face(table: FaceTable) -> None:
    assert next(make(table, clip_frames=5, split="test").epoch(0)).rows.tolist() == [[0, 1, 2, 2, 2], [3, 4, 5, 5, 5]]
    assert all(r[2] == r[4] == r[0] + 2 for b in make(table, clip_frames=5).epoch(0) for r in b.rows)


def test_sound_comes_from_the_video_itself(table: FaceTable) -> None:
    def listen(path: Path) -> np.ndarray:
        assert path.parent == table.source
        return np.full((4, 9), float(path.stem[1:]), np.float32)

    batch = next(make(table, clip_frames=2, audio=listen).epoch(0))
    assert batch.audio.shape == (4, 4, 9)
    assert batch.audio[:, 0, 0].tolist() == [float(v[1:-4]) for v in batch.video]
    assert next(make(table, clip_frames=2).epoch(0)).audio is None


# -- what cannot be done -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"fakes": NO_FAKES},
            r"split 'train' of .*: training needs both classes, there are 6 real and 0 fake files; add the other, or "
            r"make fakes \(fakes.ratio = 1\)",
        ),
        ({"fakes": SOME}, "fakes.ratio 0.5 needs fakes for the rest, there are 6 real and 0 fake files; set 1"),
        ({"fakes": PAIRS, "batch": 5}, r"the batch must be a multiple of 2 \(2 \* fakes\.views \* processes\), got 5"),
        ({"fakes": PAIRS, "batch": 6, "world": 2}, r"a multiple of 4 \(2 \* fakes\.views \* processes\), got 6"),
        ({"fakes": PAIRS, "batch": 14}, "an epoch has 12 samples, less than one batch of 14; lower train.batch"),
        ({"fakes": PAIRS, "balance": "weights"}, "with fakes.ratio 1.0 data.balance must be 'undersample'"),
    ],
)
def test_sets_that_cannot_be_trained_on(reals: FaceTable, options: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        make(reals, **options)


def test_a_set_of_fakes_alone(table: FaceTable) -> None:
    fakes = table[table.label == 1]
    with pytest.raises(DataError, match="training needs both classes, there are 0 real and 14 fake files"):
        make(fakes)
    with pytest.raises(DataError, match="pseudo-fakes are made from real faces, there are 0 real"):
        make(fakes, fakes=PAIRS)


def test_other_mistakes(table: FaceTable) -> None:
    with pytest.raises(DataError, match="2 processes cannot share a batch of 3 equally"):
        make(table, batch=3, world=2)
    with pytest.raises(DataError, match="no face is in split 'dev', only in train, val, test"):
        make(table, split="dev")
    with pytest.raises(OptionError, match="per_video must be 0 or more, got -1"):
        DataSettings(per_video=-1)
