"""The main path: path -> Frames -> Faces -> Tracks -> Crops -> logits -> VideoScore."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

import numpy as np

from dfengine.bundle import Bundle, ModelSpec
from dfengine.devices import open_decoders, open_device
from dfengine.errors import DfengineError, OptionError, display_path
from dfengine.gpu.lanes import CACHE_BYTES
from dfengine.machine import default_workers, usable_cores
from dfengine.runtime import Device
from dfengine.sampling import Policy, parse_mode
from dfengine.stages.aggregate import judge
from dfengine.stages.audio import Sound, load_log_mel
from dfengine.stages.backbone import BATCH_CROPS, Backbone
from dfengine.stages.crop import crop_tracks
from dfengine.stages.decode import DEFAULT_MEMORY_BYTES, Video, open_video
from dfengine.stages.detect import Detector
from dfengine.stages.people import People
from dfengine.timing import Watch
from dfengine.types import F64, Crops, ErrorInfo, PathLikeStr, Plan, Tracks, VideoScore

log = logging.getLogger("dfengine")

# Of the detector, on a GPU: 16 frames at the largest level of the pyramid and their proposals, 20 MiB as a rule.
DETECTOR_BYTES = 64 << 20


class Engine:
    """Scores videos. Holds compiled networks, so make one and keep it. Thread-safe; a context manager.

    ``device``: "auto", "cpu", "cuda", or a dfengine.runtime.Device, which the engine then owns. ``frames``: a sampling
    policy, or a number N for uniform:N; ``mode``: "exact", "reference" or "keyframe" (see dfengine.sampling). Both
    default to the bundle's. ``workers``: videos that ``stream`` scores at a time, by default one a core, or 16 on a
    GPU. ``threads``: cores to use, by default all. ``memory_bytes``: decoded frames held at a time, by video; a limit
    that splits a video changes scores in exact mode by rounding only, but that a person who is missed in frames at the
    split is not filled in there; in the other modes as other boxes of the same faces do.

    Note [The GPU is shared by videos]
    There is one main path. On a GPU each of ``workers`` threads goes along it with a video of its own and a stream of
    its own, so that one video is decoded while another is searched for faces and a third is judged; what overlaps is
    whole videos. Networks serve all threads and put rows of several videos into one batch (dfengine.gpu.batching).
    """

    def __init__(
        self,
        bundle: PathLikeStr | Bundle = "default",
        *,
        device: str | Device = "auto",
        frames: str | int | None = None,
        mode: str | None = None,
        workers: int | None = None,
        threads: int | None = None,
        memory_bytes: int = DEFAULT_MEMORY_BYTES,
    ) -> None:
        self.bundle = Bundle.load(bundle)
        self.plan = make_plan(self.bundle, frames=frames, mode=mode)
        for name, value in (("workers", workers), ("threads", threads)):
            if value is not None and value < 1:
                raise OptionError(f"{name} must be at least 1, got {value}")
        self.cores = threads or usable_cores()
        self._memory_bytes = memory_bytes
        self._device = open_device(device) if isinstance(device, str) else device
        self._decoders, self._no_decoders = open_decoders(self._device)
        self.device = self._device.name
        self.workers = workers or default_workers(self._device.gpu is not None, self.cores)
        self._nets: tuple[Detector, Backbone] | None = (
            Detector(self.bundle.detector, device=self._device, threads=self.cores),
            Backbone(self.bundle, device=self._device, threads=self.cores),
        )
        if self._device.gpu is not None:
            what = "%s, %s: %d videos in work, which take at most %d MiB beside networks and decoders"
            log.info(what, self.device, self._device.runtime, self.workers, self.gpu_memory_mib)

    @property
    def gpu_memory_mib(self) -> int:
        """What the videos in work may take of a GPU's memory, at most: frames, crops, and what is kept for the next.

        The networks come on top, and what NVDEC takes for each decoder. When the memory runs out before
        that, what is kept is given back, batches are halved, and what then does not fit is a DeviceMemoryError.
        """
        crops = max(3 * math.prod(m.input_hw) for m in self.bundle.members) * BATCH_CROPS * 4
        each = self._memory_bytes + crops + DETECTOR_BYTES
        return self.workers * (each * 5 // 4 + CACHE_BYTES) >> 20  # sizes are rounded up by a fourth at most

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees the networks and the device. Not while a video is being scored.

        The engine cannot be used afterwards: that raises RuntimeError.
        """
        self._nets = None
        if self._decoders is not None:
            self._decoders.close()
        self._device.close()

    def score(
        self, path: PathLikeStr, *, plan: Plan | None = None, on_stage: Callable[[str], None] | None = None
    ) -> VideoScore:
        """Scores one video on all cores. What is wrong with the file is in the result; nothing is raised for it.

        ``plan``: more or less work than the engine's own (``engine.plan``). ``on_stage`` is told the name of each stage
        that begins or goes on, "" between two.
        """
        return self._score(path, self.cores, plan, on_stage)

    def stream(self, paths: Iterable[PathLikeStr], *, ordered: bool = False) -> Iterator[VideoScore]:
        """Scores many videos, ``workers`` at a time, and yields them as they are done (``ordered``: in input order).

        ``paths`` is read as far ahead as there are workers, and one more: nothing is yielded before that many were
        given, or ``paths`` has ended.
        """
        if self.workers == 1:
            yield from map(self.score, paths)
            return
        threads = max(1, self.cores // self.workers)
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="dfengine")
        pending: list[Future[VideoScore]] = []
        try:
            for path in paths:
                pending.append(pool.submit(self._score, path, threads))
                # One more than the workers, so that none waits for the consumer.
                while len(pending) > self.workers:
                    yield from _take_done(pending, ordered)
            while pending:
                yield from _take_done(pending, ordered)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _score(
        self,
        path: PathLikeStr,
        threads: int,
        plan: Plan | None = None,
        on_stage: Callable[[str], None] | None = None,
    ) -> VideoScore:
        """The main path with its safety net: whatever happens to one video becomes its row."""
        if self._nets is None:
            raise RuntimeError("the engine is closed; make a new one")
        plan = plan or self.plan
        watch = Watch(on_stage)
        known: dict[str, Any] = {
            "path": display_path(path),
            "sampling": plan.sampling,
            "mode": plan.mode,
            "bundle": self.bundle.name,
            "bundle_digest": self.bundle.digest,
            "device": self.device,
            "runtime": self._device.runtime,
        }
        try:
            with self._device.lane() as lane:
                known |= self._main_path(path, threads, plan, watch, known, lane, *self._nets)
        except DfengineError as error:
            known |= _failed(type(error).__name__, error.stage or watch.stage, error.message)
        except MemoryError:
            known |= _failed("MemoryError", watch.stage, "memory ran out; lower memory_bytes or workers")
        except Exception as error:  # a defect of dfengine: it costs this video its score, and no other
            log.exception("unexpected error while scoring %s", display_path(path))
            known |= _failed(type(error).__name__, watch.stage, f"unexpected: {error}; please report this")
        score = VideoScore(**known, timings=watch.seconds)
        log.info("%s: %s in %.2f s", score.path, score.status, sum(watch.seconds.values()))
        return score

    def _main_path(
        self,
        path: PathLikeStr,
        threads: int,
        plan: Plan,
        watch: Watch,
        known: dict[str, Any],
        lane: Any,
        detector: Detector,
        backbone: Backbone,
    ) -> dict[str, Any]:
        """Fields of the VideoScore. ``known`` is filled on the way, so that a failed video tells how far it got."""
        policy, mode = Policy.parse(plan.sampling), parse_mode(plan.mode)
        people = People(detector, self.bundle.tracking, mode, watch=watch)
        logits: list[dict[str, F64]] = []
        with watch("decode"):
            video = open_video(path, threads=threads, lane=lane, pool=self._decoders)
        sounds: dict[str, Sound] = {}
        for member in self.bundle.members:
            if member.kind == "audio" and member.name in plan.members:
                with watch("audio"):
                    sounds[member.name] = load_log_mel(path, member.audio)
        clips = backbone.clips({name: sound.log_mel for name, sound in sounds.items()}, only=plan.members)
        with video, self._noting_how_decoded(video, known):
            chunks = watch.each("decode", video.frames(policy, mode, memory_bytes=self._memory_bytes))
            for frames, rows in people.each(chunks):

                def make_crops(spec: ModelSpec, part: slice, images: Any = frames.images, rows: Tracks = rows) -> Crops:
                    with watch("crop"):
                        return crop_tracks(images, rows[part], spec, dtype=self._device.dtype, threads=threads)

                with watch("backbone"):
                    logits.append(backbone.run(len(rows), make_crops, only=plan.members))
                    clips.add(rows, make_crops)
            deaf = (f"member {n!r} heard nothing: {s.missing}" for n, s in sounds.items() if s.missing is not None)
            known["warnings"] = (*video.warnings, *deaf)
        with watch("backbone"):
            of_clips = clips.finish()
        with watch("aggregate"):
            tracks, order = people.finish()
            if len(order) == 0:
                return {"status": "no_face"}
            columns = {name: np.concatenate([part[name] for part in logits]) for name in logits[0]} | of_clips
            verdict = judge(tracks, {name: column[order] for name, column in columns.items()}, self.bundle)
        return {
            "status": "ok",
            "p_fake": verdict.p_fake,
            "logit": verdict.logit,
            "tracks": verdict.tracks,
            "members": verdict.members,
            "frames_scored": len(np.unique(tracks.index)),
        }

    @contextmanager
    def _noting_how_decoded(self, video: Video, known: dict[str, Any]) -> Iterator[None]:
        """Whatever happens inside, what is known of the decoding is in ``known`` afterwards."""
        try:
            yield
        finally:
            known |= {
                "decoder": video.name,
                "fallback_reason": video.fallback_reason or self._no_decoders or None,
                "frames_decoded": video.frames_decoded,
            }


def make_plan(bundle: Bundle, *, frames: str | int | None = None, mode: str | None = None) -> Plan:
    """What is asked for: the bundle's own sampling where nothing is given, and all members. Raises OptionError."""
    return Plan(
        sampling=str(Policy.parse(str(frames if frames is not None else bundle.sampling))),
        mode=parse_mode(mode) if mode is not None else bundle.sampling_mode,
        members=tuple(m.name for m in bundle.members),
    )


def _failed(kind: str, stage: str, message: str) -> dict[str, Any]:
    return {"status": "error", "error": ErrorInfo(kind, stage, message)}


def _take_done(pending: list[Future[VideoScore]], ordered: bool) -> list[VideoScore]:
    """Removes what is done from ``pending``, waiting for at least one; the first in the queue if ``ordered``."""
    done = {pending[0]} if ordered else wait(pending, return_when=FIRST_COMPLETED).done
    taken = [future for future in pending if future in done]
    pending[:] = [future for future in pending if future not in done]
    return [future.result() for future in taken]
