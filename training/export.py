"""Writes a bundle from an evaluated run: ``python -m training.export runs/default --out dfengine/bundles/default``.

Fails unless the exported graph gives the network's logits, on real crops, in the runtime that will use it.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dfengine.bundle import SCHEMA_VERSION, Bundle, Calibration, to_json
from dfengine.runtime import make_session
from dfengine.types import F32, Image

from .degrade import crop
from .faces import FaceSet, split
from .model import BLOCKS, SPEC, STEM, WIDTHS, FaceNet
from .train import PAIRS, load_average, predict

OPSET = 17  # the newest that all three runtimes read
MAX_DIFFERENCE = 1e-3  # of a logit; float32 sums in another order differ by about 1e-5
CHECKED_FACES = 64

DATA = (
    {
        "name": "Face Research Lab London Set (DeBruine and Jones 2017), as in github.com/debruine/webmorphR.stim",
        "licence": "CC-BY-4.0",
    },
    {"name": "US House official portraits", "licence": "public domain (work of the US government)"},
    {"name": "US Senate official portraits", "licence": "public domain (work of the US government)"},
)


def export_bundle(
    model: FaceNet, crops: F32, out: Path, calibration: Calibration, provenance: dict[str, Any]
) -> Bundle:
    """Writes the ONNX file and bundle.json into ``out`` and returns the bundle as it loads from there.

    Raises ValueError if OpenVINO and torch disagree on ``crops``, (B, 3, H, W).
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / SPEC.file
    with warnings.catch_warnings():
        # The new exporter writes opset 18 and converts downwards; the old one writes opset 17 itself, and its file
        # holds the weights. torch warns that it will go away.
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(
            model.eval(),
            (torch.zeros(2, 3, *SPEC.input_hw),),
            str(path),
            input_names=["crops"],
            output_names=["logit"],
            dynamic_axes={"crops": {0: "batch"}, "logit": {0: "batch"}},
            opset_version=OPSET,
            dynamo=False,
        )
    member = dataclasses.replace(SPEC, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    bundle = Bundle(
        schema_version=SCHEMA_VERSION,
        name="default",
        licence="Apache-2.0",
        members=(member,),
        provenance=provenance,
        experimental=True,
        calibration=calibration,
    )
    (out / "bundle.json").write_text(to_json(bundle))
    bundle = Bundle.load(out)
    (logits,) = make_session(bundle, member.name, threads=1).run(crops)
    difference = float(np.abs(logits.squeeze(1) - predict(model, torch.from_numpy(crops))).max())
    if not difference <= MAX_DIFFERENCE:
        raise ValueError(f"OpenVINO and torch differ by {difference:.2g} in a logit, allowed is {MAX_DIFFERENCE}")
    return bundle


def crops_of(faces: FaceSet) -> F32:
    """The photos' faces as the engine would crop them, (N, 3, H, W)."""
    return crop([Image.from_rgb(rgb) for rgb in faces.rgb], torch.from_numpy(faces.xyxy), SPEC)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    torch.set_num_threads(1)
    command = json.loads((args.run / "command.json").read_text())
    progress = json.loads((args.run / "checkpoint.json").read_text())
    evaluation = json.loads((args.run / "evaluation.json").read_text())
    model = load_average(args.run)
    train, held_out = split(FaceSet.load(Path(command["faces"])))
    fitted = evaluation["calibration"]
    calibration = Calibration(temperature=fitted["temperature"], bias=fitted["bias"], fitted_on=fitted["fitted_on"])
    provenance = {
        "data": list(DATA),
        "photos": len(train),
        "people": len(np.unique(train.identity)),
        "fakes": "made from the photos: self-blended images and swaps, see training/fakes.py; no others were seen",
        "command": f"python -m training.train --faces {command['faces']} --out {command['out']} "
        f"--seed {command['seed']} --minutes {command['minutes']:g}",
        "seed": progress["seed"],
        "steps": progress["step"],
        "samples_seen": progress["step"] * 2 * PAIRS,
        "training_minutes": round(progress["seconds"] / 60, 1),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "torch": torch.__version__,
        "architecture": {
            "class": "training.model.FaceNet",
            "stem": STEM,
            "widths": list(WIDTHS),
            "blocks": list(BLOCKS),
            "parameters": sum(p.numel() for p in model.parameters()),
        },
        "held_out": evaluation,
    }
    bundle = export_bundle(model, crops_of(held_out[:CHECKED_FACES]), args.out, calibration, provenance)
    size = sum(f.stat().st_size for f in args.out.iterdir())
    print(f"{bundle.name}: {', '.join(m.name for m in bundle.members)}, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
