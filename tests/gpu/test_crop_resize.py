"""The CUDA kernel against the CPU version. tests/test_crop_tile.py runs the same cases where there is no GPU.

Also to be run under compute-sanitizer (memcheck, racecheck, initcheck).
"""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import numpy as np
import pytest
from conftest import TOLERANCE
from crop_cases import BOXES, PLAIN, device_cases, interleaved, noise_image

from dfengine.gpu.array import DeviceArray
from dfengine.gpu.lanes import Gpu, Lane
from dfengine.stages import _kernels
from dfengine.types import Image


def place(lane: Lane, image: Image) -> Image:
    """The picture on the GPU, with the strides it has on the host. Components of one buffer stay in one buffer."""
    uploaded: dict[int, tuple[np.ndarray, DeviceArray]] = {}

    def move(component: np.ndarray) -> DeviceArray:
        root = component
        while isinstance(root.base, np.ndarray):
            root = root.base
        if id(root) not in uploaded:
            uploaded[id(root)] = root, lane.upload(root.reshape(-1).view(np.uint8))
        offset = component.ctypes.data - root.ctypes.data
        memory = uploaded[id(root)][1]
        return memory.view(offset=offset, shape=component.shape, strides=component.strides, dtype=component.dtype)

    return dataclasses.replace(image, components=tuple(move(c) for c in image.components))


def enqueue(lane: Lane, images: list[Image], boxes: Any, index: Any, out: DeviceArray, **options: Any) -> None:
    """Of images that are on the GPU."""
    _kernels.crop_resize_cuda(
        images, np.asarray(boxes, np.float32).reshape(-1, 4), np.asarray(index, np.int32),
        out=out, stream=lane.stream, **({"mean": PLAIN["mean"], "std": PLAIN["std"]} | options),
    )  # fmt: skip


def run(lane: Lane, images: list[Image], boxes: Any, index: Any, *, out_hw: Any, dtype: str, **options: Any) -> Any:
    out = lane.upload(np.full((len(boxes), 3, *out_hw), np.nan, dtype))  # what is not written shows
    enqueue(lane, [place(lane, i) for i in images], boxes, index, out, **options)
    return lane.download(out)


def cpu(images: list[Image], boxes: Any, index: Any, out_hw: tuple[int, int], **options: Any) -> Any:
    boxes, index = np.asarray(boxes, np.float32).reshape(-1, 4), np.asarray(index, np.int32)
    return _kernels.crop_resize(images, boxes, index, out_hw=out_hw, **(PLAIN | options))


@pytest.fixture
def lane(gpu: Gpu) -> Any:
    if not _kernels.cuda_architectures:
        pytest.fail("dfengine was compiled without CUDA: install it again where nvcc is on PATH (DFENGINE_CUDA=ON)")
    with gpu.lane() as lane:
        yield lane


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_as_the_cpu_version(lane: Lane, rng: np.random.Generator, dtype: str) -> None:
    for case in device_cases(rng):
        want = cpu(case.images, case.boxes, case.index, case.out_hw, **case.options)
        got = run(lane, case.images, case.boxes, case.index, out_hw=case.out_hw, dtype=dtype, **case.options)
        tolerance = TOLERANCE[case.op, "float32"] + (TOLERANCE["crop_resize", "float16"] if dtype == "float16" else 0)
        np.testing.assert_allclose(got, want, rtol=0, atol=tolerance, err_msg=case.name)


@pytest.mark.parametrize(("bits", "pitch"), [(8, 2048), (10, 1920 + 64), (12, 1931)], ids=["NV12", "P010", "odd P012"])
def test_frames_as_decoders_leave_them(lane: Lane, rng: np.random.Generator, bits: int, pitch: int) -> None:
    frames = [interleaved(rng, 1080, 1920, bits=bits, pitch=pitch, matrix="bt709") for _ in range(2)]
    boxes = [(500.5, 200.25, 900.5, 600.25), (-100, -50, 400, 450), (1700, 900, 2000, 1200), (0, 0, 1920, 1080)]
    index = [0, 1, 0, 1]
    for out_hw in ((224, 224), (299, 299), (240, 427), (12, 21)):
        want = cpu(frames, boxes, index, out_hw)
        got = run(lane, frames, boxes, index, out_hw=out_hw, dtype="float32")
        np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE["crop_resize", "float32"])


def test_float16_rounds_as_numpy_does(lane: Lane, rng: np.random.Generator) -> None:
    image, boxes, index = interleaved(rng, 26, 34), list(BOXES.values()), [0] * len(BOXES)
    for std in (1.0, 1e-5, 4e4, 1e9):  # normal numbers, overflow, subnormals, zero
        options = {"out_hw": (9, 7), "mean": (0.5, 0.5, 0.5), "std": (std, std, std)}
        half = run(lane, [image], boxes, index, dtype="float16", **options)
        single = run(lane, [image], boxes, index, dtype="float32", **options)
        with np.errstate(over="ignore"):
            np.testing.assert_array_equal(half.view(np.uint16), single.astype(np.float16).view(np.uint16))


def test_the_other_boxes_change_nothing(lane: Lane, rng: np.random.Generator) -> None:
    images = [interleaved(rng, 120, 150, pitch=160), noise_image(rng, 61, 33, rotation=90), noise_image(rng, bits=10)]
    boxes = rng.uniform(-10, 40, (700, 4)).astype(np.float32)
    boxes[:, 2:] = boxes[:, :2] + rng.uniform(0.5, 90, (700, 2)).astype(np.float32)
    index = rng.integers(0, 3, 700)
    call = {"out_hw": (12, 10), "dtype": "float32"}
    want = run(lane, images, boxes, index, **call)
    for n in (0, 1, 650, 699):
        np.testing.assert_array_equal(run(lane, images, boxes[n : n + 1], index[n : n + 1], **call)[0], want[n])
    for _ in range(3):  # and every run is like the one before
        np.testing.assert_array_equal(run(lane, images, boxes, index, **call), want)


def test_two_streams_at_once(gpu: Gpu, lane: Lane, rng: np.random.Generator) -> None:
    """Different matrices, sizes and dtypes in flight together."""
    frames = [interleaved(rng, 540, 960, matrix=m, full_range=m == "bt709") for m in ("bt601", "bt709")]
    boxes = [(10 * i, 5 * i, 10 * i + 400, 5 * i + 400) for i in range(40)]
    index, dtypes, sizes = [0] * len(boxes), ("float32", "float16"), ((224, 224), (160, 96))
    failures: list[BaseException] = []

    def work(i: int) -> None:
        try:
            want = cpu([frames[i]], boxes, index, sizes[i])
            with gpu.lane() as own:
                image = place(own, frames[i])
                outs = [own.empty((len(boxes), 3, *sizes[i]), dtypes[i]) for _ in range(8)]
                for _ in range(10):
                    for out in outs:
                        enqueue(own, [image], boxes, index, out)
                for out in outs:
                    tolerance = TOLERANCE["crop_resize", dtypes[i]]
                    np.testing.assert_allclose(own.download(out), want, rtol=0, atol=tolerance)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]


def test_it_can_be_recorded(lane: Lane, rng: np.random.Generator) -> None:
    """Nothing is waited for and nothing is allocated: either would end the recording."""
    image, boxes, index = interleaved(rng, 120, 160), list(BOXES.values()), [0] * len(BOXES)
    placed, out = place(lane, image), lane.empty((len(boxes), 3, 40, 50), "float16")
    enqueue(lane, [placed], boxes, index, out)  # loads the kernel
    want = lane.download(out)
    lane.copy(lane.upload(np.zeros(out.shape, np.float16)), out)
    graph = lane.capture(lambda: enqueue(lane, [placed], boxes, index, out))
    assert not lane.download(out).any()
    lane.launch(graph)
    np.testing.assert_array_equal(lane.download(out), want)


def test_bad_outputs(lane: Lane, rng: np.random.Generator) -> None:
    image = place(lane, noise_image(rng))
    for out, message in (
        (lane.empty((2, 3, 4, 4), np.float32), r"out must have shape \(1, 3, H, W\), one .* got \(2, 3, 4, 4\)"),
        (lane.empty((1, 3, 4, 4), np.uint8), "out must be float32 or float16, got uint8"),
        (
            lane.empty((1, 3, 4, 8), np.float32).view(shape=(1, 3, 4, 4), strides=(384, 128, 32, 8)),
            "out must be C-contiguous",
        ),
        (lane.empty((1, 3, 0, 4), np.float32), r"out_hw must be within 1\.\.16384, got \(0, 4\)"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            enqueue(lane, [image], [(0, 0, 4, 4)], [0], out)


def test_no_boxes_are_no_launch(lane: Lane, rng: np.random.Generator) -> None:
    enqueue(lane, [place(lane, noise_image(rng))], [], [], lane.empty((0, 3, 4, 4), np.float32))
    enqueue(lane, [], [], [], lane.empty((0, 3, 4, 4), np.float16))
    lane.synchronize()
