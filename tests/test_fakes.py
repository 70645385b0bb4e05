"""Pseudo-fakes from one public-domain face in many lights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")  # the `train` extra

from assets import write_face_table  # noqa: E402

from dfengine.bundle import CropSpec  # noqa: E402
from dfengine.errors import OptionError  # noqa: E402
from training import fakes  # noqa: E402
from training.augment import AugmentSettings, Draws  # noqa: E402
from training.data import Batches, DataSettings, FaceTable  # noqa: E402
from training.fakes import FakeSettings, Pairs  # noqa: E402

torch.set_num_threads(1)
CROP = CropSpec(input_hw=(64, 64), margin_ratio=0.2)
PEOPLE = 8
DEFAULT = FakeSettings()
ALWAYS = FakeSettings(low_resolution=1, relight=1, warp=1, occlude=1)
NEVER = FakeSettings(low_resolution=0, relight=0, warp=0, occlude=0)
Faces = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Faces:
    """Pictures, boxes and landmarks of people, as they come to make_pairs."""
    videos = [(f"{i}.mp4", 0, f"person{i}", "train") for i in range(PEOPLE)]
    table = FaceTable.load(write_face_table(tmp_path_factory.mktemp("faces"), videos, frames=1))
    batches = Batches(
        table, CROP, DataSettings(), AugmentSettings(), FakeSettings(ratio=1), split="train", seed=0, batch=2
    )
    return batches.canvases(np.arange(PEOPLE))


def make_pairs(people: Faces, rows: list[int], donors: list[int], seed: int, settings: FakeSettings = DEFAULT) -> Pairs:
    rgb, boxes, landmarks = people
    draws = Draws([(seed, n) for n in range(len(rows))])
    return fakes.make_pairs(rgb[rows], boxes[rows], landmarks[rows], rgb[donors], landmarks[donors], settings, draws)


def test_fakes_depend_on_the_seed_alone(people: Faces) -> None:
    first, again, other = (make_pairs(people, [0, 1, 2], [0, 2, 2], seed) for seed in (1, 1, 2))
    torch.testing.assert_close(first.fake, again.fake, rtol=0, atol=0)
    torch.testing.assert_close(first.real, again.real, rtol=0, atol=0)
    assert not torch.equal(first.fake, other.fake)


def test_a_pair_does_not_depend_on_its_batch(people: Faces) -> None:
    rgb, boxes, landmarks = people
    together = make_pairs(people, list(range(8)), list(range(8)), seed=4, settings=ALWAYS)
    for n in (0, 5):
        draws = Draws([(4, n)])
        part = slice(n, n + 1)
        alone = fakes.make_pairs(rgb[part], boxes[part], landmarks[part], rgb[part], landmarks[part], ALWAYS, draws)
        torch.testing.assert_close(alone.fake, together.fake[part], rtol=0, atol=1e-5)


def test_frames_with_one_key_get_one_fake(people: Faces) -> None:
    rgb, boxes, landmarks = (t[[3, 3]] for t in people)
    pairs = fakes.make_pairs(rgb, boxes, landmarks, rgb, landmarks, ALWAYS, Draws([(1, 2), (1, 2)]))
    torch.testing.assert_close(pairs.fake[0], pairs.fake[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("settings", [ALWAYS, NEVER], ids=["every step", "no step"])
@pytest.mark.parametrize("donors", [[0, 1, 2, 3], [1, 2, 3, 4]], ids=["self_blended", "swap"])
def test_a_fake_differs_inside_its_mask_only(people: Faces, donors: list[int], settings: FakeSettings) -> None:
    pairs = make_pairs(people, [0, 1, 2, 3], donors, seed=3, settings=settings)
    difference = (pairs.fake - pairs.real).abs().amax(dim=1, keepdim=True)
    assert difference[pairs.mask == 0].max() == 0
    for changed, mask in zip(difference, pairs.mask, strict=True):
        assert changed[mask > 0.3].mean() > 0.005, "more than rounding"
    for images in (pairs.fake, pairs.real):
        assert images.min() >= 0
        assert images.max() <= 1


@pytest.mark.parametrize("step", ["low_resolution", "relight", "warp", "occlude"])
def test_every_step_changes_something(people: Faces, step: str) -> None:
    rows = [0, 1, 2, 3]
    without = make_pairs(people, rows, rows, seed=3, settings=NEVER)
    with_it = make_pairs(people, rows, rows, seed=3, settings=replace(NEVER, **{step: 1.0}))
    assert (with_it.fake - without.fake).abs().mean() > 1e-3
    if step in ("relight", "warp"):  # of the source alone
        torch.testing.assert_close(with_it.real, without.real, rtol=0, atol=0)


def test_masks_lie_on_the_face_and_have_many_shapes(people: Faces) -> None:
    rows = list(range(PEOPLE)) * 8
    pairs = make_pairs(people, rows, rows, seed=5, settings=NEVER)
    assert ((pairs.mask >= 0) & (pairs.mask <= 1)).all()
    area = pairs.mask.sum(dim=(1, 2, 3)) / np.prod(pairs.mask.shape[2:])
    assert (area > 0.001).all(), "no mask is empty"
    assert area.min() < 0.03
    assert area.max() > 0.25
    at = fakes.pixel_centres(pairs.mask.shape[-1])
    for mask, (x1, y1, x2, y2) in zip(pairs.mask.flatten(1), pairs.xyxy, strict=True):
        # The box is tight on the sides of the face; the outline may reach a third of its width beyond.
        room = (x2 - x1) / 3
        inside = (at[:, 0] > x1 - room) & (at[:, 0] < x2 + room) & (at[:, 1] > y1 - room) & (at[:, 1] < y2 + room)
        assert mask[inside].sum() > 0.97 * mask.sum()


def sharpness(images: torch.Tensor) -> np.ndarray:
    """Variance of the Laplacian of the grey images, (B,)."""
    kernel = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])[None, None]
    return torch.nn.functional.conv2d(images.mean(dim=1, keepdim=True), kernel).flatten(1).var(dim=1).numpy()


def share_in_order(real: np.ndarray, fake: np.ndarray) -> float:
    """AUC: how often a fake has the higher value."""
    return float((fake[:, None] > real[None]).mean() + (fake[:, None] == real[None]).mean() / 2)


@pytest.mark.parametrize("settings", [FakeSettings(), ALWAYS], ids=["default", "every step"])
def test_real_and_fake_are_equally_sharp_on_average(people: Faces, settings: FakeSettings) -> None:
    rows = list(range(PEOPLE)) * 12
    pairs = make_pairs(people, rows, rows, seed=7, settings=settings)
    assert abs(share_in_order(sharpness(pairs.real), sharpness(pairs.fake)) - 0.5) < 0.08
    inside = pairs.mask.sum(dim=(1, 2, 3), keepdim=True).clamp_min(1)
    brightness = [((i * pairs.mask).sum(dim=(1, 2, 3), keepdim=True) / inside / 3).flatten().numpy() for i in
                  (pairs.real, pairs.fake)]  # fmt: skip
    assert abs(share_in_order(*brightness) - 0.5) < 0.08


def test_swaps_take_the_colours_of_their_target(people: Faces) -> None:
    rgb = people[0]
    mask = torch.ones_like(rgb[:1, :1])
    matched = fakes.match_colour(rgb[:1], rgb[1:2], mask, torch.ones(1))
    torch.testing.assert_close(matched.mean(dim=(2, 3)), rgb[1:2].mean(dim=(2, 3)), rtol=0, atol=0.02)


def test_rescale_of_one_changes_nothing(people: Faces) -> None:
    rgb = people[0][:3]
    out = fakes.rescale(rgb, torch.tensor([1.0, 0.5, 0.3]), torch.tensor([True, True, False]))
    torch.testing.assert_close(out[0], rgb[0], rtol=0, atol=0)
    kept = [float(sharpness(out[[i]])[0] / sharpness(rgb[[i]])[0]) for i in (1, 2)]
    assert 1 > kept[0] > kept[1]


def test_geometry_agrees_with_itself() -> None:
    draws = Draws([(0, i) for i in range(5)])
    pose = fakes.random_pose(torch.tensor([[20.0, 30, 60, 80]]).repeat(5, 1), draws)
    points = draws.uniform(0, 100, 7, 2)
    there = fakes.transform(pose, points)
    torch.testing.assert_close(fakes.transform(fakes.invert(pose), there), points, atol=1e-3, rtol=0)
    torch.testing.assert_close(fakes.fit_affine(points, there), pose, atol=1e-2, rtol=0)
    both = fakes.compose(pose, fakes.invert(pose))
    torch.testing.assert_close(fakes.transform(both, points), points, atol=1e-3, rtol=0)


def test_mask_of_a_crop_is_the_crop_of_the_mask() -> None:
    masks = torch.zeros(1, 1, 100, 100)
    masks[:, :, 40:60, 40:60] = 1
    cells = fakes.crop_masks(masks, torch.tensor([[25.0, 25, 75, 75]]), replace(CROP, margin_ratio=0.0), (5, 5))
    torch.testing.assert_close(cells[0, 0, 2, 2], torch.tensor(1.0), atol=0.02, rtol=0)
    assert cells[0, 0, 1:4, 1:4].sum() > 3.5  # 20 px of 10 px cells, half cells at the edges
    assert cells[0, 0, 0].abs().sum() == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ratio": 1.5}, "fakes.ratio is a share, from 0 to 1; got 1.5"),
        ({"swap": -0.1}, "fakes.swap is a share"),
        ({"generator_face_px": (2.0, 80.0)}, r"fakes.generator_face_px must be 8 at least, got \(2.0, 80.0\)"),
    ],
)
def test_settings_out_of_range(fields: dict[str, float], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        FakeSettings(**fields)


def test_sheet(tmp_path: Path) -> None:
    from training import data

    videos = [(f"{i}.mp4", 0, f"person{i}", "train") for i in range(5)]
    folder = write_face_table(tmp_path, videos, frames=1)
    data.main([str(folder), "--out", str(tmp_path / "sheet.png")])
    assert (tmp_path / "sheet.png").stat().st_size > 1000
    with pytest.raises(SystemExit, match=r"error: .*there is no faces.parquet"):
        data.main([str(tmp_path / "nowhere"), "--out", str(tmp_path / "sheet.png")])
