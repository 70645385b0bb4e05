"""Makes the demo clip: a public-domain portrait that moves, turns and changes size, encoded as H.264.

    python scripts/make_demo.py build/demo.mp4

The portrait is scikit-image's `astronaut`: Eileen Collins, photographed by NASA, public domain. It is a real face in a
made-up video: whatever the score, it shows that the engine runs, not that it is right.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import av
import numpy as np
from skimage import data, transform

WIDTH, HEIGHT, RATE, SECONDS = 640, 480, 25, 4


def make_frame(portrait: np.ndarray, seconds: float) -> np.ndarray:
    """The portrait at a time: RGB uint8, (HEIGHT, WIDTH, 3)."""
    angle = 0.08 * math.sin(1.7 * seconds)
    scale = 0.9 + 0.08 * math.sin(1.1 * seconds)
    shift = (WIDTH / 2 + 40 * math.sin(0.9 * seconds), HEIGHT / 2 + 15 * math.cos(1.3 * seconds))
    middle = transform.AffineTransform(translation=(-portrait.shape[1] / 2, -portrait.shape[0] / 2))
    place = transform.AffineTransform(scale=scale, rotation=angle, translation=shift)
    warped = transform.warp(portrait, (middle + place).inverse, output_shape=(HEIGHT, WIDTH), mode="edge")
    return np.asarray(np.round(warped * 255), np.uint8)


def main(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    portrait = data.astronaut()
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"crf": "23"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for i in range(RATE * SECONDS):
            frame = av.VideoFrame.from_ndarray(make_frame(portrait, i / RATE), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    print(f"made {path}: {RATE * SECONDS} frames of {WIDTH}x{HEIGHT}, a real face in a made-up video")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
