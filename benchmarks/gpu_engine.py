"""The engine on a GPU, end to end: against decoding alone, inference alone, and the naive PyTorch way.

    python -m benchmarks.gpu_engine --videos DIR [--clips NAME ...] [--nets default efficientnet_b1] [--copies 16]

First scores are compared: GPU with CPU, in float16. Then videos per second, each clip ``copies`` times in a round:
*decode alone* is NVDEC delivering the wanted frames and nothing else; *inference alone* has the frames of each clip
decoded before; the engine cannot be faster than the slower of the two. *naive* is OpenCV, facenet-pytorch and torch
with the networks on the GPU, one video at a time, as people write it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.engine import DFDC_CLIPS, FRAMES, MODES, difference
from benchmarks.harness import save
from dfengine import Bundle, Engine
from dfengine.devices import resolve_device
from dfengine.errors import DeviceError
from dfengine.sampling import Sampling, parse_mode
from dfengine.stages.decode import open_video
from dfengine.types import Frames, VideoScore


class Kept:
    """A video whose frames were decoded before."""

    fallback_reason = ""

    def __init__(self, name: str, frames: list[Frames], frames_decoded: int) -> None:
        self.name, self.warnings = name, []
        self.frames_decoded = frames_decoded
        self._frames = frames

    def __enter__(self) -> Kept:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def frames(self, sampling: Sampling, **limits: int) -> Iterator[Frames]:
        yield from self._frames


def measure(work: Callable[[list[Path]], Iterable[object]], clips: list[Path], rounds: int) -> dict[str, float]:
    """Videos a second over ``clips``, after a round that does not count."""
    list(work(clips))
    rates = []
    for _ in range(rounds):
        started = time.perf_counter()
        list(work(clips))
        rates.append(len(clips) / (time.perf_counter() - started))
    return {"videos_per_s": statistics.median(rates), "min": min(rates), "max": max(rates)}


def decode_alone(engine: Engine, mode: str) -> Callable[[list[Path]], Iterable[int]]:
    sampling = Sampling(engine.plan.sampling.policy, parse_mode(mode))

    def decode(path: Path) -> int:
        with engine._shared.device.lane() as lane, open_video(path, lane=lane, pool=engine._shared.decoders) as video:
            count = sum(len(frames) for frames in video.frames(sampling))
            lane.synchronize()
            return count

    pool = ThreadPoolExecutor(engine.workers)
    return lambda paths: pool.map(decode, paths)


@contextmanager
def decoded_before(engine: Engine, clips: list[Path], mode: str) -> Iterator[None]:
    """Inside it the engine finds the frames of the clips decoded."""
    sampling = Sampling(engine.plan.sampling.policy, parse_mode(mode))
    with engine._shared.device.lane() as lane:
        kept = {}
        for path in clips:
            with open_video(path, lane=lane, pool=engine._shared.decoders) as video:
                frames = list(video.frames(sampling))
                kept[path] = Kept(video.name, frames, video.frames_decoded)
        lane.synchronize()
        with mock.patch("dfengine.scoring.open_video", lambda path, **options: kept[path]):
            yield


def check(scores: list[VideoScore], where: str) -> list[float]:
    failed = [f"{s.path}: {s.error.message if s.error else s.status}" for s in scores if s.p_fake is None]
    if failed:
        sys.exit(f"not all clips have a score on {where}: {'; '.join(failed)}")
    return [s.p_fake for s in scores if s.p_fake is not None]


def measure_net(bundle: Bundle, clips: list[Path], copies: int, rounds: int) -> dict[str, Any]:
    from benchmarks.baseline import Baseline

    many = clips * copies
    rows = []
    for mode in MODES:
        with Engine(bundle, device="cpu", frames=FRAMES, mode=mode) as engine:
            expected = check(list(engine.stream(clips, ordered=True)), "the CPU")
        with Engine(bundle, device="cuda", frames=FRAMES, mode=mode) as engine:
            scores = list(engine.stream(clips, ordered=True))
            row: dict[str, Any] = {"mode": mode, "device": engine.device, "runtime": scores[0].runtime}
            row["decoders"] = sorted({s.decoder for s in scores})
            row |= difference(list(zip(expected, check(scores, "the GPU"), strict=True)))
            row["decode_alone"] = measure(decode_alone(engine, mode), many, rounds)
            with decoded_before(engine, clips, mode):
                row["inference_alone"] = measure(engine.stream, many, rounds)
            row["engine"] = measure(engine.stream, many, rounds)
        slower = min(row["decode_alone"]["videos_per_s"], row["inference_alone"]["videos_per_s"])
        row["share_of_slower"] = row["engine"]["videos_per_s"] / slower
        rows.append(row)
        print(
            f"  {mode:<10} max |dp| {row['max_abs_difference']:.4f}; decode alone "
            f"{row['decode_alone']['videos_per_s']:.1f}, inference alone {row['inference_alone']['videos_per_s']:.1f}, "
            f"engine {row['engine']['videos_per_s']:.1f} videos/s ({100 * row['share_of_slower']:.0f} % of the slower)",
            flush=True,
        )
    naive = Baseline(bundle, frames=FRAMES, device="cuda")
    opponent = measure(lambda paths: map(naive.score, paths), clips, rounds)
    for row in rows:
        row["ratio_to_naive"] = row["engine"]["videos_per_s"] / opponent["videos_per_s"]
    ratios = ", ".join(f"{row['mode']} {row['ratio_to_naive']:.1f}x" for row in rows)
    print(f"  naive      {opponent['videos_per_s']:.2f} videos/s; the engine: {ratios}", flush=True)
    return {"net": bundle.name, "rows": rows, "naive": opponent}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=Path, required=True, help="folder of videos")
    parser.add_argument("--clips", nargs="+", default=DFDC_CLIPS, help="those in it that are used")
    parser.add_argument("--nets", nargs="+", default=["default", "efficientnet_b1"])
    parser.add_argument("--copies", type=int, default=16, help="how often each clip is scored in a round")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    try:
        resolve_device("cuda")
    except DeviceError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    clips = [args.videos / name for name in args.clips]
    result: dict[str, Any] = {
        "what": f"{FRAMES} frames a video; networks are compiled before",
        "clips": list(args.clips),
        "timing": [],
    }
    with tempfile.TemporaryDirectory() as temporary:
        for net in args.nets:
            if net == "default":
                bundle = Bundle.load(net)
            else:
                from benchmarks.nets import make_bundle

                bundle = make_bundle(net, Path(temporary))
            print(f"{net}: {', '.join(args.clips)}")
            result["timing"].append(measure_net(bundle, clips, args.copies, args.rounds))
            save("gpu_engine", result)
    print("wrote gpu_engine.json")


if __name__ == "__main__":
    main()
