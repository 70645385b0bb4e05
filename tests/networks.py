"""Small networks of every kind that a bundle may hold, as ONNX, and how to run them on the CPU."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import onnx

from dfengine.bundle import PACKAGED, AudioSettings, Bundle, CropSpec, DetectorSettings, ModelSpec
from dfengine.gpu.spec import EngineSpec, Profile, detector_profiles, member_profiles

PACKAGED_NETWORKS = sorted(f"{f.parent.name}/{f.stem}" for f in PACKAGED.glob("*/*.onnx"))
CLIPS = ["lstm", "relu_lstm", "audio"]
NETWORKS = [*PACKAGED_NETWORKS, *CLIPS]


def make_network_onnx(name: str, folder: Path) -> bytes:
    """A packaged network, or a small clip or audio member with random weights."""
    if "/" in name:
        bundle, member = name.split("/")
        loaded = Bundle.load(bundle)
        return loaded.onnx_bytes(loaded.member(member))
    import torch

    from training.models import LstmSettings, ModelSettings, make_network

    lstm = LstmSettings(width=8, activation="relu") if name == "relu_lstm" else LstmSettings(width=8, layers=2)
    settings = ModelSettings(
        backbone="conv_pool", input_hw=(32, 32), clip_frames=4, lstm=lstm, audio_width=8 if name == "audio" else 0,
        audio=AudioSettings(seconds=1.0),
    )  # fmt: skip
    network = make_network(settings, 0).eval()
    inputs = {"crops": torch.zeros(2, 4, 3, 32, 32)}
    if name == "audio":
        inputs["log_mel"] = torch.zeros(2, settings.audio.bands, settings.audio.frames)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network, tuple(inputs.values()), str(folder / "net.onnx"), input_names=list(inputs),
            output_names=["logit"], dynamic_axes={key: {0: "batch"} for key in (*inputs, "logit")}, opset_version=17,
            dynamo=False,
        )  # fmt: skip
    return (folder / "net.onnx").read_bytes()


def profiles_of(name: str) -> tuple[Profile, ...]:
    if "/" in name:
        spec = Bundle.load(name.split("/")[0]).member(name.split("/")[1])
        return detector_profiles(spec, DetectorSettings()) if spec.kind == "detector" else member_profiles(spec)
    kind = "audio" if name == "audio" else "clip"
    spec = ModelSpec(name=name, file="", sha256="", kind=kind, crop=CropSpec(input_hw=(32, 32)), clip_frames=4,
                     audio=AudioSettings(seconds=1.0))  # fmt: skip
    return member_profiles(spec)


def make_spec(name: str, folder: Path, *, max_batch: int = 8, precision: str = "fp32") -> EngineSpec:
    return EngineSpec(name, make_network_onnx(name, folder), profiles_of(name), max_batch, precision)  # type: ignore[arg-type]


def random_inputs(data: bytes, *, rows: int, seed: int = 0) -> list[np.ndarray]:
    """Float32 numbers that float16 can hold. Free sizes are 40."""
    rng = np.random.default_rng(seed)
    shapes = [
        [rows if i == 0 else d.dim_value or 40 for i, d in enumerate(v.type.tensor_type.shape.dim)]
        for v in onnx.load_model_from_string(data).graph.input
    ]
    return [rng.standard_normal(shape).astype(np.float16).astype(np.float32) for shape in shapes]


def run_float32(data: bytes, inputs: list[np.ndarray]) -> list[np.ndarray]:
    """The outputs, from the CPU session that scores."""
    from dfengine.runtime.openvino import OpenVinoSession

    return OpenVinoSession("test", data, threads=1).run(*inputs)
