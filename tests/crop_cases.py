"""What crop_resize is given by the tests of its three versions: CPU, emulated and CUDA."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from dfengine.types import Image

PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1 / 255, 1 / 255, 1 / 255)}  # output on the scale 0..255
FILTERS = ("triangle", "area", "bilinear")
PADDINGS = ("edge", "zero")
ORIENTATIONS = [(rotation, mirrored) for mirrored in (False, True) for rotation in (0, 90, 180, 270)]
SUBSAMPLINGS = {"4:2:0": (2, 2), "4:2:2": (2, 1), "4:4:0": (1, 2), "4:4:4": (1, 1), "4:1:1": (4, 1), "4:1:0": (4, 4)}

# (x1, y1, x2, y2) in a picture of 34 x 26.
BOXES = {
    "whole": (0, 0, 34, 26),
    "inside": (5.3, 4.2, 20.1, 19.9),
    "over the left edge": (-6.2, 3, 11.7, 20),
    "over the top edge": (8, -9.3, 25, 9.3),
    "over the right edge": (22.6, 2, 47.9, 21),
    "over the bottom edge": (3, 17.4, 20, 33.8),
    "over all edges": (-10, -10, 45, 37),
    "far outside": (300.25, -400.25, 330.25, -380.25),
    "a tenth of a pixel": (7.1, 9.1, 7.2, 9.2),
    "one pixel": (12, 5, 13, 6),
    "halves": (4.5, 3.5, 15.5, 14.5),  # `area` rounds them up, however the picture is turned
    "enlarged": (14.1, 10.2, 18.3, 13.4),
    "enlarged one way": (2, 9.2, 32, 12.3),
}


def noise_image(
    rng: np.random.Generator,
    h: int = 26,
    w: int = 34,
    *,
    sub: tuple[int, int] = (2, 2),
    bits: int = 8,
    matrix: str = "bt601",
    full_range: bool = False,
    rotation: int = 0,
    mirrored: bool = False,
) -> Image:
    """Independent samples over the whole range: every wrong tap shows."""
    dtype = np.uint8 if bits == 8 else np.uint16
    shapes = [(h, w)]
    if matrix != "gray":
        shapes += [(-(-h // sub[1]), -(-w // sub[0]))] * 2
    planes = tuple(rng.integers(0, 1 << bits, shape, dtype=dtype, endpoint=False) for shape in shapes)
    return Image(planes, bits, matrix, full_range, sub, rotation, mirrored)


def interleaved(
    rng: np.random.Generator, h: int, w: int, *, bits: int = 8, pitch: int = 0, rotation: int = 0, **options: Any
) -> Image:
    """NV12, or P010 and P016 for more than 8 bits, in one buffer as decoders leave it: rows of ``pitch`` samples,
    chroma below luma, both chroma components next to each other."""
    pitch = pitch or w + w % 2
    rows = -(-h // 2)
    dtype = np.uint8 if bits == 8 else np.uint16
    shift = 0 if bits == 8 else 16 - bits
    buffer = rng.integers(0, 1 << bits, (h + rows, pitch), dtype=dtype, endpoint=False) << dtype(shift)
    chroma = buffer[h:, : 2 * -(-w // 2)]
    depth = 8 if bits == 8 else 16
    return Image(
        (buffer[:h, :w], chroma[:, 0::2], chroma[:, 1::2]), depth, **options, subsampling_xy=(2, 2), rotation=rotation
    )


@dataclass(frozen=True)
class Case:
    """One call. ``op`` names its row of the tolerance table."""

    name: str
    images: list[Image]
    boxes: Any
    index: list[int]
    out_hw: tuple[int, int] = (9, 7)
    op: str = "crop_resize"
    options: dict[str, str] = field(default_factory=dict)


def device_cases(rng: np.random.Generator) -> Iterator[Case]:
    """The matrix for the GPU's program, whose tiles, chunks, vectors and launches the small pictures of the CPU's tests
    would not fill."""
    every_box = list(BOXES.values())
    for resize in FILTERS:
        for padding in PADDINGS:
            options = {"resize": resize, "padding": padding}
            name = f"{resize} {padding}"
            yield Case(f"boxes {name}", [noise_image(rng)], every_box, [0] * len(every_box), options=options)
            images, boxes = [], []
            for sub in SUBSAMPLINGS.values():
                for rotation, mirrored in ORIENTATIONS:
                    for h, w in ((26, 34), (25, 33), (1, 1), (1, 9), (9, 1)):
                        images.append(noise_image(rng, h, w, sub=sub, rotation=rotation, mirrored=mirrored))
                        uh, uw = images[-1].upright_hw
                        boxes.append((-4.2, uh * 0.13, uw * 0.7, uh + 7.4))
            yield Case(f"layouts {name}", images, boxes, list(range(len(images))), options=options)
            # Several tiles either way, the last of them not full; all four turns; a pitch that is a whole number of
            # vectors and one that is not; rims.
            images = [
                interleaved(rng, 120, 150, pitch=pitch, rotation=rotation, bits=bits)
                for rotation, pitch, bits in ((0, 160, 8), (90, 151, 8), (180, 160, 10), (270, 256, 8), (0, 151, 12))
            ]
            boxes = [(3.3, 5.2, 131.7, 109.9), (-20, -9.5, 90, 70.2), (60.1, 33, 170, 140)]
            index = [i for i in range(len(images)) for _ in boxes]
            yield Case(f"tiles {name}", images, boxes * len(images), index, (97, 131), options=options)
            # Levels of a pyramid: many taps, one row a tile, windows of many chunks.
            images = [interleaved(rng, 540, 960, pitch=1024), interleaved(rng, 540, 962, bits=10, rotation=90)]
            whole = [(0, 0, 960, 540), (0, 0, 540, 962)]
            yield Case(f"12 px {name}", images, whole, [0, 1], (12, 21), options=options)
            yield Case(f"75 px {name}", images, whole, [0, 1], (75, 41), options=options)
    for matrix in ("rgb", "gray", "bt709", "ycgco"):
        for bits in (8, 10, 16):
            sub = (1, 1) if matrix in ("rgb", "gray") else (2, 2)
            image = noise_image(rng, sub=sub, bits=bits, matrix=matrix, full_range=bits == 10)
            yield Case(f"{matrix} {bits} bits", [image], every_box, [0] * len(every_box), options={"padding": "zero"})
    rgb = Image.from_rgb(rng.integers(0, 256, (57, 83, 3), dtype=np.uint8))
    boxes = [(2.2, 3.1, 80, 55), (-9, -9, 99, 70)]
    yield Case("interleaved RGB", [rgb], boxes, [0, 0], (40, 70))
    hdr = [replace(noise_image(rng, bits=10, matrix="bt2020"), transfer=t) for t in ("pq", "sdr", "hlg")]
    index = np.repeat([0, 1, 2], len(every_box)).tolist()
    options = {"padding": "zero"}
    yield Case("hdr beside sdr", hdr, every_box * 3, index, op="crop_resize_hdr", options=options)
    for aspect in (2.0, 0.5, 16 / 15):
        images = [replace(noise_image(rng, rotation=r, mirrored=m), pixel_aspect=aspect) for r, m in ORIENTATIONS]
        boxes = [(-4.2, h * 0.13, w * 0.7, h + 7.4) for h, w in (image.upright_hw for image in images)]
        for resize in FILTERS:
            name = f"pixels of {aspect:.2f}:1 {resize}"
            yield Case(name, images, boxes, list(range(len(images))), options={"resize": resize})
    wide = noise_image(rng, 64, 4000, rotation=270)  # upright: 64 x 4000
    yield Case("far", [wide], [(3.2, 3900.3, 60.7, 3990.1)], [0], op="crop_resize_far")
    yield Case("wider than all chunks", [noise_image(rng, 8, 9000)], [(-50, 0, 9050, 8)], [0], (3, 5))
    # More images, boxes and matrices than one launch takes.
    images = [noise_image(rng, 6 + i % 5, 8, bits=8 + i % 9, full_range=i % 2 == 0) for i in range(300)]
    index = rng.integers(0, len(images), 1500).tolist()
    corners = rng.uniform(-3, 6, (1500, 2))
    yield Case("many", images, np.hstack([corners, corners + rng.uniform(0.5, 8, (1500, 2))]), index, (3, 4))
    for out_hw in ((1, 1), (1, 5), (5, 1), (2, 64), (64, 2), (33, 65), (24, 24), (224, 224)):
        images = [interleaved(rng, 50, 70), noise_image(rng, 70, 50, rotation=90)]
        yield Case(f"to {out_hw}", images, [(1.5, 2.5, 60, 47), (1.5, 2.5, 60, 47)], [0, 1], out_hw)
