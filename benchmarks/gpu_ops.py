"""The CUDA kernel against the memory of the GPU, and against torchvision's way to the same tensor.

    python -m benchmarks.gpu_ops

256 crops of 400 px from as many NV12 frames of 1080p, as a decoder leaves them, and the levels of the detector's
pyramid. The roofline of a call is the time in which the device copies as many bytes as the call must read and write:
the samples under the boxes once, and the output. torchvision's way: NV12 to RGB for the whole frame in float16, crop,
resize with antialiasing, normalise. Without a GPU: one line, exit code 2.
"""

from __future__ import annotations

import functools
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.harness import save
from dfengine.stages import _kernels
from dfengine.types import Image

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet, as most models of this field have it
HEIGHT, WIDTH = 1080, 1920
CROPS, BOX = 256, 400
LEVEL_FRAMES, LEVEL_SCALES = 16, [0.2223 * 0.709**i for i in range(9)]  # MTCNN's factor; 54 px faces and larger
# Difference allowed before anything is timed, on the scale 0..255: torchvision's chroma is that of the nearest sample.
MAX_MEAN_DIFFERENCE = 2.0
CPU_DIFFERENCE = 0.0625 + 2e-3  # half a step of float16 below 256, and the sums; as in tests/conftest.py
REPEATS, CALLS = 30, 10


def main() -> int:
    try:
        import torch
        import torchvision  # noqa: F401
    except ImportError as error:
        print(f"nothing was measured: {error}", file=sys.stderr)
        return 2
    if not torch.cuda.is_available() or not _kernels.cuda_architectures:
        missing = "torch sees no GPU" if _kernels.cuda_architectures else "dfengine was compiled without CUDA"
        print(f"nothing was measured: {missing}", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    stream = torch.cuda.Stream()
    torch.cuda.set_stream(stream)

    def seconds(call: Callable[[], object]) -> dict[str, float]:
        """Of the device, per call: median, smallest and largest of REPEATS times CALLS calls; ``host_s`` of the host.

        The calls are recorded in a graph first: reading 256 images takes Python longer than the device takes for them.
        """
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        host = time.perf_counter() - started
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(CALLS):
                call()
        graph.replay()
        found = []
        for _ in range(REPEATS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            found.append(start.elapsed_time(end) / 1e3 / CALLS)
        of_device = {"median_s": statistics.median(found), "min_s": min(found), "max_s": max(found)}
        return of_device | {"repeats": REPEATS, "host_s": host}

    def crop(images: list[Image], boxes: Any, out: Any, resize: str) -> None:
        _kernels.crop_resize_cuda(
            images, boxes, np.arange(len(images), dtype=np.int32), out=out, mean=MEAN, std=STD, resize=resize,
            stream=stream.cuda_stream,
        )  # fmt: skip

    def copy_bandwidth(size: int = 1 << 30) -> float:
        source = torch.empty(size, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        return 2 * size / seconds(lambda: target.copy_(source))["median_s"]

    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}: copies at {bandwidth / 1e12:.2f} TB/s, read and written")

    rng = np.random.default_rng(0)
    frames = torch.from_numpy(make_frames(rng)).to(device)
    images = [nv12_image(f) for f in frames]
    corners = rng.integers(0, (WIDTH - BOX, HEIGHT - BOX), (CROPS, 2))
    boxes = np.hstack([corners, corners + BOX]).astype(np.float32)
    rows = []
    for size in (224, 240, 299):
        out = torch.empty((CROPS, 3, size, size), dtype=torch.float16, device=device)
        crop(images, boxes, out, "triangle")
        few = 4
        ours, theirs = out[:few].float().cpu().numpy(), torchvision_way(frames[:few], boxes[:few], size).float()
        scale = 255 * np.array(STD)[:, None, None]
        difference = float((np.abs(ours - theirs.cpu().numpy()) * scale).mean())
        from_cpu = float((np.abs(ours - on_cpu(frames[:few], boxes[:few], size)) * scale).max())
        if difference > MAX_MEAN_DIFFERENCE or from_cpu > CPU_DIFFERENCE:
            raise SystemExit(
                f"{size} px: differs from torchvision by {difference:.2f} of 255 on average, from the CPU by "
                f"{from_cpu:.3f} at most; nothing was timed"
            )
        moved = CROPS * (BOX * BOX * 3 // 2 + 2 * 3 * size * size)
        row = {
            "case": f"{CROPS} crops of {BOX} px to {size} px", "bytes": moved, "roofline_s": moved / bandwidth,
            "mean_difference_of_255": difference, "largest_difference_to_cpu_of_255": from_cpu,
            **{r: seconds(lambda r=r, out=out: crop(images, boxes, out, r)) for r in ("triangle", "area")},
            "torchvision": seconds(lambda size=size: torchvision_way(frames[:32], boxes[:32], size)),
        }  # fmt: skip
        for key in ("median_s", "min_s", "max_s", "host_s"):  # timed on 32 frames: all of them would not fit as RGB
            row["torchvision"][key] *= CROPS / 32
        rows.append(row)
    whole = np.tile(np.float32([0, 0, WIDTH, HEIGHT]), (LEVEL_FRAMES, 1))
    for scale in LEVEL_SCALES:
        hw = int(HEIGHT * scale + 1), int(WIDTH * scale + 1)
        out = torch.empty((LEVEL_FRAMES, 3, *hw), dtype=torch.float16, device=device)
        moved = LEVEL_FRAMES * (HEIGHT * WIDTH * 3 // 2 + 2 * 3 * hw[0] * hw[1])
        took = seconds(lambda out=out: crop(images[:LEVEL_FRAMES], whole, out, "area"))
        name = f"{LEVEL_FRAMES} frames to {hw[0]} x {hw[1]}"
        rows.append({"case": name, "bytes": moved, "roofline_s": moved / bandwidth, "area": took})
    for row in rows:
        text = f"{row['case']:<32} roofline {row['roofline_s'] * 1e6:7.1f} us"
        for key in ("triangle", "area", "torchvision"):
            if key in row:
                row[key]["of_roofline"] = row["roofline_s"] / row[key]["median_s"]
                text += f", {key} {row[key]['median_s'] * 1e6:8.1f} us ({row[key]['of_roofline']:.0%})"
        print(text)
    result = {
        "what": "crop_resize_cuda, NV12 1080p to float16, against the copy roofline and torchvision, device time",
        "gpu": {"name": torch.cuda.get_device_name(), "driver_cuda": torch.version.cuda, "copy_bytes_per_s": bandwidth},
        "rows": rows,
    }
    print("wrote", save("gpu_ops", result).name)
    return 0


def make_frames(rng: np.random.Generator) -> np.ndarray:
    """NV12 frames (CROPS, HEIGHT * 3 / 2, WIDTH): smooth with some noise, all different, as coded video is."""
    ramp = np.linspace(0, 6 * np.pi, WIDTH)[None] + np.linspace(0, 4 * np.pi, HEIGHT)[:, None]
    luma = 128 + 80 * np.sin(ramp) + rng.normal(0, 4, ramp.shape)
    chroma = 128 + 40 * np.cos(ramp[::2, ::2, None] + np.array([0.0, 1.0]))
    frame = np.concatenate([luma, chroma.reshape(HEIGHT // 2, WIDTH)]).astype(np.uint8)
    return np.stack([np.roll(frame, 14 * i, axis=1) for i in range(CROPS)])


def nv12_image(frame: Any) -> Image:
    """Of a NumPy array or a tensor, on whatever device."""
    chroma = frame[HEIGHT:].reshape(HEIGHT // 2, WIDTH // 2, 2)
    return Image((frame[:HEIGHT], chroma[..., 0], chroma[..., 1]), subsampling_xy=(2, 2))


def on_cpu(frames: Any, boxes: np.ndarray, size: int) -> np.ndarray:
    images = [nv12_image(frame) for frame in frames.cpu().numpy()]
    index = np.arange(len(images), dtype=np.int32)
    return _kernels.crop_resize(images, boxes, index, out_hw=(size, size), mean=MEAN, std=STD)


@functools.cache
def constants(device: Any) -> Any:
    """YCbCr to RGB by BT.601, limited range; MEAN and STD. Made once: a graph cannot record a copy from the host."""
    import torch

    matrix = [[1.164384, 0.0, 1.596027], [1.164384, -0.391762, -0.812968], [1.164384, 2.017232, 0.0]]
    made = (torch.tensor(values, device=device, dtype=torch.float16) for values in (matrix, MEAN, STD))
    return tuple(t if t.ndim == 2 else t[:, None, None] for t in made)


def torchvision_way(frames: Any, boxes: np.ndarray, size: int) -> Any:
    """Crop i of frame i: (frames, 3, size, size) float16."""
    import torch
    from torchvision.transforms.v2 import functional as transforms

    matrix, mean, std = constants(frames.device)
    crops = []
    for frame, (x1, y1, x2, y2) in zip(frames, boxes.astype(int), strict=True):
        luma = frame[:HEIGHT].half() - 16
        chroma = frame[HEIGHT:].view(HEIGHT // 2, WIDTH // 2, 2).half() - 128
        chroma = chroma.repeat_interleave(2, 0).repeat_interleave(2, 1)
        rgb = torch.einsum("cj,hwj->chw", matrix, torch.cat([luma[..., None], chroma], 2)).clamp_(0, 255)
        crop = transforms.resize(rgb[:, y1:y2, x1:x2], [size, size], antialias=True)
        crops.append((crop / 255 - mean) / std)
    return torch.stack(crops)


if __name__ == "__main__":
    sys.exit(main())
