"""Members are networks of a few nodes, made here: logit = gain * mean of the crop + offset."""

from __future__ import annotations

import dataclasses
import hashlib
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import TOLERANCE

from dfengine.bundle import SCHEMA_VERSION, Bundle, CropSpec, ModelSpec
from dfengine.errors import InferenceError
from dfengine.runtime.openvino import _part_rows, _parts
from dfengine.stages.backbone import BATCH_CROPS, Backbone

HW = (6, 5)


def make_onnx(gain=1.0, offset=0.0, *, outputs=1, keepdims=True, hw=HW) -> bytes:
    import onnx
    from onnx import TensorProto, helper

    shape = ["batch", outputs] if keepdims else ["batch"]
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["mean"], axes=[1, 2, 3], keepdims=0),
        helper.make_node("Mul", ["mean", "gain"], ["scaled"]),
        helper.make_node("Add", ["scaled", "offset"], ["y1" if keepdims else "y"]),
    ]
    tensors = [
        helper.make_tensor("gain", TensorProto.FLOAT, [], [gain]),
        helper.make_tensor("offset", TensorProto.FLOAT, [], [offset]),
    ]
    if keepdims:
        tensors.append(helper.make_tensor("axis", TensorProto.INT64, [1], [1]))
        nodes.append(helper.make_node("Unsqueeze", ["y1", "axis"], ["y2"]))
        nodes.append(helper.make_node("Concat", ["y2"] * outputs, ["y"], axis=1))
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, *hw])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        tensors,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def make_bundle(folder, *members) -> Bundle:
    """members: (ONNX bytes, changes of the ModelSpec)"""
    specs = []
    for i, (data, change) in enumerate(members):
        name = f"m{i}"
        (folder / f"{name}.onnx").write_bytes(data)
        sha256 = hashlib.sha256(data).hexdigest()
        crop = CropSpec(input_hw=HW)
        specs.append(ModelSpec(**{"name": name, "file": f"{name}.onnx", "sha256": sha256, "crop": crop} | change))
    return Bundle(schema_version=SCHEMA_VERSION, name="tiny", licence="MIT", members=tuple(specs), folder=folder)


class Cutter:
    """make_crops over fixed pictures; remembers what it was asked for."""

    def __init__(self, rng, rows):
        self.batch = rng.normal(size=(rows, 3, *HW)).astype(np.float32)
        self.calls = []

    def __call__(self, crop, part):
        self.calls.append((crop, part.start, part.stop))
        return self.batch[part]

    @property
    def means(self):
        return self.batch.astype(np.float64).mean(axis=(1, 2, 3))


def assert_close(got, want):
    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE["backbone", "float32"])


@pytest.mark.parametrize("rows", [1, 2, BATCH_CROPS - 1, BATCH_CROPS, BATCH_CROPS + 1, 2 * BATCH_CROPS + 1])
@pytest.mark.parametrize("threads", [1, 2])
def test_every_row_gets_its_logit(tmp_path, rng, rows, threads):
    backbone = Backbone(make_bundle(tmp_path, (make_onnx(3, 1), {}), (make_onnx(-2, 0.5), {})), threads=threads)
    cutter = Cutter(rng, rows)
    logits = backbone.run(rows, cutter)
    assert list(logits) == ["m0", "m1"]
    for column in logits.values():
        assert column.shape == (rows,)
        assert column.dtype == np.float64
    assert_close(logits["m0"], 3 * cutter.means + 1)
    assert_close(logits["m1"], -2 * cutter.means + 0.5)


def test_no_rows(tmp_path, rng):
    backbone = Backbone(make_bundle(tmp_path, (make_onnx(), {})))
    cutter = Cutter(rng, 0)
    logits = backbone.run(0, cutter)
    assert logits["m0"].shape == (0,)
    assert cutter.calls == []


def test_members_that_are_not_asked_for_do_not_run(tmp_path, rng):
    members = [(make_onnx(g), {"crop": CropSpec(input_hw=HW, margin_ratio=g)}) for g in (1.0, 2.0, 3.0)]
    cutter = Cutter(rng, 4)
    logits = Backbone(make_bundle(tmp_path, *members)).run(4, cutter, only=("m2", "m1"))
    assert list(logits) == ["m1", "m2"]
    assert_close(logits["m2"], 3 * cutter.means)
    assert [crop.margin_ratio for crop, *_ in cutter.calls] == [2.0, 3.0]


def test_members_with_one_preprocessing_share_the_crops(tmp_path, rng):
    members = [(make_onnx(g), {"weight": g}) for g in (1.0, 2.0, 3.0)]
    cutter = Cutter(rng, BATCH_CROPS + 3)
    Backbone(make_bundle(tmp_path, *members)).run(BATCH_CROPS + 3, cutter)
    crop = CropSpec(input_hw=HW)
    assert cutter.calls == [(crop, 0, BATCH_CROPS), (crop, BATCH_CROPS, BATCH_CROPS + 3)]


@pytest.mark.parametrize(
    "change",
    [
        {"mean": (0.1, 0.1, 0.1)},
        {"std": (0.5, 0.5, 0.5)},
        {"margin_ratio": 0.2},
        {"crop_shape": "box"},
        {"resize": "area"},
        {"padding": "zero"},
    ],
    ids=lambda c: next(iter(c)),
)
def test_members_with_another_preprocessing_get_their_own_crops(tmp_path, rng, change):
    usual, other = CropSpec(input_hw=HW), CropSpec(input_hw=HW, **change)
    members = [(make_onnx(g), {"crop": crop}) for g, crop in ((1, usual), (2, other), (3, usual), (4, other))]
    cutter = Cutter(rng, 3)
    logits = Backbone(make_bundle(tmp_path, *members)).run(3, cutter)
    assert cutter.calls == [(usual, 0, 3), (other, 0, 3)]
    assert list(logits) == ["m0", "m1", "m2", "m3"]  # the bundle's order
    for i in range(4):
        assert_close(logits[f"m{i}"], (i + 1) * cutter.means)


def test_an_output_without_a_second_axis(tmp_path, rng):
    cutter = Cutter(rng, 4)
    logits = Backbone(make_bundle(tmp_path, (make_onnx(2, keepdims=False), {}))).run(4, cutter)
    assert_close(logits["m0"], 2 * cutter.means)


def test_the_other_rows_change_nothing(tmp_path, rng):
    backbone = Backbone(make_bundle(tmp_path, (make_onnx(3, 1), {})), threads=2)
    cutter = Cutter(rng, 40)
    together = backbone.run(40, cutter)["m0"]
    for i in (0, 31, 32, 39):
        one = Cutter(rng, 0)
        one.batch = cutter.batch[i : i + 1]
        assert_close(backbone.run(1, one)["m0"], together[i : i + 1])


def test_a_network_sees_few_shapes():
    for count in range(1, 300):
        parts = list(_parts(count, 64))
        assert [i for part in parts for i in range(count)[part]] == list(range(count))
        assert {part.stop - part.start for part in parts} <= {1, 2, 4, 8, 16, 32, 64}
    # R-Net; the default bundle; Xception at 299 px
    assert [_part_rows(3 * 4 * side**2) for side in (24, 144, 299)] == [64, 4, 4]


def test_several_threads_at_once(tmp_path, rng):
    backbone = Backbone(make_bundle(tmp_path, (make_onnx(3, 1), {})), threads=2)
    cutters = [Cutter(rng, n) for n in (1, 7, 33, 50)]
    results = {}
    workers = [
        threading.Thread(target=lambda i=i, c=c: results.update({i: backbone.run(len(c.batch), c)["m0"]}))
        for i, c in enumerate(cutters)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
    for i, cutter in enumerate(cutters):
        assert_close(results[i], 3 * cutter.means + 1)


# -- errors ------------------------------------------------------------------------------------------------------------


def test_more_than_one_logit_a_crop(tmp_path, rng):
    backbone = Backbone(make_bundle(tmp_path, (make_onnx(), {})))
    backbone._sessions["m0"] = SimpleNamespace(run=lambda x: [np.zeros((len(x), 2), np.float32)])
    with pytest.raises(InferenceError, match=r"member 'm0' must give one finite logit a crop, got \(3, 2\)"):
        backbone.run(3, Cutter(rng, 3))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite(tmp_path, rng, bad):
    backbone = Backbone(make_bundle(tmp_path, (make_onnx(), {}), (make_onnx(), {})))
    cutter = Cutter(rng, 3)
    cutter.batch[1, 0, 0, 0] = bad
    with pytest.raises(
        InferenceError, match=r"member 'm0' must give one finite logit .* with 1 that are not"
    ) as raised:
        backbone.run(3, cutter)
    assert raised.value.stage == "backbone"


def test_crops_of_another_size(tmp_path, rng):
    backbone = Backbone(make_bundle(tmp_path, (make_onnx(), {})))
    cutter = Cutter(rng, 2)
    cutter.batch = cutter.batch[..., :4]
    why = r"\(Can't set the input tensor .*model input \(shape=\[\?,3,6,5\]\).* are incompatible\)"
    with pytest.raises(InferenceError, match=r"network tiny/m0 failed on a batch of shape \(2, 3, 6, 4\) " + why):
        backbone.run(2, cutter)
    with pytest.raises(InferenceError, match="failed on a batch"):  # the request was given back
        backbone.run(2, cutter)


@pytest.mark.parametrize("data", [b"", b"this is no network", make_onnx()[:-40]], ids=["empty", "text", "cut"])
def test_what_is_no_network(tmp_path, data):
    with pytest.raises(InferenceError, match="network tiny/m0 cannot be compiled"):
        Backbone(make_bundle(tmp_path, (data, {})))


def test_an_error_of_make_crops_reaches_the_caller(tmp_path):
    def broken(spec, part):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        Backbone(make_bundle(tmp_path, (make_onnx(), {}))).run(1, broken)


def test_bfloat16_is_used_where_asked_for_and_nowhere_else(rng) -> None:
    from openvino import Core

    bundle = Bundle.load("default")
    narrow = dataclasses.replace(
        bundle, members=tuple(dataclasses.replace(m, precision="bf16") for m in bundle.members)
    )
    member = bundle.members[0]
    crops = rng.standard_normal((4, 3, *member.crop.input_hw)).astype(np.float32)
    wide, half = (Backbone(b).run(4, lambda spec, rows: crops)[member.name] for b in (bundle, narrow))
    # bfloat16 has 8 bits of precision; the sums of a network keep about two decimal digits of it.
    assert np.abs(half - wide).max() <= 0.05 * max(1, np.abs(wide).max())
    assert np.array_equal(half, wide) == ("BF16" not in Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))
