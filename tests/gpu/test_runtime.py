"""Networks on a real GPU, by each runtime that supports it, against the session of the CPU."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from networks import NETWORKS, make_network_onnx, make_spec, random_inputs, run_float32

from dfengine.bundle import Bundle
from dfengine.errors import DeviceMemoryError, DfengineError
from dfengine.gpu import backends
from dfengine.gpu.cache import EngineCache
from dfengine.gpu.executor import Executor
from dfengine.gpu.lanes import Gpu

from .conftest import missing

# float32 sums in another order; float16 keeps 11 bits of each number and sums in float32.
TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2}


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Engines of this file: compiled once."""
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(params=backends.BACKENDS)
def backend(request: pytest.FixtureRequest, gpu: Gpu, cache_dir: Path) -> str:
    """Each runtime that supports this GPU; the others skip, for no GPU has all."""
    try:
        backends._try(request.param, gpu, backends.trial_spec("fp16"), EngineCache(cache_dir))
    except DfengineError as error:
        pytest.skip(f"{request.param}: {error}")
    return str(request.param)


@pytest.fixture
def close() -> Iterator[list[Executor]]:
    """What is in the list is closed in the end."""
    made: list[Executor] = []
    yield made
    for executor in made:
        executor.close()


def make(gpu: Gpu, name: str, backend: str, cache_dir: Path, folder: Path, close: list[Executor], *,
         precision: str = "fp32", max_batch: int = 8, contexts: int = 1) -> list[Executor]:  # fmt: skip
    spec = make_spec(name, folder, max_batch=max_batch, precision=precision)
    made = backends.make_executors(gpu, spec, contexts=contexts, backend=backend, cache_dir=cache_dir)
    close += made
    return made


def run(gpu: Gpu, ex: Executor, inputs: list[np.ndarray], cuts: tuple[int, ...] = ()) -> list[np.ndarray]:
    edges = [0, *cuts, len(inputs[0])]
    with gpu.lane() as lane:
        parts = [tuple(lane.upload(x[a:b].astype(ex.dtype)) for x in inputs) for a, b in itertools.pairwise(edges)]
        return ex.run(parts, [lane.record()])


def test_a_runtime_is_chosen_and_the_reason_given(gpu: Gpu, cache_dir: Path) -> None:
    chosen = backends.choose_backend(gpu, cache_dir=cache_dir)
    assert chosen.name in backends.BACKENDS
    assert gpu.name in chosen.reason


def test_all_pieces_are_explained() -> None:
    rows = backends.explain_cuda()
    if not rows["networks"].startswith("usable"):
        missing(rows["networks"])


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_gives_what_the_cpu_gives(
    gpu: Gpu, backend: str, name: str, precision: str, cache_dir: Path, tmp_path: Path, close: list[Executor]
) -> None:
    (ex,) = make(gpu, name, backend, cache_dir, tmp_path, close, precision=precision)
    data = make_network_onnx(name, tmp_path)
    inputs = random_inputs(data, rows=8)
    wanted = run_float32(data, inputs)
    for rows, cuts in ((8, ()), (8, (1, 3)), (1, ()), (5, (2, 2)), (3, ()), (8, (7,)), (1, ())):
        for w, g in zip(wanted, run(gpu, ex, [x[:rows] for x in inputs], cuts), strict=True):
            limit = TOLERANCE[precision] * max(1.0, float(np.abs(w).max()))
            np.testing.assert_allclose(g, w[:rows], rtol=0, atol=limit)


def test_the_same_batch_gives_the_same_numbers(
    gpu: Gpu, backend: str, cache_dir: Path, tmp_path: Path, close: list[Executor]
) -> None:
    """Plain, while it is captured and from the graph."""
    (ex,) = make(gpu, "default/face144_a", backend, cache_dir, tmp_path, close, precision="fp16")
    inputs = random_inputs(make_network_onnx("default/face144_a", tmp_path), rows=8)
    first = run(gpu, ex, inputs)[0]
    for _ in range(4):
        assert np.array_equal(run(gpu, ex, inputs)[0], first)


def test_graphs_are_captured(
    gpu: Gpu, backend: str, cache_dir: Path, tmp_path: Path, close: list[Executor], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        for name in NETWORKS:
            (ex,) = make(gpu, name, backend, cache_dir, tmp_path, close, precision="fp16")
            inputs = random_inputs(make_network_onnx(name, tmp_path), rows=4)
            run(gpu, ex, inputs)
    assert [r.message for r in caplog.records if "CUDA graphs" in r.message] == []


def test_p_net_takes_any_size(
    gpu: Gpu, backend: str, cache_dir: Path, tmp_path: Path, close: list[Executor]
) -> None:  # fmt: skip
    (ex,) = make(gpu, "mtcnn/pnet", backend, cache_dir, tmp_path, close)
    data = make_network_onnx("mtcnn/pnet", tmp_path)
    rng = np.random.default_rng(0)
    for hw in ((12, 12), (241, 428), (428, 241), (30, 17), (241, 428)):
        x = rng.standard_normal((3, 3, *hw)).astype(np.float32)
        for w, g in zip(run_float32(data, [x]), run(gpu, ex, [x]), strict=True):
            np.testing.assert_allclose(g, w, rtol=0, atol=TOLERANCE["fp32"] * max(1.0, float(np.abs(w).max())))


def test_threads_share_a_network(
    gpu: Gpu, backend: str, cache_dir: Path, tmp_path: Path, close: list[Executor]
) -> None:  # fmt: skip
    name = "default/face144_a"
    executors = make(gpu, name, backend, cache_dir, tmp_path, close, contexts=3)
    data = make_network_onnx(name, tmp_path)
    wrong: list[object] = []

    def work(ex: Executor, seed: int) -> None:
        try:
            x = random_inputs(data, rows=7, seed=seed)
            wanted = run_float32(data, x)[0]
            for rows in (7, 2, 7, 1) * 5:
                got = run(gpu, ex, [x[0][:rows]])[0]
                if not np.allclose(got, wanted[:rows], atol=TOLERANCE["fp32"] * max(1.0, float(np.abs(wanted).max()))):
                    wrong.append((seed, rows))
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(ex, i)) for i, ex in enumerate(executors)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_full_gpu_is_an_error_and_passes(
    gpu: Gpu, backend: str, cache_dir: Path, tmp_path: Path, close: list[Executor]
) -> None:  # fmt: skip
    (ex,) = make(gpu, "mtcnn/pnet", backend, cache_dir, tmp_path, close, max_batch=16)
    x = np.zeros((16, 3, 241, 428), np.float32)
    with gpu.lane() as lane:
        hogs = []
        for size in (1 << 30, 1 << 26, 1 << 22):
            while gpu.free_bytes() > 2 * size:
                try:
                    hogs.append(lane.empty((size,), np.uint8))
                except DeviceMemoryError:
                    break
        with pytest.raises(DeviceMemoryError, match=r"no room for|does not fit"):
            run(gpu, ex, [x])
        hogs.clear()
        lane.close()
    assert len(run(gpu, ex, [x])[0]) == 16


def test_torch_beside_the_networks(
    gpu: Gpu, backend: str, cache_dir: Path, tmp_path: Path, close: list[Executor]
) -> None:  # fmt: skip
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    (ex,) = make(gpu, "mtcnn/onet", backend, cache_dir, tmp_path, close)
    data = make_network_onnx("mtcnn/onet", tmp_path)
    inputs = random_inputs(data, rows=4)
    for _ in range(3):
        product = torch.ones(64, 64, device="cuda") @ torch.ones(64, 64, device="cuda")
        np.testing.assert_allclose(run(gpu, ex, inputs)[0], run_float32(data, inputs)[0], atol=1e-4)
        assert float(product.sum()) == 64**3


def test_the_default_bundle_moves_little_in_float16(
    gpu: Gpu, backend: str, cache_dir: Path, tmp_path: Path, close: list[Executor], astronaut: np.ndarray
) -> None:
    bundle = Bundle.load("default")
    torch = pytest.importorskip("torch")
    for member in bundle.members:
        name = f"default/{member.name}"
        (ex,) = make(gpu, name, backend, cache_dir, tmp_path, close, precision="fp16")
        crops = []
        for half in (50, 60, 75, 90):
            face = torch.from_numpy(astronaut[110 - half : 110 + half, 225 - half : 225 + half] / 255.0)
            small = torch.nn.functional.interpolate(face.permute(2, 0, 1)[None], member.crop.input_hw, mode="area")[0]
            crops.append(
                (small.numpy() - np.array(member.crop.mean)[:, None, None]) / np.array(member.crop.std)[:, None, None]
            )
        x = np.array(crops, np.float32)
        (wanted,), (got,) = run_float32(make_network_onnx(name, tmp_path), [x]), run(gpu, ex, [x])
        assert np.abs(1 / (1 + np.exp(-wanted)) - 1 / (1 + np.exp(-got))).max() <= 0.01
