"""Batches from a table of faces.

``Batches`` turns one split of what training.faces wrote into network input: the faces of an epoch (training.samples),
their augmentation and the fakes made from them, and at the end the crop that dfengine.stages.crop cuts, as the engine
would.
Every number that chance decides comes from (seed, epoch, position in the epoch) alone: several processes that share the
work see what one would have seen, and a run that goes on at any batch sees what it would have seen.

``python -m training.data FACES --out sheet.png`` draws some pseudo-fakes of the training split.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as PilImage
from torch import Tensor
from torch.nn import functional as F

from dfengine.bundle import CropSpec
from dfengine.errors import DfengineError, OptionError
from dfengine.stages.crop import crop_boxes, crop_faces
from dfengine.types import F32, I64, Image

from .augment import AugmentSettings, Draws, augment_pixels, jitter_boxes, mix
from .fakes import FakeSettings, Pairs, crop_masks, make_pairs
from .samples import Sample, Samples
from .table import DataError, FaceTable

__all__ = ["Batch", "Batches", "DataError", "DataSettings", "FaceTable"]

# Pixels of network input, along a side, that share a cell of Batch.mask: the stride of common backbones' features.
MASK_STRIDE = 16

# Pseudo-fakes are made where a face has this much more pixels than in the network's input, with this much more margin
# around it: room to be turned, shifted and cropped with jitter.
CANVAS_ZOOM, CANVAS_ROOM = 1.25, 0.25

# Around the crop: more than the widest filter of the augmentation sees, so that its borders do not show.
TRIM_PX = 12

# So that a set of photos is read once and not in every epoch: 1,800 faces for an input of 144 px.
CACHE_BYTES = 256 << 20

# A swap's donor is the one of so many faces drawn whose landmarks lie most alike (after Face X-ray, Li et al. 2020,
# arXiv:1912.13458, which takes the nearest of all).
DONOR_CANDIDATES = 16


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Which faces an epoch has."""

    # More fakes than reals: "undersample" takes as many of the larger class as there are of the smaller, anew each
    # epoch; "weights" takes all and weights each class by the inverse of its share (mean 1); "none" takes all.
    balance: Literal["undersample", "weights", "none"] = "undersample"
    per_video: int = 1  # random faces (or clips) of each video in an epoch of training; 0: all
    workers: int = 1  # threads that prepare batches ahead; 0: none

    def __post_init__(self) -> None:
        for name in ("per_video", "workers"):
            if getattr(self, name) < 0:
                raise OptionError(f"data.{name} must be 0 or more, got {getattr(self, name)}")


@dataclass(frozen=True, eq=False)
class Batch:
    """B samples, normalised as the CropSpec says. T is 1 for single faces."""

    x: Tensor  # (B, 3, H, W) float32, or (B, T, 3, H, W) for clips
    audio: Tensor | None  # (B, bands, frames) log-mel
    y: Tensor  # (B,) float32 in [0, 1]; 1 is fake
    weight: Tensor  # (B,) float32
    # (B, 1, h, w): the share of each cell of 16 px that was blended in. None without pseudo-fakes; NaN for fakes that
    # came as such, of which nobody knows.
    mask: Tensor | None
    video: list[str]  # path; that of a pseudo-fake is its real one's + "#fake"
    source_id: list[str]
    rows: I64  # (B, T), of Batches.faces

    def __len__(self) -> int:
        return len(self.y)


class Batches:
    """The batches of one split. See DataSettings for what an epoch has.

    With ``fakes.ratio`` above 0 an epoch of training is made of pairs: each batch is B / 2 reals and then, in the same
    order, their partners: with chance ``ratio`` a pseudo-fake of the very sample, else a fake of the split. Batches of
    training are full: what is left at the end of an epoch is dropped, and drawn anew in the next.

    ``split`` "train" is trained on; any other, or ``training=False``, is evaluated: every face (or clip) in the order
    of the table, once, nothing augmented, also if the last batch is short. If the split holds no fake and
    ``fakes.ratio`` is above 0, each face is followed by its pseudo-fake, and both go through one camera and codec, at
    full strength: on clean pictures a network that saw few others looks best. All of that depends on ``seed`` alone.

    Process ``rank`` of ``world`` gets rows rank, rank + world, ... of every batch (where that leaves any).

    ``audio``: path of a video -> log-mel (bands, frames), float32. ``batch`` counts the rows of all processes.
    ``clip_frames``: faces of a clip, in training with a random start, else as the engine makes them. None: no clips.
    """

    def __init__(
        self,
        table: FaceTable,
        crop: CropSpec,
        data: DataSettings,
        augment: AugmentSettings,
        fakes: FakeSettings,
        *,
        split: str,
        seed: int,
        batch: int,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cpu",
        clip_frames: int | None = None,
        audio: Callable[[Path], F32] | None = None,
        training: bool | None = None,
    ) -> None:
        self.training = split == "train" if training is None else training
        self.faces = table.split(split).faces
        self.crop, self.data, self.fakes = crop, data, fakes
        self.seed, self.batch, self.rank, self.world = seed, batch, rank, world
        self.device = torch.device(device)
        self.audio = audio
        self._clip_frames = clip_frames
        self._samples = Samples(
            self.faces,
            fakes,
            balance=data.balance,
            per_video=data.per_video,
            clip_frames=clip_frames,
            seed=seed,
            batch=batch,
            training=self.training,
        )
        self._makes_fakes = self._samples.makes_pairs
        self.augment = augment if self.training or self._makes_fakes else AugmentSettings()
        self._landmarks = _fill_landmarks(self.faces)
        self._donors = np.flatnonzero(self.faces.label == 0)
        self._canvas = _canvas_crop(crop)
        self._cached_canvas = functools.lru_cache(CACHE_BYTES // (3 * self._canvas.input_hw[0] ** 2))(self._cut_canvas)
        self._mask_hw = (-(-crop.input_hw[0] // MASK_STRIDE), -(-crop.input_hw[1] // MASK_STRIDE))
        self._where = f"split {split!r} of {table.folder}"
        self._check()
        self._length = self._count_batches()
        self._class_weight = self._samples.class_weight()

    @property
    def pictures(self) -> tuple[object, ...] | None:
        """What decides how pseudo-fakes look, None if there are none."""
        return (self.fakes, self.augment, self._canvas) if self._makes_fakes else None

    def __len__(self) -> int:
        """Batches of an epoch, the same for all epochs and processes."""
        return self._length

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yields the batches of an epoch from number ``start`` on."""
        samples = self._samples.epoch(epoch)
        make = functools.partial(self._make_batch, samples, epoch)
        if self.data.workers == 0:
            yield from (b for b in map(make, range(start, len(self))) if b is not None)
            return
        with ThreadPoolExecutor(self.data.workers) as pool:
            todo = iter(range(start, len(self)))
            ready: deque[Future[Batch | None]] = deque()
            try:
                for number in todo:
                    ready.append(pool.submit(make, number))
                    if len(ready) > self.data.workers and (made := ready.popleft().result()) is not None:
                        yield made
                while ready:
                    if (made := ready.popleft().result()) is not None:
                        yield made
            finally:
                for future in ready:
                    future.cancel()

    # -- what is there -------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        def require(ok: bool, message: str) -> None:
            if not ok:
                raise DataError(f"{self._where}: {message}")

        ratio = self.fakes.ratio
        if self._makes_fakes:
            lost = int((~np.isfinite(self._landmarks[self.faces.label == 0])).any(axis=(1, 2)).sum())
            require(lost == 0, f"pseudo-fakes need landmarks, {lost} faces have none; run training.faces again")
        if not self.training:
            return
        have = f"{len(self._samples.real)} real and {len(self._samples.fake)} fake files"
        if ratio == 0:
            require(
                bool(self._samples.real and self._samples.fake),
                f"training needs both classes, there are {have}; add the other, or make fakes (fakes.ratio = 1)",
            )
        else:
            require(bool(self._samples.real), f"pseudo-fakes are made from real faces, there are {have}")
            require(
                ratio == 1 or bool(self._samples.fake),
                f"fakes.ratio {ratio} needs fakes for the rest, there are {have}; set 1",
            )
            require(
                self.data.balance == "undersample",
                f"pairs are balanced by themselves; with fakes.ratio {ratio} data.balance must be 'undersample', "
                f"got {self.data.balance!r}",
            )
        parts = 2 * self.fakes.views * self.world
        require(
            ratio == 0 or self.batch % parts == 0,
            f"with pairs the batch must be a multiple of {parts} (2 * fakes.views * processes), got {self.batch}",
        )
        half_shared = self.batch % (2 * self.world) == 0
        require(
            half_shared or not self.augment.mixes,
            f"with mixup or cutmix the batch must be a multiple of {2 * self.world} (2 * processes), got {self.batch}",
        )
        require(self.batch % self.world == 0, f"{self.world} processes cannot share a batch of {self.batch} equally")

    def _count_batches(self) -> int:
        samples = len(self._samples.epoch(0))
        if not self.training:
            return -(-samples // self.batch)
        if samples < self.batch:
            raise DataError(
                f"{self._where}: an epoch has {samples} samples, less than one batch of {self.batch}; lower train.batch"
            )
        return samples // self.batch

    # -- one batch -----------------------------------------------------------------------------------------------------

    def _make_batch(self, samples: Sequence[Sample], epoch: int, number: int) -> Batch | None:
        share = samples[number * self.batch : (number + 1) * self.batch][self.rank :: self.world]
        if not share:
            return None
        severity = 1.0
        if self.training and self.augment.ramp_epochs > 0:
            severity = min(1.0, (epoch + number / len(self)) / self.augment.ramp_epochs)
        pairs = self._make_pairs(share)
        images: list[Image] = []
        boxes: list[F32] = []
        masks: list[Tensor] = []
        for sample in share:
            pictures, face_boxes, mask = self._load(sample, pairs)
            rng = np.random.default_rng((self.seed, *sample.key, 5, sample.view))
            if rng.random() < self.augment.flip:
                width = np.array([p.shape[1] for p in pictures], np.float32)[:, None]
                pictures = [np.ascontiguousarray(p[:, ::-1]) for p in pictures]
                x1, x2 = width - face_boxes[:, 2:3], width - face_boxes[:, 0:1]
                face_boxes = np.concatenate([x1, face_boxes[:, 1:2], x2, face_boxes[:, 3:4]], axis=1)
                mask = mask.flip(3) if isinstance(mask, Tensor) else mask
            face_boxes = jitter_boxes(face_boxes, self.augment, rng)
            if isinstance(mask, Tensor):
                masks.append(crop_masks(mask, torch.from_numpy(face_boxes), self.crop, self._mask_hw).mean(dim=0))
            else:
                masks.append(torch.full((1, *self._mask_hw), mask))
            if self.training or self._makes_fakes:
                pictures, face_boxes = _trim(pictures, face_boxes, self.crop)
            stored, face_boxes = augment_pixels(pictures, face_boxes, self.augment, rng, severity=severity)
            images += stored
            boxes.append(face_boxes)
        x = torch.from_numpy(crop_faces(images, np.concatenate(boxes), np.arange(len(images)), self.crop))
        if self._clip_frames is not None:
            x = x.unflatten(0, (len(share), -1))
        paths = [self.faces.path[s.rows[0]] for s in share]
        y = torch.tensor([float(s.is_fake or self._samples.labels[p] == 1) for s, p in zip(share, paths, strict=True)])
        batch = Batch(
            x.to(self.device),
            self._load_audio(paths),
            y.to(self.device),
            self._class_weight[y.long()].to(self.device),
            torch.stack(masks).to(self.device) if self.fakes.ratio > 0 else None,
            [f"{p}#fake" if s.is_fake else p for s, p in zip(share, paths, strict=True)],
            [self.faces.source_id[s.rows[0]] for s in share],
            np.stack([s.rows for s in share]),
        )
        if self.training and self.augment.mixes:
            places = range(self.rank, self.batch, self.world)
            draws = Draws([(self.seed, epoch, 4, number, place) for place in places])
            batch = replace(batch, **mix(batch.x, batch.audio, batch.y, batch.weight, batch.mask, self.augment, draws))
        return batch

    def _load(
        self, sample: Sample, pairs: dict[tuple[int, ...], Pairs]
    ) -> tuple[list[NDArray[np.uint8]], F32, Tensor | float]:
        """A sample's pictures, RGB (H, W, 3), with its face boxes (T, 4) and masks (T, 1, S, S), or one value."""
        if sample.in_pair:
            pair = pairs[sample.key]
            images = (pair.fake if sample.is_fake else pair.real).mul(255).round().byte().permute(0, 2, 3, 1)
            mask = pair.mask.cpu() if sample.is_fake else 0.0
            return list(images.cpu().contiguous().numpy()), pair.xyxy.cpu().numpy(), mask
        pictures = [self.faces.read_crop(row) for row in sample.rows]
        boxes = [self.faces.in_crop(row, self.faces.box[row].reshape(2, 2)).reshape(4) for row in sample.rows]
        return pictures, np.stack(boxes), np.nan if self._samples.labels[self.faces.path[sample.rows[0]]] else 0.0

    def _make_pairs(self, samples: Sequence[Sample]) -> dict[tuple[int, ...], Pairs]:
        """The pairs that are needed, by key, each of T pictures."""
        rows = {s.key: s.rows for s in samples if s.in_pair}
        if not rows:
            return {}
        donors = {key: self.draw_donor(r, np.random.default_rng((self.seed, *key, 1))) for key, r in rows.items()}
        wanted = np.concatenate([*rows.values(), *donors.values()])
        unique, place = np.unique(wanted, return_inverse=True)  # a self-blended image is its own donor: read it once
        back = torch.from_numpy(place).to(self.device)
        rgb, boxes, landmarks = (t[back].chunk(2) for t in self.canvases(unique))
        draws = Draws([(self.seed, *key, 2) for key, r in rows.items() for _ in r], self.device)
        made = make_pairs(rgb[0], boxes[0], landmarks[0], rgb[1], landmarks[1], self.fakes, draws)
        parts = {f.name: getattr(made, f.name).unflatten(0, (len(rows), -1)) for f in fields(Pairs)}
        return {key: Pairs(**{name: part[i] for name, part in parts.items()}) for i, key in enumerate(rows)}

    def canvases(self, rows: I64) -> tuple[Tensor, Tensor, Tensor]:
        """Faces on squares of one size: RGB in 0..1 (N, 3, S, S), boxes (N, 4) and landmarks (N, 5, 2) there."""
        crop, faces = self._canvas, self.faces
        rgb = np.stack([self._cached_canvas(int(row)) for row in rows]) / np.float32(255)
        wide = crop_boxes(faces.box[rows], crop)
        scale = crop.input_hw[0] / (wide[:, None, 2:] - wide[:, None, :2])  # (N, 1, 2)
        boxes = (faces.box[rows].reshape(-1, 2, 2) - wide[:, None, :2]) * scale
        landmarks = (self._landmarks[rows] - wide[:, None, :2]) * scale

        def tensor(values: NDArray[Any]) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(values, np.float32)).to(self.device)

        return tensor(rgb), tensor(boxes.reshape(-1, 4)), tensor(landmarks)

    def _cut_canvas(self, row: int) -> NDArray[np.uint8]:
        """(3, S, S)"""
        box = self.faces.in_crop(row, self.faces.box[row].reshape(2, 2)).reshape(1, 4)
        image = Image.from_rgb(self.faces.read_crop(row))
        rgb = np.asarray(crop_faces([image], box, np.zeros(1, np.int64), self._canvas), np.float32)[0]
        return np.asarray((rgb * 255).round().clip(0, 255), np.uint8)

    def draw_donor(self, rows: I64, rng: np.random.Generator) -> I64:
        """Whose face a pseudo-fake of ``rows`` gets, (T,): their own, or that of another source."""
        faces = self.faces
        if rng.random() >= self.fakes.swap:
            return rows
        others = rng.choice(self._donors, DONOR_CANDIDATES)
        others = others[faces.source_id[others] != faces.source_id[rows[0]]]
        if not len(others):
            return rows
        shape = self._landmark_shape(np.append(rows[:1], others))
        donor = others[int(np.argmin(((shape[1:] - shape[0]) ** 2).sum(axis=(1, 2))))]
        of_video = self._samples.videos[faces.path[donor]]
        later: I64 = of_video[(faces.track[of_video] == faces.track[donor]) & (of_video >= donor)]
        return later[np.minimum(np.arange(len(rows)), len(later) - 1)]

    def _landmark_shape(self, rows: I64) -> F32:
        """Landmarks in box units, (N, 5, 2): the same for the same pose, wherever and however large the face is."""
        low, high = self.faces.box[rows, None, :2], self.faces.box[rows, None, 2:]
        return (self._landmarks[rows] - low) / (high - low)

    def _load_audio(self, paths: Sequence[str]) -> Tensor | None:
        if self.audio is None:
            return None
        return torch.from_numpy(np.stack([self.audio(self.faces.source / path) for path in paths])).to(self.device)


def _canvas_crop(crop: CropSpec) -> CropSpec:
    face_px = CANVAS_ZOOM * max(crop.input_hw) / (1 + crop.margin_ratio)
    margin = crop.margin_ratio + CANVAS_ROOM
    side = 2 * round(face_px * (1 + margin) / 2)  # 4:2:0 wants even sides
    return CropSpec(input_hw=(side, side), margin_ratio=margin)


def _trim(pictures: Sequence[NDArray[np.uint8]], boxes: F32, crop: CropSpec) -> tuple[list[NDArray[np.uint8]], F32]:
    """Leaves away what no crop will show, before every step of the augmentation is paid for it by the pixel."""
    wide = crop_boxes(boxes, crop)
    x1, y1 = np.maximum(np.floor(wide[:, :2].min(axis=0)) - TRIM_PX, 0).astype(int)
    x2, y2 = (np.ceil(wide[:, 2:].max(axis=0)) + TRIM_PX).astype(int)
    return [np.ascontiguousarray(p[y1:y2, x1:x2]) for p in pictures], boxes - np.array([x1, y1, x1, y1], np.float32)


def _fill_landmarks(faces: FaceTable) -> F32:
    """Landmarks with those seen before in the track where a box was filled in, as the box itself was; (N, 5, 2)."""
    filled = faces.landmarks.copy()
    for row in np.flatnonzero(np.isnan(filled).any(axis=(1, 2))).tolist():
        if row > 0 and faces.path[row] == faces.path[row - 1] and faces.track[row] == faces.track[row - 1]:
            filled[row] = filled[row - 1]
    return filled


def draw_pairs(table: FaceTable, file: Path, *, seed: int = 0, pairs: int = 40) -> None:
    """Draws pseudo-fakes of the training split as the network would see them: real, fake and mask, pair by pair."""
    crop = CropSpec(input_hw=(160, 160), margin_ratio=0.4)
    fakes = FakeSettings(ratio=1.0)
    pairs = min(pairs, len(table.split("train").rows_by_video())) // 4 * 4
    batches = Batches(table, crop, DataSettings(), AugmentSettings(), fakes, split="train", seed=seed, batch=2 * pairs)
    batch = next(batches.epoch(0))
    assert batch.mask is not None
    masks = F.interpolate(batch.mask[pairs:], batch.x.shape[2:]).expand(-1, 3, -1, -1)
    tiles = torch.cat([*batch.x.split(pairs), masks], dim=3)  # (pairs, 3, 160, 480)
    sheet = torch.cat([torch.cat(list(row), dim=2) for row in tiles.split(4)], dim=1)
    PilImage.fromarray(sheet.mul(255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()).save(file)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.data", description="Draws pseudo-fakes of some faces.")
    parser.add_argument("faces", type=Path, help="a folder that training.faces wrote")
    parser.add_argument("--out", type=Path, required=True, help="a PNG")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    try:
        draw_pairs(FaceTable.load(args.faces), args.out, seed=args.seed)
    except DfengineError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
