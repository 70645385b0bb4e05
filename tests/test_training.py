"""The training package, on one public-domain face in several sizes that play different people."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")  # the `train` extra
skimage_data = pytest.importorskip("skimage.data")

from dfengine.bundle import Bundle, Calibration  # noqa: E402
from dfengine.detect import Detector  # noqa: E402
from dfengine.runtime import make_session  # noqa: E402
from training import degrade, evaluate, export, faces, fakes, metrics, train  # noqa: E402
from training.faces import FaceSet  # noqa: E402
from training.model import SPEC, make_model  # noqa: E402

# Names that identity_of takes apart and is_held_out sends to both splits.
PHOTOS = (
    *(f"us-house/a-person{i}.jpg" for i in range(6)),
    *(f"webmorphR.stim/inst_{mood}_front_{i:03}_03.jpg" for i in (1, 2, 3) for mood in ("neutral", "smiling")),
)


@pytest.fixture(scope="module")
def people() -> FaceSet:
    """The astronaut: as she is, mirrored, and darker by photo."""
    rgb = np.ascontiguousarray(skimage_data.astronaut())
    detector = Detector(faces.DETECTOR)
    cuts = []
    for view in (rgb, np.ascontiguousarray(rgb[:, ::-1])):
        cut = faces.cut_face(view, detector)
        assert cut is not None
        cuts.append(cut)
    rows = [cuts[i % 2] for i in range(len(PHOTOS))]
    return FaceSet(
        np.stack([(r[0] * (1 - 0.03 * i)).astype(np.uint8) for i, r in enumerate(rows)]),
        np.stack([r[1] for r in rows]),
        np.stack([r[2] for r in rows]),
        np.array([faces.identity_of(p) for p in PHOTOS]),
        np.array(["test"] * len(PHOTOS)),
        np.array(PHOTOS),
    )


def make_pairs(people: FaceSet, rows: list[int], donors: list[int], seed: int) -> fakes.Pairs:
    rng = torch.Generator().manual_seed(seed)
    return fakes.make_pairs(*train.photos(people, np.array(rows)), *train.photos(people, np.array(donors))[::2], rng)


def test_cut_face_puts_the_box_where_the_spec_says(people: FaceSet) -> None:
    size = people.xyxy[:, 2:] - people.xyxy[:, :2]
    np.testing.assert_allclose(size.max(axis=1), faces.FACE_PX, atol=0.01)
    np.testing.assert_allclose((people.xyxy[:, 2:] + people.xyxy[:, :2]) / 2, faces.STORED.input_hw[0] / 2, atol=0.01)
    inside = (people.landmarks > people.xyxy[:, None, :2]) & (people.landmarks < people.xyxy[:, None, 2:])
    assert inside.all()


def test_cut_face_of_an_empty_photo_is_none() -> None:
    assert faces.cut_face(np.full((200, 200, 3), 90, np.uint8), Detector(faces.DETECTOR)) is None


def test_face_set_survives_its_file(people: FaceSet, tmp_path: Path) -> None:
    people.save(tmp_path / "faces.npz")
    loaded = FaceSet.load(tmp_path / "faces.npz")
    for field in dataclasses.fields(FaceSet):
        np.testing.assert_array_equal(getattr(loaded, field.name), getattr(people, field.name))


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("us-house/ben-ray-lujan.jpg", "us-senate/ben-lujan.jpg", True),
        ("us-house/jacky-rosen.jpg", "us-senate/jacky-rosen.jpg", True),
        ("webmorphR.stim/inst_neutral_front_018_03.jpg", "webmorphR.stim/inst_smiling_front_018_08.jpg", True),
        ("webmorphR.stim/inst_neutral_front_018_03.jpg", "webmorphR.stim/inst_neutral_front_019_03.jpg", False),
        ("us-house/al-green.jpg", "us-house/chip-roy.jpg", False),
    ],
)
def test_identity_of(one: str, other: str, same: bool) -> None:
    assert (faces.identity_of(one) == faces.identity_of(other)) is same


def test_split_keeps_people_apart() -> None:
    identity = np.array([f"person-{i // 3}" for i in range(3000)])
    held_out = faces.is_held_out(identity)
    assert not set(identity[held_out]) & set(identity[~held_out])
    assert abs(held_out.mean() - faces.HELD_OUT_RATIO) < 0.03


def test_check_disjoint_finds_a_planted_leak(people: FaceSet) -> None:
    train_set, held_out = people[:6], people[6:]
    faces.check_disjoint(train_set, held_out)
    leaked = dataclasses.replace(held_out, identity=np.array([*held_out.identity[:-1], train_set.identity[0]]))
    with pytest.raises(ValueError, match="1 identities are in both splits, the first is 'congress-person0'"):
        faces.check_disjoint(train_set, leaked)


def test_fakes_depend_on_the_seed_alone(people: FaceSet) -> None:
    first, again, other = (make_pairs(people, [0, 1, 2], [0, 2, 2], seed) for seed in (1, 1, 2))
    torch.testing.assert_close(first.fake, again.fake, rtol=0, atol=0)
    torch.testing.assert_close(first.real, again.real, rtol=0, atol=0)
    assert not torch.equal(first.fake, other.fake)


@pytest.mark.parametrize("donors", [[0, 1, 2, 3], [1, 2, 3, 4]], ids=["self_blended", "swap"])
def test_a_fake_differs_inside_its_mask_only(people: FaceSet, donors: list[int]) -> None:
    pairs = make_pairs(people, [0, 1, 2, 3], donors, seed=3)
    difference = (pairs.fake - pairs.real).abs().amax(dim=1, keepdim=True)
    assert difference[pairs.mask == 0].max() == 0
    for changed, mask in zip(difference, pairs.mask, strict=True):
        assert changed[mask > 0.5].mean() > 0.005, "more than rounding"
    assert pairs.fake.min() >= 0
    assert pairs.fake.max() <= 1


def test_masks_lie_on_the_face(people: FaceSet) -> None:
    rows = list(range(8)) * 4
    pairs = make_pairs(people, rows, rows, seed=5)
    assert ((pairs.mask >= 0) & (pairs.mask <= 1)).all()
    assert (pairs.mask.sum(dim=(1, 2, 3)) > 20).all(), "no mask is empty"
    at = fakes.pixel_centres(pairs.mask.shape[-1])
    for mask, (x1, y1, x2, y2) in zip(pairs.mask.flatten(1), pairs.xyxy, strict=True):
        # The box is tight on the sides of the face; the outline may reach a third of its width beyond.
        room = (x2 - x1) / 3
        inside = (at[:, 0] > x1 - room) & (at[:, 0] < x2 + room) & (at[:, 1] > y1 - room) & (at[:, 1] < y2 + room)
        assert mask[inside].sum() > 0.98 * mask.sum()


def test_real_and_fake_are_equally_sharp_on_average(people: FaceSet) -> None:
    rows = list(range(8)) * 12
    pairs = make_pairs(people, rows, rows, seed=7)
    real, fake = (evaluate.laplacian_variance(x) for x in (pairs.real, pairs.fake))
    labels = np.repeat(np.float32([0, 1]), len(rows))
    assert abs(metrics.auc(labels, np.concatenate([real, fake])) - 0.5) < 0.08


@pytest.mark.parametrize("codec", [degrade.Codec("jpeg", 40), degrade.Codec("h264", 32)], ids=lambda c: c.kind)
def test_degradation_treats_both_of_a_pair_alike(people: FaceSet, codec: degrade.Codec) -> None:
    rgb, xyxy, _ = train.photos(people, np.array([0, 0, 3, 3]))  # a pair is twice the same image here
    rng = torch.Generator().manual_seed(0)
    small, scale = degrade.shrink(rgb, 80)
    stored = degrade.store(degrade.random_camera(small, 1.0, rng), codec)
    crops = degrade.crop(stored, xyxy * scale, SPEC)
    np.testing.assert_array_equal(crops[0], crops[1])
    np.testing.assert_array_equal(crops[2], crops[3])
    assert np.abs(crops[0] - crops[2]).mean() > 0.01, "pairs differ from each other"


def test_make_batch_holds_reals_then_their_fakes(people: FaceSet) -> None:
    batch = train.make_batch(people, np.arange(10), 1.0, torch.Generator().manual_seed(0))
    crops = batch.crops
    assert crops.shape == (20, 3, *SPEC.input_hw)
    assert batch.labels.tolist() == [0] * 10 + [1] * 10
    assert (batch.masks[:10] == 0).all()
    assert (batch.masks[10:].amax(dim=(1, 2, 3)) > 0.1).all()
    within = (crops[:10] - crops[10:]).abs().mean(dim=(1, 2, 3))
    across = (crops[:10] - crops[10:].roll(1, 0)).abs().mean(dim=(1, 2, 3))
    assert (within < across).all()


def take_steps(trainer: train.Trainer, people: FaceSet, count: int) -> list[float]:
    batches = train.stream_batches(people, trainer.progress)
    losses = [trainer.step(batch) for _, batch in zip(range(count), batches)]  # noqa: B905 - the stream never ends
    batches.close()
    return losses


def test_resume_goes_on_as_if_nothing_had_happened(
    people: FaceSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "PAIRS", 4)
    whole = train.Trainer(seed=3, seconds=60)
    losses = take_steps(whole, people, 4)

    first = train.Trainer(seed=3, seconds=60)
    assert take_steps(first, people, 2) == losses[:2]
    first.save(tmp_path)
    resumed = train.Trainer(seed=99, seconds=60)
    resumed.load(tmp_path)
    assert take_steps(resumed, people, 2) == losses[2:]
    for ours, theirs in zip(resumed.average.state_dict().values(), whole.average.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_a_torn_checkpoint_is_refused(tmp_path: Path) -> None:
    trainer = train.Trainer(seed=0, seconds=60)
    trainer.save(tmp_path)
    (tmp_path / "checkpoint.json").write_text('{"seed": 0, "step": 7, "seconds": 1.0}')
    with pytest.raises(ValueError, match=r"checkpoint.json is of step 7, the tensors are of another"):
        trainer.load(tmp_path)


def test_export_makes_a_bundle_that_gives_the_networks_logits(people: FaceSet, tmp_path: Path) -> None:
    model = make_model(0).eval()
    crops = export.crops_of(people)
    export.export_bundle(model, crops, tmp_path / "b", Calibration(temperature=1.5, bias=-0.1), {"seed": 0})
    bundle = Bundle.load(tmp_path / "b")
    (logits,) = make_session(bundle, SPEC.name, threads=1).run(crops[:5])
    assert logits.shape == (5, 1)
    np.testing.assert_allclose(logits[:, 0], train.predict(model, torch.from_numpy(crops[:5])), atol=1e-3)
    assert bundle.experimental
    assert bundle.calibration.temperature == 1.5
    assert {p.name for p in bundle.folder.iterdir()} == {"bundle.json", SPEC.file}


def test_export_refuses_a_graph_that_disagrees(
    people: FaceSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "predict", lambda model, crops: np.full(len(crops), 5.0, np.float32))
    with pytest.raises(ValueError, match=r"OpenVINO and torch differ by .* in a logit, allowed is 0.001"):
        export.export_bundle(make_model(0), export.crops_of(people), tmp_path, Calibration(), {})


@pytest.mark.parametrize(
    ("scores", "expected"), [([0, 1, 2, 3], 1.0), ([3, 2, 1, 0], 0.0), ([1, 1, 1, 1], 0.5), ([0, 2, 1, 3], 0.75)]
)
def test_auc(scores: list[float], expected: float) -> None:
    assert metrics.auc(np.array([0, 0, 1, 1]), np.array(scores, float)) == expected


def test_calibration_recovers_temperature_and_bias() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 4, 20_000).astype(np.float32)
    labels = (rng.random(len(logits)) < 1 / (1 + np.exp(-(logits / 2.5 + 0.4)))).astype(np.float32)
    fitted = evaluate.fit_calibration(logits, labels)
    assert fitted.temperature == pytest.approx(2.5, rel=0.05)
    assert fitted.bias == pytest.approx(0.4, abs=0.05)
    p_fake = 1 / (1 + np.exp(-(logits / fitted.temperature + fitted.bias)))
    assert evaluate.calibration_error(p_fake, labels) < 0.02


def test_calibration_refuses_logits_that_point_the_wrong_way() -> None:
    labels = np.repeat(np.float32([0, 1]), 50)
    noise = np.random.default_rng(0).normal(0, 1, 100).astype(np.float32)
    with pytest.raises(ValueError, match="do not rise with the label"):
        evaluate.fit_calibration(noise - labels, labels)


def test_evaluation_scores_every_level(people: FaceSet) -> None:
    for level in evaluate.LEVELS:
        scored = evaluate.score_level(make_model(0).eval(), people[:4], "swap", level)
        assert len(scored.labels) == len(scored.logits) == len(scored.identity) == 2 * 4 * evaluate.DRAWS
        cell = evaluate.compare(scored)
        assert cell["difference"] == pytest.approx(cell["auc"] - cell["sharpness_auc"])
