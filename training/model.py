"""The network: a small residual net, one logit a crop; in training it also says where the fake is.

Note [Why the network is asked where]
One bit a crop is little to learn from. The masks of the fakes are known, so a second head predicts them on a coarse
grid, as Face X-ray does (Li et al. 2020, arXiv:1912.13458). It shares all but the last stage with the first head and
is not exported. What it brings was not measured.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfengine.bundle import ModelSpec

# 144 px and margin 0.2: in an earlier system of ours a margin of 0.3 cost .07 AUC on benchmark clips.
SPEC = ModelSpec(
    name="face144",
    file="face144.onnx",
    sha256="",
    input_hw=(144, 144),
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    margin_ratio=0.2,
)

# Widths and blocks of the stages at 36, 18, 9 and 5 px. Chosen for the clock: 100 crops a second, forward and
# backward, on one core of an AMD EPYC (Milan); a stage at 72 px would halve that.
STEM, WIDTHS, BLOCKS = 16, (24, 48, 96, 160), (2, 2, 2, 1)
MASK_STAGES = 3  # the mask is read off after so many stages,
MASK_HW = (9, 9)  # where the features are this large
DROPOUT = 0.2  # the usual value for a net of this size; not tuned


class Block(nn.Module):
    """Two 3x3 convolutions around a short cut (He et al. 2015, arXiv:1512.03385)."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.short_cut = nn.Sequential()
        if stride != 1 or width_in != width:
            conv = nn.Conv2d(width_in, width, 1, stride, bias=False)
            self.short_cut = nn.Sequential(conv, nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.short_cut(x))


class FaceNet(nn.Module):
    """Crops (B, 3, 144, 144), RGB, (rgb / 255 - mean) / std -> logits (B, 1); positive means fake."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, STEM, 3, 2, 1, bias=False), nn.BatchNorm2d(STEM), nn.ReLU())
        stages = []
        width_in = STEM
        for width, blocks in zip(WIDTHS, BLOCKS, strict=True):
            first = Block(width_in, width, stride=2)
            stages.append(nn.Sequential(first, *(Block(width, width, stride=1) for _ in range(blocks - 1))))
            width_in = width
        self.body = nn.Sequential(*stages[:MASK_STAGES])
        self.top = nn.Sequential(*stages[MASK_STAGES:])
        self.mask_head = nn.Conv2d(WIDTHS[MASK_STAGES - 1], 1, 1)
        self.head = nn.Linear(WIDTHS[-1], 1)

    def forward(self, crops: Tensor) -> Tensor:
        return self._judge(self.body(self.stem(crops)))

    def forward_with_mask(self, crops: Tensor) -> tuple[Tensor, Tensor]:
        """Also gives logits of the share of fake pixels in each cell, (B, 1, 9, 9)."""
        features = self.body(self.stem(crops))
        return self._judge(features), self.mask_head(features)

    def _judge(self, features: Tensor) -> Tensor:
        pooled = self.top(features).mean(dim=(2, 3))
        return self.head(F.dropout(pooled, DROPOUT, self.training))


def make_model(seed: int) -> FaceNet:
    """A network with weights drawn from ``seed``, laid out for the CPU's fast convolutions."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return FaceNet().to(memory_format=torch.channels_last)
