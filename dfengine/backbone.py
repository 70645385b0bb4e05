"""Crops -> logits: the members of an ensemble."""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np
from numpy.typing import NDArray

from dfengine.bundle import Bundle, ModelSpec
from dfengine.errors import InferenceError
from dfengine.runtime import make_session
from dfengine.types import F64, Crops

# Crops that go through a member together. 224 px crops of 32 rows are 19 MB; 8 and 128 were no faster.
BATCH_CROPS = 32


class Backbone:
    """All members of a bundle, compiled. Thread-safe."""

    def __init__(self, bundle: Bundle, *, threads: int = 1) -> None:
        self.members = bundle.members
        self._sessions = {m.name: make_session(bundle, m.name, threads=threads) for m in bundle.members}

    def run(
        self, rows: int, make_crops: Callable[[ModelSpec, slice], Crops], *, only: Collection[str] | None = None
    ) -> dict[str, F64]:
        """Logits of every member, or of those named in ``only``, for ``rows`` rows, (rows,) each; positive means fake.

        ``make_crops(spec, rows)`` cuts out some of the rows; members with the same preprocessing share the crops.
        """
        members = tuple(m for m in self.members if only is None or m.name in only)
        logits = {m.name: np.empty(rows, np.float64) for m in members}
        for group in _by_preprocessing(members):
            for start in range(0, rows, BATCH_CROPS):
                part = slice(start, min(start + BATCH_CROPS, rows))
                crops = make_crops(group[0], part)
                for member in group:
                    logits[member.name][part] = self._logits(member, crops)
        return logits

    def _logits(self, member: ModelSpec, crops: Crops) -> NDArray[np.float32]:
        (out,) = self._sessions[member.name].run(crops.batch)
        logits = out.reshape(len(crops), -1)
        if logits.shape[1] != 1 or not np.isfinite(logits).all():
            raise InferenceError(
                f"member {member.name!r} must give one finite logit a crop, got {out.shape} with "
                f"{int((~np.isfinite(out)).sum())} that are not finite; export it again",
                stage="backbone",
            )
        return logits[:, 0]


def _by_preprocessing(members: tuple[ModelSpec, ...]) -> list[list[ModelSpec]]:
    groups: dict[tuple[object, ...], list[ModelSpec]] = {}
    for m in members:
        key = (m.input_hw, m.mean, m.std, m.margin_ratio, m.crop_shape, m.resize, m.padding)
        groups.setdefault(key, []).append(m)
    return list(groups.values())
