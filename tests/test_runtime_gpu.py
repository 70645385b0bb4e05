"""Executors over a GPU of host memory: TensorRT's stand-in, and torch on the CPU, against the session that scores."""

from __future__ import annotations

import itertools
import json
import logging
import threading
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from assets import write_bundle
from fake_cuda import FakeGpu, array_of
from fake_tensorrt import FakeTensorRt
from networks import NETWORKS, make_network_onnx, make_spec, random_inputs, run_float32

from dfengine import Engine
from dfengine.bundle import Bundle, DetectorSettings
from dfengine.errors import DeviceError, DeviceMemoryError, InferenceError
from dfengine.gpu import backends, executor
from dfengine.gpu import tensorrt as trt_runtime
from dfengine.gpu.cache import EngineCache
from dfengine.gpu.device import GpuDevice
from dfengine.gpu.executor import Executor, bucket
from dfengine.gpu.lanes import Gpu
from dfengine.gpu.spec import EngineSpec, GpuPrecision, Profile, detector_profiles
from dfengine.gpu.tensorrt import TensorRt, make_tensorrt_executors

NET = "mtcnn/onet"


@pytest.fixture
def gpu() -> FakeGpu:
    return FakeGpu()


def make_trt(
    gpu: FakeGpu, folder: Path, name: str = NET, *, rtx: bool = False, max_batch: int = 8, precision: str = "fp32",
    contexts: int = 1, fake: FakeTensorRt | None = None,
) -> tuple[list[Executor], FakeTensorRt]:  # fmt: skip
    fake = fake or FakeTensorRt(gpu, rtx=rtx)
    made = make_tensorrt_executors(
        TensorRt("tensorrt_rtx" if rtx else "tensorrt", fake), gpu,
        make_spec(name, folder, max_batch=max_batch, precision=precision), contexts=contexts,
        cache=EngineCache(folder / "engines"),
    )  # fmt: skip
    return made, fake


def make_torch(gpu: FakeGpu, folder: Path, name: str = NET, *, max_batch: int = 8, precision: str = "fp32") -> Executor:
    import torch

    from dfengine.gpu.torch import TorchNetwork, to_module

    torch.set_num_threads(1)
    spec = make_spec(name, folder, max_batch=max_batch, precision=precision)
    module = to_module(spec.graph(), name, "cpu")
    network = TorchNetwork(gpu, module, name, as_tensor=lambda array: torch.from_numpy(array_of(array)))
    return Executor(gpu, spec, network)


def run(gpu: FakeGpu, ex: Executor, inputs: list[np.ndarray], cuts: tuple[int, ...] = ()) -> list[np.ndarray]:
    """Runs rows, cut into the parts of several callers."""
    with gpu.lane() as lane:
        edges = [0, *cuts, len(inputs[0])]
        parts = [tuple(lane.upload(x[a:b].astype(ex.dtype)) for x in inputs) for a, b in itertools.pairwise(edges)]
        return ex.run(parts, [lane.record()])


MAKERS: list[Callable[..., Executor]] = [
    lambda gpu, folder, *more, **options: make_trt(gpu, folder, *more, **options)[0][0],
    lambda gpu, folder, *more, **options: make_trt(gpu, folder, *more, rtx=True, **options)[0][0],
    make_torch,
]


@pytest.mark.parametrize("make", MAKERS, ids=["tensorrt", "rtx", "torch"])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_gives_what_the_cpu_gives(
    gpu: FakeGpu, tmp_path: Path, make: Callable[..., Executor], name: str
) -> None:
    """For all batch sizes, cut in any way, again and again: graphs are captured after the first time."""
    ex = make(gpu, tmp_path, name, max_batch=6)
    data = make_network_onnx(name, tmp_path)
    inputs = random_inputs(data, rows=6)
    wanted = run_float32(data, inputs)
    for rows, cuts in ((6, ()), (6, (1, 3)), (1, ()), (5, (2, 2)), (3, ()), (6, (5,)), (1, ())):
        got = run(gpu, ex, [x[:rows] for x in inputs], cuts)
        for w, g in zip(wanted, got, strict=True):
            assert g.dtype == np.float32
            np.testing.assert_allclose(g, w[:rows], atol=2e-5)
    ex.close()
    assert gpu.live_bytes == 0


@pytest.mark.parametrize("make", MAKERS, ids=["tensorrt", "rtx", "torch"])
def test_float16_takes_float16(gpu: FakeGpu, tmp_path: Path, make: Callable[..., Executor]) -> None:
    ex = make(gpu, tmp_path, precision="fp16")
    data = make_network_onnx(NET, tmp_path)
    inputs = random_inputs(data, rows=3)
    assert ex.dtype == np.float16
    for w, g in zip(run_float32(data, inputs), run(gpu, ex, inputs), strict=True):
        assert g.dtype == np.float32
        np.testing.assert_allclose(g, w, atol=2e-3)


@pytest.mark.parametrize("make", MAKERS, ids=["tensorrt", "rtx", "torch"])
def test_p_net_takes_any_size(gpu: FakeGpu, tmp_path: Path, make: Callable[..., Executor]) -> None:
    ex = make(gpu, tmp_path, "mtcnn/pnet", max_batch=2)
    data = make_network_onnx("mtcnn/pnet", tmp_path)
    rng = np.random.default_rng(0)
    for hw in ((12, 12), (30, 17), (17, 30), (30, 17)):
        x = rng.standard_normal((2, 3, *hw)).astype(np.float32)
        for w, g in zip(run_float32(data, [x]), run(gpu, ex, [x]), strict=True):
            np.testing.assert_allclose(g, w, atol=2e-5)


def test_no_rows(gpu: FakeGpu, tmp_path: Path) -> None:
    (ex,), _ = make_trt(gpu, tmp_path)
    got = run(gpu, ex, [np.zeros((0, 3, 48, 48))])
    assert [g.shape for g in got] == [(0,), (0, 4), (0, 10)]


@pytest.mark.parametrize(
    ("rows", "wanted"), [(0, 1), (1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (64, 64), (65, 100), (100, 100)]
)
def test_buckets(rows: int, wanted: int) -> None:
    assert bucket(rows, 100) == wanted


@pytest.mark.parametrize(
    "inputs",
    [
        [np.zeros((9, 3, 48, 48))],
        [np.zeros((2, 3, 48, 47))],
        [np.zeros((2, 3, 48, 48)), np.zeros((2, 1))],
        [np.zeros((2, 3))],
    ],
    ids=["too many rows", "other size", "too many inputs", "too few axes"],
)
def test_what_does_not_fit_is_refused(gpu: FakeGpu, tmp_path: Path, inputs: list[np.ndarray]) -> None:
    (ex,), _ = make_trt(gpu, tmp_path)
    with pytest.raises(
        InferenceError, match=r"mtcnn/onet takes up to 8 contiguous rows of float32 \(3, 48, 48\); got float32"
    ):
        run(gpu, ex, inputs)
    assert len(run(gpu, ex, [np.zeros((2, 3, 48, 48))])[0]) == 2


def test_a_size_beyond_the_profile_is_refused(gpu: FakeGpu, tmp_path: Path) -> None:
    (ex,), _ = make_trt(gpu, tmp_path, "mtcnn/pnet", max_batch=1)
    with pytest.raises(InferenceError, match=r"\(3, 12, 12\) to \(3, 965, 965\); got float32 \(1, 3, 11, 700\)"):
        run(gpu, ex, [np.zeros((1, 3, 11, 700))])


# -- CUDA graphs -------------------------------------------------------------------------------------------------------


def test_each_bucket_is_captured_once_and_then_launched(gpu: FakeGpu, tmp_path: Path) -> None:
    (ex,), fake = make_trt(gpu, tmp_path)
    x = random_inputs(make_network_onnx(NET, tmp_path), rows=8)
    for rows in (8, 7, 8, 5, 2, 2):
        run(gpu, ex, [v[:rows] for v in x])
    assert gpu.fake.calls.count("enqueue") == 4  # plain and captured, for 8 and for 2
    assert gpu.fake.calls.count("launch") == 4
    assert fake.contexts == 2
    ex.close()
    assert gpu.fake.graphs.live == 0


def test_without_graphs_it_runs_as_well_and_says_so_once(
    gpu: FakeGpu, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gpu.fake.refuses_graphs = True
    (ex,), _ = make_trt(gpu, tmp_path)
    data = make_network_onnx(NET, tmp_path)
    x = random_inputs(data, rows=8)
    with caplog.at_level(logging.WARNING):
        for rows in (8, 3, 8):
            np.testing.assert_allclose(run(gpu, ex, [x[0][:rows]])[0], run_float32(data, x)[0][:rows], atol=2e-5)
    assert [r.message for r in caplog.records if "graphs" in r.message] == [
        "network mtcnn/onet runs without CUDA graphs (cuStreamEndCapture failed: CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED)"
    ]


def test_rtx_captures_by_itself(gpu: FakeGpu, tmp_path: Path) -> None:
    (ex,), fake = make_trt(gpu, tmp_path, rtx=True)
    for rows in (8, 2, 8):
        run(gpu, ex, [np.zeros((rows, 3, 48, 48))])
    assert fake.contexts == 1
    assert "launch" not in gpu.fake.calls


def test_shapes_that_were_not_used_for_long_are_forgotten(
    gpu: FakeGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executor, "PREPARED_SHAPES", 2)
    (ex,), fake = make_trt(gpu, tmp_path, "mtcnn/pnet", max_batch=1)
    for side in (20, 30, 20, 40, 20, 30):
        run(gpu, ex, [np.zeros((1, 3, side, side))])
    assert fake.contexts == 4
    assert gpu.fake.graphs.live == 2


# -- failures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("execute_async_v3", r"mtcnn/onet on tensorrt: it cannot be enqueued \(an illegal memory access was enc"),
        ("set_input_shape", r"images cannot have the shape \(2, 3, 48, 48\)"),
        ("set_tensor_address", "the address of images was refused"),
        ("create_execution_context", "no execution context .it gave no reason"),
    ],
)
def test_each_call_that_fails_is_an_error(gpu: FakeGpu, tmp_path: Path, call: str, message: str) -> None:
    (ex,), fake = make_trt(gpu, tmp_path)
    fake.fails = {call}
    with pytest.raises(InferenceError, match=message):
        run(gpu, ex, [np.zeros((2, 3, 48, 48))])
    fake.fails = set()
    assert len(run(gpu, ex, [np.zeros((2, 3, 48, 48))])[0]) == 2
    ex.close()
    assert gpu.live_bytes == 0


@pytest.mark.parametrize(
    ("call", "result", "kind", "message"),
    [
        ("cuGraphLaunch", "CUDA_ERROR_ILLEGAL_ADDRESS", InferenceError,
         r"network mtcnn/onet failed on a batch of 2: the GPU failed \(cuGraphLaunch failed: CUDA_ERROR_ILLEGAL"),
        ("cuGraphLaunch", "CUDA_ERROR_OUT_OF_MEMORY", DeviceMemoryError, "full .cuGraphLaunch failed: CUDA_ERROR_OUT"),
        ("dtoh", "unspecified launch failure", InferenceError,
         r"network mtcnn/onet failed on a batch of 2: the GPU failed \(dtoh failed: unspecified launch failure\)"),
        ("wait", "out of memory", DeviceMemoryError, "full .wait failed: out of memory"),
    ],
)  # fmt: skip
def test_what_the_driver_refuses_names_the_network(
    gpu: FakeGpu, tmp_path: Path, call: str, result: str, kind: type[Exception], message: str
) -> None:
    (ex,), _ = make_trt(gpu, tmp_path)
    with gpu.lane() as lane:
        parts, ready = [(lane.upload(np.zeros((2, 3, 48, 48), np.float32)),)], [lane.record()]
        ex.run(parts, ready)  # the graph is captured
        gpu.fake.fails[call] = result
        with pytest.raises(kind, match=message) as error:
            ex.run(parts, ready)
    assert kind is DeviceMemoryError or error.value.stage == "runtime"  # type: ignore[attr-defined]
    gpu.fake.fails.clear()
    assert len(run(gpu, ex, [np.zeros((2, 3, 48, 48))])[0]) == 2


def test_what_pybind11_raises_is_an_error_of_ours(
    gpu: FakeGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT's constructors raise TypeError where CUDA fails, and say why in the log."""

    def refuse(logger: Any) -> None:
        logger.log(1, "CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    for name in ("Builder", "Runtime"):
        fake = FakeTensorRt(gpu)
        monkeypatch.setattr(fake, name, refuse)
        with pytest.raises(
            InferenceError, match=r"onet on tensorrt: a call ended with TypeError .*failure with error: 35"
        ):
            make_trt(gpu, tmp_path / name, fake=fake)
    (ex,), _ = make_trt(gpu, tmp_path)

    def throw(stream: int) -> bool:
        raise RuntimeError("CUDA error: device-side assert\nmore")

    run(gpu, ex, [np.zeros((2, 3, 48, 48))])
    bound = next(iter(ex._slots.values())).prepared
    monkeypatch.setattr(bound._context, "execute_async_v3", throw)  # type: ignore[attr-defined]
    next(iter(ex._slots.values())).graph = None
    with pytest.raises(InferenceError, match=r"ended with RuntimeError \(CUDA error: device-side assert\)"):
        run(gpu, ex, [np.zeros((2, 3, 48, 48))])


def test_an_engine_that_does_not_fit_into_the_memory_is_not_built_again(gpu: FakeGpu, tmp_path: Path) -> None:
    make_trt(gpu, tmp_path)
    fake = FakeTensorRt(gpu)
    fake.memory_is_full = True
    with pytest.raises(DeviceMemoryError, match=r"onet does not fit into the GPU's memory \(.*out of memory\); lower"):
        make_trt(gpu, tmp_path, fake=fake)
    assert fake.builds == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("build_serialized_network", "it cannot be compiled .no tactic was"),
        ("add_optimization_profile", "its input shapes were refused"),
    ],
)
def test_each_build_that_fails_is_an_error(gpu: FakeGpu, tmp_path: Path, call: str, message: str) -> None:
    fake = FakeTensorRt(gpu)
    fake.fails = {call}
    with pytest.raises(InferenceError, match=message):
        make_trt(gpu, tmp_path, fake=fake)


def test_a_full_gpu_takes_the_memory_of_other_shapes_first(gpu: FakeGpu, tmp_path: Path) -> None:
    (ex,), _ = make_trt(gpu, tmp_path, "mtcnn/pnet", max_batch=1)
    for side in (120, 100, 80):
        run(gpu, ex, [np.zeros((1, 3, side, side))])
    with gpu.lane() as lane:
        x, large = (lane.upload(np.zeros((1, 3, side, side), np.float32)) for side in (110, 240))
        for other in gpu._lanes:
            other._trim()
        gpu.fake.memory_bytes = gpu.allocated_bytes  # not a byte is left
        assert ex.run([(x,)], [])[0].shape == (1, 50, 50)
        with pytest.raises(DeviceMemoryError, match=r"the GPU has no room for 1 MiB: 0 of \d+ MiB are free; lower"):
            ex.run([(large,)], [])
        assert ex.run([(x,)], [])[0].shape == (1, 50, 50)


def test_memory_that_tensorrt_asks_for_itself(gpu: FakeGpu, tmp_path: Path) -> None:
    (ex,), fake = make_trt(gpu, tmp_path)
    fake.fails = {"create_execution_context"}
    runtime = ex._network._runtime  # type: ignore[attr-defined]
    runtime.messages.clear = lambda: None
    runtime.messages.add("[allocator.cpp] Requested size was 99 bytes: OutOfMemory")
    with pytest.raises(DeviceMemoryError, match=r"does not fit into the GPU's memory .*OutOfMemory.*; lower workers"):
        run(gpu, ex, [np.zeros((2, 3, 48, 48))])


def test_types_that_do_not_fit_are_refused(gpu: FakeGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EngineSpec, "graph", lambda spec: spec.onnx)
    with pytest.raises(InferenceError, match="images is float32, expected float16"):
        make_trt(gpu, tmp_path, precision="fp16")


def test_executors_of_one_network_run_at_the_same_time(gpu: FakeGpu, tmp_path: Path) -> None:
    executors, fake = make_trt(gpu, tmp_path, contexts=3)
    data = make_network_onnx(NET, tmp_path)
    wrong: list[object] = []

    def work(ex: Executor, seed: int) -> None:
        x = random_inputs(data, rows=5, seed=seed)
        wanted = run_float32(data, x)[0]
        for rows in (5, 2, 5, 1):
            if not np.allclose(run(gpu, ex, [x[0][:rows]])[0], wanted[:rows], atol=2e-5):
                wrong.append((seed, rows))

    threads = [threading.Thread(target=work, args=(ex, i)) for i, ex in enumerate(executors)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert fake.builds == 1


# -- engines on disk ---------------------------------------------------------------------------------------------------


def test_an_engine_is_built_once(gpu: FakeGpu, tmp_path: Path) -> None:
    fake = FakeTensorRt(gpu)
    for _ in range(2):
        make_trt(gpu, tmp_path, fake=fake)
    assert fake.builds == 1
    make_trt(gpu, tmp_path, fake=fake, max_batch=16)
    make_trt(gpu, tmp_path, fake=fake, precision="fp16")
    assert fake.builds == 3


def test_a_version_has_engines_of_its_own(gpu: FakeGpu, tmp_path: Path) -> None:
    for version in ("11.4.0", "11.5.0"):
        fake = FakeTensorRt(gpu, version=version)
        make_trt(gpu, tmp_path, fake=fake)
        assert fake.builds == 1


@pytest.mark.parametrize("damage", ["cut", "flipped", "text", "empty", "other key"])
def test_a_damaged_engine_is_built_again_once(
    gpu: FakeGpu, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    make_trt(gpu, tmp_path)
    (path,) = (tmp_path / "engines").glob("*.engine")
    data = path.read_bytes()
    path.write_bytes({
        "cut": data[:-10], "flipped": data[:-1] + bytes([data[-1] ^ 1]), "text": b"no engine\n", "empty": b"",
        "other key": data.replace(b'"fp32"', b'"fp16"', 1),
    }[damage])  # fmt: skip
    fake = FakeTensorRt(gpu)
    with caplog.at_level(logging.WARNING):
        make_trt(gpu, tmp_path, fake=fake)
    assert fake.builds == 1
    assert "it is built again" in caplog.text
    assert path.read_bytes() == data


def test_an_engine_that_the_runtime_refuses_is_built_again_once(gpu: FakeGpu, tmp_path: Path) -> None:
    make_trt(gpu, tmp_path)
    (path,) = (tmp_path / "engines").glob("*.engine")
    cache = EngineCache(tmp_path / "engines")
    fake = FakeTensorRt(gpu)
    key = make_spec(NET, tmp_path).key(TensorRt("tensorrt", fake).target(gpu))
    cache.write(path, key, b"of another driver")
    make_trt(gpu, tmp_path, fake=fake)
    assert fake.builds == 1
    fake.refuses_plans = True
    with pytest.raises(InferenceError, match=r"cannot use the engine it has just built .serialization error: version"):
        make_trt(gpu, tmp_path, fake=fake)
    assert fake.builds == 2


def test_a_folder_that_cannot_be_written_costs_a_warning(
    gpu: FakeGpu, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "engines").write_text("a file is in the way")
    with caplog.at_level(logging.WARNING):
        (ex,), _ = make_trt(gpu, tmp_path)
    assert "cannot be written" in caplog.text
    assert len(run(gpu, ex, [np.zeros((2, 3, 48, 48))])[0]) == 2


@pytest.mark.parametrize("rtx", [False, True])
def test_what_only_saves_time_may_be_unreadable(
    gpu: FakeGpu, tmp_path: Path, caplog: pytest.LogCaptureFixture, rtx: bool
) -> None:
    make_trt(gpu, tmp_path, rtx=rtx)
    engines = tmp_path / "engines"
    (engine,) = engines.glob("*.engine")
    engine.unlink()
    beside = engine.with_suffix(".kernels") if rtx else engines / "timing-tensorrt-11.4.0-Fake-GPU.cache"
    beside.unlink(missing_ok=True)
    beside.mkdir()
    with caplog.at_level(logging.WARNING):
        (ex,), _ = make_trt(gpu, tmp_path, rtx=rtx)
        assert len(run(gpu, ex, [np.zeros((2, 3, 48, 48))])[0]) == 2
        ex.close()
    assert f"{beside}: cannot be read (Is a directory); it is done without" in caplog.text


def test_threads_and_processes_build_once(gpu: FakeGpu, tmp_path: Path) -> None:
    fake = FakeTensorRt(gpu)
    threads = [threading.Thread(target=make_trt, args=(gpu, tmp_path), kwargs={"fake": fake}) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert fake.builds == 1


def test_timings_are_kept_for_the_next_build(gpu: FakeGpu, tmp_path: Path) -> None:
    make_trt(gpu, tmp_path)
    make_trt(gpu, tmp_path, "mtcnn/rnet")
    (path,) = (tmp_path / "engines").glob("timing-*")
    assert path.name == "timing-tensorrt-11.4.0-Fake-GPU.cache"
    assert path.read_bytes() == b"timed timed "


def test_rtx_keeps_the_kernels_it_compiled(gpu: FakeGpu, tmp_path: Path) -> None:
    for damaged in (False, True):
        for wanted in (0, 1):
            (ex,), fake = make_trt(gpu, tmp_path, rtx=True)
            assert fake.known_kernels == wanted
            ex.close()
        (path,) = (tmp_path / "engines").glob("*.kernels")
        assert path.read_bytes() == b"kernels "
        if not damaged:
            path.write_bytes(b"of another driver")


def test_torch_says_what_it_cannot_run(tmp_path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper

    from dfengine.gpu.torch import to_module

    graph = helper.make_graph(
        [helper.make_node("Det", ["x"], ["y"])], "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [])],
    )  # fmt: skip
    data = onnx.helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    with pytest.raises(InferenceError, match=r"network net cannot run on torch: onnx2torch does not know .*Det"):
        to_module(data, "net", "cpu")


def test_torchs_errors_are_dfengines(gpu: FakeGpu) -> None:
    import torch

    from dfengine.gpu.torch import TorchNetwork

    for error, wanted, message in (
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), DeviceMemoryError, "net does not fit into the GPU"),
        (
            RuntimeError("CUDA error: misaligned address\nmore"),
            InferenceError,
            r"on torch \(CUDA error: mis",
        ),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when"), DeviceMemoryError, "fit into .*STATUS_ALLOC"),
        (IndexError("too many indices"), InferenceError, r"net failed on torch \(IndexError: too many indices\)"),
    ):

        def module(x: object, error: Exception = error) -> object:
            raise error

        network = TorchNetwork(gpu, module, "net", as_tensor=lambda array: torch.from_numpy(array_of(array)))
        ex = Executor(gpu, EngineSpec("net", b"", (Profile.fixed(2),), 2, "fp32"), network)
        with pytest.raises(wanted, match=message):
            run(gpu, ex, [np.zeros((1, 2))])


@pytest.mark.parametrize("directions", [1, 2])
def test_lstm_on_torch(directions: int) -> None:
    from onnx import TensorProto, helper, numpy_helper

    from dfengine.gpu.torch import to_module

    rng = np.random.default_rng(0)
    steps, width, hidden = 5, 3, 4
    shapes = {
        "w": (directions, 4 * hidden, width),
        "r": (directions, 4 * hidden, hidden),
        "b": (directions, 8 * hidden),
    }
    graph = helper.make_graph(
        [
            helper.make_node(
                "LSTM", ["x", "w", "r", "b"], ["y", "h", "c"], hidden_size=hidden,
                direction="bidirectional" if directions == 2 else "forward",
            )
        ],
        "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [steps, "n", width])],
        [helper.make_tensor_value_info(o, TensorProto.FLOAT, None) for o in ("y", "h", "c")],
        [numpy_helper.from_array(rng.standard_normal(s).astype(np.float32), k) for k, s in shapes.items()],
    )  # fmt: skip
    data = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    import openvino
    import torch

    core = openvino.Core()
    x = rng.standard_normal((steps, 2, width)).astype(np.float32)
    wanted = core.compile_model(core.read_model(data, b""), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([x]).to_tuple()
    got = to_module(data, "net", "cpu")(torch.from_numpy(x))
    for w, g in zip(wanted, got, strict=True):
        np.testing.assert_allclose(g.numpy(), w, atol=1e-5)


@pytest.mark.parametrize(
    ("start", "end", "axis", "step"),
    [(0, 5, 0, 1), (-1, -100, 1, -1), (4, 0, -1, -2), (1, 100, 1, 3), (3, 3, 0, 1), (-2, -100, 0, -3)],
)
def test_slices_on_torch(start: int, end: int, axis: int, step: int) -> None:
    import torch

    from dfengine.gpu.onnx2torch_more import _Slice

    x = np.arange(42).reshape(6, 7)
    wanted = x[start:end:step] if axis == 0 else x[:, start:end:step]
    got = _Slice()(torch.from_numpy(x), *(torch.tensor([n]) for n in (start, end, axis, step)))
    assert np.array_equal(got.numpy(), wanted)


def test_what_an_engine_was_made_for(gpu: FakeGpu) -> None:
    def target(name: str, gpu: FakeGpu | None) -> dict[str, object]:
        return TensorRt(name, FakeTensorRt(FakeGpu())).target(gpu)

    assert (target("tensorrt", gpu)["device"], target("tensorrt", gpu)["compute_capability"]) == ("Fake GPU", "9.0")
    assert target("tensorrt_rtx", gpu) == target("tensorrt_rtx", None)


def test_all_that_changes_an_engine_is_in_its_key() -> None:
    spec = EngineSpec("net", b"onnx", (Profile.fixed(3, 8, 8),), 4, "fp16")
    target = {"backend": "tensorrt", "version": "11.4.0", "device": "Fake GPU", "compute_capability": "9.0"}
    others = {"onnx": b"other", "profiles": (Profile.fixed(3, 8, 9),), "max_batch": 5, "precision": "fp32"}
    assert {"name", *others} == {field.name for field in fields(EngineSpec)}
    keys = [spec.key(target), *(replace(spec, **{field: value}).key(target) for field, value in others.items())]
    keys += [spec.key({**target, part: "other"}) for part in target]
    assert len({json.dumps(key, sort_keys=True) for key in keys}) == 1 + len(others) + len(target)
    assert replace(spec, name="other").key(target) == spec.key(target)


# -- which runtime -----------------------------------------------------------------------------------------------------


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, object]:
    """Runtimes by name: a module, or the error that importing it raises. Torch has no CUDA."""
    modules: dict[str, object] = {}

    def find(name: str) -> TensorRt:
        found = modules.get(name, DeviceError(f"{name}: the package is missing", stage="device"))
        if isinstance(found, Exception):
            raise found
        return TensorRt(name, found)

    monkeypatch.setattr(backends, "import_tensorrt", find)
    monkeypatch.setenv("DFENGINE_CACHE", str(tmp_path / "engines"))
    return modules


def test_tensorrt_comes_first(gpu: FakeGpu, installed: dict[str, object]) -> None:
    installed |= {"tensorrt": FakeTensorRt(gpu), "tensorrt_rtx": FakeTensorRt(gpu, rtx=True)}
    chosen = backends.choose_backend(gpu)
    assert (chosen.name, chosen.reason) == ("tensorrt", "tensorrt 11.4.0 supports Fake GPU")


def test_what_was_refused_is_in_the_reason(gpu: FakeGpu, installed: dict[str, object]) -> None:
    installed["tensorrt_rtx"] = FakeTensorRt(gpu, rtx=True, version="1.7.1")
    chosen = backends.choose_backend(gpu)
    assert chosen.name == "tensorrt_rtx"
    assert chosen.reason == "tensorrt_rtx 1.7.1 supports Fake GPU; tensorrt: the package is missing"


def test_no_runtime_is_an_error_that_names_them_all(gpu: FakeGpu, installed: dict[str, object]) -> None:
    rtx = FakeTensorRt(gpu, rtx=True)
    rtx.refuses_plans = True
    installed["tensorrt_rtx"] = rtx
    with pytest.raises(DeviceError) as error:
        backends.choose_backend(gpu)
    text = str(error.value)
    assert text.startswith("no runtime can use Fake GPU: tensorrt: the package is missing; tensorrt_rtx: ")
    assert "engine invalid here: unsupported_cc" in text
    assert "torch 2" in text


def test_an_old_tensorrt_is_refused(monkeypatch: pytest.MonkeyPatch, gpu: FakeGpu) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", FakeTensorRt(gpu, version="10.3.0"))
    with pytest.raises(DeviceError, match=r"tensorrt: version 10.3.0 is too old, 10.12 is needed"):
        trt_runtime.import_tensorrt.__wrapped__("tensorrt")


def test_executors_come_from_the_chosen_runtime(gpu: FakeGpu, installed: dict[str, object], tmp_path: Path) -> None:
    installed["tensorrt"] = FakeTensorRt(gpu)
    (ex,) = backends.make_executors(gpu, make_spec(NET, tmp_path), contexts=1, backend="tensorrt")
    assert len(run(gpu, ex, [np.zeros((3, 3, 48, 48))])[0]) == 3


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
@pytest.mark.parametrize("backend", backends.BACKENDS[:2])
def test_what_compile_writes_is_what_the_device_looks_for(
    installed: dict[str, object], monkeypatch: pytest.MonkeyPatch, backend: str, precision: GpuPrecision, tmp_path: Path
) -> None:
    """Also for a bundle whose detector looks for other sizes of faces than the packaged ones."""
    fake = FakeTensorRt(FakeGpu(), rtx=backend == "tensorrt_rtx")
    installed[backend] = fake
    monkeypatch.setattr(Gpu, "open", lambda ordinal=0: FakeGpu())
    bundle = Bundle.load(write_bundle(tmp_path / "bundle", detector=DetectorSettings(min_face_ratio=0.1)))
    made = backends.compile_bundle(bundle, backend, precision=precision)
    assert list(made) == ["mtcnn/pnet", "mtcnn/rnet", "mtcnn/onet", "development/mean"]
    assert all(f"-{backend}-{precision}-" in path.name for path in made.values())
    assert fake.builds == len(made) + 1  # and P-Net for frames of the packaged size, with which runtimes are tried
    with Engine(bundle, device=GpuDevice(precision=precision)) as engine:
        assert fake.builds == len(made) + 1
        row = engine.score(tmp_path / "missing.mp4")
    assert f"{backend} 11.4.0 supports Fake GPU" in row.runtime
    assert row.runtime.endswith(f"; networks in {precision}")


def test_what_is_missing_is_told_without_a_gpu() -> None:
    rows = backends.explain_cuda()
    assert list(rows) == ["pycuda", "gpu", "PyNvVideoCodec", "tensorrt", "tensorrt_rtx", "torch", "networks"]
    assert all(text.startswith(("usable: ", "not usable: ")) for text in rows.values())


# -- the sizes that networks see ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("hw", [(1080, 1920), (1920, 1080), (800, 1912), (480, 640), (2160, 3840), (240, 320)])
@pytest.mark.parametrize("ratio", [0.05, 0.02])
def test_the_detectors_pyramid_lies_within_p_nets_profile(hw: tuple[int, int], ratio: float) -> None:
    from dfengine.stages.detect import Detector

    settings = DetectorSettings(min_face_ratio=ratio)
    (profile,) = detector_profiles(Bundle.load("mtcnn").member("pnet"), settings)
    detector = Detector.__new__(Detector)
    detector.settings = settings
    scales = detector._scales(*hw)
    assert scales
    for scale in scales:
        assert profile.holds((3, int(hw[0] * scale + 1), int(hw[1] * scale + 1)))


def test_all_networks_of_a_bundle_are_listed() -> None:
    found = EngineSpec.all_of(Bundle.load("default"), precision="fp16")
    assert [spec.name for spec in found][:3] == ["mtcnn/pnet", "mtcnn/rnet", "mtcnn/onet"]
    assert len(found) == 3 + len(Bundle.load("default").members)
    assert len(EngineSpec.all_of(Bundle.load("mtcnn"), precision="fp16")) == 3
