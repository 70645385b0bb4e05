"""dfengine.gpu.lanes on a real GPU: what the stand-in of tests/fake_cuda.py takes for granted."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from dfengine.errors import DeviceMemoryError
from dfengine.gpu.lanes import Gpu


def test_what_the_gpu_is(gpu: Gpu) -> None:
    assert gpu.name
    assert gpu.compute_capability >= (7, 5)
    assert 0 < gpu.free_bytes() <= gpu.memory_bytes
    assert gpu.driver.startswith("CUDA ")


def test_arrays_come_back_as_they_went(gpu: Gpu, rng: np.random.Generator) -> None:
    with gpu.lane() as lane:
        for dtype in (np.uint8, np.float16, np.float32):
            array = (rng.random((5, 7, 3)) * 200).astype(dtype)
            assert np.array_equal(lane.download(lane.upload(array)), array)
        nv12 = lane.upload(rng.integers(0, 255, (6, 8), np.uint8))
        cb = nv12.view(offset=32, shape=(2, 4), strides=(8, 2))
        assert np.array_equal(lane.download(cb), lane.download(nv12)[4:, ::2])


def test_pitched_copies(gpu: Gpu, rng: np.random.Generator) -> None:
    with gpu.lane() as lane:
        array = rng.integers(0, 255, (6, 100), np.uint8)
        wide = lane.empty((6, 512), np.uint8).view(shape=(6, 100), strides=(512, 1))
        lane.copy(lane.upload(array), wide)
        back = lane.empty((6, 100), np.uint8)
        lane.copy(wide, back)
        assert np.array_equal(lane.download(back), array)


def test_lanes_are_ordered_by_events(gpu: Gpu) -> None:
    """The other lane reads what this one is about to have written."""
    array = np.arange(1 << 24, dtype=np.uint8)
    with gpu.lane() as first:
        for _ in range(5):
            there = first.upload(array)
            other = first.empty(array.shape, array.dtype)
            for _ in range(20):
                first.copy(there, other)
            ready = first.record()
            with gpu.lane() as second:
                second.wait(ready)
                assert np.array_equal(second.download(other), array)


def test_memory_runs_out_with_a_message_and_comes_back(gpu: Gpu) -> None:
    with gpu.lane() as lane:
        kept = lane.empty((1 << 26,), np.uint8)
        del kept  # kept by the lane for later
        with pytest.raises(DeviceMemoryError, match=r"no room for \d+ MiB: \d+ of \d+ MiB are free"):
            lane.empty((2 * gpu.memory_bytes,), np.uint8)
        assert len(lane.download(lane.empty((1 << 20,), np.uint8))) == 1 << 20


def test_a_captured_graph_repeats_the_work(gpu: Gpu) -> None:
    with gpu.lane() as lane:
        source, target = lane.upload(np.ones(100, np.float32)), lane.empty((100,), np.float32)
        graph = lane.capture(lambda: lane.copy(source, target))
        for value in (2, 3):
            lane.copy(lane.upload(np.full(100, value, np.float32)), source)
            lane.launch(graph)
            assert np.all(lane.download(target) == value)


def test_threads_have_lanes_of_their_own_and_arrays_die_anywhere(gpu: Gpu) -> None:
    left: list[object] = []
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            array = np.random.default_rng(seed).integers(0, 255, 1 << 20, np.uint8)
            with gpu.lane() as lane:
                for _ in range(20):
                    there = lane.upload(array)
                    assert np.array_equal(lane.download(there), array)
                left.append(there)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    left.clear()
    assert not errors


def test_torch_and_dfengine_share_the_context(gpu: Gpu) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    with gpu.lane() as lane:
        array = lane.upload(np.arange(10, dtype=np.float32))
        lane.synchronize()
        tensor = torch.as_tensor(array, device="cuda")
        assert tensor.data_ptr() == array.pointer
        assert float(tensor.sum()) == 45
    assert float(torch.ones(3, device="cuda").sum()) == 3
