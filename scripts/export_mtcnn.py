"""Exports the three networks of MTCNN from facenet-pytorch to ONNX: run once, the result is packaged.

    pip install --no-deps facenet-pytorch==2.6.0
    python scripts/export_mtcnn.py            # writes dfengine/bundles/mtcnn/

Outputs are ordered (probability of a face, box regression, landmarks). Batch, height and width are dynamic for
P-Net. Weights: facenet-pytorch 2.6.0, MIT licence, converted there from the reference implementation of MTCNN
(Zhang et al. 2016, arXiv:1604.02878); see NOTICE.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from facenet_pytorch.models.mtcnn import ONet, PNet, RNet
from torch import Tensor, nn

from dfengine.bundle import SCHEMA_VERSION, Bundle, CropSpec, ModelSpec, to_json

OUT = Path(__file__).parents[1] / "dfengine/bundles/mtcnn"


class FaceFirst(nn.Module):
    """Reorders the outputs and drops the redundant probability of "no face"."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        box, *landmarks, prob = self.net(x)
        return (prob[:, 1].contiguous(), box, *landmarks)


def main() -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    members = []
    # P-Net slides over pictures of any size of at least 12 x 12 pixels; R-Net and O-Net see fixed crops.
    for name, net, size in (("pnet", PNet(), 0), ("rnet", RNet(), 24), ("onet", ONet(), 48)):
        example = torch.rand(2, 3, size or 60, size or 80)
        axes = {0: "batch"} | ({} if size else {2: "height", 3: "width"})
        outputs = ["prob", "box", "landmarks"][: 3 if name == "onet" else 2]
        dynamic = {"images": axes} | {
            o: ({0: "batch"} | ({} if size else {1: "y", 2: "x"} if o == "prob" else {2: "y", 3: "x"})) for o in outputs
        }
        path = OUT / f"{name}.onnx"
        torch.onnx.export(
            FaceFirst(net).eval(), (example,), str(path), input_names=["images"], output_names=outputs,
            dynamic_axes=dynamic, opset_version=17, dynamo=False,
        )  # fmt: skip
        members.append(
            ModelSpec(
                name=name, file=path.name, sha256=hashlib.sha256(path.read_bytes()).hexdigest(), kind="detector",
                crop=CropSpec(input_hw=(size, size), mean=(0.5,) * 3, std=(128 / 255,) * 3, resize="area"),
            )
        )  # fmt: skip
    bundle = Bundle(
        schema_version=SCHEMA_VERSION, name="mtcnn", licence="MIT", members=tuple(members),
        provenance={
            "what": "MTCNN face detector: P-Net, R-Net, O-Net",
            "source": "facenet-pytorch 2.6.0 (MIT), unchanged weights",
            "paper": "arXiv:1604.02878",
            "command": "python scripts/export_mtcnn.py",
        },
    )  # fmt: skip
    (OUT / "bundle.json").write_text(to_json(bundle, defaults=False))


if __name__ == "__main__":
    main()
