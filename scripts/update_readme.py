"""Draws the README's tables from the result files, between their markers.

python scripts/update_readme.py            # rewrites README.md
python scripts/update_readme.py --check    # exit code 1 if that would change it
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
NOT_MEASURED = "Not measured."


def engine_table(result: dict[str, Any]) -> str:
    machine, agreement = result["machine"], result["agreement"]
    lines = [
        f"One 1080p H.264 video of 10 s (`{result['clip']}`), 17 frames, one video at a time, networks loaded before; "
        f"median of {result['timing'][0]['repeats']} on {machine['cpu']}, {machine['cores']} cores, {machine['date']}:",
        "",
        "| system, same weights | s/video | min to max | faster |",
        "|---|---|---|---|",
    ]
    for row in result["timing"]:
        lines.append(
            f"| {row['system']} | {row['median_s']:.2f} | {row['min_s']:.2f} to {row['max_s']:.2f} "
            f"| {row['ratio']:.1f}x |"
        )
    both = "; ".join(
        f"`{mode}` mean {agreement[mode]['mean_abs_difference']:.4f}, max {agreement[mode]['max_abs_difference']:.4f}"
        for mode in ("exact", "reference")
    )
    lines += [
        "",
        "The scores agree: absolute difference of p_fake to the first row "
        f"over {len(result['videos'])} videos: {both}.",
    ]
    return "\n".join(lines)


def ops_table(result: dict[str, Any]) -> str:
    lines = [
        "Crop, resize and normalise from 1080p YUV 4:2:0 to a float32 tensor, one thread, median of 200, against "
        "OpenCV's way (convert the frame, crop, INTER_AREA, normalise, transpose):",
        "",
        "| case | OpenCV ms | dfengine ms (area) | dfengine ms (triangle) | faster (area) |",
        "|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        ms = [row[k]["median_s"] * 1e3 for k in ("opencv", "area", "triangle")]
        lines.append(f"| {row['case']} | {ms[0]:.2f} | {ms[1]:.2f} | {ms[2]:.2f} | {row['ratio']:.1f}x |")
    return "\n".join(lines)


def default_note(bundle: dict[str, Any]) -> str:
    held_out = bundle["provenance"]["held_out"]
    ranges = {
        (fakes, what): "{:.2f} to {:.2f}".format(*minmax([row[what] for row in held_out[fakes].values()]))
        for fakes in ("self_blended", "swap")
        for what in ("auc", "sharpness_auc")
    }
    return (
        f"  On {held_out['people']} people it had not seen, at three levels of compression, it tells a real face from "
        f"a self-blended one\n  with an AUC of {ranges['self_blended', 'auc']} (sharpness of the crop alone: "
        f"{ranges['self_blended', 'sharpness_auc']}), and from a swapped one with {ranges['swap', 'auc']}\n"
        f"  (sharpness alone: {ranges['swap', 'sharpness_auc']}); .5 is chance. "
        "All numbers: [training/README.md](training/README.md)."
    )


def minmax(values: list[float]) -> tuple[float, float]:
    return min(values), max(values)


def render(readme: str) -> str:
    """The README with its tables filled in."""
    sources = {
        "engine": (ROOT / "benchmarks/results/engine.json", engine_table),
        "ops": (ROOT / "benchmarks/results/ops.json", ops_table),
        "default": (ROOT / "dfengine/bundles/default/bundle.json", default_note),
    }
    for name, (path, draw) in sources.items():
        begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
        before, rest = readme.split(begin)
        after = rest.split(end, 1)[1]
        text = draw(json.loads(path.read_text())) if path.exists() else NOT_MEASURED
        readme = before + begin + text + "\n" + end + after
    return readme


def main() -> None:
    old = README.read_text()
    new = render(old)
    if "--check" in sys.argv[1:]:
        sys.exit(old != new)
    README.write_text(new)


if __name__ == "__main__":
    main()
