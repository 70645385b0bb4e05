"""Draws the tables of README.md and docs/performance.md, between their markers, and the chart from the result files.

python scripts/update_readme.py            # rewrites the two pages
python scripts/update_readme.py --check    # exit code 1 if that would change it
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
NOT_MEASURED = "Not measured."
NETS = {"default": "default bundle", "efficientnet_b1": "EfficientNet-B1, 240 px", "xception": "Xception, 299 px"}


def engine_table(result: dict[str, Any]) -> str:
    machine, agreement = result["machine"], result["agreement"]
    lines = [
        f"{len(result['clips'])} DFDC clips of 10 s in 1080p H.264, 17 frames each, networks loaded before; median of "
        f"rounds over them on {machine['cpu']}, {machine['cores']} cores, {machine['date']}. DFDC: Deepfake "
        "Detection Challenge. *Faster* and *than the fair stack*: than the first and the second row. *Share of the "
        "bound*: the least time that is possible (decoding the needed frames and running the networks, nothing else), "
        "divided by the time taken.",
    ]
    for part in result["timing"]:
        lines += [
            "",
            f"| {NETS.get(part['net'], part['net'])} | s/video | min to max | faster | than the fair stack "
            "| share of the bound | peak MiB |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in part["rows"]:
            to_fair = f"{row['ratio_to_fair']:.1f}x" if "ratio_to_fair" in row else ""
            share = f"{100 * row['share_of_bound']:.0f} %" if "share_of_bound" in row else ""
            memory = f"{row['peak_memory_mib']:.0f}" if "peak_memory_mib" in row else "not measured"
            lines.append(
                f"| {row['description']} | {row['median_s']:.2f} | {row['min_s']:.2f} to {row['max_s']:.2f} "
                f"| {row['ratio']:.1f}x | {to_fair} | {share} | {memory} |"
            )
    both = "; ".join(
        f"`{system}` mean {agreement[system]['mean_abs_difference']:.4f}, "
        f"max {agreement[system]['max_abs_difference']:.4f}"
        for system in ("exact", "reference", "keyframe")
    )
    lines += [
        "",
        "![Videos per second by system and network](docs/engine.png)",
        "",
        "The scores agree, with the default bundle: absolute difference of p_fake to the first row over "
        f"{len(result['videos'])} videos: {both}. (`keyframe` looks at other moments of a video.)",
    ]
    return "\n".join(lines)


def draw_engine_chart(result: dict[str, Any], path: Path) -> None:
    """Videos per second, a group of bars for each network."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    systems = {"usual stack": "#9aa5b1", "fair stack": "#616e7c", "exact": "#7cc4fa", "reference": "#2186eb",
               "keyframe": "#03449e"}  # fmt: skip
    figure, axes = pyplot.subplots(figsize=(8, 3.6), layout="constrained")
    for i, (system, colour) in enumerate(systems.items()):
        rows = [next(r for r in part["rows"] if r["system"] == system) for part in result["timing"]]
        places = [group + (i - 2) * 0.17 for group in range(len(rows))]
        label = system if system.endswith("stack") else f"dfengine, {system}"
        bars = axes.bar(places, [r["videos_per_s"] for r in rows], 0.16, color=colour, label=label)
        axes.bar_label(bars, fmt="%.2f", fontsize=7)
    axes.set_xticks(range(len(result["timing"])), [NETS.get(p["net"], p["net"]) for p in result["timing"]])
    axes.set_ylabel("videos per second")
    axes.set_title(f"1080p clips of 10 s, 17 frames, {result['machine']['cores']} cores", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    pyplot.close(figure)


def kaggle_table(result: dict[str, Any]) -> str:
    columns = list(result["rows"][0]["cells"])
    lines = [
        f"Hours for {result['count']} videos like the {len(result['sample'])} of the sample, by the CPU alone, with "
        f"a 95 % interval over videos; **bold**: the upper end of that is within {result['limit_hours']:g} hours. "
        f"All networks but the default have random weights: only their time counts here. GPU: {result['gpu']}.",
        "",
        "| networks | " + " | ".join(f"{c} frames" for c in columns) + " |",
        "|---" * (1 + len(columns)) + "|",
    ]
    for row in result["rows"]:
        cells = []
        for cell in row["cells"].values():
            hours = f"{cell['hours']:.1f}"
            cells.append(
                (f"**{hours}**" if cell["fits"] else hours) + f" ({cell['hours_low']:.1f} to {cell['hours_high']:.1f})"
            )
        lines.append(f"| {row['members']} | " + " | ".join(cells) + " |")
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
    cells, levels = held_out["by_dataset"], held_out["levels"]
    people = cells["self_blended L1"]["sources"]

    def between(family: str) -> str:
        auc, sharp = ([cells[f"{family} {level}"][k] for level in levels] for k in ("auc", "sharpness_auc"))
        return f"{min(auc):.2f} to {max(auc):.2f} ({min(sharp):.2f} to {max(sharp):.2f})"

    return "\n".join(
        [
            f"  On fakes made of photos of {people} people it had not seen, on good and on small, hard compressed",
            "  or dark pictures, its AUC is (in brackets, what the sharpness of the crop alone reaches; .5 is chance)",
            f"  {between('self_blended')} for self-blended images,",
            f"  {between('swap')} for swaps, and for two kinds that it did not learn from,",
            f"  {between('autoencoder')} for faces redrawn by an autoencoder and {between('graft')}",
            "  for faces grafted without a seam. All numbers: [docs/model_card.md](docs/model_card.md).",
        ]
    )


FAMILIES = {
    "self_blended": "self-blended",
    "swap": "swap",
    "autoencoder": "autoencoder (unseen)",
    "graft": "graft (unseen)",
}


def held_out_table(bundle: dict[str, Any]) -> str:
    held_out = bundle["provenance"]["held_out"]
    lines = ["| fakes | level | AUC | sharpness | difference | pairs in order |", "|---" * 6 + "|"]
    cells = {(name, level): f"{key} {level}" for key, name in FAMILIES.items() for level in held_out["levels"]}
    for (name, level), key in [*cells.items(), (("all", "all"), "all datasets pooled")]:
        row = held_out["by_dataset"][key]
        numbers = [
            "{:{sign}.2f} ({:{sign}.2f} to {:{sign}.2f})".format(row[k], *row[f"{k}_95"], sign=sign)
            for k, sign in (("auc", ""), ("sharpness_auc", ""), ("auc_above_sharpness", "+"))
        ]
        lines.append(f"| {name} | {level} | {' | '.join(numbers)} | {100 * row['pair_accuracy']:.0f} % |")
    return "\n".join(lines)


def false_positives_table(bundle: dict[str, Any]) -> str:
    held_out = bundle["provenance"]["held_out"]
    lines = [f"| photos | {' | '.join(held_out['levels'])} |", "|---" * (1 + len(held_out["levels"])) + "|"]
    for name, row in held_out["false_positives"].items():
        lines.append(f"| {name} | {' | '.join(f'{100 * row[level]:.0f} %' for level in held_out['levels'])} |")
    return "\n".join(lines)


def bound_table(result: dict[str, Any]) -> str:
    lines = [
        "| network | mode | decode, CPU s | networks, CPU s | bound, s/video | measured | share |",
        "|---" * 7 + "|",
    ]
    for part in result["timing"]:
        for row in part["rows"]:
            if "bound_s" in row:
                cpu, net = row["cpu_s"], NETS.get(part["net"], part["net"])
                lines.append(
                    f"| {net} | `{row['system']}` | {cpu['decode']:.2f} | {cpu['nets']:.2f} "
                    f"| {row['bound_s']:.2f} | {row['median_s']:.2f} | {100 * row['share_of_bound']:.0f} % |"
                )
    return "\n".join(lines)


def gpu_engine_table(result: dict[str, Any]) -> str:
    lines = [
        f"{len(result['clips'])} DFDC clips of 10 s in 1080p H.264, 17 frames each, videos a second on "
        f"{result['machine']['gpu']}, {result['machine']['date']}. *Naive*: OpenCV, facenet-pytorch and torch, with "
        "the networks on the GPU.",
        "",
        "| network | mode | decode alone | inference alone | engine | of the slower | than naive | max dp to CPU |",
        "|---" * 8 + "|",
    ]
    for part in result["timing"]:
        for row in part["rows"]:
            alone = [row[k]["videos_per_s"] for k in ("decode_alone", "inference_alone", "engine")]
            lines.append(
                f"| {NETS.get(part['net'], part['net'])} | `{row['mode']}` | "
                + " | ".join(f"{v:.1f}" for v in alone)
                + f" | {100 * row['share_of_slower']:.0f} % | {row['ratio_to_naive']:.1f}x "
                f"| {row['max_abs_difference']:.4f} |"
            )
    return "\n".join(lines)


def stages_table(result: dict[str, Any]) -> str:
    lines = [
        f"Each stage alone, one thread, {result['frames']} frames of one 1080p clip:",
        "",
        "| stage | ms | ms each |",
        "|---|---|---|",
    ]
    for row in result["rows"]:
        ms = row["median_s"] * 1e3
        lines.append(f"| {row['stage']} | {ms:.0f} | {ms / row['count']:.2f} a {row['per']} |")
    return "\n".join(lines)


RESULTS = ROOT / "benchmarks/results"
DEFAULT = ROOT / "dfengine/bundles/default/bundle.json"
# File -> marker -> where its numbers are, and what draws them.
PAGES: dict[Path, dict[str, tuple[Path, Callable[[dict[str, Any]], str]]]] = {
    ROOT / "README.md": {
        "engine": (RESULTS / "engine.json", engine_table),
        "kaggle": (RESULTS / "kaggle.json", kaggle_table),
        "ops": (RESULTS / "ops.json", ops_table),
        "gpu": (RESULTS / "gpu_engine.json", gpu_engine_table),
        "default": (DEFAULT, default_note),
    },
    ROOT / "docs/performance.md": {
        "bound": (RESULTS / "engine.json", bound_table),
        "stages": (RESULTS / "stages.json", stages_table),
    },
    ROOT / "docs/model_card.md": {
        "held_out": (DEFAULT, held_out_table),
        "false_positives": (DEFAULT, false_positives_table),
    },
}


def render(page: Path) -> str:
    """A page with its tables filled in."""
    text = page.read_text()
    for name, (path, draw) in PAGES[page].items():
        begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
        before, rest = text.split(begin)
        after = rest.split(end, 1)[1]
        table = draw(json.loads(path.read_text())) if path.exists() else NOT_MEASURED
        text = before + begin + table + "\n" + end + after
    return text


def main() -> None:
    new = {page: render(page) for page in PAGES}
    if "--check" in sys.argv[1:]:
        sys.exit(any(page.read_text() != text for page, text in new.items()))
    for page, text in new.items():
        page.write_text(text)
    draw_engine_chart(json.loads((RESULTS / "engine.json").read_text()), ROOT / "docs/engine.png")


if __name__ == "__main__":
    main()
