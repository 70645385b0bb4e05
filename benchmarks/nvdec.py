"""NVDEC alone: frames a second by how many sessions decode at a time, demuxing and the copies of 17 frames included.

python -m benchmarks.nvdec [--videos DIR] [--seconds 10] [--sessions 1 2 4 7 8 14]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import av
import numpy as np

from benchmarks.harness import save
from dfengine.errors import DeviceError
from dfengine.gpu.lanes import Gpu
from dfengine.gpu.nvdec import NvdecPool
from dfengine.sampling import Mode, Policy, Sampling
from dfengine.stages.decode import open_video

POLICY = Policy.parse("uniform:17")
MODES: tuple[Mode, ...] = ("exact", "reference")  # all frames, and those that others depend on


def make_clip(folder: Path) -> Path:
    """Ten seconds of 1080p, 30 frames a second, by x264's defaults: a pan over coarse noise."""
    path = folder / "made_1080p.mp4"
    noise = np.random.default_rng(1).integers(0, 256, (90, 160, 3), np.uint8).repeat(16, axis=0).repeat(16, axis=1)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=30, options={"preset": "medium", "crf": "23"})
        stream.width, stream.height, stream.pix_fmt = 1920, 1080, "yuv420p"
        for i in range(300):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(noise[i : i + 1080, 2 * i : 2 * i + 1920], "rgb24")))
        out.mux(stream.encode(None))
    return path


def differs_from_cpu(gpu: Gpu, pool: NvdecPool, path: Path, mode: Mode) -> str:
    """Why a video is left out: NVDEC does not take it, or gives other planes. "" if it is taken."""
    lane = gpu.lane()
    with open_video(path, lane=lane, pool=pool) as video:
        got = [image for frames in video.frames(Sampling(POLICY, mode)) for image in frames.images]
    if video.fallback_reason:
        return video.fallback_reason
    with open_video(path) as on_cpu:
        expected = [image for frames in on_cpu.frames(Sampling(POLICY, mode)) for image in frames.images]
    with lane:
        for a, b in zip(got, expected, strict=True):
            shift = a.bit_depth - b.bit_depth
            for x, y in zip(a.components, b.components, strict=True):
                if not np.array_equal(lane.download(x), y << shift):
                    return "its planes differ from FFmpeg's"
    return ""


def measure(gpu: Gpu, videos: list[Path], mode: Mode, sessions: int, seconds: float) -> dict[str, Any]:
    """Whole videos on ``sessions`` threads until the time is over; those in work then are finished and counted."""
    pool = NvdecPool(gpu, sessions)
    counts: list[tuple[int, int]] = []
    failures: list[BaseException] = []
    everyone = threading.Barrier(sessions + 1)
    deadline = [0.0]

    def work(first: int) -> None:
        try:
            lane = gpu.lane()
            decode(videos[first % len(videos)], lane)  # a session of its own is made
            everyone.wait()
            frames = count = 0
            while time.perf_counter() < deadline[0]:
                frames += decode(videos[(first + count) % len(videos)], lane)
                count += 1
            counts.append((frames, count))
        except BaseException as error:
            everyone.abort()
            failures.append(error)

    def decode(path: Path, lane: Any) -> int:
        with open_video(path, lane=lane, pool=pool) as video:
            for _ in video.frames(Sampling(POLICY, mode)):
                pass
        if video.fallback_reason:
            raise RuntimeError(f"{path.name}: {video.fallback_reason}")
        return video.frames_decoded

    threads = [threading.Thread(target=work, args=(i,)) for i in range(sessions)]
    for thread in threads:
        thread.start()
    deadline[0] = float("inf")
    try:
        everyone.wait()
    except threading.BrokenBarrierError:
        pass
    else:
        started, cpu = time.perf_counter(), time.process_time()
        deadline[0] = started + seconds
    for thread in threads:
        thread.join()
    pool.close()
    if failures:
        raise failures[0]
    elapsed = time.perf_counter() - started
    frames, count = (sum(column) for column in zip(*counts, strict=True))
    return {
        "mode": mode,
        "sessions": sessions,
        "seconds": elapsed,
        "frames_per_s": frames / elapsed,
        "videos_per_s": count / elapsed,
        "frames_per_video": frames / count,
        "cpu_cores": (time.process_time() - cpu) / elapsed,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=Path, help="folder of videos; by default a 1080p clip is made")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each line of the table")
    parser.add_argument("--sessions", type=int, nargs="+", default=[1, 2, 4, 7, 8, 14])
    args = parser.parse_args()
    try:
        gpu = Gpu.open()
        pool = NvdecPool(gpu, 1)
    except DeviceError as error:
        print(error, file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as temporary:
        found = sorted(p for p in args.videos.iterdir() if p.is_file()) if args.videos else [make_clip(Path(temporary))]
        left_out = {p.name: why for p in found for mode in MODES if (why := differs_from_cpu(gpu, pool, p, mode))}
        pool.close()
        videos = [p for p in found if p.name not in left_out]
        for name, why in left_out.items():
            print(f"left out: {name}: {why}")
        if not videos:
            print("NVDEC takes none of the videos", file=sys.stderr)
            return 1
        rows = []
        for mode in MODES:
            for sessions in args.sessions:
                rows.append(measure(gpu, videos, mode, sessions, args.seconds))
                row = rows[-1]
                print(
                    f"  {mode:<9} {sessions:>2} sessions {row['frames_per_s']:8.0f} frames/s "
                    f"{row['videos_per_s']:6.1f} videos/s, {row['cpu_cores']:.1f} cores busy"
                )
    result = {
        "what": "frames that came out of NVDEC; planes of the sampled ones were compared with FFmpeg's before",
        "gpu": {"name": gpu.name, "driver": gpu.driver, "engines": pool.engines},
        "policy": str(POLICY),
        "videos": [p.name for p in videos],
        "left_out": left_out,
        "rows": rows,
    }
    print("wrote", save("nvdec", result).name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
