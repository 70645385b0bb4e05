"""What happens to a picture on its way into a video, alike for real and fake, and the crop that the engine would cut.

A pair shares every number that is drawn here, its noise included, and all images of a group go through one codec at one
setting. The crops come from dfengine.crop, out of the decoder's YUV planes where the codec is H.264: what the network
is trained on is cut as it will be in use.

``severity``, 0 to 1, stretches the range that a strength is drawn from: 0 leaves good pictures, 1 is all of it.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import av
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as PilImage
from torch import Generator, Tensor
from torch.nn import functional as F

from dfengine.bundle import ModelSpec
from dfengine.crop import crop_boxes, crop_faces
from dfengine.decode.cpu import to_image
from dfengine.types import F32, Image

from .faces import FACE_PX
from .fakes import blur, transform, uniform

# Faces of 45 px are the smallest that dfengine looks for in 900 lines; above 150 px the stored crops show no more.
MIN_FACE_PX, MAX_FACE_PX = 45.0, FACE_PX
# From hardly visible to what messengers do. Real benchmark clips lie in between (FF++ c23 is CRF 23).
JPEG_QUALITY, H264_CRF = (95, 30), (18, 38)
# The box of a face moves by about this share of its side from frame to frame of one video.
BOX_JITTER = 0.04


@dataclass(frozen=True)
class Codec:
    """How a group of images is stored."""

    kind: Literal["jpeg", "h264"]
    quality: int  # JPEG quality, or H.264 CRF


def random_face_px(severity: float, rng: Generator) -> float:
    # Evenly over octaves: 45 to 90 px is as frequent as 75 to 150 px.
    return MAX_FACE_PX * (MIN_FACE_PX / MAX_FACE_PX) ** (severity * float(torch.rand((), generator=rng)))


def random_codec(severity: float, rng: Generator) -> Codec:
    kind: Literal["jpeg", "h264"] = "h264" if float(torch.rand((), generator=rng)) < 0.5 else "jpeg"
    best, worst = H264_CRF if kind == "h264" else JPEG_QUALITY
    return Codec(kind, round(best + (worst - best) * severity * float(torch.rand((), generator=rng))))


def random_camera(images: Tensor, severity: float, rng: Generator) -> Tensor:
    """Light, colour, focus and noise of a random camera, one a pair.

    ``images``: (2 P, 3, S, S) in 0..1, the two of a pair next to each other; so is the result.
    """
    pairs = images.unflatten(0, (-1, 2))
    p, _, _, size, _ = pairs.shape
    per_pair = (p, 1, 1, 1, 1)
    gain = uniform(per_pair, 0.7, 1.2, rng) * uniform((p, 1, 3, 1, 1), 0.92, 1.08, rng)  # exposure; white balance
    out = (pairs * gain).clamp(1e-4, 1) ** torch.exp(uniform(per_pair, -0.35, 0.35, rng))  # gamma 0.7 to 1.4
    out = (out - 0.5) * uniform(per_pair, 0.8, 1.2, rng) + 0.5
    grey = out.mean(dim=2, keepdim=True)
    out = grey + (out - grey) * uniform(per_pair, 0.6, 1.2, rng)
    defocused = torch.rand(p, generator=rng) < 0.3 * severity
    sigma = torch.where(defocused, uniform(p, 0.3, 1.5, rng), 0.0)
    out = blur(out.flatten(0, 1), sigma.repeat_interleave(2)).view(pairs.shape)
    noise = uniform(per_pair, 0.0, 0.04, rng) * (torch.rand(per_pair, generator=rng) < 0.3 * severity)
    return (out + noise * torch.randn(p, 1, 3, size, size, generator=rng)).clamp(0, 1).flatten(0, 1)


def shrink(images: Tensor, face_px: float) -> tuple[Tensor, float]:
    """Scales images (B, 3, S, S) so that a face is about ``face_px`` high; also returns the scale."""
    size = 2 * round(images.shape[-1] * face_px / FACE_PX / 2)  # 4:2:0 wants even sides
    small = F.interpolate(images, (size, size), mode="bilinear", antialias=True, align_corners=False)
    return small, size / images.shape[-1]


def store(images: Tensor, codec: Codec) -> list[Image]:
    """Puts images (B, 3, S, S) in 0..1 through the codec."""
    pixels = (images * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous().numpy()
    if codec.kind == "h264":
        return _through_h264(pixels, codec.quality)
    return _through_jpeg(pixels, codec.quality)


def jitter_boxes(xyxy: Tensor, rng: Generator) -> Tensor:
    """Moves and scales boxes (B, 4) as a detector does from frame to frame."""
    b = len(xyxy)
    centre, size = (xyxy[:, :2] + xyxy[:, 2:]) / 2, xyxy[:, 2:] - xyxy[:, :2]
    centre = centre + BOX_JITTER * size * torch.randn(b, 2, generator=rng).clamp(-2, 2)
    half = size / 2 * torch.exp(BOX_JITTER * torch.randn(b, 1, generator=rng).clamp(-2, 2))
    return torch.cat([centre - half, centre + half], dim=1)


def crop(images: Sequence[Image], xyxy: Tensor, spec: ModelSpec) -> F32:
    """One crop an image, (B, 3, H, W), as the engine makes it."""
    return crop_faces(images, xyxy.numpy().astype(np.float32), np.arange(len(images)), spec)


def crop_masks(masks: Tensor, xyxy: Tensor, spec: ModelSpec, cells_hw: tuple[int, int]) -> Tensor:
    """What share of each cell of the crops is masked: (B, 1, S, S) -> (B, 1, *cells_hw)."""
    x1, y1, x2, y2 = torch.from_numpy(crop_boxes(xyxy.numpy(), spec)).T[:, :, None]
    to_crop = torch.stack([x2 - x1, 0 * x1, x1, 0 * x1, y2 - y1, y1], dim=2).view(-1, 2, 3)  # from 0..1
    h, w = (4 * n for n in cells_hw)  # 16 samples a cell
    points = torch.stack(torch.meshgrid(torch.arange(w) + 0.5, torch.arange(h) + 0.5, indexing="xy"), dim=-1)
    grid = transform(to_crop, points.view(-1, 2) / torch.tensor([w, h])) * (2 / masks.shape[-1]) - 1
    return F.avg_pool2d(F.grid_sample(masks, grid.view(-1, h, w, 2), align_corners=False), 4)


def _through_jpeg(pixels: NDArray[np.uint8], quality: int) -> list[Image]:
    images = []
    for rgb in pixels:
        file = io.BytesIO()
        PilImage.fromarray(rgb).save(file, "JPEG", quality=quality)
        images.append(Image.from_rgb(np.asarray(PilImage.open(file))))
    return images


def _through_h264(pixels: NDArray[np.uint8], crf: int) -> list[Image]:
    """Each image is a key frame of one stream; with qcomp 1 its quality does not depend on the other images."""
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width = pixels.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        stream.options = {"crf": str(crf), "preset": "veryfast", "x264-params": "keyint=1:qcomp=1"}
        for rgb in pixels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(rgb, format="rgb24")))
        container.mux(stream.encode(None))
    file.seek(0)
    with av.open(file) as container:
        return [to_image(frame) for frame in container.decode(video=0)]
