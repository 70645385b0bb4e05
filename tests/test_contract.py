"""Networks that do not compile, or are not of the kind that the bundle says: refused at the start, by what is wrong."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from assets import NOBODY, write_bundle, write_clip
from onnx import TensorProto, helper

from dfengine.bundle import PACKAGED, AudioSettings, Bundle, CropSpec, ModelSpec
from dfengine.errors import InferenceError, first_line
from dfengine.runtime import CpuDevice
from dfengine.runtime.contract import check_network


def make_onnx(
    nodes: list[onnx.NodeProto],
    shapes: list[list[object]],
    outputs: list[str],
    numbers: dict[str, list[int]] | None = None,
) -> bytes:
    """A graph of inputs x0, x1, ... with these shapes."""
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info(f"x{i}", TensorProto.FLOAT, shape) for i, shape in enumerate(shapes)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [helper.make_tensor(key, TensorProto.INT64, [len(n)], n) for key, n in (numbers or {}).items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()


def mean_of(shape: list[object], *, axes: list[int], count: int = 1) -> bytes:
    nodes = [helper.make_node("ReduceMean", ["x0"], [f"y{i}"], axes=axes, keepdims=0) for i in range(count)]
    return make_onnx(nodes, [shape], [f"y{i}" for i in range(count)])


def bundle_of(folder: Path, data: bytes, **changes: object) -> Bundle:
    (folder / "net.onnx").write_bytes(data)
    sha256 = hashlib.sha256(data).hexdigest()
    spec = ModelSpec(
        **{"name": "net", "file": "net.onnx", "sha256": sha256, "crop": CropSpec(input_hw=(8, 6))} | changes
    )  # type: ignore[arg-type]
    return Bundle(schema_version=1, name="tiny", licence="MIT", members=(spec,), folder=folder)


RELU = helper.make_node("Relu", ["x0"], ["y"])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"junk", "Model can't be parsed"),
        (make_onnx([RELU], [["n", 3, 8, 6]], ["y"])[:30], "Unable to read the model"),
        (make_onnx([helper.make_node("Nonsense", ["x0"], ["y"])], [["n", 3, 8, 6]], ["y"]),
         "No conversion rule found for operations: Nonsense-17"),
        (make_onnx([helper.make_node("MatMul", ["x0", "x0"], ["y"])], [["n", 3, 8, 6]], ["y"]),
         "Incompatible MatMul matrix dimension"),
        (make_onnx([helper.make_node("Relu", ["q"], ["y"])], [["n", 3, 8, 6]], ["y"]), "q node not found in graph"),
    ],
    ids=["text", "cut", "unknown operation", "shapes that do not fit", "unknown value"],
)  # fmt: skip
def test_a_network_that_does_not_compile_says_why(data: bytes, reason: str, tmp_path: Path) -> None:
    with pytest.raises(InferenceError) as error:
        CpuDevice().session(bundle_of(tmp_path, data), "net", threads=1)
    text = error.value.message
    assert text.startswith("network tiny/net cannot be compiled: OpenVINO 20")
    assert text.partition(" says ")[2][1:].startswith(reason)
    assert text.endswith("; export it again, as ONNX of operations that OpenVINO knows")
    assert "core.cpp" not in text
    assert "\n" not in text
    assert error.value.stage == "runtime"


def test_an_error_of_nothing_but_places_is_quoted_as_it_is() -> None:
    assert (
        first_line(RuntimeError("Exception from a.cpp:1:\nCheck 'x' failed at b.cpp:2:\n\n"))
        == "Exception from a.cpp:1:"
    )


@pytest.mark.parametrize(
    ("data", "changes", "message"),
    [
        (mean_of(["n", 3, 9, 9], axes=[1, 2, 3]), {},
         r"network tiny/net has the inputs \(\?, 3, 9, 9\), one of kind 'frame' has \(\?, 3, 8, 6\); export it "),
        (mean_of(["n", 8, 6, 3], axes=[1, 2, 3]), {}, r"has the inputs \(\?, 8, 6, 3\), .* \(\?, 3, 8, 6\); "),
        (mean_of([1, 3, 8, 6], axes=[1, 2, 3]), {}, r"has the inputs \(1, 3, 8, 6\), .* \(\?, 3, 8, 6\); "),
        (mean_of(["n", 3, 8, 6], axes=[1, 2, 3]), {"kind": "clip", "clip_frames": 5},
         r"has the inputs \(\?, 3, 8, 6\), one of kind 'clip' has \(\?, 5, 3, 8, 6\)"),
        (mean_of(["n", 5, 3, 8, 6], axes=[1, 2, 3, 4]), {"kind": "audio", "clip_frames": 5,
                                                         "audio": AudioSettings(seconds=1.0)},
         r"has the inputs \(\?, 5, 3, 8, 6\), one of kind 'audio' has \(\?, 5, 3, 8, 6\) and \(\?, 64, 98\)"),
        (mean_of(["n", 3, 8, 6], axes=[2, 3]), {},
         r"has the outputs \(\?, 3\), one of kind 'frame' has \(\?, 1\); .*correct what bundle.json says of it"),
        (mean_of(["n", 3, 8, 6], axes=[1, 2, 3], count=2), {}, r"has the outputs \(\?\) and \(\?\), .* has \(\?, 1\)"),
        (mean_of(["n", 3, 24, 24], axes=[1, 2, 3], count=2),
         {"name": "rnet", "kind": "detector", "crop": CropSpec(input_hw=(24, 24))},
         r"has the outputs \(\?\) and \(\?\), one of kind 'detector' has \(\?\) and \(\?, 4\)"),
    ],
    ids=["size", "layout", "fixed batch", "no clip", "hears nothing", "more than a logit", "two outputs", "detector"],
)  # fmt: skip
def test_a_network_of_another_kind_is_refused(
    data: bytes, changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    bundle = bundle_of(tmp_path, data, **changes)
    with pytest.raises(InferenceError, match=message):
        CpuDevice().session(bundle, bundle.members[0].name, threads=1)


@pytest.mark.parametrize("outputs", [(None,), (None, 1), (None, 1, 1), (None, None), None])
def test_one_logit_may_lie_in_any_shape_of_one_number(outputs: tuple[int | None, ...] | None) -> None:
    spec = ModelSpec(name="net", file="", sha256="", crop=CropSpec(input_hw=(8, 6)))
    check_network("tiny/net", spec, [(None, 3, None, 6)], [outputs])


@pytest.mark.parametrize("name", sorted(f.parent.name for f in PACKAGED.glob("*/bundle.json")))
def test_packaged_networks_are_of_their_kind(name: str) -> None:
    bundle = Bundle.load(name)
    for member in bundle.members:
        session = CpuDevice().session(bundle, member.name, threads=1)
        assert session.inputs[0] is not None  # type: ignore[attr-defined]


def test_the_command_ends_with_2_and_one_line(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "bundle")
    data = mean_of(["n", 3, 33, 32], axes=[1, 2, 3])
    text = (folder / "bundle.json").read_text().replace(
        hashlib.sha256((folder / "mean.onnx").read_bytes()).hexdigest(), hashlib.sha256(data).hexdigest()
    )  # fmt: skip
    (folder / "bundle.json").write_text(text)
    (folder / "mean.onnx").write_bytes(data)
    command = [sys.executable, "-m", "dfengine", "score", str(write_clip(NOBODY, tmp_path)), "--bundle", str(folder)]
    done = subprocess.run([*command, "--device", "cpu"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "network development/mean has the inputs (?, 3, 33, 32), one of kind 'frame' has (?, 3, 32, 32)" in line
    assert done.stdout == ""
