"""What onnx2torch 1.5 leaves out: LSTM, shapes that need no trip to the GPU, and slices as torch wants them by now.

Import it inside functions only: it cannot do without torch.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from onnx2torch.node_converters.constant_of_shape import OnnxConstantOfShape
from onnx2torch.node_converters.registry import add_converter
from onnx2torch.node_converters.shape import OnnxShape
from onnx2torch.node_converters.slice import OnnxSlice
from onnx2torch.utils.common import OnnxMapping, OperationConverterResult
from torch import Tensor, nn


@cache
def register() -> None:
    """Teaches onnx2torch the operation LSTM, in its versions from opset 7 on."""
    for version in (7, 14, 22):
        add_converter("LSTM", version)(_convert_lstm)


def replace(module: Any, device: str) -> None:
    """Puts modules of this file in the place of onnx2torch's, in the fx.GraphModule ``module`` for ``device``."""
    for name, child in list(module.named_children()):
        if isinstance(child, OnnxShape):
            setattr(module, name, _Shape(child._start, child._end))
        elif isinstance(child, OnnxConstantOfShape):
            setattr(module, name, _Constant(child.value, device))
        elif isinstance(child, OnnxSlice):
            setattr(module, name, _Slice())


class _Shape(nn.Module):
    def __init__(self, start: int, end: int | None) -> None:
        super().__init__()
        self._sizes = slice(start, end)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tensor(x.shape[self._sizes])


class _Constant(nn.Module):
    def __init__(self, value: Tensor, device: str) -> None:
        super().__init__()
        self._value, self._dtype = value.item(), value.dtype
        self._device = device if value.is_floating_point() else "cpu"

    def forward(self, shape: Tensor) -> Tensor:
        return torch.full(shape.tolist(), self._value, dtype=self._dtype, device=self._device)


class _Slice(nn.Module):
    def forward(
        self, x: Tensor, starts: Tensor, ends: Tensor, axes: Tensor | None = None, steps: Tensor | None = None
    ) -> Tensor:
        along = axes.tolist() if axes is not None else range(len(starts))
        by = steps.tolist() if steps is not None else [1] * len(starts)
        for start, end, axis, step in zip(starts.tolist(), ends.tolist(), along, by, strict=True):
            places = range(x.shape[axis])[start:end:step]
            before = (slice(None),) * (axis % x.ndim)
            if step < 0:  # which torch cannot slice by
                x, places = x.flip(axis), range(x.shape[axis])[slice(*_turned(places, x.shape[axis]))]
            x = x[(*before, slice(places.start, places.stop, places.step))]
        return x


def _turned(places: range, size: int) -> tuple[int, int, int]:
    """The places counted from the other end."""
    return size - 1 - places.start, size - 1 - places.stop, -places.step


class _Lstm(nn.Module):
    """ONNX's LSTM on torch's: (T, B, I) -> (T, directions, B, H), and the last states, (directions, B, H)."""

    def __init__(self, weights: Tensor, recurrent: Tensor, biases: Tensor) -> None:
        super().__init__()
        directions, four_h, width = weights.shape
        hidden = four_h // 4
        self._shape = (directions, hidden)
        self.lstm = nn.LSTM(width, hidden, bidirectional=directions == 2, dtype=weights.dtype)
        for d in range(directions):
            suffix = "_l0_reverse" if d else "_l0"
            for name, rows in (
                ("weight_ih", weights[d]), ("weight_hh", recurrent[d]),
                ("bias_ih", biases[d, :four_h]), ("bias_hh", biases[d, four_h:]),
            ):  # fmt: skip
                i, o, f, c = rows.view(
                    4, hidden, *rows.shape[1:]
                )  # ONNX has input, output, forget, cell; torch i, f, c, o
                getattr(self.lstm, name + suffix).data = torch.cat([i, f, c, o])

    def forward(self, x: Tensor, *states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        steps, batch, _ = x.shape
        y, (h, c) = self.lstm(x, tuple(states) or None)
        return y.view(steps, batch, *self._shape).transpose(1, 2), h, c


def _convert_lstm(node: Any, graph: Any) -> OperationConverterResult:
    inputs = [*node.input_values, *[""] * (8 - len(node.input_values))]
    x, w, r, b, lengths, h, c, peepholes = inputs
    attributes = node.attributes
    plain = attributes.get("direction", "forward") in ("forward", "bidirectional") and not lengths and not peepholes
    plain = plain and not attributes.get("layout") and not attributes.get("input_forget") and "clip" not in attributes
    if not plain or "activations" in attributes or bool(h) != bool(c):
        raise NotImplementedError(f"LSTM with {attributes}")
    weights, recurrent = (graph.initializers[name].to_torch() for name in (w, r))
    shape = (weights.shape[0], 2 * weights.shape[1])
    biases = graph.initializers[b].to_torch() if b else torch.zeros(shape, dtype=weights.dtype)
    return OperationConverterResult(
        torch_module=_Lstm(weights, recurrent, biases),
        onnx_mapping=OnnxMapping(inputs=(x, h, c) if h else (x,), outputs=node.output_values),
    )
