"""One video on the main path: path -> Frames -> Faces -> Tracks -> crops -> logits -> VideoScore."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from dfengine.bundle import Bundle, CropSpec
from dfengine.errors import DfengineError, display_path
from dfengine.runtime import Device
from dfengine.stages.aggregate import Verdict, judge
from dfengine.stages.audio import Sound, load_log_mel
from dfengine.stages.backbone import Backbone, Clips
from dfengine.stages.crop import crop_tracks
from dfengine.stages.decode import DecoderPool, Video, open_video
from dfengine.stages.detect import DETECTOR_BYTES, Detector
from dfengine.stages.people import People
from dfengine.timing import Watch
from dfengine.types import F64, I64, VERSION, Array, ErrorInfo, Frames, PathLikeStr, Plan, Tracks, VideoScore

log = logging.getLogger("dfengine")


@dataclass(frozen=True, eq=False, kw_only=True)
class Shared:
    """What all videos of one engine share."""

    bundle: Bundle
    device: Device
    detector: Detector
    backbone: Backbone
    decoders: DecoderPool | None  # beside the CPU's
    why_no_decoders: str  # "" where none are expected
    memory_bytes: int  # decoded frames held at a time, by video

    @property
    def video_bytes(self) -> int:
        """What one video takes at a time where its frames lie, at most: these, crops, and the detector's input."""
        return self.memory_bytes + self.backbone.crops_bytes + DETECTOR_BYTES


@dataclass(kw_only=True)
class Draft:
    """A VideoScore on the way: filled stage by stage, so that a failed video tells how far it got.

    Its fields are VideoScore's; ``sampling`` is the text of a policy.
    """

    path: str
    sampling: str
    mode: str
    bundle: str
    bundle_digest: str
    detector_digest: str
    device: str
    runtime: str
    decoder: str = ""
    fallback_reason: str | None = None
    frames_decoded: int = 0
    frames_scored: int = 0
    warnings: tuple[str, ...] = ()
    verdict: Verdict | None = None  # None: nobody counts, or the video failed
    error: ErrorInfo | None = None

    def finish(self, timings: dict[str, float]) -> VideoScore:
        verdict = self.verdict
        return VideoScore(
            path=self.path,
            status="error" if self.error is not None else "no_face" if verdict is None else "ok",
            p_fake=verdict.p_fake if verdict is not None else None,
            logit=verdict.logit if verdict is not None else None,
            error=self.error,
            warnings=self.warnings,
            tracks=verdict.tracks if verdict is not None else (),
            members=verdict.members if verdict is not None else {},
            frames_decoded=self.frames_decoded,
            frames_scored=self.frames_scored,
            sampling=self.sampling,
            mode=self.mode,
            bundle=self.bundle,
            bundle_digest=self.bundle_digest,
            detector_digest=self.detector_digest,
            dfengine_version=VERSION,
            device=self.device,
            runtime=self.runtime,
            decoder=self.decoder,
            fallback_reason=self.fallback_reason,
            timings=timings,
        )


class Scoring:
    """The scoring of one video, one method a stage. Used once, by one thread, which may use ``threads`` cores."""

    def __init__(
        self,
        shared: Shared,
        path: PathLikeStr,
        plan: Plan,
        *,
        threads: int,
        on_stage: Callable[[str], None] | None = None,
    ) -> None:
        self._shared, self._path, self._plan, self._threads = shared, path, plan, threads
        self._watch = Watch(on_stage)
        self._draft = Draft(
            path=display_path(path),
            sampling=str(plan.sampling.policy),
            mode=plan.sampling.mode,
            bundle=shared.bundle.name,
            bundle_digest=shared.bundle.digest,
            detector_digest=shared.bundle.detector.digest or "",
            device=shared.device.name,
            runtime=shared.device.runtime,
        )

    def run(self) -> VideoScore:
        """The main path with its safety net: whatever happens to one video becomes its row."""
        draft, watch = self._draft, self._watch
        try:
            with self._shared.device.lane() as lane:
                self._main_path(lane)
        except DfengineError as error:
            draft.error = ErrorInfo(type(error).__name__, error.stage or watch.failed, error.message)
        except MemoryError:
            draft.error = ErrorInfo("MemoryError", watch.failed, "memory ran out; lower memory_bytes or workers")
        except Exception as error:  # a defect of dfengine: it costs this video its score, and no other
            log.exception("unexpected error while scoring %s", draft.path)
            draft.error = ErrorInfo(type(error).__name__, watch.failed, f"unexpected: {error}; please report this")
        score = draft.finish(watch.seconds)
        log.info("%s: %s in %.2f s", score.path, score.status, sum(watch.seconds.values()))
        return score

    def _main_path(self, lane: Any) -> None:
        shared = self._shared
        with self._open(lane) as video:
            sounds = self._listen()
            clips = shared.backbone.clips({n: s.log_mel for n, s in sounds.items()}, only=self._plan.members)
            mode, watch = self._plan.sampling.mode, self._watch
            people = People(shared.detector, shared.bundle.tracking, mode, threads=self._threads, watch=watch)
            logits: list[dict[str, F64]] = []
            lying: tuple[str, ...] = ()
            for frames, rows, image_index in people.each(self._decode(video)):
                logits.append(self._classify(frames, rows, image_index, clips))
                if frames.is_last and people.count == 0:
                    lying = self._look_for_lying_faces(frames)
            without_sound = (f"member {n!r} heard nothing: {s.missing}" for n, s in sounds.items() if s.missing)
            self._draft.warnings = (*video.warnings, *without_sound, *lying)
        self._judge(people, logits, clips)

    @contextmanager
    def _open(self, lane: Any) -> Iterator[Video]:
        """The open video. Whatever happens to it, how it was decoded is known afterwards."""
        draft, shared = self._draft, self._shared
        with self._watch("decode"):
            video = open_video(self._path, threads=self._threads, lane=lane, pool=shared.decoders)
        with video:
            try:
                yield video
            finally:
                draft.decoder, draft.frames_decoded = video.name, video.frames_decoded
                draft.fallback_reason = video.fallback_reason or shared.why_no_decoders or None

    def _listen(self) -> dict[str, Sound]:
        """The sound for each member of kind "audio", by its name."""
        sounds = {}
        for member in self._shared.bundle.members:
            if member.kind == "audio" and member.name in self._plan.members:
                with self._watch("audio"):
                    sounds[member.name] = load_log_mel(self._path, member.audio)
        return sounds

    def _decode(self, video: Video) -> Iterator[Frames]:
        return self._watch.each("decode", video.frames(self._plan.sampling, memory_bytes=self._shared.memory_bytes))

    def _classify(self, frames: Frames, rows: Tracks, image_index: I64, clips: Clips) -> dict[str, F64]:
        """The logits of the frame members, (R,) by name; the clip members take their rows into ``clips``.

        ``image_index``: (R,), which of ``frames.images`` each row is in.
        """

        def make_crops(crop: CropSpec, part: slice) -> Array:
            with self._watch("crop"):
                images, dtype = frames.images, self._shared.device.dtype
                return crop_tracks(images, rows[part], image_index[part], crop, dtype=dtype, threads=self._threads)

        with self._watch("backbone"):
            logits = self._shared.backbone.run(len(rows), make_crops, only=self._plan.members)
            clips.add(rows, make_crops)
        return logits

    def _look_for_lying_faces(self, frames: Frames) -> tuple[str, ...]:
        """A warning where nobody stands upright, but faces are seen in turned pictures."""
        shared = self._shared
        with self._watch("detect"):
            degrees = shared.detector.lying(frames.images, shared.bundle.tracking.min_confidence)
        if degrees == 0:
            return ()
        how = "stand on their head" if degrees == 180 else "lie on their side"
        return (f"there are faces that {how}; turn the video by {degrees} degrees clockwise and score it again",)

    def _judge(self, people: People, logits: list[dict[str, F64]], clips: Clips) -> None:
        """``logits``: of the frame members, by Frames."""
        with self._watch("backbone"):
            of_clips = clips.finish()
        with self._watch("aggregate"):
            rows, order = people.finish()
            if len(rows) == 0:
                return
            columns = {name: np.concatenate([part[name] for part in logits]) for name in logits[0]} | of_clips
            by_member = {name: column[order] for name, column in columns.items()}
            self._draft.verdict = judge(rows, by_member, self._shared.bundle)
            self._draft.frames_scored = len(np.unique(rows.frame_index))
