"""Real faces -> pairs of a real face and a pseudo-fake of it, made from real faces only.

A fake is ``mask * source + (1 - mask) * target``. The source is the same photo (a self-blended image, after Shiohara
and Yamasaki 2022, arXiv:2204.08376) or another person's, laid over the target by its five landmarks (a swap). What
gives a fake away is that source and target disagree: in place, shape, light, colour, resolution, sharpness or noise.

``python -m training.data FACES --out sheet.png`` draws some: real, fake and mask beside each other.

Note [Real and fake must be equally sharp]
A network that is shown sharp reals and soft fakes learns to score blur. So everything that changes sharpness is done
to both: the real of a pair is its *target*, resampled as often as the source is; and the source is altered in one half
of the pairs, the target in the other, so that the inside of a mask is the sharper part as often as the softer one.

All functions work on batches, on the device of their inputs. Chance comes from ``Draws``, a generator a row: rows with
the same key (the frames of a clip) get the same fake.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dfengine.bundle import CropSpec
from dfengine.errors import OptionError
from dfengine.stages.crop import crop_boxes

from .augment import Draws


@dataclass(frozen=True, kw_only=True)
class FakeSettings:
    """Names of steps are the chance that a pair gets them; the values were set by eye on contact sheets."""

    ratio: float = 0.0  # of the fakes that are made from real faces: 0 none, 1 all
    # How often a pair is in its batch, each time through another camera and codec: making pairs costs more than that.
    views: int = 1
    # The rest are self-blended images, which the literature finds to generalise better.
    swap: float = 0.3
    low_resolution: float = 0.3  # source or target came out of a generator of few pixels and was scaled up
    generator_face_px: tuple[float, float] = (40.0, 140.0)  # for nets of 64 to 256 px, whose crops are wider than faces
    relight: float = 0.4
    warp: float = 0.5  # another pose or expression: the source is bent
    occlude: float = 0.15  # something before the face, in real and fake

    def __post_init__(self) -> None:
        for name in ("ratio", "swap", "low_resolution", "relight", "warp", "occlude"):
            if not 0 <= getattr(self, name) <= 1:
                raise OptionError(f"fakes.{name} is a share, from 0 to 1; got {getattr(self, name)}")
        if self.views < 1:
            raise OptionError(f"fakes.views must be 1 or more, got {self.views}")
        if min(self.generator_face_px) < 8:
            raise OptionError(f"fakes.generator_face_px must be 8 at least, got {self.generator_face_px}")


# The five landmarks in face units: origin between the eyes, the distance of the eyes is 1, y points down. Mean of 929
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

# Shapes of masks: what of them is swapped, as centre and half axes in face units. What programs do: whole faces,
# squares that are pasted back with a soft edge, mouths (lip-sync and dubbing), eyes, single features.
_ELLIPSE, _RECTANGLE = 2, 6  # norm whose unit ball is the shape
_SHAPES = torch.tensor(
    [  # centre x, y, half width, half height, norm
        (0.0, 0.45, 1.05, 1.4, _ELLIPSE),  # a face
        (0.0, 0.45, 1.1, 1.3, _RECTANGLE),  # a square around it
        (0.0, 1.1, 0.85, 0.65, _ELLIPSE),  # mouth and chin
        (0.0, 0.0, 1.05, 0.38, _RECTANGLE),  # eyes and brows
        (-0.5, 0.0, 0.35, 0.25, _ELLIPSE),
        (0.5, 0.0, 0.35, 0.25, _ELLIPSE),
        (0.0, 0.45, 0.35, 0.5, _ELLIPSE),  # nose
        (0.0, 1.03, 0.6, 0.3, _ELLIPSE),  # lips
    ]
)

# The strengths below are about those of the self-blended images paper where it has the step (shift by 3 and 1.5 %,
# scale .95 to 1.05, colour by 20/255, contrast by 10 %); the others were set by eye on a contact sheet: subtle to
# moderate, never broken.
SHIFT_X, SHIFT_Y, SCALE, TURN = 0.03, 0.015, 0.05, 0.03  # shares of the picture; a factor; radians
COLOUR, CONTRAST, SATURATION = 0.06, 0.1, 0.2
MAX_BLUR_SHARE, MAX_NOISE = 1 / 60, 0.02  # sigmas: of the face's side, and on the scale 0..1
WARP_SHARE, RELIGHT = 0.02, 0.3  # of the face's side (standard deviation); of the brightness, at the ends of the face

# Sizes that a generator is imitated at, in shares of the picture: few, so that rows can share a call.
_GENERATOR_STEPS = 8


@dataclass(frozen=True, eq=False)
class Pairs:
    """B pairs. Images are RGB in 0..1, (B, 3, S, S)."""

    real: Tensor
    fake: Tensor
    mask: Tensor  # (B, 1, S, S), share of the source in the fake
    xyxy: Tensor  # (B, 4), the face box, pixels


def make_pairs(
    rgb: Tensor,
    xyxy: Tensor,
    landmarks: Tensor,
    donors: Tensor,
    donor_landmarks: Tensor,
    settings: FakeSettings,
    draws: Draws,
) -> Pairs:
    """Makes one pair from each photo.

    Args:
        rgb: (B, 3, S, S) in 0..1, with ``xyxy`` (B, 4) and ``landmarks`` (B, 5, 2) in pixels.
        donors: the photo that each source is taken from; the photo itself makes a self-blended image.
        donor_landmarks: (B, 5, 2), those of the donors.
    """
    b, _, size, _ = rgb.shape
    face_px = (xyxy[:, 2:] - xyxy[:, :2]).amax(dim=1)
    is_swap = (donor_landmarks != landmarks).flatten(1).any(dim=1)
    pose = random_pose(xyxy, draws)  # output -> photo
    to_donor = compose(fit_affine(landmarks, donor_landmarks), compose(pose, _random_misfit(b, size, draws)))

    alter_source = _images(draws.chance(0.5))
    altered = alter(torch.where(alter_source, donors, rgb), face_px, settings, draws)
    target = sample(torch.where(alter_source, rgb, altered), pose)
    source = sample(
        torch.where(alter_source, altered, donors), to_donor, _random_warp(size, face_px, settings.warp, draws)
    )
    source = torch.where(_images(draws.chance(settings.relight)), _relight(source, draws), source)

    points = transform(invert(pose), landmarks)
    mask = random_mask(points, size, draws)
    # Swaps always get the target's colours, as every swapping program does it; among self-blended images those that do
    # teach the net to look at more than colour.
    matched = is_swap | draws.chance(0.3)
    strength = torch.where(matched, draws.uniform(0.6, 1.0), 0.0)
    source = match_colour(source, target, mask, strength)
    opacity = torch.where(draws.chance(0.4), draws.uniform(0.6, 1.0), 1.0)
    mask = mask * _images(opacity)
    target, mask = _occlude(target, mask, points, settings.occlude, draws)
    return Pairs(target, target + mask * (source - target), mask, box_around(xyxy, pose))


def random_mask(landmarks: Tensor, size: int, draws: Draws) -> Tensor:
    """Soft, deformed masks on faces with these landmarks, (B, 5, 2) pixels -> (B, 1, size, size) in 0..1.

    Half of the masks are convex polygons around the whole face, the others one of _SHAPES; some are cut in two. All are
    turned, scaled and wobbled by smooth noise. They are made at half the size: edges are never sharper than that.
    """
    b, half, device = len(landmarks), size // 2, landmarks.device
    five, outline, middle = (t.to(device) for t in (FIVE_POINTS, OUTLINE, CENTRE))
    at = transform(
        fit_affine(landmarks, five.expand(b, 5, 2)), 2 * pixel_centres(half, device)
    )  # face units, (B, P, 2)
    grown = draws.uniform(0.85, 1.15)

    angle = (torch.arange(PLANES, device=device) + draws.uniform(0, 1, PLANES)) * (2 * torch.pi / PLANES)
    normal = torch.stack([angle.cos(), angle.sin()], dim=-1)  # (B, K, 2)
    reach = ((outline - middle) @ normal.transpose(1, 2)).amax(dim=1)  # (B, K)
    reach = reach * grown[:, None] * draws.uniform(0.85, 1.1, PLANES)
    inside = (reach[:, :, None] - normal @ (at - middle).transpose(1, 2)).amin(dim=1)  # distance, (B, P)

    shape = _SHAPES.to(device)[draws.choice(len(_SHAPES))]  # (B, 5)
    axes = shape[:, 2:4] * grown[:, None] * draws.uniform(0.85, 1.15, 2)
    turned = rotate(at - shape[:, None, :2] - draws.uniform(-0.08, 0.08, 2)[:, None], draws.uniform(-0.25, 0.25))
    ratio = (turned / axes[:, None]).abs().clamp(1e-4, 9.0)
    norm = (ratio ** shape[:, 4, None, None]).sum(dim=2) ** (1 / shape[:, 4, None])
    inside_shape = (1 - norm) * axes.amin(dim=1, keepdim=True)
    is_shape = draws.chance(0.5)
    inside = torch.where(is_shape[:, None], inside_shape, inside)

    cut_angle = draws.uniform(0, 2 * torch.pi)
    cut = (at - middle) @ torch.stack([cut_angle.cos(), cut_angle.sin()], dim=-1)[:, :, None]
    cut = cut.squeeze(2) + draws.uniform(-0.1, 0.5, 1)
    is_cut = ~is_shape & draws.chance(0.25)
    inside = torch.where(is_cut[:, None], torch.minimum(inside, cut), inside)

    wobble = F.interpolate(draws.normal(1, 7, 7), size=(half, half), mode="bicubic", align_corners=True)
    # Small shapes take small steps: 8 % of the distance of the eyes would eat up an eye.
    room = torch.where(is_shape, axes.amin(dim=1), 1.0).clamp_max(1.0)
    inside = inside.view(b, 1, half, half) + wobble * _images(draws.uniform(0.0, 0.08) * room)
    edge = torch.exp(draws.uniform(-3.0, -0.7)) * room  # 5 to 50 % of the eyes' distance
    ramp = (inside / _images(edge)).clamp(0, 1)
    return F.interpolate(ramp * ramp * (3 - 2 * ramp), size=(size, size), mode="bilinear", align_corners=False)


def alter(rgb: Tensor, face_px: Tensor, settings: FakeSettings, draws: Draws) -> Tensor:
    """Changes colour, resolution, sharpness and noise of each image a little, (B, 3, S, S) -> the same, in 0..1."""
    grey = rgb.mean(dim=1, keepdim=True)
    out = grey + (rgb - grey) * _images(draws.uniform(1 - SATURATION, 1 + SATURATION))
    out = (out - 0.5) * _images(draws.uniform(1 - CONTRAST, 1 + CONTRAST)) + 0.5
    out = out + draws.uniform(-COLOUR, COLOUR, 3, 1, 1) * _images(draws.uniform(0.0, 1.0))

    low, high = sorted(settings.generator_face_px)
    wanted = torch.exp(draws.uniform(math.log(low), math.log(high)))
    share = torch.where(draws.chance(settings.low_resolution), (wanted / face_px).clamp_max(1.0), 1.0)
    out = rescale(out, share, draws.chance(0.5))

    max_sigma = MAX_BLUR_SHARE * face_px
    soft = blur(out, torch.exp(draws.uniform(-1.6, 0.0)) * max_sigma)
    # 0 leaves the image as it is, 1 is the blurred one, -1 sharpens as much as 1 blurs.
    amount = torch.where(draws.chance(0.7), draws.uniform(-1.0, 1.0), 0.0)
    out = out + _images(amount) * (soft - out)
    noisy = draws.chance(0.3)
    noise = _images(draws.uniform(0.0, MAX_NOISE)) * draws.normal(*rgb.shape[1:], where=noisy)
    return (out + noise).clamp(0, 1)


def rescale(images: Tensor, share: Tensor, cubic: Tensor) -> Tensor:
    """Scales each image (B, C, S, S) down to ``share`` (B,) of its size and up again, by cubic or linear weights.

    The share is rounded to a few steps between a fifth and one; one leaves the image untouched.
    """
    step = torch.round(share.clamp(0.2, 1.0) * _GENERATOR_STEPS * 2).long().cpu()
    size, out = images.shape[-1], images.clone()
    for n in step.unique().tolist():
        small = max(2, round(size * n / (_GENERATOR_STEPS * 2)))
        for mode, which in (("bicubic", cubic), ("bilinear", ~cubic)):
            rows = torch.nonzero((step == n) & which.cpu()).flatten().to(images.device)
            if small < size and len(rows):
                down = F.interpolate(images[rows], (small, small), mode="bilinear", antialias=True)
                out[rows] = F.interpolate(down, (size, size), mode=mode)
    return out


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
    return source + _images(strength) * (matched - source)


def crop_masks(masks: Tensor, xyxy: Tensor, crop: CropSpec, cells_hw: tuple[int, int]) -> Tensor:
    """What share of each cell of the crops is masked: (B, 1, S, S) and face boxes (B, 4) -> (B, 1, *cells_hw)."""
    boxes = torch.from_numpy(crop_boxes(xyxy.cpu().numpy(), crop)).to(masks.device)
    x1, y1, x2, y2 = boxes.T[:, :, None]
    to_crop = torch.stack([x2 - x1, 0 * x1, x1, 0 * x1, y2 - y1, y1], dim=2).view(-1, 2, 3)  # from 0..1
    h, w = (4 * n for n in cells_hw)  # 16 samples a cell
    axes = torch.arange(w, device=masks.device) + 0.5, torch.arange(h, device=masks.device) + 0.5
    points = torch.stack(torch.meshgrid(*axes, indexing="xy"), dim=-1).view(-1, 2)
    grid = transform(to_crop, points / torch.tensor([w, h], device=masks.device)) * (2 / masks.shape[-1]) - 1
    return F.avg_pool2d(F.grid_sample(masks, grid.view(-1, h, w, 2), align_corners=False), 4)


def blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur with one sigma (B,), in pixels, for each image (B, C, H, W)."""
    b, c, h, w = images.shape
    radius = max(1, int(2.5 * float(sigma.max())))
    offsets = torch.arange(-radius, radius + 1, device=images.device)
    kernel = torch.exp(-0.5 * (offsets / sigma.clamp_min(1e-3)[:, None]) ** 2)
    # Each row ends where its own kernel does, whatever the others need.
    kernel = kernel * (offsets.abs() <= (2.5 * sigma).long().clamp_min(1)[:, None])
    kernel = (kernel / kernel.sum(dim=1, keepdim=True)).repeat_interleave(c, dim=0)[:, None]  # (B * C, 1, K)
    x = F.pad(images.reshape(1, b * c, h, w), [radius] * 4, mode="replicate")
    x = F.conv2d(x, kernel[:, :, :, None], groups=b * c)
    return F.conv2d(x, kernel[:, :, None, :], groups=b * c).view(b, c, h, w)


# -- geometry: affine maps are (B, 2, 3), act on points (B, P, 2) or (P, 2), in pixels; pixel centres lie at .5 -------


def transform(matrix: Tensor, points: Tensor) -> Tensor:
    return points @ matrix[:, :, :2].transpose(1, 2) + matrix[:, None, :, 2]


def compose(outer: Tensor, inner: Tensor) -> Tensor:
    """The map that does ``inner`` first."""
    linear = outer[:, :, :2] @ inner[:, :, :2]
    return torch.cat([linear, outer[:, :, :2] @ inner[:, :, 2:] + outer[:, :, 2:]], dim=2)


def invert(matrix: Tensor) -> Tensor:
    inverse = torch.linalg.inv(matrix[:, :, :2])
    return torch.cat([inverse, -inverse @ matrix[:, :, 2:]], dim=2)


def rotate(points: Tensor, radians: Tensor) -> Tensor:
    """Turns points (B, P, 2) about the origin."""
    cos, sin = radians.cos()[:, None], radians.sin()[:, None]
    x, y = points.unbind(dim=2)
    return torch.stack([cos * x - sin * y, sin * x + cos * y], dim=2)


def fit_affine(points: Tensor, onto: Tensor) -> Tensor:
    """The affine maps that bring points (B, P, 2) closest to others in the sense of least squares."""
    ones = torch.ones_like(points[..., :1])
    solution: Tensor = torch.linalg.lstsq(torch.cat([points, ones], dim=2), onto).solution
    return solution.transpose(1, 2)


def pixel_centres(size: int, device: torch.device | str = "cpu") -> Tensor:
    """(size * size, 2), row by row."""
    axis = torch.arange(size, device=device) + 0.5
    return torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1).reshape(-1, 2)


def sample(images: Tensor, to_input: Tensor, displacement: Tensor | float = 0.0) -> Tensor:
    """Resamples images (B, C, S, S), bilinear; ``to_input`` maps pixels of the result to pixels of the image.

    ``displacement``: (B, S * S, 2), added to the pixels of the result before.
    """
    size = images.shape[-1]
    grid = transform(to_input, pixel_centres(size, images.device) + displacement) * (2 / size) - 1
    return F.grid_sample(images, grid.view(-1, size, size, 2), padding_mode="border", align_corners=False)


def _images(values: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1)"""
    return values[:, None, None, None]


def _affine(centre: Tensor, scale_x: Tensor, scale_y: Tensor, radians: Tensor, shift: Tensor) -> Tensor:
    """Turns and scales about ``centre`` (B, 2), then shifts (B, 2)."""
    cos, sin = radians.cos(), radians.sin()
    linear = torch.stack([cos * scale_x, -sin * scale_y, sin * scale_x, cos * scale_y], dim=1).view(-1, 2, 2)
    offset = centre[:, :, None] + shift[:, :, None] - linear @ centre[:, :, None]
    return torch.cat([linear, offset], dim=2)


def random_pose(xyxy: Tensor, draws: Draws) -> Tensor:
    """What real and fake share: a flip, a turn up to 10 degrees, 10 % of scale; about the middle of the face."""
    flip = torch.where(draws.chance(0.5), -1.0, 1.0)
    scale = draws.uniform(0.9, 1.1)
    centre = (xyxy[:, :2] + xyxy[:, 2:]) / 2
    shift = draws.uniform(-0.5, 0.5, 2)  # part of a pixel: all are resampled equally
    return _affine(centre, flip * scale, scale, draws.uniform(-0.17, 0.17), shift)


def _random_misfit(b: int, size: int, draws: Draws) -> Tensor:
    """How a source lies wrong on its target."""
    shift = draws.uniform(-size, size, 2)
    shift = shift * torch.tensor([SHIFT_X, SHIFT_Y], device=shift.device)
    scale = draws.uniform(1 - SCALE, 1 + SCALE, 2)
    centre = torch.full((b, 2), size / 2, device=shift.device)
    return _affine(centre, scale[:, 0], scale[:, 1], draws.uniform(-TURN, TURN), shift)


def _random_warp(size: int, face_px: Tensor, chance: float, draws: Draws) -> Tensor:
    """A smooth field of displacements, (B, size * size, 2) pixels; zero in rows that get none."""
    amount = draws.uniform(0.3, 1.0) * draws.chance(chance) * WARP_SHARE * face_px
    # A knot every sixth of the picture: about the distance of eyes, nose and mouth.
    field = F.interpolate(draws.normal(2, 7, 7), size=(size, size), mode="bicubic", align_corners=True)
    return (field * _images(amount)).flatten(2).transpose(1, 2)


def _relight(images: Tensor, draws: Draws) -> Tensor:
    """Lamps moved: brightness that changes along a line and with the distance from a point, differently by colour."""
    size = images.shape[-1]
    axis = torch.linspace(-1, 1, size, device=images.device)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    k = draws.uniform(-RELIGHT, RELIGHT, 4)[:, :, None, None]
    field = k[:, 0] * x + k[:, 1] * y + k[:, 2] * x * y + k[:, 3] * (x * x + y * y - 0.5)
    warm = draws.uniform(0.7, 1.3, 3)[:, :, None, None]
    return (images * torch.exp(warm * field[:, None])).clamp(0, 1)


def _occlude(target: Tensor, mask: Tensor, landmarks: Tensor, chance: float, draws: Draws) -> tuple[Tensor, Tensor]:
    """Puts something before some faces: a stripe or a blob of plain or mottled colour, such as hair, hands, frames.

    In half of them the mask leaves it out, as a careful swap does; in the other half the source is painted over it.
    """
    size, device = target.shape[-1], target.device
    has = draws.chance(chance)
    centre = CENTRE.to(device) + draws.uniform(-1.0, 1.0, 2)
    angle, careful = draws.uniform(0, torch.pi), draws.chance(0.5)
    axes = torch.stack([draws.uniform(0.3, 2.5), draws.uniform(0.05, 0.5)], dim=1)
    mottle = draws.normal(1, 24, 24) * _images(draws.uniform(0, 0.1))
    colour = draws.uniform(0.02, 0.9, 1, 1, 1) * draws.uniform(0.7, 1.1, 3, 1, 1)
    if not has.any():
        return target, mask

    to_face = fit_affine(landmarks[has], FIVE_POINTS.to(device).expand(int(has.sum()), 5, 2))
    local = rotate(transform(to_face, pixel_centres(size, device)) - centre[has, None], angle[has])
    distance = (1 - (local / axes[has, None]).norm(dim=2)) * axes[has].amin(dim=1, keepdim=True)
    shape = (distance / 0.06).clamp(0, 1).view(-1, 1, size, size)
    mottle = F.interpolate(mottle[has], size=(size, size), mode="bilinear")
    target, mask = target.clone(), mask.clone()
    target[has] += shape * ((colour[has] + mottle).clamp(0, 1) - target[has])
    mask[has] *= 1 - shape * _images(careful[has])
    return target, mask


def box_around(xyxy: Tensor, pose: Tensor) -> Tensor:
    """The box that the detector would give after ``pose``: moved and scaled, but upright."""
    centre = transform(invert(pose), (xyxy[:, None, :2] + xyxy[:, None, 2:]) / 2).squeeze(1)
    zoom = torch.linalg.det(pose[:, :, :2]).abs().rsqrt()[:, None]
    half = (xyxy[:, 2:] - xyxy[:, :2]) / 2 * zoom
    return torch.cat([centre - half, centre + half], dim=1)
