"""Held-out people: fakes that training never makes, fixed levels, and their numbers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")  # the `train` extra

import torch
from assets import FACE, write_clip, write_face_table

from dfengine.bundle import Bundle
from training import export, heldout, train
from training.augment import Draws
from training.fakes import Pairs
from training.table import FaceTable

FAMILIES = ("self_blended", "swap", "autoencoder", "graft")
PEOPLE = {"train": 6, "val": 2, "test": 2}
RECIPE = """
[fakes]
ratio = 1.0
[model]
input_hw = [48, 48]
[train]
epochs = 1
batch = 4
"""


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    people = [(f"{split}{i}.jpg", 0, f"{split}{i}", split) for split, count in PEOPLE.items() for i in range(count)]
    return write_face_table(tmp_path_factory.mktemp("faces"), people, frames=1)


@pytest.fixture(scope="module")
def held_out(faces: Path) -> heldout.HeldOut:
    torch.set_num_threads(1)
    return heldout.HeldOut(FaceTable.load(faces), "val")


@pytest.fixture(scope="module")
def pictures(held_out: heldout.HeldOut) -> list[heldout.Pictures]:
    torch.set_num_threads(1)
    return list(held_out)


def test_every_family_is_there_at_every_level(pictures: list[heldout.Pictures]) -> None:
    wanted = {(f, level, view) for f in FAMILIES for level in heldout.LEVELS for view in range(heldout.VIEWS)}
    assert sorted((p.family, p.level, p.view) for p in pictures) == sorted(wanted)
    for p in pictures:
        assert len(p.images) == len(p.boxes) == 2 * len(p.rows) == 2 * PEOPLE["val"]
        side = (p.boxes[:, 2:] - p.boxes[:, :2]).max(axis=1)
        np.testing.assert_allclose(side, heldout.LEVELS[p.level].face_px, rtol=0.15)  # the pose scales by .9 to 1.1
        np.testing.assert_array_equal(*p.boxes.reshape(2, -1, 4), err_msg="real and fake lie alike")


def test_pictures_depend_on_the_seed_alone(faces: Path, pictures: list[heldout.Pictures]) -> None:
    table = FaceTable.load(faces)
    again, other = next(iter(heldout.HeldOut(table, "val"))), next(iter(heldout.HeldOut(table, "val", seed=1)))
    crops = [heldout.crop_faces(p.images, p.boxes, np.arange(4), heldout.CROP) for p in (pictures[0], again, other)]
    np.testing.assert_array_equal(crops[0], crops[1])
    assert not np.array_equal(crops[0], crops[2])


@pytest.mark.parametrize("family", ["autoencoder", "graft"])
def test_a_fake_has_another_face_and_the_same_surroundings(held_out: heldout.HeldOut, family: str) -> None:
    pairs = make(held_out, family)
    difference = (pairs.fake - pairs.real).abs().mean(dim=1, keepdim=True)
    around = heldout.blur(pairs.mask, torch.full((len(pairs.mask),), 8.0)) == 0
    assert difference[around].max() < 1e-4, "more than rounding"
    assert difference[pairs.mask > 0.9].mean() > 0.005
    assert 0 <= pairs.fake.min() <= pairs.fake.max() <= 1


def test_a_graft_has_the_donors_gradients_and_no_seam(held_out: heldout.HeldOut) -> None:
    source, target = torch.rand(2, 3, 40, 40), torch.rand(2, 3, 40, 40)
    mask = torch.zeros(2, 1, 40, 40)
    mask[:, :, 10:25, 12:30] = 1
    mixed = heldout.poisson(source, target, mask)
    outside = (mask == 0).expand_as(target)
    torch.testing.assert_close(mixed[outside], target[outside], rtol=0, atol=0)

    def laplacian(x: torch.Tensor) -> torch.Tensor:
        return 4 * x - sum(x.roll(s, d) for s in (-1, 1) for d in (2, 3))

    error = (laplacian(mixed) - laplacian(source)).abs()[(mask == 1).expand_as(target)]
    assert error.max() < 1e-3
    torch.testing.assert_close(heldout.poisson(target + 0.3, target, mask), target, rtol=0, atol=1e-4)


def test_a_thin_plate_goes_through_its_points_and_keeps_affine_maps() -> None:
    points = torch.rand(2, 7, 2, generator=torch.Generator().manual_seed(0))
    onto = points + 0.1 * torch.rand(2, 7, 2, generator=torch.Generator().manual_seed(1))
    for i in range(2):
        there = heldout.thin_plate(points[i : i + 1], onto[i : i + 1], points[i])
        torch.testing.assert_close(there, onto[i : i + 1], rtol=0, atol=1e-3)
    turned = points @ torch.tensor([[0.8, 0.3], [-0.2, 1.1]]) + torch.tensor([0.5, -1.0])
    at = torch.tensor([[0.1, 0.9], [2.0, -1.0]])
    wanted = at @ torch.tensor([[0.8, 0.3], [-0.2, 1.1]]) + torch.tensor([0.5, -1.0])
    torch.testing.assert_close(heldout.thin_plate(points, turned, at), wanted.expand(2, 2, 2), rtol=0, atol=1e-3)


def test_the_autoencoder_draws_what_it_knows(held_out: heldout.HeldOut) -> None:
    rgb, _, landmarks = held_out._swaps.canvases(np.arange(2))
    known = heldout.align(rgb, landmarks)
    net = heldout.Autoencoder(known)
    all_of_it, little = (net(known, torch.full((2,), share), torch.zeros(2)) for share in (1.0, 0.0))
    torch.testing.assert_close(all_of_it, known, rtol=0, atol=1e-3)
    torch.testing.assert_close(little[0], little[1], rtol=0, atol=0)
    torch.testing.assert_close(net(known, torch.zeros(2), torch.ones(2)), known, rtol=0, atol=1e-5)


def test_from_photos_to_a_bundle_with_its_numbers(faces: Path, tmp_path: Path) -> None:
    (tmp_path / "small.toml").write_text(RECIPE)
    train.main([str(tmp_path / "small.toml"), "--faces", str(faces), "--out", str(tmp_path / "run")])
    checkpoint, out = tmp_path / "run" / train.BEST, tmp_path / "evaluation"
    heldout.main([str(checkpoint), "--faces", str(faces), "--out", str(out)])
    report = json.loads((out / "evaluation.json").read_text())
    cells = [f"{family} {level}" for family in FAMILIES for level in heldout.LEVELS]
    assert sorted(report["by_dataset"]) == sorted([*cells, "all datasets pooled"])
    for cell in cells:
        row = report["by_dataset"][cell]
        assert (row["real"], row["fake"], row["sources"]) == (4, 4, 2)
        assert row["pairs"] == 4
    assert report["false_positives"].keys() == {"made"}
    assert report["false_positives"]["made"].keys() == heldout.LEVELS.keys()

    video = write_clip(FACE, tmp_path)
    evaluation = out / "evaluation.json"
    bundle = export.export([checkpoint], tmp_path / "bundle", faces=faces, videos=[video], evaluation=evaluation)
    assert Bundle.load(tmp_path / "bundle").provenance["held_out"]["levels"]["L3"]["quality"] == 38
    assert bundle.calibration.temperature == report["calibration"]["temperature"]


def make(held_out: heldout.HeldOut, family: str) -> Pairs:
    batches, how = held_out._families[family]
    rgb, boxes, landmarks = batches.canvases(np.arange(2))
    donor_rgb, _, donor_landmarks = batches.canvases(np.array([1, 0]))
    return how(rgb, boxes, landmarks, donor_rgb, donor_landmarks, Draws([(1, 0), (1, 1)]))
