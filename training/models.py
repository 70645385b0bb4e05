"""Networks: a backbone, an LSTM over the frames of a clip and an audio head if wanted, and a head of one logit.

Note [What the mask head is for]
One bit a crop is little to learn from. The masks of pseudo-fakes are known, so FaceNet can predict them on a coarse
grid, as Face X-ray does (Li et al. 2020, arXiv:1912.13458). That head shares all but the last stage with the first one
and is not exported. What it brings was not measured.

Note [Why detail is an input]
What gives a fake away is fine and faint; light and colour are strong, and the first batch norm scales the sum of both.
Steganalysis therefore looks at what a smoothing filter leaves over (Fridrich and Kodovsky 2012), and so do networks
that look for tampering (Zhou et al. 2018, arXiv:1805.04953). FaceNet is given that beside the colours. Of all that was
tried it helped most, see training/README.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfengine.bundle import AudioSettings, CropSpec, MarginRatio, ModelSpec, Std
from dfengine.errors import OptionError, first_line
from dfengine.settings import AboveZero, Count, Share, ZeroOrMore

from .checkpoint import read_tensors
from .errors import WeightsError


@dataclass(frozen=True, kw_only=True)
class LstmSettings:
    """An LSTM over the embeddings of a clip's frames; its last step goes on to the head. Width 0: none."""

    width: ZeroOrMore = 0
    layers: Count = 1
    dropout: Share = 0.0  # between layers
    activation: Literal["tanh", "relu"] = "tanh"  # of the cell and its output; Keras lets one choose, torch does not


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The network and what it sees. The second half becomes the member's ModelSpec."""

    # face_net (ours), conv_pool (one convolution), inception_resnet_v1 (facenet-pytorch), or any name timm knows.
    backbone: str = "face_net"
    # True: the backbone's published weights, fetched; a path: a .safetensors file; False: from scratch.
    pretrained: bool | str = False
    frozen: bool = False  # the backbone keeps its weights and its batch statistics
    pool: Literal["avg", "max"] = "avg"  # how a timm backbone's last feature map becomes a vector
    lstm: LstmSettings = LstmSettings()
    audio_width: ZeroOrMore = 0  # length of the sound's embedding, appended to the LSTM's last step; 0: no sound
    # Layers before the last linear one: norm, dropout:RATIO, linear:WIDTH, relu, elu.
    head: tuple[str, ...] = ()
    mask_head: bool = False  # face_net only, see Note [What the mask head is for]

    input_hw: tuple[Count, Count] = (144, 144)
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[Std, Std, Std] = (0.5, 0.5, 0.5)
    margin_ratio: MarginRatio = 0.2
    crop_shape: Literal["square", "box"] = "square"
    resize: Literal["triangle", "area", "bilinear"] = "triangle"
    padding: Literal["edge", "zero"] = "edge"
    clip_frames: Count = 1
    audio: AudioSettings = AudioSettings()
    weight: AboveZero = 1.0  # in the blend of a bundle with several members

    def __post_init__(self) -> None:
        if self.clip_frames > 1 and self.lstm.width == 0:
            raise OptionError(
                f"model.clip_frames is {self.clip_frames} but lstm.width is 0; give an LSTM, or one frame"
            )
        if self.audio_width and self.lstm.width == 0:
            raise OptionError("model.audio_width needs an LSTM: the sound joins its last step; set lstm.width")
        if self.mask_head and self.lstm.width:
            raise OptionError("model.mask_head is for networks of single frames; leave it out, or set lstm.width to 0")
        if self.mask_head and self.backbone != "face_net":
            raise OptionError(f"model.mask_head is for the backbone face_net alone, not for {self.backbone!r}")

    @property
    def kind(self) -> Literal["frame", "clip", "audio"]:
        if self.audio_width:
            return "audio"
        return "clip" if self.lstm.width else "frame"

    def spec(self, name: str) -> ModelSpec:
        """The member's contract with the engine; only the sha256 of its file is not known yet."""
        return ModelSpec(
            name=name,
            file=f"{name}.onnx",
            sha256="",
            kind=self.kind,
            crop=CropSpec(**{f.name: getattr(self, f.name) for f in fields(CropSpec)}),
            clip_frames=self.clip_frames,
            audio=self.audio,
            weight=self.weight,
        )


class Network(nn.Module):
    """Crops (B, 3, H, W) or clips (B, T, 3, H, W), and a log-mel (B, bands, frames) for an audio head -> logits (B, 1).

    Raises OptionError for a backbone or layer that does not exist, WeightsError for weights that cannot be had.
    """

    def __init__(self, settings: ModelSettings, *, fetch: bool = True) -> None:
        """``fetch=False`` leaves pretrained weights out: a checkpoint follows."""
        super().__init__()
        self.settings = settings
        self.backbone, width = make_backbone(settings, fetch=fetch)
        self.lstm, self.audio_head = None, None
        if settings.lstm.width:
            self.lstm = make_lstm(width, settings.lstm)
            width = settings.lstm.width
        if settings.audio_width:
            self.audio_head = AudioHead(settings.audio.bands, settings.audio_width)
            width += settings.audio_width
        self.head = make_head(width, settings.head)
        if settings.frozen:
            self.backbone.requires_grad_(False)

    def train(self, mode: bool = True) -> Network:
        super().train(mode)
        if self.settings.frozen:
            self.backbone.eval()
        return self

    def forward(self, x: Tensor, log_mel: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """In training, a network with a mask head also gives logits of the share of fake pixels in each cell of 16 px,
        (B, 1, h, w).
        """
        if self.settings.mask_head and self.training:
            assert isinstance(self.backbone, FaceNet), "only FaceNet has a mask head, as ModelSettings checks"
            features, cells = self.backbone.forward_with_mask(x)
            return self.head(features), cells
        logits: Tensor
        if self.lstm is None:
            logits = self.head(self.backbone(x))
            return logits
        features = self.backbone(x.flatten(0, 1))  # (B T, width)
        last: Tensor = self.lstm(features.view(-1, self.settings.clip_frames, features.shape[1]))[0][:, -1]
        if self.audio_head is not None:
            assert log_mel is not None, "a network with an audio head needs a log-mel"
            last = torch.cat([last, self.audio_head(log_mel)], dim=1)
        logits = self.head(last)
        return logits


def make_network(settings: ModelSettings, seed: int) -> Network:
    """A network to train, with the weights that are not pretrained drawn from ``seed``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Network(settings).to(memory_format=torch.channels_last)  # the layout of the CPU's fast convolutions


# -- parts -------------------------------------------------------------------------------------------------------------


def make_head(width: int, layers: tuple[str, ...]) -> nn.Sequential:
    made: list[nn.Module] = []
    for layer in layers:
        name, _, value = layer.partition(":")
        try:
            if name == "norm":
                made.append(nn.BatchNorm1d(width))
            elif name == "dropout":
                made.append(nn.Dropout(float(value)))
            elif name == "linear":
                made.append(nn.Linear(width, int(value)))
                width = int(value)
            elif name in ("relu", "elu"):
                made.append(nn.ReLU() if name == "relu" else nn.ELU())
            else:
                raise ValueError("no such layer")
        except ValueError as error:
            raise OptionError(
                f"model.head: {layer!r} is no layer ({error}); known are norm, dropout:RATIO, linear:WIDTH, relu, elu"
            ) from None
    return nn.Sequential(*made, nn.Linear(width, 1))


def make_lstm(width: int, settings: LstmSettings) -> nn.Module:
    if settings.activation == "relu":
        if settings.layers != 1:
            raise OptionError(f"model.lstm.activation relu is for one layer, not {settings.layers}")
        return ReluLstm(width, settings.width)
    dropout = settings.dropout if settings.layers > 1 else 0.0  # torch warns where there is nothing in between
    return nn.LSTM(width, settings.width, settings.layers, dropout=dropout, batch_first=True)


class ReluLstm(nn.Module):
    """An LSTM whose cell and output pass through ReLU, as Keras' LSTM(activation="relu"); the gates stay sigmoids."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(width_in, width)  # only its weights are used, in torch's order of gates
        # Keras' first weights. Torch's do not shrink with width_in, and without a tanh the state would explode.
        nn.init.xavier_uniform_(self.cell.weight_ih)
        nn.init.orthogonal_(self.cell.weight_hh)
        nn.init.zeros_(self.cell.bias_ih)
        nn.init.zeros_(self.cell.bias_hh)
        nn.init.ones_(self.cell.bias_ih.data[width : 2 * width])  # the forget gate's

    def forward(self, x: Tensor) -> tuple[Tensor]:
        """(B, T, width_in) -> (B, T, width), in a tuple as nn.LSTM has it."""
        h = c = x.new_zeros(x.shape[0], self.cell.hidden_size)  # len(x) would be exported as a constant
        steps = []
        for t in range(x.shape[1]):
            gates = F.linear(x[:, t], self.cell.weight_ih, self.cell.bias_ih)
            gates = gates + F.linear(h, self.cell.weight_hh, self.cell.bias_hh)
            i, f, g, o = gates.chunk(4, dim=1)
            c = f.sigmoid() * c + i.sigmoid() * g.relu()
            h = o.sigmoid() * c.relu()
            steps.append(h)
        return (torch.stack(steps, dim=1),)


class AudioHead(nn.Module):
    """Log-mel (B, bands, frames) -> embedding (B, width); zeros for silence, which stands for a missing sound track."""

    def __init__(self, bands: int, width: int) -> None:
        super().__init__()
        widths = (bands, 64, 128, 256)  # chosen, not fitted
        blocks: list[nn.Module] = []
        for a, b in pairwise(widths):
            blocks += [nn.Conv1d(a, b, 5, stride=2, padding=2, bias=False), nn.BatchNorm1d(b), nn.ReLU()]
        self.convolutions = nn.Sequential(*blocks)
        self.out = nn.Linear(widths[-1], width)

    def forward(self, log_mel: Tensor) -> Tensor:
        present = (log_mel.amax(dim=(1, 2)) > 0).to(log_mel.dtype)
        embedding: Tensor = self.out(self.convolutions(log_mel).amax(dim=2))
        return embedding * present[:, None]


def make_backbone(settings: ModelSettings, *, fetch: bool) -> tuple[nn.Module, int]:
    """The backbone, (N, 3, H, W) -> (N, width), and the width."""
    name, pretrained = settings.backbone, settings.pretrained
    net: nn.Module
    if name == "face_net":
        net, make = FaceNet(settings.mask_head), None
    elif name == "conv_pool":
        net, make = conv_pool(), None
    elif name == "inception_resnet_v1":
        from facenet_pytorch import InceptionResnetV1

        net, make = InceptionResnetV1(), _inception_of_vggface2
    else:
        import timm

        if name.split(".")[0] not in timm.list_models():
            near = ", ".join(timm.list_models(f"*{name.split('.')[0].split('_')[0]}*")[:8]) or "see timm.list_models()"
            raise OptionError(f"model.backbone: timm has no {name!r}; near it: {near}")
        options: dict[str, Any] = {"num_classes": 0, "global_pool": settings.pool}
        net = timm.create_model(name, pretrained=False, **options)
        make = lambda: timm.create_model(name, pretrained=True, **options)  # noqa: E731
    if settings.pool != "avg" and name in ("face_net", "conv_pool", "inception_resnet_v1"):
        raise OptionError(f"model.pool: {name} pools in its own way; leave pool out, or take a backbone of timm")
    if fetch and pretrained is True:
        net = _published(name, make)
    elif fetch and isinstance(pretrained, str) and pretrained:
        _load_backbone(net, Path(pretrained))
    with torch.no_grad():
        width = net.eval()(torch.zeros(1, 3, *settings.input_hw)).shape[1]
    return net.train(), width


def _inception_of_vggface2() -> nn.Module:
    from facenet_pytorch import InceptionResnetV1

    net: nn.Module = InceptionResnetV1(pretrained="vggface2")
    del net.logits  # of the identities it was trained on: 4.4 million numbers that no feature goes through
    return net


def _published(name: str, make: Callable[[], nn.Module] | None) -> nn.Module:
    if make is None:
        raise WeightsError(f"model.pretrained: there are no published weights of {name}; set it to false, or to a file")
    try:
        return make()
    except Exception as error:  # whatever the hub's client raises: there are no weights, and no other way is taken
        reason = first_line(error)[:200]
        raise WeightsError(
            f"model.pretrained: the weights of {name} cannot be fetched ({type(error).__name__}: {reason}); fetch "
            "them on a machine with a network and set pretrained to the .safetensors file, or to false to start "
            "from scratch"
        ) from None


# Files of whole classifiers end in a layer that is not wanted here; timm and facenet-pytorch call it one of these.
CLASSIFIERS = ("classifier", "fc", "head", "last_linear", "logits")


def _load_backbone(net: nn.Module, path: Path) -> None:
    tensors, _ = read_tensors(path)
    wanted = net.state_dict()
    missing = [k for k, v in wanted.items() if k not in tensors or tensors[k].shape != v.shape]
    extra = [k for k in tensors if k not in wanted and k.split(".")[0] not in CLASSIFIERS]
    if missing or extra:
        raise WeightsError(
            f"model.pretrained: the file is of another network: {len(missing)} of {len(wanted)} tensors are missing "
            f"or of another shape and {len(extra)} do not belong, the first is {(missing + extra)[0]!r}",
            path=path,
        )
    net.load_state_dict({k: tensors[k] for k in wanted})


def conv_pool() -> nn.Module:
    """One 2x2 convolution of 32 channels and a 2x2 mean, flattened: the backbone of the recipe cnn_lstm."""
    return nn.Sequential(nn.Conv2d(3, 32, 2), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten())


# Widths and blocks of the stages at 36, 18, 9 and 5 px. Chosen for the clock: 100 crops a second, forward and
# backward, on one core of an AMD EPYC (Milan); a stage at 72 px would halve that.
STEM, WIDTHS, BLOCKS = 16, (24, 48, 96, 160), (2, 2, 2, 1)
MASK_STAGES = 3  # the mask is read off after so many stages


class WithDetail(nn.Module):
    """Crops and their fine detail side by side: (B, 3, H, W) -> (B, 6, H, W). See Note [Why detail is an input]."""

    kernel: Tensor
    GAIN, LIMIT = 8.0, 2.0  # about the strength of the colours; beyond the limit are hard edges, which those show too

    def __init__(self) -> None:
        super().__init__()
        row = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16  # a Gaussian of 1 px
        self.register_buffer("kernel", torch.outer(row, row).expand(3, 1, 5, 5).contiguous(), persistent=False)

    def forward(self, crops: Tensor) -> Tensor:
        with torch.autocast(crops.device.type, enabled=False):  # in bfloat16, detail is less than a rounding
            soft = F.conv2d(F.pad(crops, [2] * 4, mode="replicate"), self.kernel, groups=3)
            return torch.cat([crops, (self.GAIN * (crops - soft)).clamp(-self.LIMIT, self.LIMIT)], dim=1)


class FaceNet(nn.Module):
    """A small residual net: crops (B, 3, H, W) -> features (B, 160)."""

    def __init__(self, mask_head: bool = False) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            WithDetail(), nn.Conv2d(6, STEM, 3, 2, 1, bias=False), nn.BatchNorm2d(STEM), nn.ReLU()
        )
        stages = []
        width_in = STEM
        for width, blocks in zip(WIDTHS, BLOCKS, strict=True):
            first = Block(width_in, width, stride=2)
            stages.append(nn.Sequential(first, *(Block(width, width, stride=1) for _ in range(blocks - 1))))
            width_in = width
        self.body = nn.Sequential(*stages[:MASK_STAGES])
        self.top = nn.Sequential(*stages[MASK_STAGES:])
        self.mask_head = nn.Conv2d(WIDTHS[MASK_STAGES - 1], 1, 1) if mask_head else None

    def forward(self, crops: Tensor) -> Tensor:
        features: Tensor = self.top(self.body(self.stem(crops)))
        return features.mean(dim=(2, 3))

    def forward_with_mask(self, crops: Tensor) -> tuple[Tensor, Tensor]:
        """Also gives logits of the share of fake pixels in each cell of 16 px, (B, 1, H / 16, W / 16)."""
        assert self.mask_head is not None, "a network without a mask head was asked for a mask"
        features = self.body(self.stem(crops))
        return self.top(features).mean(dim=(2, 3)), self.mask_head(features)


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
