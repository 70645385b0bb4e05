"""dfengine.gpu.lanes over a GPU of host memory, and against the names of the real PyCUDA."""

from __future__ import annotations

import gc
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from fake_cuda import FakeGpu, array_of

from dfengine.errors import DeviceError, DeviceMemoryError
from dfengine.gpu import lanes as cuda
from dfengine.gpu.array import DeviceArray
from dfengine.gpu.lanes import Gpu


@pytest.fixture
def gpu() -> FakeGpu:
    return FakeGpu()


def test_arrays_come_back_as_they_went(gpu: FakeGpu, rng: np.random.Generator) -> None:
    with gpu.lane() as lane:
        for array in (
            rng.random((3, 4, 5)).astype(np.float16),
            rng.random((3, 4, 5)).transpose(2, 0, 1),
            np.zeros((0, 3), np.float32),
            np.array(7, np.int64),
        ):
            there = lane.upload(array)
            assert (there.shape, there.dtype, there.nbytes) == (array.shape, array.dtype, array.nbytes)
            back = lane.download(there)
            assert np.array_equal(back, array)
            assert back.flags.c_contiguous


def test_an_upload_may_be_overwritten_at_once(gpu: FakeGpu) -> None:
    array = np.ones(10)
    with gpu.lane() as lane:
        first = lane.upload(array)
        array[:] = 2
        second = lane.upload(array)
        assert lane.download(first)[0] == 1
        assert lane.download(second)[0] == 2


def test_views(gpu: FakeGpu, rng: np.random.Generator) -> None:
    """NV12 as it lies: luma, then chroma with Cb and Cr by turns."""
    picture = rng.integers(0, 255, (6, 8), np.uint8)
    with gpu.lane() as lane:
        there = lane.upload(picture)
        luma = there[:4]
        cb = there.view(offset=32, shape=(2, 4), strides=(8, 2))
        cr = there.view(offset=33, shape=(2, 4), strides=(8, 2))
        assert np.array_equal(lane.download(luma), picture[:4])
        assert np.array_equal(lane.download(cb), picture[4:, ::2])
        assert np.array_equal(lane.download(cr[1:]), picture[5:, 1::2])
        assert np.array_equal(lane.download(there[1:6:2]), picture[1:6:2])
        assert len(there[4:2]) == 0
        assert np.array_equal(array_of(cr), picture[4:, 1::2])
        with pytest.raises(ValueError, match="does not fit into the 15 bytes"):
            there.view(offset=33, shape=(2, 5), strides=(8, 2))
        with pytest.raises(ValueError, match="none negative"):
            there.view(shape=(2,), strides=(-1,))


def test_views_keep_the_memory(gpu: FakeGpu) -> None:
    with gpu.lane() as lane:
        row = lane.upload(np.arange(100, dtype=np.uint8))[50:60]
        other = lane.upload(np.zeros(100, np.uint8))
        assert lane.download(row)[0] == 50
        assert gpu.live_bytes > 0
        del row, other
    assert gpu.live_bytes == 0


def test_the_interface_others_read(gpu: FakeGpu) -> None:
    with gpu.lane() as lane:
        array = lane.empty((2, 3), np.float16)
        assert array.__cuda_array_interface__ == {
            "version": 3, "shape": (2, 3), "typestr": "<f2", "data": (array.pointer, False), "strides": (6, 2),
            "stream": lane.stream,
        }  # fmt: skip
        assert lane.stream != 0


@pytest.mark.parametrize(
    ("shape", "source", "target"),
    [
        ((5, 10), (10, 1), (10, 1)),
        ((5, 10), (16, 1), (10, 1)),
        ((5, 10), (16, 1), (32, 1)),
        ((3, 4, 5), (40, 5, 1), (20, 5, 1)),  # frames of a batch that lie apart
        ((3, 4, 5), (24, 6, 1), (20, 5, 1)),  # pitched throughout
        ((1, 4, 5), (999, 8, 1), (20, 5, 1)),  # a stride that is never walked
    ],
)
def test_copies(
    gpu: FakeGpu, rng: np.random.Generator, shape: tuple[int, ...], source: tuple[int, ...], target: tuple[int, ...]
) -> None:
    data = rng.integers(0, 255, 200, np.uint8)
    with gpu.lane() as lane:
        a = lane.upload(data).view(shape=shape, strides=source)
        b = lane.upload(np.zeros(200, np.uint8)).view(shape=shape, strides=target)
        lane.copy(a, b)
        assert np.array_equal(lane.download(b), lane.download(a))


def test_copies_that_cannot_be_made(gpu: FakeGpu) -> None:
    with gpu.lane() as lane:
        a = lane.empty((100,), np.uint8)
        with pytest.raises(ValueError, match="cannot copy uint8"):
            lane.copy(a, a[1:])
        gaps = a.view(shape=(2, 3, 5), strides=(50, 10, 1))  # rows at 0, 10, 20, 50, 60, 70
        with pytest.raises(ValueError, match="only rows that lie one pitch apart"):
            lane.copy(gaps, lane.empty((2, 3, 5), np.uint8))


def test_memory_is_used_again(gpu: FakeGpu) -> None:
    with gpu.lane() as lane:
        pointer = lane.empty((1000,), np.uint8).pointer
        assert lane.empty((990,), np.uint8).pointer == pointer
        with gpu.lane() as other:
            assert other.empty((1000,), np.uint8).pointer != pointer
        assert gpu.fake.calls.count("mem_alloc") == 2
    gpu.close()
    assert gpu.allocated_bytes == 0


def test_what_is_kept_has_a_limit(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "CACHE_BYTES", 10_000)
    with gpu.lane() as lane:
        for size in range(1000, 9000, 1000):
            lane.empty((size,), np.uint8)
            assert gpu.allocated_bytes <= 10_000


def test_full_memory_is_an_error_after_all_lanes_gave_up_what_they_kept() -> None:
    gpu = FakeGpu(memory_bytes=3 << 20)
    with gpu.lane() as first, gpu.lane() as second:
        first.empty((2 << 20,), np.uint8)
        held = second.empty((2 << 20,), np.uint8)
        with pytest.raises(DeviceMemoryError, match="no room for 2 MiB: 1 of 3 MiB are free; lower workers") as error:
            first.empty((2 << 20,), np.uint8)
        assert isinstance(error.value, MemoryError)
        del held
        first.empty((2 << 20,), np.uint8)
    assert gpu.live_bytes == 0


def test_arrays_die_on_any_thread(gpu: FakeGpu) -> None:
    """Without a context there, nothing may be freed, and nothing is lost."""
    with gpu.lane() as lane:
        held = [lane.empty((1000,), np.uint8), lane.record()]
        thread = threading.Thread(target=held.clear)
        thread.start()
        thread.join()
        assert gpu.live_bytes == 0
    lane.close()
    assert gpu.allocated_bytes == 0


def test_a_call_needs_the_lane_to_be_entered(gpu: FakeGpu) -> None:
    with pytest.raises(gpu.fake.LogicError, match="invalid device context"):
        gpu.lane().empty((1,), np.uint8)


def test_graphs_hold_what_was_enqueued(gpu: FakeGpu) -> None:
    with gpu.lane() as lane:
        source, target = lane.upload(np.zeros(3)), lane.upload(np.full(3, 9.0))
        graph = lane.capture(lambda: lane.copy(source, target))
        assert lane.download(target)[0] == 9
        lane.copy(lane.upload(np.ones(3)), source)
        lane.launch(graph)
        assert lane.download(target)[0] == 1
        del graph
        gc.collect()
    assert gpu.fake.graphs.live == 0


def test_a_failed_capture_leaves_a_lane_that_works(gpu: FakeGpu) -> None:
    with gpu.lane() as lane:
        array = lane.upload(np.ones(3))
        with pytest.raises(gpu.fake.LogicError, match="not permitted when stream is capturing"):
            lane.capture(lane.synchronize)
        gpu.fake.refuses_graphs = True
        with pytest.raises(RuntimeError, match="CAPTURE_UNSUPPORTED"):
            lane.capture(lambda: None)
        assert lane.download(array)[0] == 1
    assert gpu.fake.graphs.live == 0


@pytest.mark.parametrize(
    ("call", "what", "kind", "message"),
    [
        ("htod", "an illegal memory access was encountered", DeviceError,
         r"the GPU failed \(htod failed: an illegal memory access was encountered\); .* start the process again"),
        ("synchronize", "unspecified launch failure", DeviceError, r"the GPU failed \(synchronize failed: unspecified"),
        ("Event", "out of memory", DeviceMemoryError,
         r"the GPU's memory is full \(Event failed: out of memory\); lower workers or memory_bytes"),
        ("pagelocked_empty", "out of memory", DeviceMemoryError, "memory is full .pagelocked_empty failed"),
        ("mem_alloc", "initialization error", DeviceError, "the GPU failed .mem_alloc failed: initialization error"),
    ],
)  # fmt: skip
def test_what_the_driver_refuses_leaves_a_lane_as_an_error_of_ours(
    gpu: FakeGpu, call: str, what: str, kind: type[Exception], message: str
) -> None:
    lane = gpu.lane()
    gpu.fake.fails[call] = what
    with pytest.raises(kind, match=message) as caught, lane:
        lane.download(lane.upload(np.ones(3)))
    assert caught.value.__suppress_context__  # one line, not PyCUDA's too
    gpu.fake.fails.clear()
    with lane:
        assert lane.download(lane.upload(np.ones(3)))[0] == 1
    assert gpu.fake._current() == 0


def test_what_the_driver_refuses_without_a_lane(gpu: FakeGpu) -> None:
    gpu.fake.fails["Stream"] = "out of memory"
    with pytest.raises(DeviceMemoryError, match=r"memory is full \(Stream failed: out of memory\)"):
        gpu.lane()
    gpu.fake.fails = {"mem_get_info": "an illegal memory access was encountered"}
    with pytest.raises(DeviceError, match=r"the GPU failed \(mem_get_info failed: an illegal"):
        gpu.free_bytes()
    gpu.fake.fails = {}
    gpu.lane()
    gpu.fake.fails = {"synchronize": "an illegal memory access was encountered"}
    with pytest.raises(DeviceError, match=r"the GPU failed \(synchronize failed: an illegal"):
        gpu.close()


@pytest.mark.parametrize(
    ("result", "kind", "message"),
    [
        ("CUDA_ERROR_ILLEGAL_ADDRESS", DeviceError, r"the GPU failed \(cuGraphLaunch failed: CUDA_ERROR_ILLEGAL_ADDR"),
        ("CUDA_ERROR_OUT_OF_MEMORY", DeviceMemoryError, "memory is full .cuGraphLaunch failed: CUDA_ERROR_OUT_OF_MEM"),
    ],
)
def test_a_failed_launch_is_an_error_of_ours(gpu: FakeGpu, result: str, kind: type[Exception], message: str) -> None:
    with gpu.lane() as lane:
        graph = lane.capture(lambda: None)
        gpu.fake.fails["cuGraphLaunch"] = result
        with pytest.raises(kind, match=message):
            lane.launch(graph)


def test_a_gpu_that_others_keep_for_themselves(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise gpu.fake.Error("cuDevicePrimaryCtxRetain failed: CUDA-capable device(s) is/are busy or unavailable")

    monkeypatch.setattr(gpu.fake, "Device", lambda ordinal: SimpleNamespace(retain_primary_context=refuse))
    monkeypatch.setattr(cuda, "find_driver", lambda ordinal: (gpu.fake, gpu.fake.graphs))
    with pytest.raises(
        DeviceError, match=r"GPU number 7 cannot be used: .* busy or unavailable; nvidia-smi shows what"
    ):
        Gpu.open(7)


def test_foreign_memory_is_wrapped_with_its_owner(gpu: FakeGpu) -> None:
    memory = np.arange(20, dtype=np.uint8)
    with gpu.lane() as lane:
        surface = DeviceArray(memory.ctypes.data, (4, 4), np.uint8, strides=(5, 1), owner=memory, lane=lane)
        own = lane.empty((4, 4), np.uint8)
        lane.copy(surface, own)
        assert np.array_equal(lane.download(own), memory.reshape(4, 5)[:, :4])


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ModuleNotFoundError("No module named 'pycuda'", name="pycuda"), r"pycuda is missing; pip install 'dfengine\["),
        (ImportError("libcuda.so.1: cannot open shared object file"), "there is no NVIDIA driver .*--gpus all"),
        (ImportError("undefined symbol: x"), "cannot be loaded .undefined symbol: x.; build it anew"),
    ],
)
def test_why_there_is_no_pycuda(error: ImportError, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refuses:
        def find_spec(self, name: str, *rest: object) -> None:
            if name.startswith("pycuda"):
                raise error

    monkeypatch.setattr("sys.meta_path", [Refuses()])
    monkeypatch.delitem(__import__("sys").modules, "pycuda.driver", raising=False)
    monkeypatch.delitem(__import__("sys").modules, "pycuda", raising=False)
    with pytest.raises(DeviceError, match=message):
        Gpu.open()


def test_pycuda_has_what_is_used() -> None:
    try:
        import pycuda.driver as pycuda
    except ImportError as error:
        pytest.skip(f"PyCUDA cannot be loaded here: {error}")
    for name in vars(FakeGpu().fake) | vars(type(FakeGpu().fake)):
        if not name.startswith("_") and name not in ("memory_bytes", "allocated", "calls", "called", "refuses_graphs",
                                                     "fails", "graphs", "context"):  # fmt: skip
            assert hasattr(pycuda, name), name
    assert {"set_src_device", "set_dst_device", "src_pitch", "dst_pitch", "width_in_bytes", "height"} <= set(
        dir(pycuda.Memcpy2D)
    )
    assert hasattr(pycuda.Device, "retain_primary_context")


def test_cuda_bindings_have_what_is_used() -> None:
    driver = pytest.importorskip("cuda.bindings.driver")
    for name in vars(type(FakeGpu().fake.graphs)):
        assert name.startswith("_") or hasattr(driver, name), name
