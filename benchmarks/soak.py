"""A long run over good, damaged and foreign files: one row each, flat memory, and kill -9 loses nothing.

    python -m benchmarks.soak --videos DIR [--count 1000] [--kills 10] [--originals 0.05]

Makes COUNT variants of the videos in DIR in a temporary folder: short 320-pixel copies, cut and damaged copies of
these, renamed ones and junk, and a share of the originals. Scores them with `dfengine score` once without a break,
sampling the memory of the run and of its workers, and once with KILLS times kill -9 at random moments and --resume.
Compares the two tables.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import av
import numpy as np

from benchmarks.harness import save
from dfengine.jobs.inputs import VIDEO_SUFFIXES

SHORT_SIDE, SHORT_SECONDS = 320, 3.0
SAMPLE_SECONDS = 0.2
TOLERANCE = 1e-5


def shorten(video: Path, target: Path) -> None:
    """The first seconds of a video, small, as H.264 in mp4."""
    with av.open(str(video)) as source, av.open(str(target), "w") as out:
        stream = source.streams.video[0]
        scale = SHORT_SIDE / max(stream.codec_context.width, stream.codec_context.height)
        width, height = (
            round(side * scale / 2) * 2 for side in (stream.codec_context.width, stream.codec_context.height)
        )
        made = out.add_stream("libx264", rate=stream.average_rate, options={"preset": "veryfast", "crf": "26"})
        made.width, made.height, made.pix_fmt = width, height, "yuv420p"
        for i, frame in enumerate(source.decode(stream)):
            if frame.time is not None and frame.time > SHORT_SECONDS:
                break
            frame = frame.reformat(width, height, "yuv420p")
            frame.pts, frame.time_base = i, 1 / stream.average_rate
            out.mux(made.encode(frame))
        out.mux(made.encode(None))


def make_variants(videos: list[Path], folder: Path, count: int, originals: float, rng: random.Random) -> Counter[str]:
    """``count`` files in ``folder``; how many of each kind."""
    with tempfile.TemporaryDirectory() as temporary:
        short = []
        for video in videos:
            short.append(Path(temporary) / f"{video.stem}.mp4")
            shorten(video, short[-1])
        data = [path.read_bytes() for path in short]
    kinds: Counter[str] = Counter()
    for i in range(count):
        kind = rng.choices(
            ("original", "copy", "cut", "flipped", "renamed", "junk", "text", "empty"),
            (originals, 0.6 - originals, 0.15, 0.15, 0.04, 0.04, 0.01, 0.01),
        )[0]
        kinds[kind] += 1
        which = rng.randrange(len(videos))
        good, suffix = data[which], ".mp4"
        if kind == "original":
            good, suffix = videos[which].read_bytes(), videos[which].suffix
        elif kind == "cut":
            good = good[: int(len(good) * rng.uniform(0.02, 0.98))]
        elif kind == "flipped":
            damaged = bytearray(good)
            for _ in range(rng.randint(1, 20)):
                at = rng.randrange(len(damaged))
                damaged[at : at + rng.randint(1, 200)] = rng.randbytes(rng.randint(1, 200))
            good = bytes(damaged)
        elif kind == "renamed":
            suffix = rng.choice([".avi", ".mkv", ".mpg", ".ts"])
        elif kind == "junk":
            good = rng.randbytes(rng.randint(1, 50_000))
        elif kind == "text":
            good = b"no video\n" * rng.randint(1, 100)
        elif kind == "empty":
            good = b""
        (folder / f"{i:05}_{kind}{suffix}").write_bytes(good)
    return kinds


class Run:
    """One `dfengine score` in a process of its own."""

    def __init__(self, words: list[str], out: Path) -> None:
        self._out = out
        self._process = subprocess.Popen(
            [sys.executable, "-m", "dfengine", "score", *words, "--out", str(out), "--quiet"], stdout=subprocess.DEVNULL
        )

    def running(self) -> bool:
        return self._process.poll() is None

    def rows(self) -> int:
        return self._out.read_bytes().count(b"\n") if self._out.exists() else 0

    def workers(self) -> list[int]:
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        try:
            return [int(pid) for pid in children.read_text().split()]
        except OSError:
            return []

    def memory_mib(self) -> tuple[float, list[float]]:
        """Resident memory of the run itself, and of each worker."""
        return _resident_mib(self._process.pid), [m for pid in self.workers() if (m := _resident_mib(pid)) > 0]

    def kill(self) -> list[int]:
        """kill -9; the workers that must now end by themselves."""
        workers = self.workers()
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        return workers

    def wait(self) -> int:
        return self._process.wait()


def _resident_mib(pid: int) -> float:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0.0
    return pages * 4096 / 2**20


def run_unbroken(words: list[str], out: Path) -> dict[str, Any]:
    """Scores everything in one go; memory by the number of rows written."""
    started = time.monotonic()
    run = Run(words, out)
    samples = []  # rows, parent MiB, workers MiB
    while run.running():
        parent, workers = run.memory_mib()
        if parent and workers:
            samples.append((run.rows(), parent, sum(workers)))
        time.sleep(SAMPLE_SECONDS)
    run.wait()
    seconds = time.monotonic() - started
    table = np.array(samples)
    count = table[-1, 0]
    quarters = np.array_split(table, 4)

    return {
        "seconds": round(seconds, 1),
        "videos_per_second": round(float(count) / seconds, 2),
        "median_mib_by_quarter": [[round(float(v), 1) for v in np.median(q[:, 1:], axis=0)] for q in quarters],
        "peak_mib_by_quarter": [[round(float(v), 1) for v in q[:, 1:].max(axis=0)] for q in quarters],
    }


def run_broken(words: list[str], out: Path, kills: int, seconds: float, rng: random.Random) -> dict[str, Any]:
    """The same with ``kills`` interruptions, spread at random over the time that an unbroken run takes."""
    killed_at = []
    for i in range(kills):
        run = Run([*words, "--resume"], out)
        time.sleep(rng.uniform(0.1, 2 * seconds / (kills + 1)))
        if not run.running():
            print(f"  the run was over before kill {i + 1}")
            break
        orphans = run.kill()
        killed_at.append(run.rows())
        time.sleep(2)
        alive = [pid for pid in orphans if _resident_mib(pid) > 0]
        if alive:
            raise RuntimeError(f"workers {alive} outlived their run")
    run = Run([*words, "--resume"], out)
    code = run.wait()
    return {"kills": len(killed_at), "rows_at_each_kill": killed_at, "exit_code": code}


def read_table(path: Path) -> dict[str, dict[str, Any]]:
    """Rows by path. Raises ValueError if a path has two."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    by_path = {row["path"]: row for row in rows}
    if len(by_path) != len(rows):
        raise ValueError(f"{len(rows)} rows for {len(by_path)} paths in {path}")
    return by_path


def compare(one: dict[str, dict[str, Any]], other: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What differs between two tables, timings aside."""
    different = []
    largest = 0.0
    for path in sorted(one.keys() | other.keys()):
        a, b = one.get(path), other.get(path)
        if a is None or b is None:
            different.append(f"{path}: missing in one")
            continue
        kinds = [(row["status"], (row["error"] or {}).get("type"), len(row["tracks"])) for row in (a, b)]
        if kinds[0] != kinds[1]:
            different.append(f"{path}: {kinds[0]} and {kinds[1]}")
        elif a["p_fake"] is not None:
            largest = max(largest, abs(a["p_fake"] - b["p_fake"]))
            if abs(a["p_fake"] - b["p_fake"]) > TOLERANCE:
                different.append(f"{path}: {a['p_fake']} and {b['p_fake']}")
    return {"different": different, "largest_difference_of_p_fake": largest}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=Path, required=True, help="folder of videos")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--originals", type=float, default=0.05, help="share of files that are unchanged originals")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="work in this folder, and leave it")
    args = parser.parse_args()
    videos = sorted(p for p in args.videos.iterdir() if p.suffix.lower() in VIDEO_SUFFIXES)
    rng = random.Random(args.seed)
    work = args.keep or Path(tempfile.mkdtemp(prefix="soak"))
    (work / "videos").mkdir(parents=True)
    try:
        kinds = make_variants(videos, work / "videos", args.count, args.originals, rng)
        print(f"{args.count} files: {dict(kinds)}")
        unbroken = run_unbroken([str(work / "videos")], work / "unbroken.jsonl")
        print(f"unbroken: {unbroken}")
        table = read_table(work / "unbroken.jsonl")
        answers = Counter((row["error"] or {}).get("type") or row["status"] for row in table.values())
        missing = {str(p) for p in (work / "videos").iterdir()} ^ table.keys()
        print(f"answers: {dict(answers)}; files without exactly one row: {len(missing)}")
        result: dict[str, Any] = {
            "what": "one row a file; memory of the run itself and of all workers together; kill -9 and --resume",
            "files": args.count, "kinds": dict(kinds), "answers": dict(answers), "without_a_row": sorted(missing),
            "unbroken": unbroken,
        }  # fmt: skip
        if args.kills:
            broken = run_broken([str(work / "videos")], work / "broken.jsonl", args.kills, unbroken["seconds"], rng)
            result["broken"] = broken | compare(table, read_table(work / "broken.jsonl"))
            print(f"broken: {result['broken']}")
        print("wrote", save("soak", result).name)
    finally:
        if not args.keep:
            shutil.rmtree(work, ignore_errors=True)
    if missing or result.get("broken", {}).get("different"):
        sys.exit("the tables are not what they should be")


if __name__ == "__main__":
    main()
