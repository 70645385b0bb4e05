"""Bundles around well-known backbones, to time what users bring: random weights, so their scores mean nothing.

Time does not depend on the values of weights. The last layer is scaled so that logits differ from crop to crop like
those of a trained network; otherwise every comparison of scores would agree.
"""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path

import timm
import torch
from torch import nn

from dfengine.bundle import SCHEMA_VERSION, Aggregation, Bundle, CropSpec, ModelSpec, Precision, to_json

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}

# name -> (timm's name, input side). The sizes are those that the throughput of this field is quoted for; the published
# ensemble of seven took 150 px for Xception and 224 px for EfficientNet-B1.
NETS = {"efficientnet_b1": ("efficientnet_b1", 240), "xception": ("legacy_xception", 299)}

# Bundle -> its members. The last is the ensemble of GreatGameDota/Deepfake-Detection, geometric mean.
BUNDLES = {
    "efficientnet_b1": ["efficientnet_b1"],
    "xception": ["xception"],
    "ensemble7": ["xception"] * 2 + ["efficientnet_b1"] * 5,
}


def make_bundle(name: str, folder: Path, precision: Precision = "fp32") -> Bundle:
    """Writes BUNDLES[name] into ``folder``, unless it is there."""
    out = folder / f"{name}_{precision}"
    if not (out / "bundle.json").exists():
        out.mkdir(parents=True, exist_ok=True)
        members = [_make_member(net, seed, out, precision) for seed, net in enumerate(BUNDLES[name])]
        bundle = Bundle(
            schema_version=SCHEMA_VERSION, name=name, licence="none: random weights", members=tuple(members),
            aggregation=Aggregation(members="geometric_mean"), experimental=True,
        )  # fmt: skip
        (out / "bundle.json").write_text(to_json(bundle))
    return Bundle.load(out)


def _make_member(net: str, seed: int, out: Path, precision: Precision) -> ModelSpec:
    timm_name, side = NETS[net]
    torch.manual_seed(seed)
    model = timm.create_model(timm_name, pretrained=False, num_classes=1).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # equal tensors would be stored once, which onnx2torch cannot read
            nn.init.normal_(parameter, std=0.1)
    _spread_logits(model, side)
    path = out / f"{net}_{seed}.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter that writes opset 17 is the old one, and says so
        torch.onnx.export(
            model, (torch.zeros(2, 3, side, side),), str(path), input_names=["crops"], output_names=["logit"],
            dynamic_axes={"crops": {0: "batch"}, "logit": {0: "batch"}}, opset_version=17, dynamo=False,
        )  # fmt: skip
    return ModelSpec(
        name=path.stem, file=path.name, sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        crop=CropSpec(input_hw=(side, side), margin_ratio=0.3, **IMAGENET), precision=precision,
    )  # fmt: skip


@torch.inference_mode()
def _spread_logits(model: nn.Module, side: int) -> None:
    """Gives the logits of smooth random pictures mean 0 and deviation 1."""
    pictures = nn.functional.interpolate(torch.randn(32, 3, 8, 8), (side, side), mode="bicubic")
    logits = model(pictures)
    last = model.get_classifier()
    last.weight /= logits.std()
    last.bias.copy_((last.bias - logits.mean()) / logits.std())
