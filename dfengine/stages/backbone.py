"""Crops -> logits: the members of an ensemble.

Note [Clips]
A clip member judges ``clip_frames`` crops of one person at a time. A track is cut into consecutive clips that do not
overlap; its last rows, if they are too few, are judged together with the rows before them, so that every clip is full
of what was seen. A track shorter than a clip repeats its last crop. A row's logit is that of its clip, so pooling
over rows weighs every clip by the rows that only it has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from functools import partial

import numpy as np
from numpy.typing import NDArray

from dfengine.bundle import Bundle, CropSpec, ModelSpec
from dfengine.errors import InferenceError
from dfengine.runtime import CpuDevice, Device, run_or_halve
from dfengine.stages.kernels import to_host
from dfengine.types import F32, F64, I64, Array, Tracks

MakeCrops = Callable[[CropSpec, slice], Array]

# Crops that are cut and handed to a member together. 224 px crops of 32 rows are 19 MB; 8 and 128 were no faster.
BATCH_CROPS = 32


def clip_rows(count: int, clip_frames: int) -> I64:
    """The clips of a track of ``count`` rows, (clips, clip_frames): which rows each holds. See Note [Clips]."""
    starts = np.arange(0, count, clip_frames)
    starts = np.maximum(np.minimum(starts, count - clip_frames), 0)
    return np.asarray(np.minimum(starts[:, None] + np.arange(clip_frames), count - 1), np.int64)


class Backbone:
    """All members of a bundle, compiled for a device. Thread-safe."""

    def __init__(self, bundle: Bundle, *, device: Device | None = None, threads: int = 1) -> None:
        device = CpuDevice() if device is None else device
        self.members = bundle.members
        self._sessions = {m.name: device.session(bundle, m.name, threads=threads) for m in bundle.members}

    @property
    def crops_bytes(self) -> int:
        """Of the crops that a member is handed together, as float32, at most."""
        return max(3 * math.prod(m.crop.input_hw) for m in self.members) * BATCH_CROPS * 4

    def run(self, rows: int, make_crops: MakeCrops, *, only: Collection[str] | None = None) -> dict[str, F64]:
        """Logits of every frame member, or of those named in ``only``, for ``rows`` rows, (rows,) each.

        Positive means fake. ``make_crops(crop, rows)`` cuts out some of the rows, (B, 3, H, W); members with the same
        preprocessing share them.
        """
        members = tuple(m for m in self.members if m.kind == "frame" and (only is None or m.name in only))
        logits = {m.name: np.empty(rows, np.float64) for m in members}
        for group in _by_preprocessing(members):
            for start in range(0, rows, BATCH_CROPS):
                stop = min(start + BATCH_CROPS, rows)
                run_or_halve(partial(self._run_batch, group, make_crops, logits), start, stop)
        return logits

    def _run_batch(
        self, group: list[ModelSpec], make_crops: MakeCrops, logits: dict[str, F64], start: int, stop: int
    ) -> None:
        batch = make_crops(group[0].crop, slice(start, stop))
        for member in group:
            logits[member.name][start:stop] = self._logits(member, batch)

    def clips(self, log_mel: Mapping[str, F32], *, only: Collection[str] | None = None) -> Clips:
        """The clip members, or those named in ``only``, ready for one video.

        ``log_mel``: (bands, frames) by name of each member of kind "audio".
        """
        members = (m for m in self.members if m.takes_clips)
        return Clips(self, tuple(m for m in members if only is None or m.name in only), log_mel)

    def _logits(self, member: ModelSpec, *inputs: Array) -> NDArray[np.float32]:
        (out,) = self._sessions[member.name].run(*inputs)
        logits = out.reshape(len(inputs[0]), -1)
        if logits.shape[1] != 1 or not np.isfinite(logits).all():
            what = "crop" if member.kind == "frame" else "clip"
            raise InferenceError(
                f"member {member.name!r} must give one finite logit a {what}, got {out.shape} with "
                f"{int((~np.isfinite(out)).sum())} that are not finite; export it again",
                stage="backbone",
            )
        return logits[:, 0]


class Clips:
    """One video on its way through the clip members: keeps crops until their clip is full. Not thread-safe.

    A video may come in several parts, each row of a track later than those before. What is kept is less than two clips
    of each track.
    """

    def __init__(self, backbone: Backbone, members: tuple[ModelSpec, ...], log_mel: Mapping[str, F32]) -> None:
        self._backbone = backbone
        self._log_mel = log_mel
        self._groups = _by_preprocessing(members)
        self._rows = 0
        self._logits: dict[str, F64] = {m.name: np.empty(0, np.float64) for m in members}
        # By group and track: crops of the last full clip and of the rows since, and the numbers of the latter.
        self._held: dict[tuple[int, int], tuple[F32, I64]] = {}

    def add(self, tracks: Tracks, make_crops: MakeCrops) -> None:
        """Takes the next rows, ordered by track and then by time; scores the clips that are full."""
        numbers = self._rows + np.arange(len(tracks))
        self._rows += len(tracks)
        for name in self._logits:
            self._logits[name] = np.append(self._logits[name], np.full(len(tracks), np.nan))
        for g, group in enumerate(self._groups):
            size = group[0].clip_frames
            full: list[tuple[F32, I64]] = []
            for track in np.unique(tracks.track_id):
                mine = np.flatnonzero(tracks.track_id == track)
                # At most a clip at a time, so that little more is cut than kept.
                for start in range(0, len(mine), size):
                    part = slice(int(mine[start]), int(mine[start : start + size][-1]) + 1)
                    crops = to_host(make_crops(group[0].crop, part))
                    before, waiting = self._held.get((g, int(track)), (crops[:0], numbers[:0]))
                    held, waiting = np.concatenate([before, crops]), np.append(waiting, numbers[part])
                    if len(waiting) >= size:
                        end = len(held) - (len(waiting) - size)
                        full.append((held[end - size : end], waiting[:size]))
                        waiting = waiting[size:]
                    self._held[g, int(track)] = held[-(size + len(waiting)) :], waiting
                    if len(full) * size >= BATCH_CROPS:
                        self._run_clips(group, full)
                        full = []
            self._run_clips(group, full)

    def finish(self) -> dict[str, F64]:
        """Logits of every clip member for all rows that were added, in that order, (rows,) each."""
        for g, group in enumerate(self._groups):
            size = group[0].clip_frames
            rest = []
            for (of, _), (held, waiting) in self._held.items():
                if of == g and len(waiting):
                    last = held[-size:]
                    rest.append((last[np.minimum(np.arange(size), len(last) - 1)], waiting))
            self._run_clips(group, rest)
        self._held.clear()
        return self._logits

    def _run_clips(self, group: list[ModelSpec], clips: list[tuple[F32, I64]]) -> None:
        """``clips``: the crops of each, (T, 3, H, W), and the rows that get its logit."""
        if not clips:
            return
        batch = np.stack([crops for crops, _ in clips])
        for member in group:
            sound = self._log_mel.get(member.name)
            sound_input = [np.broadcast_to(sound, (len(clips), *sound.shape))] if sound is not None else []
            for logit, (_, rows) in zip(self._backbone._logits(member, batch, *sound_input), clips, strict=True):
                self._logits[member.name][rows] = logit


def _by_preprocessing(members: tuple[ModelSpec, ...]) -> list[list[ModelSpec]]:
    groups: dict[tuple[CropSpec, int], list[ModelSpec]] = {}
    for m in members:
        groups.setdefault((m.crop, m.clip_frames), []).append(m)
    return list(groups.values())
