"""Whether a job fits a deadline: scores a sample, projects the whole, and says which ensembles fit.

    python -m benchmarks.kaggle --videos DIR [--limit 9h] [--count 4000] [--sample 16]

A row is a set of networks, a column what is done for each video. Every cell is measured: the sample is scored with that
work on all cores, a video a core, and the seconds are multiplied up. The interval is a bootstrap over the videos of the
sample, so it knows how videos differ and nothing of how the whole set differs from the sample.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import save
from benchmarks.nets import make_bundle
from dfengine import Bundle, Engine
from dfengine.jobs.deadline import parse_duration
from dfengine.jobs.inputs import VIDEO_SUFFIXES
from dfengine.machine import usable_cores
from dfengine.sampling import Sampling
from dfengine.types import Plan

FRAMES = (8, 17, 30)
MODES = ("reference", "keyframe")

# Members of the ensemble of seven that are run: "2x Xception + 5x EfficientNet-B1" is all of them.
SETS = {
    "EfficientNet-B1": ["efficientnet_b1_2"],
    "Xception": ["xception_0"],
    "Xception + 2x EfficientNet-B1": ["xception_0", "efficientnet_b1_2", "efficientnet_b1_3"],
    "2x Xception + 5x EfficientNet-B1": None,
}


def measure(bundle: Bundle, videos: list[Path], plans: dict[str, Plan], cores: int) -> dict[str, NDArray[np.float64]]:
    """For each plan, seconds by video while ``cores`` videos are scored at a time."""
    local = threading.local()

    def seconds(job: tuple[Path, Plan]) -> float:
        if not hasattr(local, "engine"):
            local.engine = Engine(bundle, threads=1, workers=1)
        score = local.engine.score(job[0], plan=job[1])
        if score.status == "error":
            raise SystemExit(f"{job[0].name} cannot be scored, so it tells nothing: {score.error}")
        return sum(score.timings.values())

    results = {}
    with ThreadPoolExecutor(cores) as pool:
        list(pool.map(seconds, [(v, p) for v in videos[:cores] for p in plans.values()]))  # warm up
        for name, plan in plans.items():
            results[name] = np.array(list(pool.map(seconds, [(v, plan) for v in videos])))
    return results


def project(seconds: NDArray[np.float64], count: int, cores: int) -> dict[str, float]:
    """Hours for ``count`` videos like these, with a 95 % bootstrap interval over videos."""
    rng = np.random.default_rng(0)
    means = rng.choice(seconds, (2000, len(seconds))).mean(axis=1)
    hours = count / cores / 3600
    low, high = np.quantile(means, (0.025, 0.975))
    return {
        "s_per_video": float(seconds.mean() / cores),
        "hours": float(seconds.mean() * hours),
        "hours_low": float(low * hours),
        "hours_high": float(high * hours),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=Path, required=True, help="folder of videos")
    parser.add_argument("--limit", default="9h", help="like 9h, 90m")
    parser.add_argument("--count", type=int, default=4000, help="videos of the whole job")
    parser.add_argument("--sample", type=int, default=16, help="videos that are scored, evenly spaced by name")
    args = parser.parse_args()
    limit_hours = parse_duration(args.limit) / 3600
    videos = sorted(p for p in args.videos.iterdir() if p.suffix.lower() in VIDEO_SUFFIXES)
    videos = [videos[i] for i in np.unique(np.linspace(0, len(videos) - 1, args.sample).round().astype(int))]
    cores = usable_cores()
    columns = [(frames, mode) for mode in MODES for frames in FRAMES]

    print(f"{args.count} videos in {limit_hours:g} h: {3600 * limit_hours / args.count:.2f} s/video; {cores} cores")
    print(f"{'hours (95 % interval)':<36}" + "".join(f"{f'{m} {n}':>22}" for n, m in columns))
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        ensemble = make_bundle("ensemble7", Path(temporary))
        for name, bundle, members in (
            ("default", Bundle.load("default"), None),
            *((name, ensemble, members) for name, members in SETS.items()),
        ):
            chosen = tuple(members or (m.name for m in bundle.members))
            plans = {
                f"{mode} {frames}": Plan(Sampling.parse(f"uniform:{frames}", mode), chosen) for frames, mode in columns
            }
            cells = {k: project(s, args.count, cores) for k, s in measure(bundle, videos, plans, cores).items()}
            for cell in cells.values():
                cell["fits"] = cell["hours_high"] <= limit_hours
            rows.append({"members": name, "cells": cells})
            texts = [
                f"{c['hours']:.2f} ({c['hours_low']:.2f}-{c['hours_high']:.2f}){' ' if c['fits'] else '!'}"
                for c in cells.values()
            ]
            print(f"{name:<36}" + "".join(f"{t:>22}" for t in texts), flush=True)
    result = {
        "what": "projected hours by networks, mode and frames, CPU alone; weights of all but `default` are random",
        "limit_hours": limit_hours, "count": args.count, "sample": [v.name for v in videos], "rows": rows,
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "gpu": "not measured",
    }  # fmt: skip
    print("wrote", save("kaggle", result).name)


if __name__ == "__main__":
    main()
