"""Which faces or clips an epoch has, and in which order. What is done with them is in training.data.

Every draw comes from (seed, epoch) alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dfengine.stages.backbone import clip_rows
from dfengine.types import I64

from .fakes import FakeSettings
from .table import FaceTable


@dataclass(frozen=True, eq=False)
class Sample:
    """What one place in an epoch holds: T rows of one track, perhaps to be made a fake of."""

    rows: I64  # (T,)
    key: tuple[int, ...]  # of its chance; the real and the fake of a pair have the same
    view: int = 0  # of a pair: which camera and codec it goes through
    is_fake: bool = False  # to be made a fake of
    in_pair: bool = False


class Samples:
    """The samples of one split, epoch by epoch. See training.data.Batches for what an epoch has."""

    def __init__(
        self,
        faces: FaceTable,
        fakes: FakeSettings,
        *,
        balance: Literal["undersample", "weights", "none"],
        per_video: int,
        clip_frames: int | None,
        seed: int,
        batch: int,
        training: bool,
    ) -> None:
        """``clip_frames``: crops of a clip, None for single faces; the rest is that of DataSettings and Batches."""
        self._faces, self._fakes, self._balance, self._per_video = faces, fakes, balance, per_video
        self._clip_frames, self._seed, self._batch, self._training = clip_frames, seed, batch, training
        self.videos = faces.rows_by_video()
        self.labels = {path: int(faces.label[rows[0]]) for path, rows in self.videos.items()}
        self.real = [p for p, label in self.labels.items() if label == 0]
        self.fake = [p for p, label in self.labels.items() if label == 1]
        self.makes_pairs = fakes.ratio > 0 and (training or not self.fake)

    def class_weight(self) -> Tensor:
        """(2,), by label."""
        if not self._training or self._balance != "weights":
            return torch.ones(2)
        rng = np.random.default_rng(0)
        samples = [sum(len(self._draw_rows(path, rng)) for path in paths) for paths in (self.real, self.fake)]
        return sum(samples) / (2 * torch.tensor(samples, dtype=torch.float32))

    def epoch(self, epoch: int) -> list[Sample]:
        """The samples of an epoch in order, ``batch`` of them a batch."""
        if not self._training:
            return self._evaluation()
        rng = np.random.default_rng((self._seed, epoch, 0))
        if self._fakes.ratio > 0:
            return self._pairs(rng, epoch)
        real, fake = ([r for path in paths for r in self._draw_rows(path, rng)] for paths in (self.real, self.fake))
        if self._balance == "undersample":  # of samples: videos may have fewer faces than they are asked for
            count = min(len(real), len(fake))
            real, fake = ([rows[i] for i in rng.permutation(len(rows))[:count]] for rows in (real, fake))
        rows = [*real, *fake]
        return [Sample(rows[i], (epoch, 1, n)) for n, i in enumerate(rng.permutation(len(rows)))]

    def _pairs(self, rng: np.random.Generator, epoch: int) -> list[Sample]:
        reals = [r for path in self.real for r in self._draw_rows(path, rng)]
        samples, partners = [], []
        fakes: list[str] = []
        for n, i in enumerate(rng.permutation(len(reals))):
            samples.append(Sample(reals[i], (epoch, 1, n), in_pair=True))
            if rng.random() < self._fakes.ratio:
                partners.append(replace(samples[-1], is_fake=True))
                continue
            samples[-1] = replace(samples[-1], in_pair=False)
            if not fakes:  # all of them, in random order, before any comes again
                fakes = [self.fake[k] for k in rng.permutation(len(self.fake))]
            (rows,) = self._draw_rows(fakes.pop(), rng, count=1)
            partners.append(Sample(rows, (epoch, 2, n)))
        # Views of a pair lie so far apart that one process has them all, and makes the pair once.
        views, unique = self._fakes.views, self._batch // (2 * self._fakes.views)
        starts = range(0, len(samples), unique)
        return [
            replace(s, view=view)
            for k in starts
            for part in (samples[k : k + unique], partners[k : k + unique])
            for view in range(views)
            for s in part
        ]

    def _evaluation(self) -> list[Sample]:
        rows = [r for of_video in self.videos.values() for r in self._all_rows(of_video)]
        samples = [Sample(r, (0, 3, n), in_pair=self.makes_pairs) for n, r in enumerate(rows)]
        if not self.makes_pairs:
            return samples
        return [s for real in samples for s in (real, replace(real, is_fake=True))]

    def _draw_rows(self, path: str, rng: np.random.Generator, count: int | None = None) -> list[I64]:
        """Random faces or clips of a video: ``count`` of them, or as the settings say; each (T,)."""
        rows = self.videos[path]
        count = self._per_video if count is None else count
        if count == 0:
            return self._all_rows(rows)
        if self._clip_frames is None:
            return [rows[[i]] for i in rng.permutation(len(rows))[:count]]
        t = self._clip_frames
        starts = [(track, i) for track in self._tracks(rows) for i in range(max(1, len(track) - t + 1))]
        chosen = [starts[i] for i in rng.permutation(len(starts))[:count]]
        return [track[np.minimum(i + np.arange(t), len(track) - 1)] for track, i in chosen]

    def _all_rows(self, rows: I64) -> list[I64]:
        if self._clip_frames is None:
            return [rows[[i]] for i in range(len(rows))]
        return [track[c] for track in self._tracks(rows) for c in clip_rows(len(track), self._clip_frames)]

    def _tracks(self, rows: I64) -> list[I64]:
        tracks = self._faces.track[rows]
        return [rows[tracks == t] for t in np.unique(tracks)]
