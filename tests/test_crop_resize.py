"""crop_resize against the plain reference, torch, PIL and swscale."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import reference
from conftest import TOLERANCE
from crop_cases import BOXES, FILTERS, ORIENTATIONS, PADDINGS, PLAIN, SUBSAMPLINGS, noise_image

from dfengine.stages._kernels import crop_resize, pyramid
from dfengine.types import Image

CSRC = Path(__file__).parents[1] / "csrc"
NORMALIZED = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
MATRICES = ("bt601", "bt709", "bt2020", "smpte240m", "fcc", "ycgco")


def run(images, boxes, index=None, *, out_hw=(9, 7), options=PLAIN, **more):
    boxes = np.asarray(boxes, np.float32).reshape(-1, 4)
    index = np.zeros(len(boxes), np.int32) if index is None else np.asarray(index, np.int32)
    return crop_resize(images, boxes, index, out_hw=out_hw, **options, **more)


def assert_as_reference(images, boxes, index=None, *, out_hw=(9, 7), dtype="float32", op="crop_resize", **more):
    boxes = np.asarray(boxes, np.float32).reshape(-1, 4)
    index = np.zeros(len(boxes), np.int32) if index is None else np.asarray(index, np.int32)
    got = crop_resize(images, boxes, index, out_hw=out_hw, dtype=dtype, **PLAIN, **more)
    want = reference.crop_resize(images, boxes, index, out_hw=out_hw, **PLAIN, **more)
    assert got.shape == want.shape == (len(boxes), 3, *out_hw)
    assert got.dtype == dtype
    assert got.flags.c_contiguous
    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE[op, dtype])


# -- against the reference ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resize", FILTERS)
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("box", BOXES.values(), ids=BOXES)
def test_boxes(rng, box, padding, resize):
    assert_as_reference([noise_image(rng)], [box], padding=padding, resize=resize)


@pytest.mark.parametrize("sub", SUBSAMPLINGS.values(), ids=SUBSAMPLINGS)
@pytest.mark.parametrize(("rotation", "mirrored"), ORIENTATIONS)
@pytest.mark.parametrize("hw", [(26, 34), (25, 33), (27, 34), (26, 35), (1, 1), (1, 9), (9, 1)], ids=str)
def test_layouts_sizes_and_orientations(rng, hw, rotation, mirrored, sub):
    image = noise_image(rng, *hw, sub=sub, rotation=rotation, mirrored=mirrored)
    h, w = image.upright_hw
    boxes = [(0, 0, w, h), (w * 0.21, h * 0.13, w * 0.73, h * 0.91), (-4.2, 1.3, w * 0.7, h + 7.4)]
    for resize in FILTERS:
        for padding in PADDINGS:
            assert_as_reference([image], boxes, [0, 0, 0], resize=resize, padding=padding)


@pytest.mark.parametrize("bits", [8, 9, 10, 12, 14, 16])
@pytest.mark.parametrize("full_range", [False, True], ids=["limited", "full"])
@pytest.mark.parametrize("matrix", [*MATRICES, "rgb", "gray"])
def test_colours(rng, matrix, full_range, bits):
    sub = (1, 1) if matrix in ("rgb", "gray") else (2, 2)
    image = noise_image(rng, sub=sub, bits=bits, matrix=matrix, full_range=full_range)
    for padding in PADDINGS:
        assert_as_reference([image], [BOXES["inside"], BOXES["over all edges"]], padding=padding)


@pytest.mark.parametrize(
    ("matrix", "full_range", "samples", "rgb"),
    [
        # Hand-computed, independent of the reference: ITU-R BT.601 and BT.709 in 8 bits.
        ("bt601", False, (16, 128, 128), (0, 0, 0)),
        ("bt601", False, (235, 128, 128), (255, 255, 255)),
        ("bt601", False, (81, 90, 240), (254, 0, 0)),  # red, as rounded by a converter
        ("bt601", False, (0, 128, 128), (0, 0, 0)),  # below black: clamped
        ("bt601", False, (255, 128, 128), (255, 255, 255)),  # above white: clamped
        ("bt709", False, (63, 102, 240), (255, 1, 0)),
        ("bt601", True, (76, 85, 255), (254, 0, 0)),
        ("bt601", True, (255, 128, 128), (255, 255, 255)),
        ("ycgco", True, (128, 255, 128), (1, 255, 1)),
        ("rgb", True, (10, 20, 30), (10, 20, 30)),
        ("gray", True, (77,), (77, 77, 77)),
        ("gray", False, (16,), (0, 0, 0)),
        ("gray", False, (235,), (255, 255, 255)),
    ],
)
def test_known_colours(matrix, full_range, samples, rgb):
    image = Image(tuple(np.full((4, 4), s, np.uint8) for s in samples), 8, matrix, full_range, (1, 1))
    got = run([image], [(0, 0, 4, 4)], out_hw=(1, 1))[0, :, 0, 0]
    np.testing.assert_allclose(got, rgb, rtol=0, atol=1.0)  # the samples are rounded to whole numbers


def test_interleaved_chroma_as_strided_views(rng):
    luma = rng.integers(0, 256, (26, 34), dtype=np.uint8)
    nv12 = rng.integers(0, 256, (13, 34), dtype=np.uint8)
    image = Image((luma, nv12[:, 0::2], nv12[:, 1::2]), subsampling_xy=(2, 2))
    assert_as_reference([image], list(BOXES.values()), [0] * len(BOXES))
    p010 = rng.integers(0, 1024, (13, 34), dtype=np.uint16) << 6
    luma = rng.integers(0, 1024, (26, 34), dtype=np.uint16) << 6
    for rotation in (0, 90):
        image = Image((luma, p010[:, 0::2], p010[:, 1::2]), 16, "bt2020", False, (2, 2), rotation)
        assert_as_reference([image], list(BOXES.values()), [0] * len(BOXES))


def test_msb_aligned_samples_equal_their_lsb_form(rng):
    lsb = noise_image(rng, bits=10)
    msb = dataclasses.replace(lsb, components=tuple(c << 6 for c in lsb.components), bit_depth=16)
    boxes = list(BOXES.values())
    np.testing.assert_allclose(run([lsb], boxes), run([msb], boxes), rtol=0, atol=TOLERANCE["crop_resize", "float32"])


def test_memory_layouts(rng):
    image = noise_image(rng)
    boxes = list(BOXES.values())
    want = run([image], boxes)

    def padded(plane):  # decoders align rows
        wide = np.full((plane.shape[0], plane.shape[1] + 13), 255, np.uint8)
        wide[:, : plane.shape[1]] = plane
        return wide[:, : plane.shape[1]]

    def read_only(plane):
        plane = plane.copy()
        plane.setflags(write=False)
        return plane

    same = {
        "padded rows": padded,
        "read-only": read_only,
        "from bytes": lambda p: np.frombuffer(p.tobytes(), np.uint8).reshape(p.shape),
        "rows upside down": lambda p: p[::-1].copy()[::-1],
        "columns the wrong way round": lambda p: p[:, ::-1].copy()[:, ::-1],
        "both": lambda p: p[::-1, ::-1].copy()[::-1, ::-1],
        "column-major": np.asfortranarray,
        "every second sample": lambda p: np.repeat(p, 2, axis=1)[:, ::2],
    }
    for name, layout in same.items():
        got = run([dataclasses.replace(image, components=tuple(map(layout, image.components)))], boxes)
        tolerance = TOLERANCE["crop_resize", "float32"]
        np.testing.assert_allclose(got, want, rtol=0, atol=tolerance, err_msg=name)


def test_broadcast_planes():
    flat = Image(tuple(np.broadcast_to(np.uint8(v), (6, 8)) for v in (200, 100, 50)), 8, "rgb", True)
    np.testing.assert_allclose(
        run([flat], [(1, 1, 5, 5)], out_hw=(2, 2))[0, :, 1, 1], (200, 100, 50), rtol=0, atol=1e-3
    )


def test_the_last_column_and_row_are_read_without_touching_what_lies_behind(rng):
    whole = rng.integers(0, 256, (40, 40), dtype=np.uint8)
    view = whole[:20, :20]
    boxes = [(10, 10, 20, 20), (18, 18, 21, 21), (15.2, 15.1, 40, 40)]
    before = run([Image((view,), matrix="gray", full_range=True)], boxes)
    whole[20:] = 255 - whole[20:]
    whole[:20, 20:] = 255 - whole[:20, 20:]
    after = run([Image((view,), matrix="gray", full_range=True)], boxes)
    np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("out_hw", [(1, 1), (1, 5), (5, 1), (3, 64), (40, 3), (64, 64)], ids=str)
@pytest.mark.parametrize("resize", FILTERS)
def test_output_sizes(rng, out_hw, resize):
    images = [noise_image(rng), noise_image(rng, rotation=90)]
    assert_as_reference(images, [BOXES["inside"], BOXES["whole"]], [0, 1], out_hw=out_hw, resize=resize)


@pytest.mark.parametrize("resize", FILTERS)
def test_far_from_the_origin_of_a_large_picture(rng, resize):
    image = noise_image(rng, 64, 4000, rotation=270)  # upright: 64 x 4000
    boxes = [(3.2, 3900.3, 60.7, 3990.1), (3.2, 3999.1, 4.7, 4001.3)]
    assert_as_reference([image], boxes, [0, 0], resize=resize, op="crop_resize_far")


def test_mixed_images_in_one_call(rng):
    images = [
        noise_image(rng),
        noise_image(rng, 9, 51, sub=(1, 1), bits=10, matrix="bt709"),
        noise_image(rng, 40, 12, sub=(1, 1), matrix="gray", full_range=True, rotation=90),
        Image.from_rgb(rng.integers(0, 256, (17, 23, 3), dtype=np.uint8)),
        noise_image(rng, 25, 33, sub=(4, 1), rotation=180),
    ]
    index = [4, 0, 2, 2, 1, 3, 0]
    boxes = [BOXES["inside"], BOXES["whole"], (0, 0, 9, 9), (3, 3, 8, 30), (1, 1, 4, 4), (2, 2, 20, 9), (-3, 1, 9, 9)]
    assert_as_reference(images, boxes, index)


def test_float16(rng):
    images = [noise_image(rng)]
    assert_as_reference(images, list(BOXES.values()), [0] * len(BOXES), dtype="float16")


@pytest.mark.parametrize("std", [1.0, 0.2, 1e-3, 1e-5, 30.0, 4e4, 1e6, 1e9])
def test_float16_rounds_as_numpy_does(rng, std):
    # From overflow (std 1e-5) over normal numbers to subnormals and zero; both signs.
    image = noise_image(rng)
    options = {"mean": (0.5, 0.5, 0.5), "std": (std, std, std)}
    half = run([image], list(BOXES.values()), options=options, dtype="float16")
    single = run([image], list(BOXES.values()), options=options, dtype="float32")
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(half.view(np.uint16), single.astype(np.float16).view(np.uint16))


def test_normalization(rng):
    image = noise_image(rng)
    boxes = np.array(list(BOXES.values()), np.float32)
    index = np.zeros(len(boxes), np.int32)
    got = crop_resize([image], boxes, index, out_hw=(6, 5), padding="zero", **NORMALIZED)
    want = reference.crop_resize([image], boxes, index, out_hw=(6, 5), padding="zero", **NORMALIZED)
    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE["normalize", "float32"])


def test_no_boxes(rng):
    for images in ([], [noise_image(rng)]):
        out = run(images, [], out_hw=(8, 6))
        assert out.shape == (0, 3, 8, 6)
        assert out.dtype == np.float32
    assert run([], [], dtype="float16").dtype == np.float16


# -- against other people's code ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("out_hw", [(7, 9), (20, 13), (31, 47), (64, 80), (1, 1)], ids=str)
@pytest.mark.parametrize("resize", FILTERS)
def test_whole_rgb_pictures_equal_torch(rng, out_hw, resize):
    import torch
    import torch.nn.functional as F

    h, w = 31, 47
    rgb = rng.integers(0, 256, (h, w, 3), dtype=np.uint8)
    options = {
        "area": {"mode": "area"},
        "bilinear": {"mode": "bilinear", "align_corners": False, "antialias": False},
        "triangle": {"mode": "bilinear", "align_corners": False, "antialias": True},
    }
    want = F.interpolate(torch.from_numpy(rgb).permute(2, 0, 1)[None].double(), out_hw, **options[resize]).numpy()
    got = run([Image.from_rgb(rgb)], [(0, 0, w, h)], out_hw=out_hw, resize=resize)
    if resize == "triangle":
        # At the rim torch (and PIL) drop the part of the tent that leaves the picture; `edge` repeats its pixels.
        inside = np.ix_([0], range(3), *(fully_inside(n, out) for n, out in zip((h, w), out_hw, strict=True)))
        assert out_hw == (1, 1) or got[inside].size > 0
        got, want = got[inside], want[inside]
    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE["crop_resize_torch", "float32"])


def fully_inside(n: int, out: int) -> list[int]:
    """The output pixels whose tent does not leave an axis of n pixels."""
    reach = max(1.0, n / out)
    return [i for i in range(out) if (i + 0.5) * n / out >= reach and (i + 0.5) * n / out <= n - reach]


def test_area_equals_torch_on_boxes_of_whole_pixels(rng):
    import torch
    import torch.nn.functional as F

    rgb = rng.integers(0, 256, (31, 47, 3), dtype=np.uint8)
    for x1, y1, x2, y2 in [(3, 4, 20, 29), (0, 0, 5, 5), (46, 30, 47, 31)]:
        part = torch.from_numpy(rgb[y1:y2, x1:x2].copy()).permute(2, 0, 1)[None].double()
        got = run([Image.from_rgb(rgb)], [(x1, y1, x2, y2)], out_hw=(6, 6), resize="area")
        want = F.interpolate(part, (6, 6), mode="area").numpy()
        np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE["crop_resize_torch", "float32"])


def swscale_frame(rgb, pixel_format, colorspace, full_range):
    """RGB -> a frame of another format, tagged with its matrix and range, by FFmpeg's swscale."""
    import av
    from av.video.reformatter import ColorRange, Colorspace

    name = {"bt601": Colorspace.ITU601, "bt709": Colorspace.ITU709}[colorspace]
    color_range = ColorRange.JPEG if full_range else ColorRange.MPEG
    frame = av.VideoFrame.from_ndarray(rgb, format="rgb24").reformat(
        format=pixel_format, dst_colorspace=name, dst_color_range=color_range
    )
    frame.colorspace = name
    frame.color_range = color_range
    return frame, frame.reformat(format="rgb24", src_colorspace=name, src_color_range=color_range).to_ndarray()


@pytest.mark.parametrize(
    ("pixel_format", "colorspace", "full_range"),
    [
        ("yuv420p", "bt601", False),
        ("yuv420p", "bt709", False),
        ("yuv420p", "bt601", True),
        ("yuv422p", "bt601", False),
        ("yuv444p", "bt709", False),
        ("yuv420p10le", "bt709", False),
        ("gbrp", "bt601", True),
    ],
)
@pytest.mark.parametrize("box", [(150, 40, 300, 220), (100, 10, 420, 330), (180, 70, 240, 150)], ids=str)
def test_as_swscale_and_pil_see_it(astronaut, pixel_format, colorspace, full_range, box):
    """The usual way, frame -> RGB -> PIL resize, which the training sets of this field were made with."""
    from PIL import Image as PilImage

    from dfengine.stages.decode.cpu import to_image

    frame, rgb = swscale_frame(astronaut, pixel_format, colorspace, full_range)
    want = PilImage.fromarray(rgb).resize((112, 96), PilImage.Resampling.BILINEAR, box=box)
    got = run([to_image(frame)], [box], out_hw=(96, 112))[0].transpose(1, 2, 0)
    difference = np.abs(got - np.asarray(want, np.float32))
    kind = "exact" if pixel_format in ("yuv444p", "gbrp") else "subsampled"
    assert difference.mean() < TOLERANCE["crop_resize_swscale_mean", kind]
    assert np.percentile(difference, 99.9) < TOLERANCE["crop_resize_swscale_p999", kind]


# -- invariances -------------------------------------------------------------------------------------------------------


@pytest.fixture
def crowd(rng):
    """Pictures, boxes and their index: enough to go round four threads unevenly."""
    images = [noise_image(rng), noise_image(rng, 61, 33, rotation=90), noise_image(rng, 30, 40, sub=(1, 1), bits=10)]
    boxes = rng.uniform(-10, 40, (23, 4)).astype(np.float32)
    boxes[:, 2:] = boxes[:, :2] + rng.uniform(0.5, 40, (23, 2)).astype(np.float32)
    return images, boxes, rng.integers(0, 3, 23).astype(np.int32)


@pytest.mark.parametrize("resize", FILTERS)
@pytest.mark.parametrize("count", [1, 2, 3, 23])
def test_threads_change_nothing(crowd, count, resize):
    images, boxes, index = crowd
    want = run(images, boxes[:count], index[:count], out_hw=(37, 29), resize=resize, padding="zero")
    for threads in (2, 4, 64):
        got = run(images, boxes[:count], index[:count], out_hw=(37, 29), resize=resize, padding="zero", threads=threads)
        np.testing.assert_array_equal(got, want)


def test_more_threads_than_rows(rng):
    image = noise_image(rng)
    want = run([image], [BOXES["inside"]], out_hw=(1, 3))
    np.testing.assert_array_equal(run([image], [BOXES["inside"]], out_hw=(1, 3), threads=16), want)


def test_the_other_boxes_change_nothing(crowd, rng):
    images, boxes, index = crowd
    want = run(images, boxes, index, threads=2)
    for n in range(len(boxes)):
        np.testing.assert_array_equal(run(images, boxes[n : n + 1], index[n : n + 1])[0], want[n])
    order = rng.permutation(len(boxes))
    np.testing.assert_array_equal(run(images, boxes[order], index[order], threads=2), want[order])
    np.testing.assert_array_equal(run(images[::-1], boxes, 2 - index), want)


@pytest.mark.parametrize("resize", FILTERS)
@pytest.mark.parametrize(("rotation", "mirrored"), ORIENTATIONS[1:])
def test_a_tagged_orientation_equals_a_turned_picture(rng, rotation, mirrored, resize):
    rgb = rng.integers(0, 256, (26, 34, 3), dtype=np.uint8)
    tagged = dataclasses.replace(Image.from_rgb(rgb), rotation=rotation, mirrored=mirrored)
    turned = Image.from_rgb(np.ascontiguousarray(np.rot90(rgb[:, ::-1] if mirrored else rgb, -rotation // 90)))
    assert tagged.upright_hw == turned.upright_hw
    boxes = list(BOXES.values())
    tolerance = TOLERANCE["crop_resize", "float32"]
    for padding in PADDINGS:
        got, want = (run([i], boxes, resize=resize, padding=padding) for i in (tagged, turned))
        np.testing.assert_allclose(got, want, rtol=0, atol=tolerance)


@pytest.mark.parametrize("resize", FILTERS)
@pytest.mark.parametrize(("rotation", "mirrored"), ORIENTATIONS)
@pytest.mark.parametrize("pixel_aspect", [2.0, 0.5, 0.25])
def test_boxes_are_in_square_pixels(rng, pixel_aspect, rotation, mirrored, resize):
    plain = noise_image(rng, sub=(1, 1), rotation=rotation, mirrored=mirrored)
    image = dataclasses.replace(plain, pixel_aspect=pixel_aspect)
    (h, w), (square_h, square_w) = plain.upright_hw, image.upright_hw
    assert (square_h * square_w) == h * w * max(pixel_aspect, 1 / pixel_aspect)
    boxes = np.float32([(0, 0, w, h), (5, 4, 20, 19), (-6, 3, 11, 20)])
    stretched = boxes * np.float32([square_w / w, square_h / h] * 2)
    for padding in PADDINGS:
        options = {"resize": resize, "padding": padding}
        got, want = run([image], stretched, **options), run([plain], boxes, **options)
        np.testing.assert_array_equal(got, want)
    if resize == "area":  # whole coded pixels, at least one
        assert np.isfinite(run([image], [(7, 9, 8, 10)], resize=resize)).all()


@pytest.mark.parametrize("transfer", ["pq", "hlg"])
@pytest.mark.parametrize("bits", [8, 10, 16])
def test_hdr_is_mapped_to_sdr(rng, transfer, bits):
    image = dataclasses.replace(noise_image(rng, bits=bits, matrix="bt2020"), transfer=transfer)
    for padding in PADDINGS:
        boxes = [BOXES["inside"], BOXES["over all edges"]]
        assert_as_reference([image], boxes, padding=padding, op="crop_resize_hdr")


@pytest.mark.parametrize(("transfer", "white"), [("pq", 0.5807), ("hlg", 0.75)])
def test_diffuse_white_of_hdr_is_white(transfer, white):
    """ITU-R BT.2408, table 1: 203 cd/m2 are 58 % of PQ and 75 % of HLG."""
    levels = [0, white / 2, white, 1]
    images = [
        Image(tuple(np.full((4, 4), round(65535 * v), np.uint16) for _ in range(3)), 16, "rgb", True, transfer=transfer)
        for v in levels
    ]
    got = run(images, [(0, 0, 4, 4)] * 4, range(4), out_hw=(1, 1))[:, :, 0, 0]
    np.testing.assert_allclose(got[0], 0, atol=1e-3)
    np.testing.assert_allclose(got[2], 255, atol=0.5)
    np.testing.assert_allclose(got[3], 255, atol=1e-3)
    assert np.all((got[1] > 50) & (got[1] < 160))


def test_the_inputs_are_not_written_to(crowd):
    images, boxes, index = crowd
    before = [c.copy() for i in images for c in i.components], boxes.copy(), index.copy()
    run(images, boxes, index, threads=2)
    for old, new in zip(before[0], [c for i in images for c in i.components], strict=True):
        np.testing.assert_array_equal(old, new)
    np.testing.assert_array_equal(before[1], boxes)
    np.testing.assert_array_equal(before[2], index)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_gil_is_released(rng, threads):
    # With so long a switch interval another Python thread runs only if this one lets go of the GIL. The other
    # thread must still be woken by the system while the call lasts (some 50 ms): a few tries make that certain.
    image = Image.from_rgb(rng.integers(0, 256, (512, 512, 3), dtype=np.uint8))
    boxes = np.tile(np.float32([0, 0, 512, 512]), (24, 1))
    interval = sys.getswitchinterval()
    progress = 0
    for _ in range(10):
        go = threading.Event()
        counter = [0]

        def count(go=go, counter=counter):
            go.wait()
            counter[0] += 1

        other = threading.Thread(target=count)
        other.start()
        sys.setswitchinterval(1000)
        try:
            go.set()
            before = counter[0]
            run([image], boxes, out_hw=(256, 256), threads=threads)
            progress = counter[0] - before
        finally:
            sys.setswitchinterval(interval)
            go.set()
            other.join()
        if progress:
            break
    assert progress == 1


def test_calls_from_several_threads(crowd):
    images, boxes, index = crowd
    want = run(images, boxes, index)
    results = [None] * 4

    def work(i):
        results[i] = [run(images, boxes, index, threads=1 + i % 2) for _ in range(5)]

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for result in results:
        for got in result:
            np.testing.assert_array_equal(got, want)


# -- errors ------------------------------------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out_hw": (0, 5)}, r"out_hw must be within 1\.\.16384, got \(0, 5\)"),
        ({"out_hw": (5, -1)}, r"out_hw must be within 1\.\.16384, got \(5, -1\)"),
        ({"out_hw": (5, 16385)}, r"out_hw must be within 1\.\.16384, got \(5, 16385\)"),
        ({"std": (1, 0, 1)}, r"std must be positive \(at least 1e-6\), got 0"),
        ({"std": (1, -1, 1)}, r"std must be positive \(at least 1e-6\), got -1"),
        ({"std": (1, 1, NAN)}, "std must be positive"),
        ({"std": (1, 1, INF)}, "std must be positive"),
        ({"mean": (NAN, 0, 0)}, "mean must be finite"),
        ({"mean": (0, INF, 0)}, "mean must be finite"),
        ({"resize": "cubic"}, "resize must be one of triangle, area, bilinear; got 'cubic'"),
        ({"padding": "mirror"}, "padding must be one of edge, zero; got 'mirror'"),
        ({"dtype": "float64"}, "dtype must be one of float32, float16; got 'float64'"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"threads": -3}, "threads must be at least 1, got -3"),
        ({"boxes": [(0, 0, 4, 4), (NAN, 0, 4, 4)]}, r"box 1 has a coordinate that is not finite or beyond 2\^20: nan"),
        ({"boxes": [(0, 0, INF, 4)]}, r"box 0 has a coordinate that is not finite or beyond 2\^20: inf"),
        ({"boxes": [(0, -2e6, 4, 4)]}, r"box 0 has a coordinate that is not finite or beyond 2\^20: -2000000"),
        ({"boxes": [(5, 0, 5, 4)]}, r"box 0 is empty: xyxy \(5\.0+, 0\.0+, 5\.0+, 4\.0+\)"),
        ({"boxes": [(5, 4, 9, 2)]}, "box 0 is empty"),
        ({"index": [1]}, "box 0 refers to image 1, but there are 1 images"),
        ({"index": [-1]}, "box 0 refers to image -1, but there are 1 images"),
        ({"images": []}, "box 0 refers to image 0, but there are 0 images"),
        ({"index": [0, 0]}, r"image_index must have shape \(N,\).*there are 1 boxes and 2 entries"),
    ],
)
def test_bad_calls(rng, change, message):
    call = {"images": [noise_image(rng)], "boxes": [(0, 0, 4, 4)], "index": None} | change
    options = {name: call.pop(name, default) for name, default in PLAIN.items()}
    images, boxes, index = call.pop("images"), call.pop("boxes"), call.pop("index")
    if index is None:
        index = [0] * len(boxes)
    with pytest.raises(ValueError, match=message):
        run(images, boxes, index, options=options, **call)


@pytest.mark.parametrize("shape", [(4,), (2, 5), (0,), (2, 2, 4)], ids=str)
def test_bad_shape_of_boxes(rng, shape):
    with pytest.raises(ValueError, match=r"boxes must have shape \(N, 4\)"):
        crop_resize([noise_image(rng)], np.ones(shape, np.float32), np.zeros(1, np.int32), out_hw=(2, 2), **PLAIN)


def planes(*shapes, dtype=np.uint8):
    return tuple(np.zeros(shape, dtype) for shape in shapes)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Image(()), "an image has 1 or 3 components, got 0"),
        (Image(planes((4, 4), (4, 4))), "an image has 1 or 3 components, got 2"),
        (Image(planes((4, 4), (4, 4), (4, 4), (4, 4))), "an image has 1 or 3 components, got 4"),
        (Image(planes((4, 4), (4, 4), (4, 4), dtype=np.float32)), "component 0 must be uint8 or uint16, got float32"),
        (Image(planes((4, 4), dtype=np.int16), matrix="gray"), "component 0 must be uint8 or uint16, got int16"),
        (Image(planes((4, 4), dtype=">u2"), matrix="gray"), "component 0 must be uint8 or uint16, got >u2"),
        (
            Image((*planes((4, 4)), *planes((4, 4), (4, 4), dtype=np.uint16))),
            "all components of an image must have one dtype",
        ),
        (Image(planes((4, 0)), matrix="gray"), r"component 0 must be a non-empty \(H, W\) array"),
        (Image(planes((4,)), matrix="gray"), r"component 0 must be a non-empty \(H, W\) array"),
        (Image(planes((4, 4, 3)), matrix="gray"), r"component 0 must be a non-empty \(H, W\) array"),
        (
            Image(planes((5, 7), (2, 4), (3, 4)), subsampling_xy=(2, 2)),
            r"component 1 has shape \(2, 4\), but subsampling_xy asks for \(3, 4\)",
        ),
        (
            Image(planes((5, 7), (3, 4), (3, 3)), subsampling_xy=(2, 2)),
            r"component 2 has shape \(3, 3\), but subsampling_xy asks for \(3, 4\)",
        ),
        (Image(planes((4, 4), (4, 4), (4, 4)), subsampling_xy=(0, 1)), r"subsampling_xy must be at least \(1, 1\)"),
        (Image(planes((4, 4), (4, 4), (4, 4)), subsampling_xy=(1, -2)), r"subsampling_xy must be at least \(1, 1\)"),
        (Image(planes((4, 4), (4, 4), (4, 4)), rotation=45), "rotation must be 0, 90, 180 or 270 degrees .* got 45"),
        (Image(planes((4, 4), (4, 4), (4, 4)), rotation=-90), "rotation must be 0, 90, 180 or 270 degrees .* got -90"),
        (Image(planes((4, 4), (4, 4), (4, 4)), matrix="gray"), "matrix 'gray' goes with one component, and only it"),
        (Image(planes((4, 4))), "matrix 'gray' goes with one component, and only it"),
        (
            Image(planes((4, 4), (4, 4), (4, 4)), matrix="bt470"),
            "matrix must be one of rgb, gray, bt601, .* got 'bt470'",
        ),
        (Image(planes((4, 4), (4, 4), (4, 4)), bit_depth=7), "bit_depth must be 8 to 16, got 7"),
        (Image(planes((4, 4), (4, 4), (4, 4), dtype=np.uint16), bit_depth=17), "bit_depth must be 8 to 16, got 17"),
        (Image(planes((4, 4), (4, 4), (4, 4)), bit_depth=10), "bit_depth 10 does not fit the samples, which are uint8"),
    ],
)
def test_bad_images(image, message):
    with pytest.raises(ValueError, match=message):
        run([image], [(0, 0, 4, 4)], out_hw=(2, 2))


def test_a_component_that_is_no_array():
    # In a process of its own: such a mistake must not be able to end the caller's.
    code = (
        "from dfengine.stages._kernels import crop_resize; from dfengine.types import Image; import numpy as np\n"
        "try:\n"
        "    crop_resize([Image(([[1, 2], [3, 4]],), matrix='gray')], np.ones((0, 4), np.float32),\n"
        "                np.zeros(0, np.int32), out_hw=(2, 2), mean=(0, 0, 0), std=(1, 1, 1))\n"
        "except (TypeError, ValueError) as error:\n"
        "    print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "component 0 must be a NumPy array" in result.stdout


@pytest.mark.parametrize(
    ("boxes", "index"),
    [
        (np.zeros((1, 4), np.float64), np.zeros(1, np.int32)),
        (np.zeros((1, 4), np.float32), np.zeros(1, np.int64)),
        (np.zeros((1, 4), np.float32), np.zeros(1, np.float32)),
    ],
)
def test_arrays_of_other_types_are_not_converted_silently(rng, boxes, index):
    with pytest.raises(TypeError, match="incompatible function arguments"):
        crop_resize([noise_image(rng)], boxes, index, out_hw=(2, 2), **PLAIN)


def test_mean_and_std_have_three_entries(rng):
    boxes, index = np.float32([[0, 0, 4, 4]]), np.zeros(1, np.int32)
    with pytest.raises(TypeError, match="incompatible function arguments"):
        crop_resize([noise_image(rng)], boxes, index, out_hw=(2, 2), mean=(0, 0), std=(1, 1, 1))


# -- the headers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("header", sorted(p.name for p in CSRC.glob("*.h")))
def test_each_header_compiles_alone(header, tmp_path):
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    (tmp_path / "alone.cpp").write_text(f'#include "{header}"\n')
    result = subprocess.run(
        [compiler, "-std=c++17", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", "-I", CSRC, "alone.cpp"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("resize", FILTERS)
def test_a_pyramid_is_the_whole_picture_at_every_size(rng, resize, threads):
    images = [noise_image(rng), noise_image(rng, 41, 57, rotation=90), noise_image(rng, bits=10, sub=(1, 1))]
    sizes = [(20, 25), (9, 7), (1, 1)]
    levels = pyramid(images, sizes, **NORMALIZED, resize=resize, threads=threads)
    boxes = [(0, 0, *reversed(i.upright_hw)) for i in images]
    assert len(levels) == len(sizes)
    for level, hw in zip(levels, sizes, strict=True):
        want = run(images, boxes, range(3), out_hw=hw, options=NORMALIZED, resize=resize)
        np.testing.assert_array_equal(level, want)
        assert level.dtype == np.float32


def test_a_pyramid_of_nothing(rng):
    assert pyramid([noise_image(rng)], [], **PLAIN) == []
    assert [level.shape for level in pyramid([], [(4, 5)], **PLAIN)] == [(0, 3, 4, 5)]


def test_a_pyramid_of_bad_sizes(rng):
    with pytest.raises(ValueError, match=r"out_hw must be within 1\.\.16384, got \(0, 5\)"):
        pyramid([noise_image(rng)], [(4, 5), (0, 5)], **PLAIN)
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        pyramid([noise_image(rng)], [(4, 5)], **PLAIN, threads=0)
