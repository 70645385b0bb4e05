"""Each stage alone, on one thread: what a second of CPU buys.

python -m benchmarks.stages --videos DIR [--clip NAME] [--repeats 5]
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.harness import save, time_calls
from benchmarks.nets import NETS, make_bundle
from dfengine import Bundle
from dfengine.runtime import CpuDevice
from dfengine.sampling import Sampling
from dfengine.stages.crop import crop_tracks
from dfengine.stages.decode import open_video
from dfengine.stages.detect import Detector
from dfengine.stages.people import People
from dfengine.types import Frames


def decode(clip: Path, mode: str) -> tuple[Frames, int]:
    """All sampled frames, and how many were decoded for them."""
    with open_video(clip) as video:
        (frames,) = video.frames(Sampling.parse("uniform:17", mode), memory_bytes=1 << 40)
        return frames, video.frames_decoded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=Path, required=True, help="folder of videos")
    parser.add_argument("--clip", default="lynaeydofd.mp4", help="the one that is used")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    clip = args.videos / args.clip
    rows: list[dict[str, Any]] = []

    def measure(stage: str, call: Callable[[], object], per: str, count: int) -> None:
        row = {"stage": stage, "per": per, "count": count} | time_calls(call, repeats=args.repeats)
        rows.append(row)
        print(f"  {stage:<34} {row['median_s'] * 1e3:8.1f} ms, {row['median_s'] * 1e3 / count:8.3f} ms a {per}")

    for mode in ("exact", "reference", "keyframe"):
        measure(f"decode, {mode}", lambda mode=mode: decode(clip, mode), "decoded frame", decode(clip, mode)[1])
    frames, _ = decode(clip, "reference")
    default = Bundle.load("default")
    detector = Detector(default.detector)
    for stride in (1, default.detector.stride):
        measure(
            f"detect, stride {stride}", lambda stride=stride: detector.detect(frames.images, stride=stride), "frame",
            len(frames),
        )  # fmt: skip
    ((_, rows_found, image_index),) = People(detector, default.tracking, "exact").each([frames])
    with tempfile.TemporaryDirectory() as temporary:
        bundles = {"default": default} | {name: make_bundle(name, Path(temporary)) for name in NETS}
        for name, bundle in bundles.items():
            member = bundle.members[0]
            size = f"{member.crop.input_hw[0]} px"
            cut = functools.partial(crop_tracks, frames.images, rows_found, image_index, member.crop)
            crops = cut()
            measure(f"crop, {size}", cut, "crop", len(crops))
            session = CpuDevice().session(bundle, member.name, threads=1)
            measure(f"{name}, {size}", lambda session=session, crops=crops: session.run(crops), "crop", len(crops))
    result = {"what": "one thread, networks are loaded before", "clip": clip.name, "frames": len(frames), "rows": rows}
    print("wrote", save("stages", result).name)


if __name__ == "__main__":
    main()
