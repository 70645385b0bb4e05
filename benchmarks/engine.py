"""The engine against the usual stack: same weights, same frames, same machine, one run.

    python -m benchmarks.engine --videos DIR [--clips NAME ...] [--rounds 5] [--nets default ...]

First the scores of the default bundle are compared over all videos of DIR, if that is among the networks; then the
clips are scored again and again by each system, on all cores, each in a process of its own (which also tells its peak
memory). Networks that are not named keep the numbers of an earlier run on the same clips.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import describe_machine, load, save
from dfengine import Bundle, Engine
from dfengine.jobs.inputs import VIDEO_SUFFIXES
from dfengine.machine import usable_cores

FRAMES = 17
MODES = ("exact", "reference", "keyframe")
DFDC_CLIPS = ("brtujopkby.mp4", "lynaeydofd.mp4", "widuwuoiur.mp4", "yhffcuhhjy.mp4")

USUAL, USUAL_20, FAIR = "usual stack", "usual stack, 20 px", "fair stack"
DESCRIPTIONS = {
    USUAL: "cv2 + facenet-pytorch MTCNN + torch, same min_face",
    USUAL_20: "cv2 + facenet-pytorch MTCNN + torch, its own min_face of 20 px",
    FAIR: "PyAV + all networks on OpenVINO + cv2/PIL crops, a video a core",
    **{mode: f"dfengine, {mode}, a video a core" for mode in MODES},
    **{f"{mode}, alone": f"dfengine, {mode}, one video at a time" for mode in MODES},
    **{f"{mode}, bf16": f"dfengine, {mode}, a video a core, network in bfloat16" for mode in MODES},
}

# (videos) -> p_fake of each
ScoreAll = Callable[[list[Path]], Iterable[float | None]]


def make_system(system: str, bundle: Bundle) -> ScoreAll:
    if system in (USUAL, USUAL_20):
        from benchmarks.baseline import Baseline

        usual = Baseline(bundle, frames=FRAMES, min_face_px=20 if system == USUAL_20 else None)
        return lambda videos: [v.p_fake if (v := usual.score(path)) else None for path in videos]
    if system == FAIR:
        from benchmarks.baseline import FairBaseline

        cores = usable_cores()
        pool, local = ThreadPoolExecutor(cores), threading.local()

        def score(path: Path) -> float | None:
            if not hasattr(local, "fair"):
                local.fair = FairBaseline(bundle, frames=FRAMES)
            verdict = local.fair.score(path)
            return verdict.p_fake if verdict else None

        return lambda videos: pool.map(score, videos)
    engine = Engine(bundle, frames=FRAMES, mode=system.split(",")[0])
    if system.endswith("alone"):
        return lambda videos: [engine.score(path).p_fake for path in videos]
    return lambda videos: [score.p_fake for score in engine.stream(videos, ordered=True)]


def measure(system: str, folder: Path, videos: list[Path], rounds: int) -> dict[str, Any]:
    """Seconds a video in each round over ``videos``, scores, peak memory of this process."""
    bundle = Bundle.load(folder)
    score_all = make_system(system, bundle)
    scores = list(score_all(videos))  # and warms up
    # A video a core leaves cores idle at the end of a round, so those rounds are longer.
    repeated = videos if system in (USUAL, USUAL_20) else videos * 3
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        list(score_all(repeated))
        seconds.append((time.perf_counter() - started) / len(repeated))
    return {
        "system": system,
        "description": DESCRIPTIONS[system],
        "median_s": statistics.median(seconds),
        "min_s": min(seconds),
        "max_s": max(seconds),
        "rounds": rounds,
        "videos_per_s": 1 / statistics.median(seconds),
        "peak_memory_mib": peak_memory_mib(),
        "p_fake": dict(zip([v.name for v in videos], scores, strict=True)),
    }


def peak_memory_mib() -> float:
    """Of this process. (ru_maxrss would do, but a child begins with its parent's.)"""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def measure_bound(mode: str, folder: Path, videos: list[Path], rounds: int) -> dict[str, float]:
    """Mean CPU seconds a video by stage, on one thread; ``nets`` is the time inside the networks alone.

    No engine that decodes these frames and runs these networks on these crops can be faster than (decode + nets) by the
    number of cores.
    """
    from dfengine.runtime.openvino import OpenVinoSession

    nets = 0.0
    run = OpenVinoSession.run

    def counted(self: OpenVinoSession, *inputs: Any) -> Any:
        nonlocal nets
        started = time.perf_counter()
        result = run(self, *inputs)
        nets += time.perf_counter() - started
        return result

    OpenVinoSession.run = counted  # type: ignore[method-assign]
    per_round = []
    with Engine(Bundle.load(folder), frames=FRAMES, mode=mode, threads=1, workers=1) as engine:
        for video in videos:
            engine.score(video)
        for _ in range(rounds):
            nets = 0.0
            stages: dict[str, float] = {}
            for video in videos:
                for stage, seconds in engine.score(video).timings.items():
                    stages[stage] = stages.get(stage, 0.0) + seconds / len(videos)
            per_round.append(stages | {"nets": nets / len(videos)})
    return {stage: statistics.median(r[stage] for r in per_round) for stage in per_round[0]}


def in_a_process(function: Callable[..., Any], *args: Any) -> Any:
    """Calls it in a fresh process, so that neither memory nor thread pools are shared."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def score_videos(system: str, folder: Path, videos: list[Path]) -> list[float | None]:
    return list(make_system(system, Bundle.load(folder))(videos))


def compare_scores(videos: list[Path], folder: Path) -> dict[str, Any]:
    """p_fake of every video by the usual stack and by the engine in all modes; differences."""
    systems = (USUAL, FAIR, *MODES)
    columns = {s: in_a_process(score_videos, s, folder, videos) for s in systems}
    agreement: dict[str, Any] = {
        "rows": [{"video": v.name} | {s: columns[s][i] for s in systems} for i, v in enumerate(videos)]
    }
    for system in systems[1:]:
        pairs = zip(columns[USUAL], columns[system], strict=True)
        both = [(a, b) for a, b in pairs if a is not None and b is not None]
        agreement[system] = {"videos": len(both)} | difference(both)
        print(
            f"  {system:<12} mean |dp| {agreement[system]['mean_abs_difference']:.4f}, "
            f"max {agreement[system]['max_abs_difference']:.4f} over {len(both)} videos",
            flush=True,
        )
    return agreement


def difference(pairs: list[tuple[float, float]]) -> dict[str, float]:
    d = np.abs(np.subtract(*np.array(pairs).T))
    return {"mean_abs_difference": float(d.mean()), "max_abs_difference": float(d.max())}


def time_systems(net: str, folders: dict[str, Path], clips: list[Path], rounds: int) -> dict[str, Any]:
    """Every system on one network, ``folders`` by precision.

    Ratios refer to the first, the usual stack, and to the second, the fair one.
    """
    opponents = [USUAL, FAIR, USUAL_20] if net == "default" else [USUAL, FAIR]
    alone = [f"{mode}, alone" for mode in MODES] if net == "default" else []
    narrow = [f"{mode}, bf16" for mode in MODES[1:]] if "bf16" in folders else []
    cores = usable_cores()
    rows: list[dict[str, Any]] = []
    for system in (*opponents, *MODES, *narrow, *alone):
        folder = folders["bf16" if system in narrow else "fp32"]
        row = in_a_process(measure, system, folder, clips, 3 if system in opponents else rounds)
        rows.append(row)
        row["ratio"] = rows[0]["median_s"] / row["median_s"]
        if len(rows) > 1:
            row["ratio_to_fair"] = rows[1]["median_s"] / row["median_s"]
        row |= difference([(rows[0]["p_fake"][c.name], row["p_fake"][c.name]) for c in clips])
        text = f"  {row['description']:<66} {row['median_s']:6.3f} s/video {row['ratio']:5.1f}x"
        if system in MODES:
            row["cpu_s"] = in_a_process(measure_bound, system, folder, clips, rounds)
            row["bound_s"] = (row["cpu_s"]["decode"] + row["cpu_s"]["nets"]) / cores
            row["share_of_bound"] = row["bound_s"] / row["median_s"]
            text += f", {100 * row['share_of_bound']:.0f} % of the bound"
        print(text, flush=True)
    return {"net": net, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=Path, required=True, help="folder of videos")
    parser.add_argument("--clips", nargs="+", default=DFDC_CLIPS, help="those in it that are timed")
    parser.add_argument("--nets", nargs="+", default=["default", "efficientnet_b1", "xception"])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    videos = sorted(p for p in args.videos.iterdir() if p.suffix.lower() in VIDEO_SUFFIXES)
    clips = [args.videos / name for name in args.clips]
    for clip in clips:
        if clip not in videos:
            parser.error(f"{clip} is not there; name some of: {', '.join(v.name for v in videos)}")

    with tempfile.TemporaryDirectory() as temporary:
        folders: dict[str, dict[str, Path]] = {}
        for net in args.nets:
            if net == "default":
                folders[net] = {"fp32": Bundle.load(net).folder}
            else:
                from benchmarks.nets import make_bundle

                folders[net] = {p: make_bundle(net, Path(temporary), p).folder for p in ("fp32", "bf16")}
        result = load("engine")
        if result.get("clips") != list(args.clips):
            result = {"clips": list(args.clips), "timing": []}
        result["what"] = (
            f"{FRAMES} frames a video, all cores; networks are loaded before; each system in its own process"
        )
        if "default" in folders:
            print(f"agreement over {len(videos)} videos, default bundle")
            result["videos"] = [v.name for v in videos]
            result["agreement"] = compare_scores(videos, Bundle.load("default").folder)
        for net, by_precision in folders.items():
            print(f"{net}: {', '.join(args.clips)}; {FRAMES} frames, all cores")
            part = time_systems(net, by_precision, clips, args.rounds)
            parts = {p["net"]: p for p in (*result["timing"], part | {"git": describe_machine()["git"]})}
            result["timing"] = sorted(parts.values(), key=lambda p: str(p["net"]))
            print("wrote", save("engine", result).name)  # after each: a run that is stopped keeps what it has


if __name__ == "__main__":
    main()
