"""Real faces -> pairs of a real face and a pseudo-fake of it, made from real faces only.

A fake is ``mask * source + (1 - mask) * target``. The source is the same photo (a self-blended image, after Shiohara
and Yamasaki 2022, arXiv:2204.08376) or another person's, laid over the target by its five landmarks (a swap). What
gives a fake away is that source and target disagree: in place, colour, sharpness or noise.

Note [Real and fake must be equally sharp]
A network that is shown sharp reals and soft fakes learns to score blur. So everything that changes sharpness is done
to both: the real of a pair is its *target*, resampled as often as the source is; and the source is altered in one half
of the pairs, the target in the other, so that the inside of a mask is the sharper part as often as the softer one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

# The five landmarks in face units: origin between the eyes, the distance of the eyes is 1, y points down. Mean of the
# portraits, rounded.
FIVE_POINTS = torch.tensor([[-0.5, 0.0], [0.5, 0.0], [0.0, 0.58], [-0.48, 1.03], [0.48, 1.03]])

# Half of the face's outline from forehead to chin, in face units. Proportions of the textbook face (five eyes wide,
# that is 1.25 to each side with the ears; up to the hairline and down to the chin), checked by eye.
_HALF_OUTLINE = [
    (0.0, -0.95),
    (0.55, -0.9),
    (0.95, -0.6),
    (1.15, 0.0),
    (1.1, 0.6),
    (0.95, 1.15),
    (0.6, 1.65),
    (0.0, 1.85),
]
OUTLINE = torch.tensor([(s * x, y) for s in (-1, 1) for x, y in _HALF_OUTLINE])
CENTRE = torch.tensor([0.0, 0.45])

# Planes that bound a mask: enough for a round face, few enough for the corners that a convex hull of landmarks has.
PLANES = 12

# The strengths below are about those of the self-blended images paper where it has the step (shift by 3 and 1.5 %,
# scale .95 to 1.05, colour by 20/255, contrast by 10 %); the others were set by eye on a contact sheet: subtle to
# moderate, never broken.
SHIFT_X, SHIFT_Y, SCALE, TURN = 0.03, 0.015, 0.05, 0.03  # shares of the crop; a factor; radians
COLOUR, CONTRAST, SATURATION = 0.06, 0.1, 0.2
MAX_BLUR_PX, MAX_NOISE = 2.5, 0.02  # sigmas, in pixels of the 150 px face and on the scale 0..1


@dataclass(frozen=True, eq=False)
class Pairs:
    """B pairs. Images are RGB in 0..1, (B, 3, S, S)."""

    real: Tensor
    fake: Tensor
    mask: Tensor  # (B, 1, S, S), share of the source in the fake
    xyxy: Tensor  # (B, 4), the face box, pixels


def make_pairs(
    rgb: Tensor, xyxy: Tensor, landmarks: Tensor, donors: Tensor, donor_landmarks: Tensor, rng: Generator
) -> Pairs:
    """Makes one pair from each photo.

    Args:
        rgb: (B, 3, S, S) in 0..1, with ``xyxy`` (B, 4) and ``landmarks`` (B, 5, 2) in pixels.
        donors: the photo that each source is taken from; the photo itself makes a self-blended image.
        donor_landmarks: (B, 5, 2), those of the donors.
        rng: where all chance comes from.
    """
    b, _, size, _ = rgb.shape
    is_swap = (donor_landmarks != landmarks).flatten(1).any(dim=1)
    pose = _random_pose(xyxy, size, rng)  # output -> photo
    to_donor = compose(fit_affine(landmarks, donor_landmarks), compose(pose, _random_misfit(b, size, rng)))

    alter_source = _chance(b, 0.5, rng)[:, None, None, None]
    altered = alter(torch.where(alter_source, donors, rgb), rng)
    target = sample(torch.where(alter_source, rgb, altered), pose)
    source = sample(torch.where(alter_source, altered, donors), to_donor)

    points = transform(invert(pose), landmarks)
    mask = random_mask(points, size, rng)
    # Swaps always get the target's colours, as every swapping program does it; among self-blended images those that do
    # teach the net to look at more than colour.
    matched = is_swap | _chance(b, 0.3, rng)
    strength = torch.where(matched, uniform(b, 0.6, 1.0, rng), 0.0)
    source = match_colour(source, target, mask, strength)
    opacity = torch.where(_chance(b, 0.4, rng), uniform(b, 0.6, 1.0, rng), 1.0)
    mask = mask * opacity[:, None, None, None]
    return Pairs(target, target + mask * (source - target), mask, _box_around(xyxy, pose))


def random_mask(landmarks: Tensor, size: int, rng: Generator) -> Tensor:
    """Soft, deformed masks on faces with these landmarks, (B, 5, 2) pixels -> (B, 1, size, size) in 0..1.

    A mask is a convex polygon around the whole face, around a part of it, or cut in two, wobbled by smooth noise. It is
    made at half the size: its edges are never sharper than that.
    """
    b, half = len(landmarks), size // 2
    at = transform(fit_affine(landmarks, FIVE_POINTS.expand(b, 5, 2)), 2 * pixel_centres(half))  # face units, (B, P, 2)

    is_part = _chance(b, 0.25, rng)
    spot = FIVE_POINTS[torch.randint(5, (b,), generator=rng)] * 0.8
    centre = torch.where(is_part[:, None], spot, CENTRE)
    grown = torch.where(is_part, uniform(b, 0.35, 0.7, rng), uniform(b, 0.85, 1.15, rng))

    angle = (torch.arange(PLANES) + torch.rand(b, PLANES, generator=rng)) * (2 * torch.pi / PLANES)
    normal = torch.stack([angle.cos(), angle.sin()], dim=-1)  # (B, K, 2)
    reach = ((OUTLINE - CENTRE) @ normal.transpose(1, 2)).amax(dim=1)  # (B, K)
    reach = reach * grown[:, None] * uniform((b, PLANES), 0.85, 1.1, rng)
    inside = (reach[:, :, None] - normal @ (at - centre[:, None]).transpose(1, 2)).amin(dim=1)  # distance, (B, P)

    cut_angle = uniform(b, 0, 2 * torch.pi, rng)
    cut = (at - CENTRE) @ torch.stack([cut_angle.cos(), cut_angle.sin()], dim=-1)[:, :, None]
    cut = cut.squeeze(2) + uniform((b, 1), -0.1, 0.5, rng)
    is_cut = ~is_part & _chance(b, 0.25, rng)
    inside = torch.where(is_cut[:, None], torch.minimum(inside, cut), inside)

    wobble = F.interpolate(
        torch.randn(b, 1, 7, 7, generator=rng), size=(half, half), mode="bicubic", align_corners=True
    )
    inside = inside.view(b, 1, half, half) + wobble * uniform((b, 1, 1, 1), 0.0, 0.08, rng)
    edge = (
        torch.exp(uniform((b, 1, 1, 1), -3.0, -0.7, rng)) * grown[:, None, None, None]
    )  # 5 to 50 % of the eyes' distance
    ramp = (inside / edge).clamp(0, 1)
    return F.interpolate(ramp * ramp * (3 - 2 * ramp), size=(size, size), mode="bilinear", align_corners=False)


def alter(rgb: Tensor, rng: Generator) -> Tensor:
    """Changes colour, sharpness and noise of each image a little, (B, 3, S, S) -> the same shape, in 0..1."""
    b = len(rgb)
    per_image = (b, 1, 1, 1)
    grey = rgb.mean(dim=1, keepdim=True)
    out = grey + (rgb - grey) * uniform(per_image, 1 - SATURATION, 1 + SATURATION, rng)
    out = (out - 0.5) * uniform(per_image, 1 - CONTRAST, 1 + CONTRAST, rng) + 0.5
    out = out + uniform((b, 3, 1, 1), -COLOUR, COLOUR, rng) * uniform(per_image, 0.0, 1.0, rng)
    soft = blur(out, torch.exp(uniform(b, -0.7, torch.tensor(MAX_BLUR_PX).log().item(), rng)))
    # 0 leaves the image as it is, 1 is the blurred one, -1 sharpens as much as 1 blurs.
    amount = torch.where(_chance(b, 0.7, rng), uniform(b, -1.0, 1.0, rng), 0.0)[:, None, None, None]
    out = out + amount * (soft - out)
    noise = uniform(per_image, 0.0, MAX_NOISE, rng) * _chance(b, 0.3, rng)[:, None, None, None]
    return (out + noise * torch.randn(out.shape, generator=rng)).clamp(0, 1)


def match_colour(source: Tensor, target: Tensor, mask: Tensor, strength: Tensor) -> Tensor:
    """Gives the source the target's mean and deviation of each channel under the mask; ``strength`` (B,) in 0..1."""
    weight = mask / mask.sum(dim=(2, 3), keepdim=True).clamp_min(1e-6)

    def moments(x: Tensor) -> tuple[Tensor, Tensor]:
        mean = (weight * x).sum(dim=(2, 3), keepdim=True)
        return mean, (weight * (x - mean) ** 2).sum(dim=(2, 3), keepdim=True).sqrt()

    (mean, deviation), (wanted_mean, wanted_deviation) = moments(source), moments(target)
    # Beyond 1.6 a flat patch would be blown up to noise.
    gain = (wanted_deviation / deviation.clamp_min(1e-3)).clamp(1 / 1.6, 1.6)
    matched = ((source - mean) * gain + wanted_mean).clamp(0, 1)
    return source + strength[:, None, None, None] * (matched - source)


def blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur with one sigma (B,), in pixels, for each image (B, C, H, W)."""
    b, c, h, w = images.shape
    radius = max(1, int(2.5 * float(sigma.max())))
    offsets = torch.arange(-radius, radius + 1)
    kernel = torch.exp(-0.5 * (offsets / sigma.clamp_min(1e-3)[:, None]) ** 2)
    kernel = (kernel / kernel.sum(dim=1, keepdim=True)).repeat_interleave(c, dim=0)[:, None]  # (B * C, 1, K)
    x = F.pad(images.reshape(1, b * c, h, w), [radius] * 4, mode="replicate")
    x = F.conv2d(x, kernel[:, :, :, None], groups=b * c)
    return F.conv2d(x, kernel[:, :, None, :], groups=b * c).view(b, c, h, w)


# Affine maps are (B, 2, 3) and act on points (B, P, 2) or (P, 2), in pixels; pixel centres lie at .5.


def transform(matrix: Tensor, points: Tensor) -> Tensor:
    return points @ matrix[:, :, :2].transpose(1, 2) + matrix[:, None, :, 2]


def compose(outer: Tensor, inner: Tensor) -> Tensor:
    """The map that does ``inner`` first."""
    linear = outer[:, :, :2] @ inner[:, :, :2]
    return torch.cat([linear, outer[:, :, :2] @ inner[:, :, 2:] + outer[:, :, 2:]], dim=2)


def invert(matrix: Tensor) -> Tensor:
    inverse = torch.linalg.inv(matrix[:, :, :2])
    return torch.cat([inverse, -inverse @ matrix[:, :, 2:]], dim=2)


def fit_affine(points: Tensor, onto: Tensor) -> Tensor:
    """The affine maps that bring points (B, P, 2) closest to others in the sense of least squares."""
    ones = torch.ones_like(points[..., :1])
    return torch.linalg.lstsq(torch.cat([points, ones], dim=2), onto).solution.transpose(1, 2)


def pixel_centres(size: int) -> Tensor:
    """(size * size, 2), row by row."""
    axis = torch.arange(size) + 0.5
    return torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1).reshape(-1, 2)


def sample(images: Tensor, to_input: Tensor) -> Tensor:
    """Resamples images (B, C, S, S), bilinear; ``to_input`` maps pixels of the result to pixels of the image."""
    size = images.shape[-1]
    grid = transform(to_input, pixel_centres(size)) * (2 / size) - 1
    return F.grid_sample(images, grid.view(-1, size, size, 2), padding_mode="border", align_corners=False)


def uniform(shape: int | tuple[int, ...], low: float, high: float, rng: Generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=rng)


def _chance(b: int, p: float, rng: Generator) -> Tensor:
    return torch.rand(b, generator=rng) < p


def _affine(centre: Tensor, scale_x: Tensor, scale_y: Tensor, radians: Tensor, shift: Tensor) -> Tensor:
    """Turns and scales about ``centre`` (B, 2), then shifts (B, 2)."""
    cos, sin = radians.cos(), radians.sin()
    linear = torch.stack([cos * scale_x, -sin * scale_y, sin * scale_x, cos * scale_y], dim=1).view(-1, 2, 2)
    offset = centre[:, :, None] + shift[:, :, None] - linear @ centre[:, :, None]
    return torch.cat([linear, offset], dim=2)


def _random_pose(xyxy: Tensor, size: int, rng: Generator) -> Tensor:
    """What real and fake share: a flip, a turn up to 10 degrees, 10 % of scale; about the middle of the face."""
    b = len(xyxy)
    flip = torch.where(_chance(b, 0.5, rng), -1.0, 1.0)
    scale = uniform(b, 0.9, 1.1, rng)
    centre = (xyxy[:, :2] + xyxy[:, 2:]) / 2
    shift = uniform((b, 2), -0.5, 0.5, rng)  # part of a pixel: all are resampled equally
    return _affine(centre, flip * scale, scale, uniform(b, -0.17, 0.17, rng), shift)


def _random_misfit(b: int, size: int, rng: Generator) -> Tensor:
    """How a source lies wrong on its target."""
    shift = uniform((b, 2), -1, 1, rng) * torch.tensor([SHIFT_X, SHIFT_Y]) * size
    scale = uniform((2, b), 1 - SCALE, 1 + SCALE, rng)
    return _affine(torch.full((b, 2), size / 2), scale[0], scale[1], uniform(b, -TURN, TURN, rng), shift)


def _box_around(xyxy: Tensor, pose: Tensor) -> Tensor:
    """The box that the detector would give after ``pose``: moved and scaled, but upright."""
    centre = transform(invert(pose), (xyxy[:, None, :2] + xyxy[:, None, 2:]) / 2).squeeze(1)
    zoom = torch.linalg.det(pose[:, :, :2]).abs().rsqrt()[:, None]
    half = (xyxy[:, 2:] - xyxy[:, :2]) / 2 * zoom
    return torch.cat([centre - half, centre + half], dim=1)
