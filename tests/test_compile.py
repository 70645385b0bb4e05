"""Engines compiled for real, by TensorRT for RTX, which needs no GPU for it. They cannot be run here."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from assets import write_bundle
from networks import CLIPS, make_spec

from dfengine.bundle import PACKAGED, Bundle
from dfengine.errors import DeviceError, InferenceError, OptionError
from dfengine.gpu import backends
from dfengine.gpu.spec import GpuPrecision, Profile
from dfengine.gpu.tensorrt import TensorRt, import_tensorrt

pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: no engine can be compiled")


@pytest.fixture(scope="module")
def rtx() -> TensorRt:
    return import_tensorrt("tensorrt_rtx")


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
@pytest.mark.parametrize("name", sorted(f.parent.name for f in PACKAGED.glob("*/bundle.json")))
def test_every_packaged_bundle_compiles(name: str, precision: GpuPrecision, tmp_path: Path) -> None:
    bundle = Bundle.load(name)
    made = backends.compile_bundle(bundle, "tensorrt_rtx", precision=precision, folder=tmp_path)
    members = () if name == "mtcnn" else bundle.members
    assert set(made) == {"mtcnn/pnet", "mtcnn/rnet", "mtcnn/onet"} | {f"{name}/{m.name}" for m in members}
    before = {path: path.stat().st_mtime_ns for path in made.values()}
    assert backends.compile_bundle(bundle, "tensorrt_rtx", precision=precision, folder=tmp_path) == made
    assert {path: path.stat().st_mtime_ns for path in made.values()} == before
    for path in made.values():
        line, _, plan = path.read_bytes().partition(b"\n")
        assert json.loads(line)["key"]["precision"] == precision
        assert len(plan) > 100_000


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
@pytest.mark.parametrize("name", CLIPS)
def test_clip_and_audio_members_compile(rtx: TensorRt, name: str, precision: str, tmp_path: Path) -> None:
    assert rtx.build(make_spec(name, tmp_path, max_batch=4, precision=precision))


@pytest.mark.parametrize(
    ("onnx", "profiles", "message"),
    [
        (b"junk", [Profile.fixed(3, 24, 24)], r"network x cannot be read by tensorrt_rtx \(.*parse the ONNX"),
        (None, [], "network x has 1 inputs, its kind has 0"),
        (None, [Profile.fixed(3, 23, 24)], r"on tensorrt_rtx: it cannot be compiled \(.*images"),
    ],
    ids=["no ONNX", "other inputs", "other size"],
)
def test_what_cannot_be_compiled(
    rtx: TensorRt, onnx: bytes | None, profiles: list[Profile], message: str, tmp_path: Path
) -> None:
    rnet = make_spec("mtcnn/rnet", tmp_path)
    spec = replace(rnet, name="x", onnx=rnet.onnx if onnx is None else onnx, profiles=tuple(profiles))
    with pytest.raises(InferenceError, match=message):
        rtx.build(spec)


def test_without_a_gpu_an_engine_cannot_be_loaded(rtx: TensorRt, tmp_path: Path) -> None:
    """What it says depends on the machine; that it is no crash does not."""
    plan = rtx.build(make_spec("mtcnn/rnet", tmp_path))
    if rtx.load(plan[:1000], "rnet") is None:
        assert rtx.messages.last.startswith("engine invalid here")


def test_options_that_do_not_exist() -> None:
    with pytest.raises(OptionError, match="backend must be one of tensorrt, tensorrt_rtx; got 'openvino'"):
        backends.compile_bundle(Bundle.load("default"), "openvino")
    with pytest.raises(OptionError, match="precision must be one of fp16, fp32; got 'int8'"):
        backends.compile_bundle(Bundle.load("default"), "tensorrt_rtx", precision="int8")  # type: ignore[arg-type]


def test_tensorrt_needs_the_package() -> None:
    try:
        import tensorrt  # noqa: F401
    except ImportError:
        with pytest.raises(DeviceError, match=r"tensorrt: the package is missing; pip install 'dfengine\[gpu\]'"):
            backends.compile_bundle(Bundle.load("default"), "tensorrt")


def test_the_command(tmp_path: Path) -> None:
    write_bundle(tmp_path / "bundle")
    words = ["compile", "bundle", "--backend", "tensorrt_rtx", "--out", "engines"]
    done = subprocess.run(
        [sys.executable, "-m", "dfengine", *words], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["mtcnn/pnet", "mtcnn/rnet", "mtcnn/onet", "development/mean"]
    assert all(re.search(r"  engines/\S+\.engine  \d+\.\d MB$", line) for line in lines)
    bad = subprocess.run(
        [sys.executable, "-m", "dfengine", *words[:3], "openvino"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert bad.returncode == 2
    assert "backend must be one of" in bad.stderr
