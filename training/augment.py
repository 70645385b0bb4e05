"""What happens to a picture between a face and the network: flips, light, focus, noise, scale, JPEG, H.264; mixtures.

A strength that is a range is drawn from it evenly (sizes evenly over octaves). Everything is off by default: a recipe
says what it uses. All chance comes from generators that are passed in, one a sample, so that what is drawn for a sample
depends on its own key and not on its batch.

What has been through H.264 is handed on as the decoder's YUV planes: the network's input is cut from those, as in use.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, TypedDict

import av
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as PilImage
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as transforms

from dfengine.errors import OptionError
from dfengine.stages.decode.cpu import to_image
from dfengine.types import F32, Image


@dataclass(frozen=True, kw_only=True)
class AugmentSettings:
    """Names of steps are the chance that a sample gets them."""

    flip: float = 0.0  # left to right
    # The box moves and grows by this share of its side (standard deviation); .04 is what it does from frame to frame of
    # one video.
    box_jitter: float = 0.0
    downscale: float = 0.0
    # Side of the face after it, never more than it has. 45 px is the smallest that dfengine looks for in 900 lines.
    downscale_face_px: tuple[float, float] = (45.0, 150.0)
    colour: float = 0.0  # exposure, white balance, gamma, contrast, saturation: a random camera
    exposure: tuple[float, float] = (0.75, 1.25)  # what it multiplies pixels with, 1 in the middle
    blur: float = 0.0
    blur_sigma_px: tuple[float, float] = (0.3, 1.5)
    noise: float = 0.0
    noise_sigma: tuple[float, float] = (0.0, 0.04)  # on the scale 0..1
    # From hardly visible to what messengers do. Benchmark clips lie in between (FaceForensics++ c23 is CRF 23).
    jpeg: float = 0.0
    jpeg_quality: tuple[int, int] = (95, 30)
    h264: float = 0.0
    h264_crf: tuple[int, int] = (18, 38)
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_alpha: float = 0.4  # both: shares are Beta(alpha, alpha)
    # Strengths begin at the mild end of their ranges and reach all of them after so many epochs. A small network that
    # learned from photos had a held-out AUC of .516 after 300 steps without this, with it .529.
    ramp_epochs: float = 0.0

    def __post_init__(self) -> None:
        for name in ("flip", "downscale", "colour", "blur", "noise", "jpeg", "h264", "mixup", "cutmix"):
            if not 0 <= getattr(self, name) <= 1:
                raise OptionError(f"augment.{name} is a chance, from 0 to 1; got {getattr(self, name)}")
        if self.mixup + self.cutmix > 1:
            raise OptionError(
                f"a sample gets mixup or cutmix: augment.mixup + augment.cutmix must not exceed 1, got "
                f"{self.mixup} + {self.cutmix}"
            )
        for name in ("downscale_face_px", "blur_sigma_px"):
            if min(getattr(self, name)) <= 0:
                raise OptionError(f"augment.{name} must be above 0, got {getattr(self, name)}")
        if not 0 < self.exposure[0] <= 1 <= self.exposure[1]:
            raise OptionError(f"augment.exposure must go from above 0 through 1, got {self.exposure}")
        if self.mix_alpha <= 0:
            raise OptionError(f"augment.mix_alpha must be above 0, got {self.mix_alpha}")
        if not all(1 <= q <= 100 for q in self.jpeg_quality):
            raise OptionError(f"augment.jpeg_quality goes from 1 to 100, got {self.jpeg_quality}")
        if not all(0 <= q <= 51 for q in self.h264_crf):
            raise OptionError(f"augment.h264_crf goes from 0 to 51, got {self.h264_crf}")

    @property
    def mixes(self) -> bool:
        return self.mixup + self.cutmix > 0


class Draws:
    """Random numbers for B samples, each from a generator of its own; results are (B, ...) float32."""

    def __init__(self, keys: Sequence[tuple[int, ...]], device: torch.device | str = "cpu") -> None:
        self._generators = [np.random.default_rng(key) for key in keys]
        self._device = device

    def __len__(self) -> int:
        return len(self._generators)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * self._stack([g.random(shape, np.float32) for g in self._generators])

    def normal(self, *shape: int, where: Tensor | None = None) -> Tensor:
        """``where``: (B,), the rows that are wanted; the others are 0, which is quicker."""
        wanted = [True] * len(self) if where is None else where.tolist()
        zeros = np.zeros(shape, np.float32)
        pairs = zip(self._generators, wanted, strict=True)
        return self._stack([g.standard_normal(shape, np.float32) if w else zeros for g, w in pairs])

    def beta(self, alpha: float) -> Tensor:
        return self._stack([np.float32(g.beta(alpha, alpha)) for g in self._generators])

    def chance(self, p: float) -> Tensor:
        return self.uniform(0.0, 1.0) < p

    def choice(self, count: int) -> Tensor:
        """Integers below ``count``, int64."""
        return (self.uniform(0.0, 1.0) * count).long().clamp_max(count - 1)

    def _stack(self, arrays: Sequence[Any]) -> Tensor:
        return torch.from_numpy(np.stack(arrays)).to(self._device)


# -- one sample --------------------------------------------------------------------------------------------------------


def jitter_boxes(boxes: F32, settings: AugmentSettings, rng: np.random.Generator) -> F32:
    """Moves and scales the boxes of a sample, (T, 4), all alike, as a detector does from frame to frame."""
    by = settings.box_jitter * rng.standard_normal(3).clip(-2, 2)
    size = boxes[:, 2:] - boxes[:, :2]
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2 + by[:2] * size
    half = size / 2 * math.exp(by[2])
    return np.concatenate([centre - half, centre + half], axis=1).astype(np.float32)


def augment_pixels(
    pictures: Sequence[NDArray[np.uint8]],
    boxes: F32,
    settings: AugmentSettings,
    rng: np.random.Generator,
    *,
    severity: float = 1.0,
) -> tuple[list[Image], F32]:
    """Puts the pictures of one sample, T of RGB (H, W, 3), through one camera and one codec.

    Returns the pictures and their ``boxes`` (T, 4), which follow where a picture was scaled. Numbers are drawn whether
    they are used or not: what one step does never depends on which others are on. ``severity``, 0 to 1, is how far into
    the ranges they go.
    """
    steps = ("downscale", "colour", "blur", "noise", "jpeg", "h264")
    on = {name: drawn < getattr(settings, name) for name, drawn in zip(steps, rng.random(len(steps)), strict=True)}
    scale, sigma, noise_sigma, quality, crf = rng.random(5) * severity
    camera, noise_seed = rng.random(7), rng.integers(1 << 63)
    if not any(on.values()):
        return [Image.from_rgb(p) for p in pictures], boxes

    x = _to_tensor(pictures)
    if on["downscale"]:
        low, high = sorted(settings.downscale_face_px)
        x, boxes = downscale(x, boxes, high * (low / high) ** scale)
    if on["colour"]:
        x = _take_photo(x, camera, severity, settings.exposure)
    if on["blur"]:
        x = _blur(x, _between(settings.blur_sigma_px, sigma))
    if on["noise"]:
        noise = np.random.default_rng(noise_seed).standard_normal(x.shape, np.float32)
        x = x + _between(settings.noise_sigma, noise_sigma) * torch.from_numpy(noise)
    pixels = (x * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous().numpy()
    if on["jpeg"]:
        pixels = np.stack([through_jpeg(p, round(_between(settings.jpeg_quality, quality))) for p in pixels])
    if on["h264"]:
        return through_h264(pixels, round(_between(settings.h264_crf, crf))), boxes
    return [Image.from_rgb(p) for p in pixels], boxes


def through_jpeg(rgb: NDArray[np.uint8], quality: int) -> NDArray[np.uint8]:
    """RGB (H, W, 3) -> the same after JPEG (4:2:0). Pillow's, since torchvision gives up its own."""
    file = io.BytesIO()
    PilImage.fromarray(rgb).save(file, "JPEG", quality=quality)
    return np.asarray(PilImage.open(file))


def through_h264(pixels: NDArray[np.uint8], crf: int) -> list[Image]:
    """RGB (T, H, W, 3) -> the same pictures as a decoder gives them after one stream of H.264 (4:2:0).

    Odd sides grow by a copy of the last row or column.
    """
    t, h, w, _ = pixels.shape
    even = np.pad(pixels, ((0, 0), (0, h % 2), (0, w % 2), (0, 0)), "edge")
    encoder = av.CodecContext.create("libx264", "w")
    encoder.height, encoder.width = even.shape[1:3]
    encoder.pix_fmt, encoder.framerate, encoder.thread_count = "yuv420p", Fraction(25), 1
    encoder.options = {"crf": str(crf), "preset": "veryfast"}
    decoder = av.CodecContext.create("h264", "r")
    decoder.thread_count = 1
    frames = [av.VideoFrame.from_ndarray(p, format="rgb24") for p in even]
    for i, frame in enumerate(frames):
        frame.pts = i
    packets = [p for frame in (*frames, None) for p in encoder.encode(frame)]
    decoded = [f for packet in (*packets, None) for f in decoder.decode(packet)]
    if len(decoded) != t:
        raise RuntimeError(f"H.264 gave {len(decoded)} of {t} pictures back")
    return [to_image(f) for f in decoded]


def _between(ends: tuple[float, float], share: float) -> float:
    return ends[0] + (ends[1] - ends[0]) * share


def _to_tensor(pictures: Sequence[NDArray[np.uint8]]) -> Tensor:
    """(T, 3, H, W) in 0..1; smaller pictures grow at their lower and right edge."""
    h, w = (max(p.shape[axis] for p in pictures) for axis in (0, 1))
    same = [np.pad(p, ((0, h - p.shape[0]), (0, w - p.shape[1]), (0, 0)), "edge") for p in pictures]
    return torch.from_numpy(np.stack(same)).permute(0, 3, 1, 2).float() / 255


def downscale(x: Tensor, boxes: F32, face_px: float) -> tuple[Tensor, F32]:
    """Scales pictures so that the largest face has ``face_px``; never up."""
    scale = face_px / float(np.max(boxes[:, 2:] - boxes[:, :2]))
    if scale >= 1:
        return x, boxes
    h, w = x.shape[2:]
    small = transforms.resize(x, [max(2, round(h * scale)), max(2, round(w * scale))], antialias=True)
    by = np.array([small.shape[3] / w, small.shape[2] / h] * 2, np.float32)
    return small, boxes * by


def _take_photo(x: Tensor, camera: NDArray[np.float64], severity: float, exposure: tuple[float, float]) -> Tensor:
    """Light and colour of a random camera. The strengths were set by eye: visible, and nobody would call it broken."""
    u = torch.from_numpy((2 * camera - 1) * severity).float()  # (7,) in -1..1
    white_balance = 1 + 0.08 * u[:3].view(3, 1, 1)
    light = _between((1.0, exposure[0] if u[3] < 0 else exposure[1]), abs(float(u[3])))
    x = transforms.adjust_brightness(x * white_balance, light)
    x = transforms.adjust_gamma(x.clamp(1e-4, 1), math.exp(0.35 * float(u[4])))
    x = transforms.adjust_contrast(x, 1 + 0.2 * float(u[5]))
    x = transforms.adjust_saturation(x, 1 + 0.3 * float(u[6]))
    return x.clamp(0, 1)


def _blur(x: Tensor, sigma_px: float) -> Tensor:
    blurred: Tensor = transforms.gaussian_blur(x, [2 * math.ceil(2.5 * sigma_px) + 1] * 2, [sigma_px] * 2)
    return blurred


# -- a batch -----------------------------------------------------------------------------------------------------------


class Mixed(TypedDict):
    """The fields of a Batch that mixing changes."""

    x: Tensor
    audio: Tensor | None
    y: Tensor
    weight: Tensor
    mask: Tensor | None


def mix(
    x: Tensor,
    audio: Tensor | None,
    y: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    settings: AugmentSettings,
    draws: Draws,
) -> Mixed:
    """Mixup (Zhang et al. 2017, arXiv:1710.09412) and CutMix (Yun et al. 2019, arXiv:1905.04899).

    Not torchvision's: that takes one share a batch from the global generator and mixes with the next row, which depends
    on how many processes share the batch. Here each row has its own share, and its partner is half a batch away: in a
    batch of pairs a real and its own fake, in others anybody.
    """
    b, (h, w) = len(x), x.shape[-2:]
    share = draws.beta(settings.mix_alpha)
    which, centre = draws.uniform(0.0, 1.0), draws.uniform(0.0, 1.0, 2)
    is_mixup, is_cutmix = which < settings.mixup, which >= 1 - settings.cutmix

    half = torch.sqrt(1 - share) / 2  # of the cut box, as a share of the sides
    low, high = ((centre + s * half[:, None]).clamp(0, 1) * torch.tensor([w, h]) for s in (-1, 1))
    low, high = low.round(), high.round()
    columns, rows = torch.arange(w), torch.arange(h)
    inside_x = (columns >= low[:, :1]) & (columns < high[:, :1])  # (B, W)
    inside_y = (rows >= low[:, 1:]) & (rows < high[:, 1:])
    cut = (inside_y[:, :, None] & inside_x[:, None, :]).float()[:, None]  # (B, 1, H, W)

    # What is taken of the partner, by pixel and in all.
    by_pixel = torch.where(is_cutmix[:, None, None, None], cut, torch.zeros_like(cut))
    by_pixel = torch.where(is_mixup[:, None, None, None], (1 - share)[:, None, None, None].expand_as(cut), by_pixel)
    by_pixel = by_pixel.to(x.device)
    taken = by_pixel.mean(dim=(1, 2, 3))

    def blend(values: Tensor, amount: Tensor) -> Tensor:
        amount = amount.view(b, *amount.shape[1:], *[1] * (values.ndim - amount.ndim))
        return torch.where(amount > 0, values + amount * (values.roll(b // 2, 0) - values), values)

    return {
        "x": blend(x, by_pixel if x.ndim == 4 else by_pixel[:, None]),
        "audio": None if audio is None else blend(audio, taken),
        "y": blend(y, taken),
        "weight": blend(weight, taken),
        "mask": None if mask is None else blend(mask, F.adaptive_avg_pool2d(by_pixel, (mask.size(-2), mask.size(-1)))),
    }
