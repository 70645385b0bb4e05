"""The engine against the usual stack: same weights, same frames, same machine, one run.

    python -m benchmarks.engine --videos DIR [--clip NAME] [--repeats 3]

First the scores are compared over all videos of DIR, then one 1080p clip is timed, both cores for everybody.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.baseline import Baseline
from benchmarks.harness import save, time_calls
from dfengine import Bundle, Engine
from dfengine.batch import VIDEO_SUFFIXES

FRAMES = 17


def compare_scores(videos: list[Path], bundle: Bundle, baseline: Baseline) -> dict[str, Any]:
    """p_fake of every video by the baseline and by the engine in both modes; differences."""
    rows = []
    with Engine(bundle, frames=FRAMES, mode="exact") as exact, Engine(bundle, frames=FRAMES) as reference:
        for video in videos:
            verdict = baseline.score(video)
            row = {
                "video": video.name,
                "baseline": verdict.p_fake if verdict else None,
                "exact": exact.score(video).p_fake,
                "reference": reference.score(video).p_fake,
            }
            rows.append(row)
            print(
                f"  {video.name:<20}"
                + "".join(f" {k} {'-' if v is None else f'{v:.4f}'}" for k, v in row.items() if k != "video")
            )
    agreement: dict[str, Any] = {"rows": rows}
    for mode in ("exact", "reference"):
        both = [(r["baseline"], r[mode]) for r in rows if r["baseline"] is not None and r[mode] is not None]
        difference = np.abs(np.subtract(*np.array(both).T)) if both else np.full(1, np.nan)
        agreement[mode] = {
            "videos": len(both),
            "mean_abs_difference": float(difference.mean()),
            "max_abs_difference": float(difference.max()),
        }
        print(f"  {mode}: mean |dp| {difference.mean():.4f}, max {difference.max():.4f} over {len(both)} videos")
    return agreement


def time_clip(clip: Path, bundle: Bundle, baseline: Baseline, repeats: int) -> list[dict[str, Any]]:
    """Seconds a video, by system; the first is the opponent the ratios refer to."""
    rows: list[dict[str, Any]] = []

    def measure(system: str, call: Any) -> None:
        rows.append({"system": system} | time_calls(call, repeats=repeats))
        ratio = rows[0]["median_s"] / rows[-1]["median_s"]
        rows[-1]["ratio"] = ratio
        print(f"  {system:<58} {rows[-1]['median_s']:6.2f} s   {ratio:5.1f}x")

    measure("cv2 + facenet-pytorch MTCNN + torch, same min_face", lambda: baseline.score(clip))
    default_px = Baseline(bundle, frames=FRAMES, min_face_px=20)
    measure("cv2 + facenet-pytorch MTCNN + torch, its own min_face 20 px", lambda: default_px.score(clip))
    for mode in ("exact", "reference"):
        with Engine(bundle, frames=FRAMES, mode=mode) as engine:
            measure(f"dfengine, {mode}", lambda engine=engine: engine.score(clip))
            stages: dict[str, list[float]] = {}
            for _ in range(repeats):
                for stage, seconds in engine.score(clip).timings.items():
                    stages.setdefault(stage, []).append(seconds)
            rows[-1]["stages_s"] = {stage: float(np.median(values)) for stage, values in stages.items()}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=Path, required=True, help="folder of videos")
    parser.add_argument("--clip", default="lynaeydofd.mp4", help="the clip in it that is timed")
    parser.add_argument("--bundle", default="default")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    videos = sorted(p for p in args.videos.iterdir() if p.suffix.lower() in VIDEO_SUFFIXES)
    clip = args.videos / args.clip
    if clip not in videos:
        parser.error(f"{clip} is not there; name one of: {', '.join(v.name for v in videos)}")

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    bundle = Bundle.load(args.bundle)
    baseline = Baseline(bundle, frames=FRAMES)
    print(f"agreement over {len(videos)} videos")
    agreement = compare_scores(videos, bundle, baseline)
    print(f"seconds for {clip.name}, {FRAMES} frames, median of {args.repeats}")
    timing = time_clip(clip, bundle, baseline, args.repeats)
    result = {
        "what": f"one video at a time, {FRAMES} frames, all cores; networks are loaded before",
        "bundle": bundle.name, "clip": clip.name, "videos": [v.name for v in videos],
        "agreement": agreement, "timing": timing,
    }  # fmt: skip
    print("wrote", save("engine", result).name)


if __name__ == "__main__":
    main()
