"""What dfengine.gpu.tensorrt uses of the module tensorrt (or tensorrt_rtx), over the memory of a FakeGpu.

A plan is the ONNX with its profile; what is enqueued is computed by OpenVINO. Rules that a real context has and breaks
silently are asserted here: addresses are set, shapes are within the profile, a captured context keeps its shapes.
"""

from __future__ import annotations

import json
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
from fake_cuda import FakeGpu, host_view

MAGIC = b"fake plan\n"


class FakeTensorRt:
    """The module. ``fails``: names of calls that report failure from now on."""

    def __init__(self, gpu: FakeGpu, *, rtx: bool = False, version: str = "11.4.0") -> None:
        self.__version__ = version
        self.gpu = gpu
        self.fails: set[str] = set()
        self.builds = 0
        self.contexts = 0
        self.known_kernels = 0  # caches that could be used again
        self.refuses_plans = False
        self.memory_is_full = False
        self.NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=0)
        self.MemoryPoolType = SimpleNamespace(WORKSPACE=0)
        self.BuilderFlag = SimpleNamespace(TF32="TF32")
        self.TensorIOMode = SimpleNamespace(INPUT=1, OUTPUT=2)
        self.ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED=2)
        self.Builder = lambda logger: _Builder(self, logger)
        self.OnnxParser = lambda network, logger: _Parser(self, network)
        self.Runtime = lambda logger: _Runtime(self, logger)
        self.nptype = lambda dtype: dtype
        self.ILogger, self.IErrorRecorder = _ILogger, _IErrorRecorder
        if rtx:
            self.CudaGraphStrategy = SimpleNamespace(WHOLE_GRAPH_CAPTURE=1)
            self.DynamicShapesKernelSpecializationStrategy = SimpleNamespace(LAZY=0, EAGER=1, NONE=2)
            self.ComputeCapability = SimpleNamespace(SM75=75)
            self.EngineValidity = SimpleNamespace(VALID=0, SUBOPTIMAL=1, INVALID=2)
            self.EngineInvalidityDiagnostics = SimpleNamespace(__members__={"VERSION_MISMATCH": 1, "UNSUPPORTED_CC": 2})

    def ok(self, call: str) -> bool:
        return call not in self.fails


class _ILogger:
    Severity = SimpleNamespace(INTERNAL_ERROR=0, ERROR=1, WARNING=2, INFO=3)


class _IErrorRecorder:
    pass


class _Builder:
    def __init__(self, trt: FakeTensorRt, logger: Any) -> None:
        self._trt, self._logger = trt, logger

    def create_network(self, flags: int) -> Any:
        assert flags == 1, "not strongly typed"
        return SimpleNamespace(num_inputs=0, onnx=b"")

    def create_builder_config(self) -> _Config:
        return _Config(self._trt)

    def create_optimization_profile(self) -> Any:
        shapes: dict[str, list[Any]] = {}
        return SimpleNamespace(
            shapes=shapes, set_shape=lambda name, least, usual, most: shapes.update({name: [least, usual, most]})
        )

    def build_serialized_network(self, network: Any, config: _Config) -> Any:
        if not self._trt.ok("build_serialized_network"):
            self._logger.log(1, "no tactic was found")
            return None
        self._trt.builds += 1
        config.timing += b"timed "
        return MAGIC + json.dumps(config.profiles).encode() + b"\n" + network.onnx


class _Config:
    def __init__(self, trt: FakeTensorRt) -> None:
        self._trt = trt
        self.profiles: list[Any] = []
        self.timing = b""
        self.cleared: list[str] = []

    def set_memory_pool_limit(self, pool: int, size: int) -> None:
        pass

    def clear_flag(self, flag: str) -> None:
        self.cleared.append(flag)

    def add_optimization_profile(self, profile: Any) -> int:
        self.profiles.append(profile.shapes)
        return 0 if self._trt.ok("add_optimization_profile") else -1

    def create_timing_cache(self, data: bytes) -> bytes:
        return data

    def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:
        self.timing = cache
        return True

    def get_timing_cache(self) -> Any:
        return SimpleNamespace(serialize=lambda: self.timing)


class _Parser:
    def __init__(self, trt: FakeTensorRt, network: Any) -> None:
        self._network = network
        self.num_errors = 0

    def parse(self, onnx: bytes) -> bool:
        import onnx as package

        try:
            graph = package.load_model_from_string(onnx).graph
        except Exception:
            self.num_errors = 1
            return False
        names = [v.name for v in graph.input]
        self._network.onnx, self._network.num_inputs = onnx, len(names)
        self._network.get_input = lambda i: SimpleNamespace(name=names[i])
        return True

    def get_error(self, index: int) -> Any:
        return SimpleNamespace(desc=lambda: "no ONNX")


class _Runtime:
    def __init__(self, trt: FakeTensorRt, logger: Any) -> None:
        self._trt, self._logger = trt, logger

    def get_engine_validity(self, plan: bytes) -> tuple[int, int]:
        return (2, 2) if self._trt.refuses_plans or not plan.startswith(MAGIC) else (0, 0)

    def deserialize_cuda_engine(self, plan: bytes) -> _Engine | None:
        if self._trt.refuses_plans or not plan.startswith(MAGIC):
            self._logger.log(1, "serialization error: version tag does not match")
            return None
        if self._trt.memory_is_full:
            self._logger.log(1, "defaultAllocator.cpp: Cuda failure: out of memory")
            return None
        return _Engine(self._trt, plan)


class _Engine:
    device_memory_size_v2 = 1000

    def __init__(self, trt: FakeTensorRt, plan: bytes) -> None:
        import openvino

        self._trt = trt
        self.lock = threading.Lock()
        profiles, _, onnx = plan[len(MAGIC) :].partition(b"\n")
        (self.profile,) = json.loads(profiles)
        core = openvino.Core()
        hint = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
        self.model = core.compile_model(core.read_model(onnx, b""), "CPU", hint)
        self.names = [*(i.any_name for i in self.model.inputs), *(o.any_name for o in self.model.outputs)]
        self.num_io_tensors = len(self.names)

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_mode(self, name: str) -> int:
        return 1 if name in self.profile else 2

    def get_tensor_dtype(self, name: str) -> Any:
        port = self.model.input(name) if name in self.profile else self.model.output(name)
        return port.element_type.to_dtype()

    def create_runtime_config(self) -> Any:
        return _RuntimeConfig(self._trt)

    def create_execution_context(self, how: Any) -> _Context | None:
        if not self._trt.ok("create_execution_context"):
            return None
        self._trt.contexts += 1
        if isinstance(how, _RuntimeConfig):
            how.cache.data += b"kernels "
        return _Context(self._trt, self, shares_memory=how == 2)


class _RuntimeConfig:
    def __init__(self, trt: FakeTensorRt) -> None:
        self._trt = trt
        self.cuda_graph_strategy = self.dynamic_shapes_kernel_specialization_strategy = 0

    def create_runtime_cache(self) -> Any:
        cache = SimpleNamespace(data=b"")
        cache.serialize = lambda: cache.data

        def deserialize(data: bytes) -> bool:
            if data != b"kernels ":
                return False
            cache.data = b""  # nothing has to be compiled
            self._trt.known_kernels += 1
            return True

        cache.deserialize = deserialize
        return cache

    def set_runtime_cache(self, cache: Any) -> bool:
        self.cache = cache
        return True


class _Context:
    def __init__(self, trt: FakeTensorRt, engine: _Engine, *, shares_memory: bool) -> None:
        self._trt, self._engine = trt, engine
        self._has_memory = not shares_memory
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._captured = False
        self.error_recorder: Any = None

    def set_device_memory(self, memory: int, size: int) -> None:
        assert memory % 256 == 0
        assert size >= self._engine.device_memory_size_v2
        self._has_memory = True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert not self._captured or self._shapes[name] == shape, "the graph of this context became invalid"
        least, _, most = self._engine.profile[name]
        self._shapes[name] = shape
        fits = len(shape) == len(least) and all(a <= n <= b for a, n, b in zip(least, shape, most, strict=True))
        return fits and self._trt.ok("set_input_shape")

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return address != 0 and self._trt.ok("set_tensor_address")

    def infer_shapes(self) -> list[str]:
        return [name for name in self._engine.profile if name not in self._shapes]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._compute({n: np.zeros(s, self._engine.get_tensor_dtype(n)) for n, s in self._shapes.items()})[
            name
        ].shape

    def execute_async_v3(self, stream: int) -> bool:
        assert set(self._addresses) == set(self._engine.names)
        assert self._has_memory
        if not self._trt.ok("execute_async_v3"):
            self.error_recorder.report_error(1, "an illegal memory access was encountered")
            return False
        fake = self._trt.gpu.fake
        self._captured = fake._streams[stream].captured is not None
        fake.called("enqueue", fake._streams[stream], work=self._work)
        return True

    def _work(self) -> None:
        inputs = {name: self._read(name, shape) for name, shape in self._shapes.items()}
        for name, values in self._compute(inputs).items():
            data = np.ascontiguousarray(values).view(np.uint8).ravel()
            np.copyto(host_view(self._addresses[name], data.nbytes), data)

    def _read(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        dtype = np.dtype(self._engine.get_tensor_dtype(name))
        return host_view(self._addresses[name], int(np.prod(shape)) * dtype.itemsize).view(dtype).reshape(shape)

    def _compute(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        with self._engine.lock:  # OpenVINO's model is not made for several threads, a real engine is
            results = self._engine.model(inputs)
            return {o.any_name: np.array(results[o]) for o in self._engine.model.outputs}
