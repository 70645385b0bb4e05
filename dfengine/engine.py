"""Scores videos: one at a time, or many with what they share."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from dfengine.bundle import Bundle
from dfengine.devices import open_decoders, open_device
from dfengine.errors import BundleError, OptionError
from dfengine.machine import default_workers, threads_each, usable_cores
from dfengine.runtime import Device
from dfengine.sampling import Policy, Sampling, parse_mode
from dfengine.scoring import Scoring, Shared
from dfengine.stages.backbone import Backbone
from dfengine.stages.decode import DEFAULT_MEMORY_BYTES
from dfengine.stages.detect import Detector
from dfengine.types import PathLikeStr, Plan, VideoScore

log = logging.getLogger("dfengine")


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
        self._process = os.getpid()
        opened = open_device(device) if isinstance(device, str) else device
        decoders, why_no_decoders = open_decoders(opened)
        self.device = opened.name
        self.workers = workers or default_workers(opened.gpu is not None, self.cores)
        self._open: Shared | None = Shared(
            bundle=self.bundle,
            device=opened,
            detector=Detector(self.bundle.detector, folder=self.bundle.folder, device=opened, threads=self.cores),
            backbone=Backbone(self.bundle, device=opened, threads=self.cores),
            decoders=decoders,
            why_no_decoders=why_no_decoders,
            memory_bytes=memory_bytes,
        )
        if opened.gpu is not None:
            what = "%s, %s: %d videos in work, which take at most %d MiB beside networks and decoders"
            log.info(what, self.device, opened.runtime, self.workers, self.gpu_memory_mib)

    @property
    def gpu_memory_mib(self) -> int:
        """What the videos in work may take of a GPU's memory, at most: frames, crops, and what is kept for the next.

        0 on the CPU. The networks come on top, and what NVDEC takes for each decoder. When the memory runs out before
        that, what is kept is given back, batches are halved, and what then does not fit is a DeviceMemoryError.
        """
        return self.workers * self._shared.device.lane_bytes(self._shared.video_bytes) >> 20

    @property
    def _shared(self) -> Shared:
        if self._open is None:
            raise RuntimeError("the engine is closed; make a new one")
        if self._process != os.getpid():  # the threads that run its networks stayed behind: it would wait for ever
            raise RuntimeError(
                "the engine was made before this process was forked from another; make one in each process, or start "
                "processes with multiprocessing's 'spawn'"
            )
        return self._open

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees the networks and the device. Not while a video is being scored.

        The engine cannot be used afterwards: that raises RuntimeError.
        """
        shared, self._open = self._open, None
        if shared is not None:
            if shared.decoders is not None:
                shared.decoders.close()
            shared.device.close()

    def score(
        self, path: PathLikeStr, *, plan: Plan | None = None, on_stage: Callable[[str], None] | None = None
    ) -> VideoScore:
        """Scores one video on all cores. What is wrong with the file is in the result; nothing is raised for it.

        ``plan``: more or less work than the engine's own (``engine.plan``). ``on_stage`` is called with the name of
        each stage that begins or goes on, "" between two. Raises OptionError for a plan with unknown members, or none.
        """
        if plan is not None:
            known = self.plan.members
            if not plan.members or not set(plan.members) <= set(known):
                raise OptionError(
                    f"the plan's members are {list(plan.members)}; give one or more of those of the bundle that score: "
                    f"{', '.join(known)}"
                )
        return self._score(path, self.cores, plan, on_stage)

    def stream(self, paths: Iterable[PathLikeStr], *, ordered: bool = False) -> Iterator[VideoScore]:
        """Scores many videos, ``workers`` at a time, and yields them as they are done (``ordered``: in input order).

        ``paths`` is read as far ahead as there are workers, and one more: nothing is yielded before that many were
        given, or ``paths`` has ended.
        """
        if isinstance(paths, str | bytes | os.PathLike):
            raise TypeError(f"paths must be several paths, got the one path {paths!r}; write stream([path])")
        return self._stream(paths, ordered)

    def _stream(self, paths: Iterable[PathLikeStr], ordered: bool) -> Iterator[VideoScore]:
        if self.workers == 1:
            yield from map(self.score, paths)
            return
        threads = threads_each(self.cores, self.workers)
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
        if not isinstance(os.fspath(path), str):
            raise TypeError(f"a path must be text, got {path!r}; os.fsdecode(path) makes text of it")
        return Scoring(self._shared, path, plan or self.plan, threads=threads, on_stage=on_stage).run()


def make_plan(bundle: Bundle, *, frames: str | int | None = None, mode: str | None = None) -> Plan:
    """What is asked for: the bundle's own sampling where nothing is given, and all members that score.

    Raises OptionError, and BundleError if no member scores.
    """
    if not bundle.scorers:
        raise BundleError(
            f"{bundle.name!r} has no member that scores; it is a detector, for detector.nets of other bundles",
            path=bundle.folder,
            stage="bundle",
        )
    policy = Policy.parse(str(frames)) if frames is not None else bundle.sampling
    sampling = Sampling(policy, parse_mode(mode) if mode is not None else bundle.sampling_mode)
    return Plan(sampling, members=tuple(m.name for m in bundle.scorers))


def _take_done(pending: list[Future[VideoScore]], ordered: bool) -> list[VideoScore]:
    """Removes what is done from ``pending``, waiting for at least one; the first in the queue if ``ordered``."""
    done = {pending[0]} if ordered else wait(pending, return_when=FIRST_COMPLETED).done
    taken = [future for future in pending if future in done]
    pending[:] = [future for future in pending if future not in done]
    return [future.result() for future in taken]
