"""Augmentation of pictures and batches."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")  # the `train` extra

from dfengine.bundle import CropSpec  # noqa: E402
from dfengine.errors import OptionError  # noqa: E402
from dfengine.stages.crop import crop_faces  # noqa: E402
from dfengine.types import Image  # noqa: E402
from training.augment import AugmentSettings, Draws, augment_pixels, jitter_boxes, mix, through_h264  # noqa: E402

torch.set_num_threads(1)
STEPS = ("downscale", "colour", "blur", "noise", "jpeg", "h264")


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    from skimage import data

    return np.ascontiguousarray(data.astronaut()[20:221, 130:329])  # odd sides


BOX = np.float32([[50, 40, 140, 155]])


def rng(*key: int) -> np.random.Generator:
    return np.random.default_rng(key)


def to_rgb(images: list[Image]) -> np.ndarray:
    """(T, 3, H, W), 0..255"""
    h, w = images[0].upright_hw
    spec = CropSpec(input_hw=(h, w), std=(1 / 255,) * 3, crop_shape="box")
    boxes = np.tile(np.float32([0, 0, w, h]), (len(images), 1))
    return crop_faces(images, boxes, np.arange(len(images)), spec)


def test_nothing_is_done_by_default(picture: np.ndarray) -> None:
    settings = AugmentSettings()
    images, boxes = augment_pixels([picture], BOX, settings, rng(0))
    np.testing.assert_array_equal(np.stack(images[0].components, axis=2), picture)
    np.testing.assert_array_equal(boxes, BOX)
    np.testing.assert_allclose(jitter_boxes(BOX, settings, rng(0)), BOX, atol=1e-4)
    assert not settings.mixes


@pytest.mark.parametrize("step", STEPS)
def test_every_step_changes_the_picture_and_depends_on_its_key_alone(picture: np.ndarray, step: str) -> None:
    settings = AugmentSettings(**{step: 1.0}, downscale_face_px=(40.0, 80.0))
    first, again, other = (augment_pixels([picture], BOX, settings, rng(key)) for key in (1, 1, 2))
    np.testing.assert_array_equal(to_rgb(first[0]), to_rgb(again[0]))
    if step == "downscale":
        assert first[0][0].upright_hw != other[0][0].upright_hw
    else:
        assert not np.array_equal(to_rgb(first[0]), to_rgb(other[0]))
        difference = np.abs(to_rgb(first[0])[0, :, :201, :199] - picture.transpose(2, 0, 1))
        assert 0.3 < difference.mean() < 60, "seen, and not broken"


def test_what_a_step_does_does_not_depend_on_the_others(picture: np.ndarray) -> None:
    sizes = {
        augment_pixels([picture], BOX, settings, rng(3))[0][0].upright_hw
        for settings in (AugmentSettings(downscale=1), AugmentSettings(downscale=1, colour=1, blur=1, jpeg=1))
    }
    assert len(sizes) == 1


def test_downscale_moves_the_box_along(picture: np.ndarray) -> None:
    settings = AugmentSettings(downscale=1, downscale_face_px=(50.0, 50.0))
    (image,), boxes = augment_pixels([picture], BOX, settings, rng(0))
    assert (boxes[0, 2:] - boxes[0, :2]).max() == pytest.approx(50, abs=0.5)
    h, w = picture.shape[:2]
    np.testing.assert_allclose(boxes[0] / np.tile(image.upright_hw[::-1], 2), BOX[0] / [w, h, w, h], atol=1e-6)
    settings = replace(settings, downscale_face_px=(400.0, 500.0))
    (image,), boxes = augment_pixels([picture], BOX, settings, rng(0))
    assert image.upright_hw == (h, w), "never up"


@pytest.mark.parametrize("step", ["downscale", "blur", "noise", "jpeg", "h264"])
def test_severity_is_how_far_it_goes(picture: np.ndarray, step: str) -> None:
    settings = AugmentSettings(**{step: 1.0}, downscale_face_px=(40.0, 110.0))

    def harm(severity: float) -> float:
        images, _ = augment_pixels([picture], BOX, settings, rng(5), severity=severity)
        if step == "downscale":
            return -float(images[0].upright_hw[0])
        return float(np.abs(to_rgb(images)[0, :, :201, :199] - picture.transpose(2, 0, 1)).mean())

    assert harm(0.0) < harm(0.5) < harm(1.0)


def test_a_clip_goes_through_one_camera_and_one_stream(picture: np.ndarray) -> None:
    settings = AugmentSettings(downscale=1, colour=1, blur=1, jpeg=1, h264=1)
    clip = [picture, picture[:-1, :-10], picture]
    images, boxes = augment_pixels(clip, np.tile(BOX, (3, 1)), settings, rng(1))
    assert len({image.upright_hw for image in images}) == 1
    np.testing.assert_array_equal(boxes[0], boxes[1])
    rgb = to_rgb(images)
    assert np.abs(rgb[0] - rgb[2]).mean() < 5, "the same light; the codec may differ"


def test_exposure_goes_both_ways_from_one(picture: np.ndarray) -> None:
    def light(exposure: tuple[float, float], severity: float = 1.0) -> np.ndarray:
        """Brightness against the picture's own, for 24 samples."""
        settings = AugmentSettings(colour=1, exposure=exposure)
        made = (augment_pixels([picture], BOX[None], settings, rng(i), severity=severity)[0] for i in range(24))
        return np.array([to_rgb(m).mean() for m in made]) / picture.mean()

    usual, dark = light((0.75, 1.25)), light((0.3, 1.25))
    brighter = dark == usual
    assert 4 < brighter.sum() < 20, "one end does not move the other"
    assert (dark[~brighter] < usual[~brighter]).all()
    assert dark.min() < 0.5
    np.testing.assert_allclose(light((0.3, 1.25), severity=0.0), 1, atol=0.01)


def test_noise_is_new_in_every_picture(picture: np.ndarray) -> None:
    images, _ = augment_pixels([picture] * 2, np.tile(BOX, (2, 1)), AugmentSettings(noise=1), rng(1))
    assert not np.array_equal(*to_rgb(images))


@pytest.mark.parametrize("count", [1, 2, 9])
def test_h264_gives_every_picture_back_in_order(picture: np.ndarray, count: int) -> None:
    pixels = np.stack([np.roll(picture, 5 * i, axis=1) for i in range(count)])
    images = through_h264(pixels, 18)
    assert images[0].upright_hw == (202, 200)
    assert images[0].subsampling_xy == (2, 2)
    rgb = to_rgb(images)[:, :, :201, :199]
    for i in range(count):
        assert np.abs(rgb[i] - pixels[i].transpose(2, 0, 1)).mean() < 4
    worse = to_rgb(through_h264(pixels, 40))[:, :, :201, :199]
    wanted = pixels.transpose(0, 3, 1, 2)
    assert np.abs(worse - wanted).mean() > 1.5 * np.abs(rgb - wanted).mean()


def test_boxes_of_a_clip_move_together() -> None:
    boxes = np.float32([[10, 10, 30, 40], [60, 20, 100, 80]])
    moved = jitter_boxes(boxes, AugmentSettings(box_jitter=0.04), rng(0))
    size, old = moved[:, 2:] - moved[:, :2], boxes[:, 2:] - boxes[:, :2]
    np.testing.assert_allclose(size[0] / old[0], size[1] / old[1], atol=1e-5)
    shift = ((moved[:, :2] + moved[:, 2:]) - (boxes[:, :2] + boxes[:, 2:])) / 2 / old
    np.testing.assert_allclose(shift[0], shift[1], atol=1e-5)
    assert 0 < np.abs(shift[0]).max() <= 0.08


# -- draws -------------------------------------------------------------------------------------------------------------


def test_draws_of_a_row_depend_on_its_key_alone() -> None:
    together, alone = Draws([(0, i) for i in range(4)]), Draws([(0, 2)])
    for draw in (
        lambda d: d.uniform(-1, 1, 3),
        lambda d: d.normal(2, 2),
        lambda d: d.beta(0.4),
        lambda d: d.chance(0.5),
        lambda d: d.choice(7),
    ):
        torch.testing.assert_close(draw(together)[2:3], draw(alone), rtol=0, atol=0)
    where = torch.tensor([True, False, True, False])
    some, alone = Draws([(0, i) for i in range(4)]).normal(2, where=where), Draws([(0, 2)]).normal(2)
    torch.testing.assert_close(some[2:3], alone, rtol=0, atol=0)
    assert some[[1, 3]].abs().sum() == 0
    many = Draws([(1, i) for i in range(3000)])
    assert abs(many.chance(0.3).float().mean() - 0.3) < 0.03
    assert many.choice(3).bincount().min() > 850
    assert abs(many.uniform(2, 4).mean() - 3) < 0.05


# -- mixtures ----------------------------------------------------------------------------------------------------------


def mixed(settings: AugmentSettings, clip: bool = False) -> dict[str, torch.Tensor | None]:
    shape = (6, 2, 3, 32, 32) if clip else (6, 3, 32, 32)
    value = torch.arange(6.0).view(6, *[1] * (len(shape) - 1))
    y = torch.tensor([0.0, 0, 0, 1, 1, 1])
    mask = y.view(6, 1, 1, 1).expand(6, 1, 2, 2).clone()
    audio = torch.arange(6.0).view(6, 1, 1).expand(6, 4, 5).clone()
    draws = Draws([(0, i) for i in range(6)])
    return mix(value.expand(shape).clone(), audio, y, torch.ones(6), mask, settings, draws)


@pytest.mark.parametrize("clip", [False, True])
def test_mixup_blends_everything_by_one_share(clip: bool) -> None:
    out = mixed(AugmentSettings(mixup=1, mix_alpha=1.0), clip)
    x = out["x"].flatten(1)
    assert (x.amax(dim=1) == x.amin(dim=1)).all()
    partner = torch.arange(6.0).roll(3)
    share = (x[:, 0] - torch.arange(6.0)) / (partner - torch.arange(6.0))
    assert share.min() > 0.01
    assert share.max() < 0.99
    torch.testing.assert_close(out["y"], torch.where(torch.arange(6) < 3, share, 1 - share), atol=1e-5, rtol=0)
    torch.testing.assert_close(out["mask"][:, 0, 0, 0], out["y"], atol=1e-5, rtol=0)
    torch.testing.assert_close(out["audio"][:, 0, 0], x[:, 0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("clip", [False, True])
def test_cutmix_cuts_a_box_and_counts_its_area(clip: bool) -> None:
    out = mixed(AugmentSettings(cutmix=1, mix_alpha=1.0), clip)
    own = torch.arange(6.0).view(6, *[1] * (out["x"].ndim - 1))
    taken = (out["x"] != own).flatten(1).float().mean(dim=1)
    assert set(out["x"].unique().tolist()) <= set(range(6)), "nothing is blended"
    torch.testing.assert_close(out["y"], torch.where(torch.arange(6) < 3, taken, 1 - taken), atol=1e-5, rtol=0)
    torch.testing.assert_close(out["mask"].mean(dim=(1, 2, 3)), out["y"], atol=1e-5, rtol=0)
    assert ((taken > 0) & (taken < 1)).any()


def test_no_mixture_leaves_values_alone_even_unknown_ones() -> None:
    mask = torch.full((2, 1, 2, 2), torch.nan)
    mask[0] = 0
    draws = Draws([(0, 0), (0, 1)])
    out = mix(
        torch.rand(2, 3, 8, 8), None, torch.tensor([0.0, 1]), torch.ones(2), mask, AugmentSettings(mixup=1e-9), draws
    )
    assert out["y"].tolist() == [0, 1]
    assert out["audio"] is None
    assert out["mask"][0].sum() == 0
    assert out["mask"][1].isnan().all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"flip": 1.2}, "augment.flip is a chance, from 0 to 1; got 1.2"),
        ({"mixup": 0.6, "cutmix": 0.6}, r"augment.mixup \+ augment.cutmix must not exceed 1, got 0.6 \+ 0.6"),
        ({"blur_sigma_px": (0.0, 1.0)}, r"augment.blur_sigma_px must be above 0, got \(0.0, 1.0\)"),
        ({"exposure": (1.1, 1.5)}, r"augment.exposure must go from above 0 through 1, got \(1.1, 1.5\)"),
        ({"mix_alpha": 0.0}, "augment.mix_alpha must be above 0, got 0.0"),
        ({"jpeg_quality": (0, 50)}, r"augment.jpeg_quality goes from 1 to 100, got \(0, 50\)"),
        ({"h264_crf": (18, 60)}, r"augment.h264_crf goes from 0 to 51, got \(18, 60\)"),
    ],
)
def test_settings_out_of_range(fields: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        AugmentSettings(**fields)
