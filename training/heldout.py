"""Measures networks that learned from photos on photos of people they have not seen:
``python -m training.heldout RUN/best.safetensors... --faces DIR --out DIR``.

Each photo becomes a real picture and a fake of it, of four families, at fixed levels of degradation (LEVELS). Two
families are what training.fakes makes. The other two are made in other ways and in evaluation only, since what a
network reaches on the fakes it was trained on mostly says how well it knows their generator:

* ``autoencoder``: the inner face is drawn again at 80 px from the principal components of the training split's faces
  (the person's own, or another's: half and half), scaled up, and blended in band by band (Burt and Adelson 1983).
* ``graft``: another person's inner face, bent by a thin-plate spline (Bookstein 1989) so that all five landmarks fall
  on the target's, and set in by solving Poisson's equation (Pérez et al. 2003), so that no seam is left.

Writes what training.evaluate writes, for training.export too: each family at each level counts as a dataset.
Temperature and bias are fitted on the validation split, all families and levels together, and ``false_positives`` has
the share of real pictures that are taken for fakes, by where the photos come from.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dfengine.bundle import Bundle, CropSpec
from dfengine.errors import DfengineError
from dfengine.stages.aggregate import pool_rows
from dfengine.stages.crop import crop_faces
from dfengine.types import F32, F64, I64, Image

from .augment import AugmentSettings, Draws, downscale, through_h264, through_jpeg
from .calibration import fit_calibration
from .data import Batches, DataSettings
from .fakes import (
    CENTRE,
    FIVE_POINTS,
    OUTLINE,
    FakeSettings,
    Pairs,
    blur,
    box_around,
    fit_affine,
    invert,
    make_pairs,
    match_colour,
    pixel_centres,
    random_pose,
    sample,
    transform,
)
from .report import THRESHOLD, make_report, write_report
from .scoring import Scored, ScoredVideo, Trained, collect, load_trained, make_bundle, make_tracks, sharpness
from .table import FaceTable

VIEWS = 2  # pairs that are made of each photo, for each family
BATCH = 16
PRINTED = ("auc", "sharpness_auc", "auc_above_sharpness")
# Faces have 150 px in the canvas of this network's input, whatever the measured networks take.
CROP = CropSpec(input_hw=(144, 144), margin_ratio=0.2)


@dataclass(frozen=True)
class Level:
    """What a picture goes through: a size of the face, then a codec."""

    face_px: float
    codec: Literal["jpeg", "h264"]
    quality: int  # JPEG's quality, H.264's CRF
    light: float = 1.0  # what pixels are multiplied with before


LEVELS = {
    "L1": Level(150, "jpeg", 90),
    "L2": Level(150, "h264", 28),
    "L3": Level(75, "h264", 38),
    "dark": Level(150, "h264", 28, light=0.3),  # about a tenth of the light, at a gamma of 2
}


# -- fakes that training never sees ------------------------------------------------------------------------------------

COMPONENTS, FACE_SIDE = 250, 80  # of the autoencoder; its pictures' side, 2.6 eye distances
INNER = torch.tensor([0.9, 1.15])  # half axes of the inner face, in face units (fakes.FIVE_POINTS)


class Autoencoder:
    """Principal components of aligned faces: a code from which a face is drawn again."""

    def __init__(self, faces: Tensor) -> None:
        """``faces``: (N, 3, FACE_SIDE, FACE_SIDE), of the training split."""
        flat = torch.cat([faces, faces.flip(3)]).flatten(1)
        self._mean = flat.mean(dim=0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # svd_lowrank begins with a random projection
            self._basis = torch.svd_lowrank(flat - self._mean, q=min(COMPONENTS, *flat.shape), niter=2)[2]  # (P, K)

    def __call__(self, faces: Tensor, share: Tensor, kept: Tensor) -> Tensor:
        """Draws faces from a share of their components, (B,), and keeps ``kept`` of what those leave out, (B,)."""
        flat = faces.flatten(1)
        code = (flat - self._mean) @ self._basis
        code = code * (torch.arange(code.shape[1]) < share[:, None] * code.shape[1])
        drawn = code @ self._basis.T + self._mean
        return (drawn + kept[:, None] * (flat - drawn)).view_as(faces).clamp(0, 1)


def align(rgb: Tensor, landmarks: Tensor) -> Tensor:
    """Inner faces upright and of one size: (B, 3, S, S) -> (B, 3, FACE_SIDE, FACE_SIDE)."""
    five = _aligned_points().expand(len(rgb), 5, 2)
    grid = transform(fit_affine(five, landmarks), pixel_centres(FACE_SIDE)) * (2 / rgb.shape[-1]) - 1
    return F.grid_sample(rgb, grid.view(-1, FACE_SIDE, FACE_SIDE, 2), padding_mode="border", align_corners=False)


def _aligned_points() -> Tensor:
    return ((FIVE_POINTS - CENTRE) / 2.6 + 0.5) * FACE_SIDE


def make_blended(
    rgb: Tensor, xyxy: Tensor, landmarks: Tensor, donors: Tensor, donor_landmarks: Tensor, draws: Draws
) -> Pairs:
    """What training.fakes makes by its defaults."""
    return make_pairs(rgb, xyxy, landmarks, donors, donor_landmarks, FakeSettings(), draws)


def make_autoencoded(
    rgb: Tensor,
    xyxy: Tensor,
    landmarks: Tensor,
    donors: Tensor,
    donor_landmarks: Tensor,
    draws: Draws,
    net: Autoencoder,
) -> Pairs:
    own = draws.chance(0.5)[:, None, None, None]
    size, pose = rgb.shape[-1], random_pose(xyxy, draws)
    target, points = sample(rgb, pose), transform(invert(pose), landmarks)
    faces = torch.where(own, align(target, points), align(donors, donor_landmarks))
    faces = net(faces, draws.uniform(0.3, 1.0), draws.uniform(0.0, 0.6))
    to_face = fit_affine(points, _aligned_points().expand(len(rgb), 5, 2))
    grid = transform(to_face, pixel_centres(size)) * (2 / FACE_SIDE) - 1
    grid = grid.view(-1, size, size, 2)
    source = F.grid_sample(faces, grid, "bicubic", padding_mode="border", align_corners=False).clamp(0, 1)
    mask = inner_mask(points, size, 0.15)
    source = match_colour(source, target, mask, torch.ones(len(rgb)))
    # Fine bands change over within a pixel or two, coarse ones over a tenth of the face.
    fake, rest, other = torch.zeros_like(target), target, source
    for sigma in (1.0, 2.0, 4.0, 8.0):
        width = torch.full((len(rgb),), sigma)
        soft, soft_other = blur(rest, width), blur(other, width)
        fake = fake + _mix(rest - soft, other - soft_other, blur(mask, width))
        rest, other = soft, soft_other
    fake = (fake + _mix(rest, other, blur(mask, width))).clamp(0, 1)
    return Pairs(target, fake, mask, box_around(xyxy, pose))


def make_grafted(
    rgb: Tensor, xyxy: Tensor, landmarks: Tensor, donors: Tensor, donor_landmarks: Tensor, draws: Draws
) -> Pairs:
    size, pose = rgb.shape[-1], random_pose(xyxy, draws)
    target, points = sample(rgb, pose), transform(invert(pose), landmarks)
    # The outline goes where the best affine map takes it; between it and the landmarks the face is bent.
    outline = transform(fit_affine(FIVE_POINTS.expand(len(rgb), 5, 2), points), OUTLINE.unique(dim=0))
    from_outline = transform(fit_affine(points, donor_landmarks), outline)
    here = torch.cat([points, outline], dim=1) / size  # of the order of 1, for the solver
    there = torch.cat([donor_landmarks, from_outline], dim=1) / size
    grid = (2 * thin_plate(here, there, pixel_centres(size) / size) - 1).view(-1, size, size, 2)
    source = F.grid_sample(donors, grid, padding_mode="border", align_corners=False)
    mask = (inner_mask(points, size, 0.02) > 0.5).float()
    return Pairs(target, poisson(source, target, mask).clamp(0, 1), mask, box_around(xyxy, pose))


def inner_mask(landmarks: Tensor, size: int, edge: float) -> Tensor:
    """An ellipse over brows to chin, (B, 1, size, size); its edge is ``edge`` of its half axes wide."""
    at = transform(fit_affine(landmarks, FIVE_POINTS.expand(len(landmarks), 5, 2)), pixel_centres(size))
    inside: Tensor = 1 - ((at - CENTRE) / INNER).norm(dim=2)
    return (inside / edge + 0.5).clamp(0, 1).view(-1, 1, size, size)


def thin_plate(points: Tensor, onto: Tensor, at: Tensor) -> Tensor:
    """The spline that brings ``points`` (B, K, 2) to ``onto``, bending least, at other points (P, 2): (B, P, 2)."""
    b, k, _ = points.shape

    def basis(x: Tensor) -> Tensor:  # (B or 1, P, 2) -> (B, P, K + 3)
        squared = (x[:, :, None] - points[:, None]).square().sum(dim=3)
        radial = squared * torch.log(squared.clamp_min(1e-6))
        return torch.cat([radial, torch.ones_like(radial[:, :, :1]), x.expand(b, -1, 2)], dim=2)

    rows = basis(points)
    below = torch.cat([rows[:, :, k:].transpose(1, 2), torch.zeros(b, 3, 3)], dim=2)
    weights: Tensor = torch.linalg.solve(
        torch.cat([rows, below], dim=1), torch.cat([onto, torch.zeros(b, 3, 2)], dim=1)
    )
    return basis(at[None]) @ weights


def poisson(source: Tensor, target: Tensor, mask: Tensor, steps: int = 200) -> Tensor:
    """Pictures with the source's gradients where ``mask`` is 1 and the target's pixels elsewhere, (B, 3, S, S).

    By conjugate gradients; after 200 steps nothing changes by more than rounding to 8 bits on faces of 150 px. ``mask``
    must not reach the border.
    """
    y, x = (mask.amax(dim=(0, 1, axis)).nonzero() for axis in (3, 2))
    inner = (..., slice(int(y.min()) - 1, int(y.max()) + 2), slice(int(x.min()) - 1, int(x.max()) + 2))
    solved = target.clone()
    solved[inner] += _solve_poisson((source - target)[inner], mask[inner], steps)
    return solved


def _solve_poisson(wanted: Tensor, mask: Tensor, steps: int) -> Tensor:
    """What has the gradients of ``wanted`` where ``mask`` is 1 and is 0 elsewhere."""
    kernel = torch.tensor([[0.0, -1.0, 0.0], [-1.0, 4.0, -1.0], [0.0, -1.0, 0.0]]).expand(3, 1, 3, 3)

    def laplacian(x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, [1] * 4, mode="replicate"), kernel, groups=3) * mask

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(dim=(1, 2, 3), keepdim=True)

    x = torch.zeros_like(wanted)
    residual = laplacian(wanted)
    direction = residual
    length = dot(residual, residual)
    for _ in range(steps):
        image = laplacian(direction)
        step = length / dot(direction, image).clamp_min(1e-12)
        x, residual = x + step * direction, residual - step * image
        former, length = length, dot(residual, residual)
        direction = residual + length / former.clamp_min(1e-12) * direction
    return x


def _mix(a: Tensor, b: Tensor, share: Tensor) -> Tensor:
    return a + share * (b - a)


# -- pictures ----------------------------------------------------------------------------------------------------------

Family = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Draws], Pairs]


@dataclass(frozen=True, eq=False)
class Pictures:
    """B degraded pairs of one family at one level: first the reals, then, in the same order, the fakes."""

    family: str
    level: str
    view: int
    images: list[Image]  # 2 B
    boxes: F32  # (2 B, 4)
    rows: I64  # (B,), of the split's faces


class HeldOut:
    """The photos of one split, and the fakes that are made of them; ``seed`` decides everything."""

    def __init__(self, table: FaceTable, split: str, *, seed: int = 0) -> None:
        self._seed = seed
        self._swaps = self._open(table, split, swap=1.0)
        self._selves = self._open(table, split, swap=0.0)
        self.faces = self._selves.faces
        known = self._open(table, "train", swap=0.0)
        parts = torch.arange(len(known.faces)).split(BATCH)
        canvases = (known.canvases(part.numpy()) for part in parts)
        net = Autoencoder(torch.cat([align(rgb, landmarks) for rgb, _, landmarks in canvases]))
        self._families: dict[str, tuple[Batches, Family]] = {
            "self_blended": (self._selves, make_blended),
            "swap": (self._swaps, make_blended),
            "autoencoder": (self._swaps, functools.partial(make_autoencoded, net=net)),
            "graft": (self._swaps, make_grafted),
        }

    @staticmethod
    def _open(table: FaceTable, split: str, swap: float) -> Batches:
        fakes = FakeSettings(ratio=1.0, swap=swap)
        return Batches(
            table, CROP, DataSettings(), AugmentSettings(), fakes, split=split, seed=0, batch=BATCH, training=False
        )

    def __iter__(self) -> Iterator[Pictures]:
        for rows in torch.arange(len(self.faces)).split(BATCH):
            for number, (family, (batches, make)) in enumerate(self._families.items()):
                for view in range(VIEWS):
                    yield from self._degrade(
                        family, view, rows.numpy(), self._make(batches, make, rows.numpy(), (number, view))
                    )

    def _make(self, batches: Batches, make: Family, rows: I64, key: tuple[int, ...]) -> Pairs:
        keys = [(self._seed, *key, int(row)) for row in rows]
        donors = [batches.draw_donor(rows[[i]], np.random.default_rng((*k, 1)))[0] for i, k in enumerate(keys)]
        rgb, boxes, landmarks = batches.canvases(rows)
        donor_rgb, _, donor_landmarks = batches.canvases(np.array(donors))
        return make(rgb, boxes, landmarks, donor_rgb, donor_landmarks, Draws([(*k, 2) for k in keys]))

    @staticmethod
    def _degrade(family: str, view: int, rows: I64, pairs: Pairs) -> Iterator[Pictures]:
        both = torch.cat([pairs.real, pairs.fake])
        boxes = torch.cat([pairs.xyxy, pairs.xyxy]).numpy()
        for name, level in LEVELS.items():
            made = [degrade(x, box, level) for x, box in zip(both, boxes, strict=True)]
            yield Pictures(family, name, view, [image for image, _ in made], np.stack([box for _, box in made]), rows)


def degrade(picture: Tensor, box: F32, level: Level) -> tuple[Image, F32]:
    """One picture (3, H, W) in 0..1, and its face box (4,), as they are at a level."""
    x, boxes = downscale(picture[None], box[None], level.face_px)
    rgb = (x * (255 * level.light)).round().clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous().numpy()
    if level.codec == "jpeg":
        return Image.from_rgb(through_jpeg(rgb[0], level.quality)), boxes[0]
    return through_h264(rgb, level.quality)[0], boxes[0]


# -- scores ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def score(trained: Sequence[Trained], bundle: Bundle, held_out: HeldOut) -> Scored:
    """Every picture as a video of its own, uncalibrated; its dataset is its family and level."""
    scored: list[ScoredVideo] = []
    faces = held_out.faces
    for pictures in held_out:
        logits, sharp = {}, None
        for t in trained:
            crops = crop_faces(pictures.images, pictures.boxes, np.arange(len(pictures.images)), t.spec.crop)
            x = torch.from_numpy(crops)
            sharp = sharpness(x) if sharp is None else sharp
            logits[t.name] = t.network(x).squeeze(1).numpy()
        assert sharp is not None
        count = len(pictures.rows)
        for i in range(2 * count):
            row, is_fake = pictures.rows[i % count], i >= count
            tracks = make_tracks(faces, np.array([row]))
            name = f"{faces.path[row]}#{pictures.family}{pictures.view}{pictures.level}"
            dataset = f"{pictures.family} {pictures.level}"
            scored.append(
                ScoredVideo(
                    f"{name}#fake" if is_fake else name,
                    float(is_fake),
                    faces.source_id[row],
                    name if is_fake else None,
                    dataset,
                    pool_rows(tracks, {k: v[i : i + 1] for k, v in logits.items()}, bundle),
                    float(sharp[i]),
                )
            )
    return collect(scored, bundle.aggregation.tracks)


def count_false_positives(scored: Scored, faces: FaceTable, p_fake: F64) -> dict[str, dict[str, float]]:
    """The share of real pictures with p_fake above THRESHOLD, by the photos' dataset and by level."""
    origin = dict(zip(faces.path, faces.dataset, strict=True))
    groups: dict[str, dict[str, list[bool]]] = {}
    for video, label, dataset, p in zip(scored.video, scored.label, scored.dataset, p_fake, strict=True):
        if label == 0:
            by_level = groups.setdefault(origin[video.partition("#")[0]], {})
            by_level.setdefault(dataset.split()[-1], []).append(bool(p > THRESHOLD))
    return {name: {k: float(np.mean(v)) for k, v in by_level.items()} for name, by_level in sorted(groups.items())}


def evaluate(
    checkpoints: Sequence[Path], faces: Path, out: Path, *, split: Literal["val", "test"] = "test"
) -> dict[str, Any]:
    """What the command does; returns the content of evaluation.json."""
    table = FaceTable.load(faces)
    trained = [load_trained(path) for path in checkpoints]
    bundle = make_bundle(trained, [t.spec for t in trained])
    validation = score(trained, bundle, HeldOut(table, "val"))
    people = len(set(validation.source_id))
    fitted_on = (
        f"{len(validation)} real and fake pictures of {people} people, all families and levels of training.heldout"
    )
    calibration = fit_calibration(validation.logits, validation.label, fitted_on)
    scored = validation if split == "val" else score(trained, bundle, HeldOut(table, split))
    part = table.split(split)
    report = make_report(trained, part.faces, scored, calibration, same=split == "val") | {
        "not_scored": part.failures,
        "levels": {name: asdict(level) for name, level in LEVELS.items()},
        "false_positives": count_false_positives(scored, part, scored.logits.p_fake(calibration)),
    }
    write_report(report, scored, calibration, out)
    return report


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.heldout", description=__doc__.split("\n\n")[0])
    parser.add_argument("checkpoints", type=Path, nargs="+", help="best.safetensors of one or more runs")
    parser.add_argument("--faces", type=Path, required=True, help="what training.faces wrote, of photos")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--split", default="test", choices=["val", "test"])
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    try:
        report = evaluate(args.checkpoints, args.faces, args.out, split=args.split)
    except DfengineError as error:
        sys.exit(f"error: {error}")
    print(f"{'split ' + report['split']:24} {'AUC':24} {'of sharpness':24} difference, with 95 % intervals over people")
    for name, row in report["by_dataset"].items():
        cells = (f"{row[k]:.3f} ({row[k + '_95'][0]:.3f} to {row[k + '_95'][1]:.3f})" for k in PRINTED)
        print(f"{name:24}", *(f"{cell:24}" for cell in cells))
    fitted = report["calibration"]
    print(f"temperature {fitted['temperature']:.3f}, bias {fitted['bias']:+.3f}: {fitted['fitted_on']}")


if __name__ == "__main__":
    main()
