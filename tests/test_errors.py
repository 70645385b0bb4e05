"""What errors of other packages say, in one line. The texts are theirs."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper

from dfengine.errors import InferenceError, first_line, is_known
from dfengine.runtime.openvino import OpenVinoSession


def network(op: str, *weights_shape: int) -> bytes:
    weights = [helper.make_tensor("w", TensorProto.FLOAT, weights_shape, [0.0] * int(np.prod(weights_shape)))]
    graph = helper.make_graph(
        [helper.make_node(op, ["x", *(["w"] if weights_shape else [])], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        weights if weights_shape else [],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()


@pytest.mark.parametrize(
    ("onnx_bytes", "reason"),
    [
        (network("Relu")[:30], "Unable to read the model. Please check if the model format is supported"),
        (b"\xff" + network("Relu")[1:], "(Unable to read the model|Error during import of ONNX model)"),
        (network("NoSuchOp"), "No conversion rule found for operations: NoSuchOp"),
        (
            network("Conv", 4, 5, 3, 3),
            r"Data batch channel count \(3\) does not match filter input channel count \(5\)",
        ),
    ],
)
def test_openvino_says_what_is_wrong_with_a_network(onnx_bytes: bytes, reason: str) -> None:
    message = rf"^network n cannot be compiled: OpenVINO [\d.]+ says '{reason}"
    with pytest.raises(InferenceError, match=message) as caught:
        OpenVinoSession("n", onnx_bytes, threads=1)
    assert ".cpp" not in caught.value.message


def test_openvino_says_what_is_wrong_with_a_batch() -> None:
    session = OpenVinoSession("n", network("Relu"), threads=1)
    with pytest.raises(
        InferenceError, match=r"^network n failed on a batch .* \(Can't set the input .* incompatible\)$"
    ):
        session.run(np.zeros((1, 4, 8, 8), np.float32))


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "ValueError"),
        ("\n \n", "ValueError"),
        ("one line", "one line"),
        ("\n  two\nlines", "two"),
        ("HandlePictureDecode : \nError code : 999\nError Type : decoding failed\n at a.cpp:7", "decoding failed"),
        ("only a place.cpp:7:\n", "only a place.cpp:7:"),
    ],
)
def test_first_line(text: str, line: str) -> None:
    assert first_line(ValueError(text)) == line


@pytest.mark.parametrize(
    ("kind", "known"),
    [("DecodeError", True), ("WorkerCrashed", True), ("MemoryError", True), ("ZeroDivisionError", False),
     ("DfengineError", True), ("ValueError", False), ("first_line", False), ("", False)],
)  # fmt: skip
def test_errors_that_are_no_defects(kind: str, known: bool) -> None:
    assert is_known(kind) == known
