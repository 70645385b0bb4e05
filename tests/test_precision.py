"""Float16 written into the graph: types, and what it costs, computed in float16 by torch on the CPU."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from networks import NETWORKS, make_network_onnx, random_inputs, run_float32
from onnx import TensorProto, helper, numpy_helper

from dfengine.bundle import Bundle, DetectorSettings
from dfengine.errors import InferenceError
from dfengine.gpu.precision import to_float16
from dfengine.gpu.torch import to_module
from dfengine.stages.detect import Detector
from dfengine.types import Image


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def types_of(model: onnx.ModelProto) -> tuple[set[int], set[int]]:
    return tuple({v.type.tensor_type.elem_type for v in values} for values in (model.graph.input, model.graph.output))  # type: ignore[return-value]


def run_float16(data: bytes, inputs: list[np.ndarray]) -> list[np.ndarray]:
    with torch.inference_mode():
        y = to_module(data, "test", "cpu")(*(torch.from_numpy(x.astype(np.float16)) for x in inputs))
    return [v.numpy() for v in (y if isinstance(y, tuple | list) else [y])]


@pytest.mark.parametrize("name", NETWORKS)
def test_inputs_are_float16_outputs_float32_and_the_numbers_stay(name: str, tmp_path: Path) -> None:
    """Probabilities of P-, R- and O-Net, boxes in sides of the window, logits."""
    data = make_network_onnx(name, tmp_path)
    half = to_float16(data, name)
    model = onnx.load_model_from_string(half)
    onnx.checker.check_model(model, full_check=True)
    assert types_of(model) == ({TensorProto.FLOAT16}, {TensorProto.FLOAT})
    assert len(half) < 0.75 * len(data)
    inputs = random_inputs(data, rows=3)
    for wanted, got in zip(run_float32(data, inputs), run_float16(half, inputs), strict=True):
        assert got.dtype == np.float32
        assert np.abs(got - wanted).max() <= 0.01 * max(1.0, np.abs(wanted).max())


def graph_of(nodes: list[onnx.NodeProto], constants: dict[str, np.ndarray], outputs: list[str]) -> bytes:
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info(o, TensorProto.FLOAT, ["n", None]) for o in outputs],
        [numpy_helper.from_array(a, name) for name, a in constants.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()


W = np.eye(4, dtype=np.float32)


def kinds(data: bytes) -> list[str]:
    return [n.op_type for n in onnx.load_model_from_string(data).graph.node]


def test_the_last_layer_stays_float32() -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"]), helper.make_node("MatMul", ["y", "w"], ["z"])]
    data = to_float16(graph_of(nodes, {"w": W}, ["z"]), "net")
    assert kinds(data) == ["MatMul", "Cast", "MatMul"]
    stored = {t.name: t.data_type for t in onnx.load_model_from_string(data).graph.initializer}
    assert stored == {"w.float16": TensorProto.FLOAT16, "w.float32": TensorProto.FLOAT}


def test_an_output_inside_the_network_is_float32_too() -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["y"]), helper.make_node("MatMul", ["y", "w"], ["z"]),
        helper.make_node("MatMul", ["z", "w"], ["logit"]),
    ]  # fmt: skip
    data = to_float16(graph_of(nodes, {"w": W}, ["y", "logit"]), "net")
    x = np.array([[1, -2, 3, 0.5]], np.float32)
    y, logit = run_float16(data, [x])
    assert y.dtype == logit.dtype == np.float32
    assert np.array_equal(y, np.maximum(x, 0))
    assert np.array_equal(logit, y)


def test_numbers_that_float16_cannot_hold_stay_float32() -> None:
    nodes = [helper.make_node("Mul", ["x", "big"], ["y"]), helper.make_node("Div", ["y", "big"], ["z"]),
             helper.make_node("MatMul", ["z", "w"], ["m"]), helper.make_node("MatMul", ["m", "w"], ["o"])]  # fmt: skip
    data = to_float16(graph_of(nodes, {"w": W, "big": np.array([1e6], np.float32)}, ["o"]), "net")
    assert np.array_equal(run_float16(data, [np.ones((2, 4))])[0], np.ones((2, 4)))


def test_sums_do_not_overflow() -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"]), helper.make_node("ReduceSum", ["y"], ["s"], keepdims=1),
             helper.make_node("Div", ["s", "n"], ["m"]), helper.make_node("Mul", ["m", "w"], ["o"]),
             helper.make_node("MatMul", ["o", "w"], ["p"])]  # fmt: skip
    data = to_float16(graph_of(nodes, {"w": W, "n": np.array([8e5], np.float32)}, ["p"]), "net")
    x = np.full((2, 4), 6e4)
    assert np.allclose(run_float16(data, [x])[0], np.eye(4) * 0.6, atol=1e-3)


def test_shared_and_hidden_constants() -> None:
    """As exporters write them: a constant in a node, and one that is stored once and named twice."""
    nodes = [
        helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.array([2], np.float32))),
        helper.make_node("Identity", ["w"], ["v"]),
        helper.make_node("Mul", ["x", "c"], ["y"]), helper.make_node("MatMul", ["y", "v"], ["z"]),
        helper.make_node("MatMul", ["z", "v"], ["o"]),
    ]  # fmt: skip
    data = to_float16(graph_of(nodes, {"w": W}, ["o"]), "net")
    assert kinds(data) == ["Mul", "MatMul", "Cast", "MatMul"]
    assert np.array_equal(run_float16(data, [np.ones((1, 4))])[0], np.full((1, 4), 2))


def test_branches_are_refused() -> None:
    body = helper.make_graph([helper.make_node("Relu", ["x"], ["r"])], "b", [], [
        helper.make_tensor_value_info("r", TensorProto.FLOAT, ["n", 4])])  # fmt: skip
    nodes = [helper.make_node("If", ["yes"], ["o"], then_branch=body, else_branch=body)]
    data = graph_of(nodes, {"yes": np.array(True)}, ["o"])
    with pytest.raises(InferenceError, match=r"network net holds If, whose branches .* use precision fp32"):
        to_float16(data, "net")


def test_default_bundle_moves_little_on_faces(astronaut: np.ndarray) -> None:
    """Real crops of one face, large and small: the probability moves by a hundredth at most."""
    bundle = Bundle.load("default")
    for member in bundle.members:
        data = bundle.onnx_bytes(member)
        side = member.crop.input_hw[0]
        mean, std = np.array(member.crop.mean), np.array(member.crop.std)
        crops = []
        for half in (50, 60, 75, 90):
            face = torch.from_numpy(astronaut[110 - half : 110 + half, 225 - half : 225 + half] / 255.0)
            resized = torch.nn.functional.interpolate(face.permute(2, 0, 1)[None], (side, side), mode="area")[0].numpy()
            crops.append((resized - mean[:, None, None]) / std[:, None, None])
        x = np.array(crops, np.float32)
        (wanted,), (got,) = run_float32(data, [x]), run_float16(to_float16(data, member.name), [x])
        assert np.abs(1 / (1 + np.exp(-wanted)) - 1 / (1 + np.exp(-got))).max() <= 0.01


class HalfSession:
    """A detector's network in float16, computed by torch on the CPU."""

    def __init__(self, name: str) -> None:
        bundle = Bundle.load("mtcnn")
        self.name = name
        self._module = to_module(to_float16(bundle.onnx_bytes(bundle.member(name)), name), name, "cpu")

    def run(self, x: np.ndarray) -> list[np.ndarray]:
        padded = np.zeros((max(1, len(x)), *x.shape[1:]), np.float16)  # as executors do
        padded[: len(x)] = x
        with torch.inference_mode():
            return [np.ascontiguousarray(y.numpy()[: len(x)]) for y in self._module(torch.from_numpy(padded))]


def test_the_detector_finds_the_same_faces(astronaut: np.ndarray) -> None:
    """In frames of several sizes; what moves is below the tolerance of detection between formats of a frame."""
    full, half = Detector(DetectorSettings()), Detector(DetectorSettings())
    half._pnet, half._rnet, half._onet = (HalfSession(name) for name in ("pnet", "rnet", "onet"))
    pictures = [astronaut, astronaut[::2, ::2], astronaut[:320, 60:400], astronaut[:, ::-1]]
    images = [Image.from_rgb(np.ascontiguousarray(p)) for p in pictures]
    a, b = full.detect(images), half.detect(images)
    assert np.array_equal(a.image_index, b.image_index)
    assert len(a.image_index) >= len(images)
    width = (a.xyxy[:, 2] - a.xyxy[:, 0])[:, None]
    assert np.abs(a.xyxy - b.xyxy).max(initial=0) <= (0.02 * width).max()
    assert (np.abs(a.landmarks - b.landmarks) <= 0.02 * width[..., None]).all()
    assert np.abs(a.confidence - b.confidence).max() <= 0.01


def test_what_is_no_onnx_is_refused() -> None:
    with pytest.raises(InferenceError, match=r"network net cannot be read as ONNX \(.+\)"):
        to_float16(b"junk", "net")


@pytest.mark.parametrize("name", ["efficientnet_b0", "legacy_xception"])
def test_backbones_of_others(name: str) -> None:
    """With random weights, so that the last layer says nothing: compared are the features below it."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=16).eval()
    for key, parameter in model.named_parameters():
        if key.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    import io

    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, (torch.zeros(2, 3, 96, 96),), file, input_names=["crops"], output_names=["logit"],
            dynamic_axes={"crops": {0: "batch"}, "logit": {0: "batch"}}, opset_version=17, dynamo=False,
        )  # fmt: skip
    data = file.getvalue()
    x = random_inputs(data, rows=2)
    (wanted,), (got,) = run_float32(data, x), run_float16(to_float16(data, name), x)
    assert np.abs(got - wanted).max() <= 0.02 * np.abs(wanted).max()
