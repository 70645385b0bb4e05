"""What a compiled network is made from: one value, which runtimes build from, and from which an engine's key comes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from dfengine.bundle import Bundle, DetectorSettings, ModelSpec, load_nets
from dfengine.errors import OptionError
from dfengine.gpu.precision import RECIPE, to_float16
from dfengine.runtime.contract import input_shapes

__all__ = ["EngineSpec", "GpuPrecision", "Profile", "Shape", "detector_profiles", "member_profiles"]

GpuPrecision = Literal["fp16", "fp32"]
Shape = tuple[int, ...]

# Largest batches. A member's: 64 crops of 224 px are 19 MB in float16, and GPUs are busy from 32 on. R-Net and O-Net
# get the proposals of 16 frames together; P-Net 8 frames, since its memory is planned for the largest frames.
MAX_BATCH = {"pnet": 8, "rnet": 1024, "onet": 512, "member": 64}

# Frames are at most this much longer than high, or the other way round: cinema has 2.39, two screens side by side 3.56.
# Beyond it P-Net refuses them on a GPU.
_LONGEST_ASPECT = 4.0


@dataclass(frozen=True)
class Profile:
    """What shapes one input of a network will have, without the batch: the smallest, the usual and the largest."""

    least: Shape
    usual: Shape
    most: Shape

    @classmethod
    def fixed(cls, *shape: int) -> Profile:
        return cls(shape, shape, shape)

    def holds(self, shape: Shape) -> bool:
        limits = zip(self.least, shape, self.most, strict=False)
        return len(shape) == len(self.least) and all(low <= n <= high for low, n, high in limits)


@dataclass(frozen=True)
class EngineSpec:
    """All that an engine depends on, but for the runtime and the GPU that it is compiled with and for.

    ``name``, "bundle/network", is for messages and the names of files. ``onnx``: the network as the bundle holds it,
    in float32. ``profiles``: of its inputs, in order. ``max_batch``: rows that go through it together, at most.
    Raises OptionError for a precision that does not exist.
    """

    name: str
    onnx: bytes
    profiles: tuple[Profile, ...]
    max_batch: int
    precision: GpuPrecision

    def __post_init__(self) -> None:
        if self.precision not in get_args(GpuPrecision):
            raise OptionError(f"precision must be one of {', '.join(get_args(GpuPrecision))}; got {self.precision!r}")

    @classmethod
    def of_member(
        cls, bundle: Bundle, member: str, *, precision: GpuPrecision, detector: DetectorSettings | None = None
    ) -> EngineSpec:
        """The engine of a network of a bundle. ``detector``: how P-, R- and O-Net will be used."""
        model = bundle.member(member)
        if detector is not None:
            profiles, max_batch = detector_profiles(model, detector), MAX_BATCH[model.name]
        else:
            profiles, max_batch = member_profiles(model), max(1, MAX_BATCH["member"] // model.clip_frames)
        return cls(f"{bundle.name}/{member}", bundle.onnx_bytes(model), profiles, max_batch, precision)

    @classmethod
    def all_of(cls, bundle: Bundle, *, precision: GpuPrecision) -> list[EngineSpec]:
        """The engines of all networks that scoring with a bundle takes: its detector's, then its members'."""
        detector = load_nets(bundle.detector, bundle.folder) if bundle.scorers else bundle
        of_detector = [
            cls.of_member(detector, m.name, precision=precision, detector=bundle.detector) for m in detector.members
        ]
        members = bundle.members if detector is not bundle else ()
        return of_detector + [cls.of_member(bundle, m.name, precision=precision) for m in members]

    @property
    def dtype(self) -> np.dtype[np.generic]:
        """Of the inputs; outputs are float32."""
        return np.dtype(np.float16 if self.precision == "fp16" else np.float32)

    def graph(self) -> bytes:
        """The network with its precision written into it. Raises DeviceError, InferenceError."""
        return to_float16(self.onnx, self.name) if self.precision == "fp16" else self.onnx

    def key(self, target: Mapping[str, object]) -> dict[str, object]:
        """What tells this engine from all others, as JSON has it. ``target``: the runtime and the GPU.

        The name is not in it, since it decides nothing.
        """
        return {
            **target,
            "onnx": hashlib.sha256(self.onnx).hexdigest(),
            "precision": self.precision,
            "recipe": RECIPE,
            "profiles": [[list(p.least), list(p.usual), list(p.most)] for p in self.profiles],
            "max_batch": self.max_batch,
        }


def member_profiles(spec: ModelSpec) -> tuple[Profile, ...]:
    """The inputs of a member of a bundle."""
    return tuple(Profile.fixed(*shape) for shape in input_shapes(spec))


def detector_profiles(spec: ModelSpec, settings: DetectorSettings) -> tuple[Profile, ...]:
    """The input of P-Net, R-Net or O-Net. P-Net sees frames scaled so that the smallest face has 12 px."""
    if min(spec.crop.input_hw) > 0:
        return (Profile.fixed(3, *spec.crop.input_hw),)
    short = int(12 / settings.min_face_ratio) + 1
    long = int(short * _LONGEST_ASPECT) + 1
    return (Profile((3, 12, 12), (3, short, int(short * 16 / 9)), (3, long, long)),)
