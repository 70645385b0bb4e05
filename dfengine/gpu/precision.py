"""Float16 written into the ONNX graph, for runtimes that compute each layer in the type the graph gives it.

Weights, inputs and all between them become float16; the last layers and what follows them, and the few operations
listed below, stay float32, as all outputs do. Casts stand where the two meet.

TensorRT 11 takes precision from the graph alone. onnxconverter-common was tried and left: its list of outputs to keep
is ignored, and it moves small weights away from zero.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dfengine.errors import DeviceError, InferenceError, first_line

RECIPE = 1  # part of the key of compiled engines: count up when the graphs that come out change

# Operations that stay float32: sums, powers and exponentials leave the range of float16 (65504) first; the scales of
# Resize may be nothing else. Not LSTM, whose state tanh keeps small: TensorRT-RTX 1.7 fails to compile one that stays
# float32 in a network of float16 ("failed to refine intervals").
_KEPT = frozenset(
    [
        "Resize",
        "Exp",
        "Pow",
        "Softmax",
        "LogSoftmax",
        "ReduceSum",
        "ReduceSumSquare",
        "ReduceL2",
        "LayerNormalization",
        "InstanceNormalization",
        "GroupNormalization",
        "MeanVarianceNormalization",
        "CumSum",
        "Range",
    ]
)
_LAYERS = frozenset({"Conv", "Gemm", "MatMul"})
_MAX = float(np.finfo(np.float16).max)


def to_float16(onnx: bytes, name: str) -> bytes:
    """The network with float16 inputs and insides, and float32 outputs. ``name`` is for messages.

    Raises InferenceError for what is no ONNX and for graphs with branches or loops, DeviceError where the package onnx
    is missing.
    """
    try:
        from onnx import helper, load_model_from_string, shape_inference
    except ImportError:
        raise DeviceError(
            "float16 needs the package onnx; pip install 'dfengine[gpu]', or use precision fp32", stage="device"
        ) from None
    try:
        model = load_model_from_string(onnx)
        graph = shape_inference.infer_shapes(model).graph
    except Exception as error:  # protobuf's and onnx's have no common type
        raise InferenceError(f"network {name} cannot be read as ONNX ({first_line(error)})", stage="runtime") from None
    if nested := [n.op_type for n in graph.node if any(a.HasField("g") or a.graphs for a in n.attribute)]:
        raise InferenceError(
            f"network {name} holds {nested[0]}, whose branches cannot be turned into float16; use precision fp32 "
            "(dfengine.gpu.device.GpuDevice) or --device cpu",
            stage="runtime",
        )
    gather_constants(graph)
    narrowed = _Narrowed(graph)
    made_graph = helper.make_graph(
        narrowed.nodes, graph.name, [v for v in graph.input if v.name not in narrowed.constants], graph.output,
        [_named(t, key) for key, t in narrowed.initializers.items()],
    )  # fmt: skip
    model.graph.CopyFrom(made_graph)
    return bytes(model.SerializeToString())


class _Narrowed:
    """The nodes and initializers of a graph in float16. Changes the types of the graph's inputs, and its nodes.

    ``types``: which type each value has now. Constants get what their first reader needs, and a twin for other readers.
    """

    def __init__(self, graph: Any) -> None:
        from onnx import TensorProto

        self._wide, self._half = TensorProto.FLOAT, TensorProto.FLOAT16
        self.constants = {t.name: t for t in graph.initializer}
        values = [*graph.value_info, *graph.input, *graph.output]
        self.floats = {v.name for v in values if v.type.tensor_type.elem_type == self._wide}
        self.floats |= {key for key, t in self.constants.items() if t.data_type == self._wide}
        self.types = {v.name: self._half for v in graph.input if v.name in self.floats and v.name not in self.constants}
        for v in graph.input:
            if v.name in self.types:
                v.type.tensor_type.elem_type = self._half
        self.nodes: list[Any] = []
        self.initializers = {key: t for key, t in self.constants.items() if key not in self.floats}
        self._twins: dict[tuple[str, int], str] = {}
        kept = _last_layers(graph) | {i for i, n in enumerate(graph.node) if n.op_type in _KEPT}
        for i, node in enumerate(graph.node):
            too_large = any(_exceeds(self.constants[v]) for v in node.input if v in self.constants and v in self.floats)
            self._add(node, self._wide if i in kept or too_large else self._half)
        for output in graph.output:
            self._widen(output.name)

    def _add(self, node: Any, wanted: int) -> None:
        """A node that computes in the type that is wanted."""
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == self._wide:
                attribute.i = wanted
            elif node.op_type == "ConstantOfShape" and attribute.t.data_type == self._wide:
                attribute.t.CopyFrom(self._as_tensor(attribute.t, wanted, ""))
        # Cast takes what there is.
        for j, value in enumerate(node.input):
            if value in self.floats and node.op_type != "Cast":
                node.input[j] = self._as_type(value, wanted)
        self.nodes.append(node)
        self.types |= {value: wanted for value in node.output if value in self.floats}

    def _as_type(self, value: str, wanted: int) -> str:
        """The name under which a value is there in the type that is wanted."""
        from onnx import helper

        if self.types.get(value) == wanted:
            return value
        if (value, wanted) not in self._twins:
            self._twins[value, wanted] = twin = f"{value}.{'float16' if wanted == self._half else 'float32'}"
            if value in self.constants:
                self.initializers[twin] = self._as_tensor(self.constants[value], wanted, twin)
            else:
                self.nodes.append(helper.make_node("Cast", [value], [twin], name=twin, to=wanted))
        return self._twins[value, wanted]

    def _as_tensor(self, tensor: Any, wanted: int, name: str) -> Any:
        from onnx import numpy_helper

        array = numpy_helper.to_array(tensor)
        return numpy_helper.from_array(array.astype(np.float16) if wanted == self._half else array, name or None)

    def _widen(self, output: str) -> None:
        """Outputs are float32."""
        from onnx import helper

        if self.types.get(output) == self._half:
            inner = f"{output}.inner"
            for node in self.nodes:
                node.output[:] = [inner if v == output else v for v in node.output]
                node.input[:] = [inner if v == output else v for v in node.input]
            self.nodes.append(helper.make_node("Cast", [inner], [output], to=self._wide))


def gather_constants(graph: Any) -> None:
    """Makes every constant an initializer: those in nodes, and those that exporters store once and name twice."""
    for node in [n for n in graph.node if n.op_type == "Constant"]:
        value = [a.t for a in node.attribute if a.name == "value"]
        if value:
            graph.initializer.append(_named(value[0], node.output[0]))
            graph.node.remove(node)
    names = {t.name for t in graph.initializer}
    outputs = {v.name for v in graph.output}
    other = {}
    for node in [n for n in graph.node if n.op_type == "Identity"]:
        if node.input[0] in names and node.output[0] not in outputs:
            other[node.output[0]] = node.input[0]
            graph.node.remove(node)
    for node in graph.node:
        node.input[:] = [other.get(value, value) for value in node.input]


def _last_layers(graph: Any) -> set[int]:
    """Numbers of the nodes from each output back to the last layer that has weights, that one included."""
    makers = {value: i for i, node in enumerate(graph.node) for value in node.output}
    found: set[int] = set()
    todo = [output.name for output in graph.output]
    while todo:
        i = makers.get(todo.pop())
        if i is not None and i not in found:
            found.add(i)
            if graph.node[i].op_type not in _LAYERS:
                todo += graph.node[i].input
    return found


def _exceeds(tensor: Any) -> bool:
    from onnx import numpy_helper

    array = numpy_helper.to_array(tensor)
    return bool(array.size and np.abs(array).max() > _MAX)


def _named(tensor: Any, name: str) -> Any:
    tensor.name = name
    return tensor
