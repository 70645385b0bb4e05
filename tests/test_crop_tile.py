"""The program of the CUDA kernel, run on the CPU, against the CPU version; what a GPU is told; and what nvcc says."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import TOLERANCE
from crop_cases import BOXES, PLAIN, Case, device_cases, interleaved, noise_image

from dfengine.stages import _kernels
from dfengine.types import Image

CSRC = Path(__file__).parents[1] / "csrc"


class OnHost:
    """An array of the host that says it lies on a device."""

    def __init__(self, array: np.ndarray, **changes: object) -> None:
        self.array, self.shape = array, array.shape
        self.__cuda_array_interface__ = {
            "version": 3,
            "shape": array.shape,
            "typestr": array.dtype.str,
            "data": (array.ctypes.data, False),
            "strides": array.strides,
            "stream": None,
        } | changes


def placed(image: Image) -> Image:
    return dataclasses.replace(image, components=tuple(OnHost(c) for c in image.components))


def emulate(images, boxes, index, *, out_hw, dtype="float32", options=PLAIN, **more):
    boxes = np.asarray(boxes, np.float32).reshape(-1, 4)
    out = np.full((len(boxes), 3, *out_hw), np.nan, dtype)
    _kernels.crop_resize_emulated(
        [placed(i) for i in images], boxes, np.asarray(index, np.int32), out=OnHost(out), **options, **more
    )
    return out


def assert_as_cpu(case: Case, dtype: str) -> None:
    boxes, index = np.asarray(case.boxes, np.float32), np.asarray(case.index, np.int32)
    want = _kernels.crop_resize(case.images, boxes, index, out_hw=case.out_hw, **PLAIN, **case.options)
    got = emulate(case.images, boxes, index, out_hw=case.out_hw, dtype=dtype, **case.options)
    tolerance = TOLERANCE[case.op, "float32"] + (TOLERANCE["crop_resize", "float16"] if dtype == "float16" else 0)
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance, err_msg=case.name)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_as_the_cpu_version(rng, dtype):
    for case in device_cases(rng):
        assert_as_cpu(case, dtype)


def test_no_boxes(rng):
    assert emulate([noise_image(rng)], [], [], out_hw=(8, 6)).shape == (0, 3, 8, 6)
    assert emulate([], [], [], out_hw=(8, 6)).shape == (0, 3, 8, 6)


def test_float16_rounds_as_numpy_does(rng):
    image = interleaved(rng, 26, 34)
    for std in (1.0, 1e-5, 4e4, 1e9):  # normal numbers, overflow, subnormals, zero
        call = {"out_hw": (9, 7), "options": {"mean": (0.5, 0.5, 0.5), "std": (std, std, std)}}
        half = emulate([image], list(BOXES.values()), [0] * len(BOXES), dtype="float16", **call)
        single = emulate([image], list(BOXES.values()), [0] * len(BOXES), **call)
        with np.errstate(over="ignore"):
            np.testing.assert_array_equal(half.view(np.uint16), single.astype(np.float16).view(np.uint16))


def test_the_other_boxes_change_nothing(rng):
    """Tiles, chunks and launches differ between these calls."""
    images = [interleaved(rng, 120, 150, pitch=160), noise_image(rng, 61, 33, rotation=90), noise_image(rng, bits=10)]
    boxes = rng.uniform(-10, 40, (700, 4)).astype(np.float32)
    boxes[:, 2:] = boxes[:, :2] + rng.uniform(0.5, 90, (700, 2)).astype(np.float32)
    index = rng.integers(0, 3, 700)
    want = emulate(images, boxes, index, out_hw=(12, 10))
    for n in (0, 1, 650, 699):
        np.testing.assert_array_equal(emulate(images, boxes[n : n + 1], index[n : n + 1], out_hw=(12, 10))[0], want[n])
    np.testing.assert_array_equal(emulate(images[::-1], boxes, 2 - index, out_hw=(12, 10)), want)


def test_vectors_change_nothing(rng):
    """The same picture with rows that can be read 8 bytes at a time, and with rows that cannot."""
    image = interleaved(rng, 60, 80, pitch=96)
    planar = dataclasses.replace(image, components=tuple(np.ascontiguousarray(c) for c in image.components))
    boxes = [(1.2, 3.4, 77, 56), (-5, -6, 90, 70), (20, 20, 40, 40)]
    want = emulate([image], boxes, [0, 0, 0], out_hw=(31, 45))
    for other in (planar, *(shifted(image, (n, n, n)) for n in (1, 2, 3, 5, 7)), shifted(image, (0, 0, 3))):
        np.testing.assert_array_equal(emulate([other], boxes, [0, 0, 0], out_hw=(31, 45)), want)


def shifted(image: Image, by: tuple[int, int, int]) -> Image:
    """A planar copy whose planes begin so many bytes later than they could."""

    def move(plane, by):
        wide = np.zeros((plane.shape[0], plane.shape[1] + 8), np.uint8)
        wide[:, by : by + plane.shape[1]] = plane
        return wide[:, by : by + plane.shape[1]]

    return dataclasses.replace(image, components=tuple(map(move, image.components, by)))


def test_any_strides(rng):
    image = noise_image(rng)
    boxes = list(BOXES.values())
    want = emulate([image], boxes, [0] * len(boxes), out_hw=(9, 7))
    same = {
        "rows upside down": lambda p: p[::-1].copy()[::-1],
        "columns the wrong way round": lambda p: p[:, ::-1].copy()[:, ::-1],
        "column-major": np.asfortranarray,
        "every second sample": lambda p: np.repeat(p, 2, axis=1)[:, ::2],
    }
    for name, layout in same.items():
        other = dataclasses.replace(image, components=tuple(map(layout, image.components)))
        got = emulate([other], boxes, [0] * len(boxes), out_hw=(9, 7))
        np.testing.assert_array_equal(got, want, err_msg=name)
    flat = Image(tuple(np.broadcast_to(np.uint8(v), (6, 8)) for v in (200, 100, 50)), 8, "rgb", True)
    got = emulate([flat], [(1, 1, 5, 5)], [0], out_hw=(2, 2))
    np.testing.assert_allclose(got[0, :, 1, 1], (200, 100, 50), rtol=0, atol=1e-3)


def test_nothing_behind_the_picture_is_read(rng):
    """Not even as a part of 8 bytes that has weight 0: on a GPU that may be another's memory."""
    whole = np.zeros((3 * 64, 64), np.uint8)
    view = whole[64:115, 8:47]  # begins and ends within 8 bytes
    whole[...] = rng.integers(0, 256, whole.shape, dtype=np.uint8)
    picture = view.copy()
    image = Image((view,), matrix="gray", full_range=True)
    boxes = [(10, 10, 39, 51), (38, 50, 40, 52), (15.2, 15.1, 60, 70), (-9, -9, 5, 5)]
    before = emulate([image], boxes, [0] * 4, out_hw=(20, 20))
    whole[...] = 255 - whole
    view[...] = picture
    np.testing.assert_array_equal(emulate([image], boxes, [0] * 4, out_hw=(20, 20)), before)


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (OnHost(np.zeros((1, 3, 4, 4), np.float64)), "out must be float32 or float16, got float64"),
        (OnHost(np.zeros((2, 3, 4, 4), np.float32)), r"out must have shape \(1, 3, H, W\), one .* got \(2, 3, 4, 4\)"),
        (OnHost(np.zeros((1, 4, 4), np.float32)), r"out must have shape \(1, 3, H, W\), .* got \(1, 4, 4\)"),
        (OnHost(np.zeros((1, 3, 4, 8), np.float32)[..., ::2]), "out must be C-contiguous"),
        (OnHost(np.zeros((1, 3, 0, 4), np.float32)), r"out_hw must be within 1\.\.16384, got \(0, 4\)"),
        (OnHost(np.zeros((1, 3, 4, 4), np.float32), data=(1, True)), "out must be writable"),
        (np.zeros((1, 3, 4, 4), np.float32), "out must lie on the device, with __cuda_array_interface__; got ndarray"),
    ],
)  # fmt: skip
def test_bad_outputs(rng, out, message):
    box, index = np.float32([[0, 0, 2, 2]]), np.zeros(1, np.int32)
    with pytest.raises(ValueError, match=message):
        _kernels.crop_resize_emulated([placed(noise_image(rng))], box, index, out=out, **PLAIN)


@pytest.mark.parametrize(
    ("components", "message"),
    [
        ((np.zeros((4, 4), np.uint8),), "component 0 must lie on the device, with __cuda_array_interface__"),
        ((OnHost(np.zeros((4, 4), np.float32)),), "component 0 must be uint8 or uint16, got float32"),
        ((OnHost(np.zeros((4, 0), np.uint8)),), r"component 0 must be a non-empty \(H, W\) array"),
        ((OnHost(np.zeros((4, 4), np.uint16), data=(3, False)),), "image 0: the 16-bit samples .* at odd addresses"),
        ((OnHost(np.zeros((4, 4), np.uint8), strides=(1 << 31, 1)),), "image 0: rows .* are 2147483648 bytes apart"),
    ],
)  # fmt: skip
def test_bad_images(components, message):
    out = OnHost(np.zeros((1, 3, 2, 2), np.float32))
    image = Image(components, matrix="gray", bit_depth=8)
    with pytest.raises(ValueError, match=message):
        _kernels.crop_resize_emulated([image], np.float32([[0, 0, 2, 2]]), np.zeros(1, np.int32), out=out, **PLAIN)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boxes": [(5, 4, 9, 2)]}, "box 0 is empty"),
        ({"index": [1]}, "box 0 refers to image 1, but there are 1 images"),
        ({"index": [0, 0]}, r"image_index must have shape \(N,\).*there are 1 boxes and 2 entries"),
        ({"resize": "cubic"}, "resize must be one of triangle, area, bilinear; got 'cubic'"),
        ({"padding": "mirror"}, "padding must be one of edge, zero; got 'mirror'"),
        ({"options": {"mean": (0, 0, 0), "std": (1, 0, 1)}}, r"std must be positive \(at least 1e-6\), got 0"),
    ],
)
def test_bad_calls_are_refused_as_on_the_cpu(rng, change, message):
    call = {"images": [noise_image(rng)], "boxes": [(0, 0, 4, 4)], "index": [0]} | change
    with pytest.raises(ValueError, match=message):
        emulate(call.pop("images"), call.pop("boxes"), call.pop("index"), out_hw=(2, 2), **call)


def test_without_a_driver_the_launch_says_so(rng):
    if not _kernels.cuda_architectures:
        pytest.skip("compiled without CUDA")
    # Elsewhere than on this machine's GPUs, if it has any.
    code = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "import numpy as np; from test_crop_tile import OnHost, PLAIN, placed, noise_image, _kernels\n"
        "out = OnHost(np.zeros((1, 3, 2, 2), np.float32))\n"
        "image = placed(noise_image(np.random.default_rng(0)))\n"
        "try:\n"
        "    _kernels.crop_resize_cuda([image], np.float32([[0, 0, 4, 4]]), np.zeros(1, np.int32),"
        " out=out, stream=0, **PLAIN)\n"
        "except RuntimeError as error:\n"
        "    print(error)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=CSRC.parent,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert "crop_resize could not be launched on the GPU: " in result.stdout
    assert "`dfengine info`" in result.stdout


# -- nvcc --------------------------------------------------------------------------------------------------------------


def test_the_kernel_compiles_without_warnings_and_spills(tmp_path):
    """For the two architectures that need the most registers; the build itself goes through all architectures."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("there is no nvcc")
    result = subprocess.run(
        [
            nvcc, "-std=c++17", "-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra,-Werror", "-Xptxas", "-v",
            "--threads", "2", "-gencode", "arch=compute_86,code=sm_86", "-gencode", "arch=compute_90,code=sm_90",
            "-c", CSRC / "crop_resize_cuda.cu", "-o", "kernel.o",
        ],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    report = result.stdout + result.stderr
    assert result.returncode == 0, report
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert len(spills) == 8, report  # two dtypes, with HDR and without, two architectures
    assert {spill[1:] for spill in spills} == {("0", "0")}, report
    assert spills.count(("0", "0", "0")) >= 4, report  # SDR's; HDR's goes over a thread's pixels in a loop


def test_the_extension_needs_no_cuda_library():
    """The runtime is linked statically, so that the package can be imported without a driver."""
    ldd = shutil.which("ldd")
    if ldd is None:
        pytest.skip("there is no ldd")
    libraries = subprocess.run([ldd, _kernels.__file__], capture_output=True, text=True, check=True).stdout
    assert "libcuda" not in libraries
