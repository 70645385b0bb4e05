"""Networks on TensorRT and on TensorRT for RTX: the same Python module under two names, and so one code path.

Both take types from the graph (strongly typed), so float16 is written into it before (dfengine.gpu.precision).
They differ in two things. TensorRT builds on and for the GPU at hand, timing kernels; RTX builds anywhere, for every
GPU it knows, and compiles the rest when an engine is used. And RTX captures CUDA graphs by itself.

Note [A context for each shape]
A captured graph is good for as long as its context is not given another shape (NVIDIA's guide says so). So with
TensorRT each prepared shape has a context of its own; the memory they work in is one for all, as only one runs.
"""

from __future__ import annotations

import importlib
import logging
import re
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from dfengine.errors import DeviceError, DeviceMemoryError, DfengineError, InferenceError, OutputError, first_line
from dfengine.gpu.array import DeviceArray
from dfengine.gpu.cache import EngineCache, read_if_possible, write_cached
from dfengine.gpu.driver import says_memory_is_full
from dfengine.gpu.executor import Executor, Network
from dfengine.gpu.lanes import Gpu, Graph, Lane
from dfengine.gpu.spec import EngineSpec

log = logging.getLogger("dfengine")

OLDEST = (10, 12)  # the first in which strongly typed networks are the rule and not an experiment

# Memory a layer may use besides its tensors. Convolutions of this size gain nothing from more; without a limit
# TensorRT would take the whole GPU's as one. Chosen, not fitted.
_WORKSPACE_BYTES = 1 << 30


class TensorRt:
    """One of the two modules, with what its log said last."""

    def __init__(self, name: str, module: Any) -> None:
        """``name``: "tensorrt" or "tensorrt_rtx"."""
        self.name = name
        self.module = module
        self.version: str = module.__version__
        self.is_rtx = name == "tensorrt_rtx"
        self.messages = Messages()
        self.logger = _make_logger(module, self.messages)
        self._runtime: Any = None
        self._opening = threading.Lock()

    def target(self, gpu: Gpu | None) -> dict[str, object]:
        """What engines of this runtime are for: its part of their key. RTX makes one for all GPUs since Ampere.

        It could make others for Turing, but there it has no float32 matrix products, which the last layers are.
        """
        if self.is_rtx:
            device, capability = "any", "8.0 and later"
        else:
            assert gpu is not None, "TensorRT compiles for the GPU at hand"
            device, capability = gpu.name, "{}.{}".format(*gpu.compute_capability)
        return {"backend": self.name, "version": self.version, "device": device, "compute_capability": capability}

    def build(
        self, spec: EngineSpec, *, timing: bytes = b"", keep_timing: Callable[[bytes], None] = lambda timing: None
    ) -> bytes:
        """Compiles a network. TensorRT needs its GPU to be current, RTX needs none.

        ``timing``: a timing cache from before; the new one goes to ``keep_timing``. Raises DeviceError where float16
        needs a package that is missing, and InferenceError.
        """
        trt, name, onnx = self.module, spec.name, spec.graph()
        self.messages.clear()
        builder = self._made(trt.Builder(self.logger), name, "there is no builder")
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, self.logger)
        if not parser.parse(onnx):
            what = parser.get_error(0).desc() if parser.num_errors else self.messages.last
            raise InferenceError(f"network {name} cannot be read by {self.name} ({what})", stage="runtime")
        if network.num_inputs != len(spec.profiles):
            raise InferenceError(
                f"network {name} has {network.num_inputs} inputs, its kind has {len(spec.profiles)}", stage="runtime"
            )
        config = builder.create_builder_config()
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, _WORKSPACE_BYTES)
        if spec.precision == "fp32":  # float32 products in full
            config.clear_flag(trt.BuilderFlag.TF32)
        shapes = builder.create_optimization_profile()
        for i, profile in enumerate(spec.profiles):
            try:
                shapes.set_shape(
                    network.get_input(i).name, (1, *profile.least), (spec.max_batch, *profile.usual),
                    (spec.max_batch, *profile.most),
                )  # fmt: skip
            except ValueError as error:
                raise InferenceError(
                    f"input {i} of network {name} cannot have the shape {profile.usual} ({first_line(error)})",
                    stage="runtime",
                ) from None
        self._check(config.add_optimization_profile(shapes) >= 0, name, "its input shapes were refused")
        if not self.is_rtx:
            self._check(config.set_timing_cache(config.create_timing_cache(timing), True), name, "timing cache")
        plan = self._made(builder.build_serialized_network(network, config), name, "it cannot be compiled")
        if not self.is_rtx:
            keep_timing(bytes(config.get_timing_cache().serialize()))
        return bytes(plan)

    def load(self, plan: bytes, name: str) -> Any | None:
        """The engine, for the GPU that is current; None if it cannot be used here (``messages`` may say why).

        ``name``: the network's, for the DeviceMemoryError that it may raise.
        """
        self.messages.clear()
        with self._opening:
            if self._runtime is None:
                self._runtime = self.module.Runtime(self.logger)
            if self.is_rtx:
                validity, why = self._runtime.get_engine_validity(plan)
                if validity == self.module.EngineValidity.INVALID:
                    kinds = self.module.EngineInvalidityDiagnostics.__members__
                    named = [n.lower() for n, flag in kinds.items() if int(flag) & int(why)]
                    self.messages.add(f"engine invalid here: {', '.join(named) or 'no reason given'}")
                    return None
            engine = self._runtime.deserialize_cuda_engine(plan)
        # One that does not fit into the memory is a good one all the same.
        self._check(engine is not None or not says_memory_is_full(self.messages.last), name, "it cannot be loaded")
        return engine

    @contextmanager
    def errors_of(self, name: str, messages: Messages | None = None) -> Iterator[None]:
        """What pybind11 raises, where C++ threw or made nothing, becomes InferenceError or DeviceMemoryError.

        ``name``: the network's. ``messages``: where TensorRT says more of it, by default the log's.
        """
        try:
            yield
        except DfengineError:
            raise
        except (RuntimeError, TypeError, MemoryError) as error:
            messages = messages or self.messages
            if not messages.any:
                messages.add(first_line(error))
            self._check(False, name, f"a call ended with {type(error).__name__}", messages)

    def _made(self, thing: Any, name: str, otherwise: str) -> Any:
        self._check(thing is not None, name, otherwise)
        return thing

    def _check(self, ok: bool, name: str, what: str, messages: Messages | None = None) -> None:
        """Each call that can fail ends here. Raises DeviceMemoryError, InferenceError."""
        if not ok:
            said = (messages or self.messages).last
            if says_memory_is_full(said):
                raise DeviceMemoryError(
                    f"network {name} does not fit into the GPU's memory ({said}); lower workers", stage="runtime"
                )
            raise InferenceError(f"network {name} on {self.name}: {what} ({said})", stage="runtime")


class Messages:
    """The last errors that TensorRT reported. Thread-safe."""

    def __init__(self) -> None:
        self._texts: deque[str] = deque(maxlen=8)

    def add(self, text: str) -> None:
        self._texts.append(next((line for line in text.splitlines() if line.strip()), ""))

    def clear(self) -> None:
        self._texts.clear()

    @property
    def any(self) -> bool:
        return bool(self._texts)

    @property
    def last(self) -> str:
        texts = list(self._texts)
        return texts[-1] if texts else "it gave no reason"


@cache
def import_tensorrt(name: str) -> TensorRt:
    """The module "tensorrt" or "tensorrt_rtx". Raises DeviceError."""
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == name
        extra = "gpu-rtx" if name == "tensorrt_rtx" else "gpu"
        why = f"the package is missing; pip install 'dfengine[{extra}]'" if missing else first_line(error)
        raise DeviceError(f"{name}: {why}", stage="device") from None
    if name == "tensorrt" and tuple(map(int, module.__version__.split(".")[:2])) < OLDEST:
        raise DeviceError(
            f"{name}: version {module.__version__} is too old, {'.'.join(map(str, OLDEST))} is needed", stage="device"
        )
    return TensorRt(name, module)


def compile_network(runtime: TensorRt, gpu: Gpu | None, spec: EngineSpec, cache: EngineCache) -> tuple[Any, Path]:
    """The engine, from the cache or compiled, and its file. Without a GPU (RTX only) it is compiled, but not loaded.

    The GPU must be current. Raises DeviceError, DeviceMemoryError, InferenceError, OutputError.
    """
    key = spec.key(runtime.target(gpu))

    def build() -> bytes:
        log.info("compiling %s with %s %s, %s", spec.name, runtime.name, runtime.version, spec.precision)
        where = gpu.name if gpu is not None else "any"
        timing = cache.folder / f"timing-{runtime.name}-{runtime.version}-{_file_name(where)}.cache"

        def keep(data: bytes) -> None:
            try:
                write_cached(timing, data)
            except OutputError as error:
                log.warning("%s", error)

        return runtime.build(spec, timing=read_if_possible(timing), keep_timing=keep)

    path = cache.path(spec.name, key)
    try:
        with runtime.errors_of(spec.name):
            if gpu is not None:
                engine = cache.load_or_build(spec.name, key, load=lambda p: runtime.load(p, spec.name), build=build)
                return engine, path
            if cache.read(path, key) is None:
                cache.write(path, key, build())
            return None, path
    except ValueError:
        raise InferenceError(
            f"network {spec.name}: {runtime.name} cannot use the engine it has just built ({runtime.messages.last})",
            stage="runtime",
        ) from None


def make_tensorrt_executors(
    runtime: TensorRt, gpu: Gpu, spec: EngineSpec, *, contexts: int, cache: EngineCache
) -> list[Executor]:
    """Executors that share one engine. Raises DeviceError, DeviceMemoryError, InferenceError."""
    with gpu.current(), runtime.errors_of(spec.name):
        engine, path = compile_network(runtime, gpu, spec, cache)
        _check_types(runtime, engine, spec)
        networks: list[Network]
        if runtime.is_rtx:
            fixed = all(p.least == p.most for p in spec.profiles)
            kernels = path.with_suffix(".kernels")
            networks = [RtxNetwork(runtime, engine, spec.name, fixed=fixed, kernels=kernels) for _ in range(contexts)]
        else:
            networks = [TensorRtNetwork(runtime, engine, spec.name) for _ in range(contexts)]
    return [Executor(gpu, spec, n) for n in networks]


class TensorRtNetwork:
    """An engine with a context for each shape. See Note [A context for each shape]."""

    def __init__(self, runtime: TensorRt, engine: Any, name: str) -> None:
        self._runtime, self._engine, self._name = runtime, engine, name
        self._scratch: DeviceArray | None = None

    def prepare(self, lane: Lane, inputs: Sequence[DeviceArray]) -> PreparedContext:
        strategy = self._runtime.module.ExecutionContextAllocationStrategy.USER_MANAGED
        self._runtime.messages.clear()
        with self._runtime.errors_of(self._name):
            context = self._runtime._made(
                self._engine.create_execution_context(strategy), self._name, "no execution context"
            )
        if self._scratch is None:
            self._scratch = lane.empty((max(256, int(self._engine.device_memory_size_v2)),), np.uint8)
        context.set_device_memory(self._scratch.pointer, self._scratch.nbytes)
        prepared = PreparedContext(self._runtime, self._name, context, self._engine, lane, inputs)
        prepared.bind()
        return prepared

    def close(self) -> None:
        self._scratch = self._engine = None


class RtxNetwork:
    """An engine with one context, which captures and keeps graphs itself.

    ``fixed``: the inputs have one size. ``kernels``: a file for what RTX compiles when it runs, seconds each time; the
    next process finds it there.
    """

    def __init__(self, runtime: TensorRt, engine: Any, name: str, *, fixed: bool, kernels: Path) -> None:
        trt = runtime.module
        runtime.messages.clear()
        config = engine.create_runtime_config()
        config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        # EAGER compiles kernels for the very shape before they first run, so that all runs give the same numbers; LAZY
        # would change kernels while videos are scored. P-Net has too many shapes for that.
        strategy = trt.DynamicShapesKernelSpecializationStrategy
        config.dynamic_shapes_kernel_specialization_strategy = strategy.EAGER if fixed else strategy.NONE
        self._kernels, self._file = config.create_runtime_cache(), kernels
        known = read_if_possible(kernels)
        if known and not self._kernels.deserialize(known):
            log.info("%s is of another driver or version, or damaged; kernels are compiled again", kernels)
        self._known_bytes = len(known)
        config.set_runtime_cache(self._kernels)
        self._runtime, self._name, self._engine = runtime, name, engine
        self._context = runtime._made(engine.create_execution_context(config), name, "no execution context")

    def prepare(self, lane: Lane, inputs: Sequence[DeviceArray]) -> PreparedContext:
        self._runtime.messages.clear()
        prepared = PreparedContext(
            self._runtime, self._name, self._context, self._engine, lane, inputs, shares_context=True
        )
        prepared.bind()
        return prepared

    def close(self) -> None:
        self._context = self._engine = None
        kernels = bytes(self._kernels.serialize())
        if len(kernels) != self._known_bytes:
            try:
                write_cached(self._file, kernels)
            except OutputError as error:
                log.warning("%s", error)


class PreparedContext:
    """A context whose inputs and outputs have their places. See executor.Prepared."""

    def __init__(self, runtime: TensorRt, name: str, context: Any, engine: Any, lane: Lane,
                 inputs: Sequence[DeviceArray], *, shares_context: bool = False) -> None:  # fmt: skip
        self._runtime, self._name, self._context, self._lane = runtime, name, context, lane
        self._shares_context = shares_context
        self._messages = Messages()
        self._recorder = _make_recorder(runtime.module, self._messages)
        context.error_recorder = self._recorder
        trt = runtime.module
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        is_input = [engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT for n in names]
        self._inputs = dict(zip([n for n, i in zip(names, is_input, strict=True) if i], inputs, strict=True))
        self._output_names = [n for n, i in zip(names, is_input, strict=True) if not i]
        self.outputs: list[DeviceArray] = []

    def bind(self) -> None:
        """Gives the context its shapes and addresses. Raises DeviceMemoryError, InferenceError."""
        with self._runtime.errors_of(self._name, self._messages):
            self._bind()

    def _bind(self) -> None:
        context, check = self._context, self._check
        for name, array in self._inputs.items():
            check(context.set_input_shape(name, array.shape), f"{name} cannot have the shape {array.shape}")
            check(context.set_tensor_address(name, array.pointer), f"the address of {name} was refused")
        if not self.outputs:
            missing = context.infer_shapes()
            check(not missing, f"shapes of {missing} are not known")
            shapes = [tuple(context.get_tensor_shape(name)) for name in self._output_names]
            check(all(min(s) >= 0 for s in shapes), f"outputs have the shapes {shapes}")
            self.outputs = [self._lane.empty(shape, np.float32) for shape in shapes]
        for name, array in zip(self._output_names, self.outputs, strict=True):
            check(context.set_tensor_address(name, array.pointer), f"the address of {name} was refused")

    def enqueue(self) -> None:
        if self._shares_context:
            self.bind()
        with self._runtime.errors_of(self._name, self._messages):
            self._check(self._context.execute_async_v3(self._lane.stream), "it cannot be enqueued")

    def _check(self, ok: bool, what: str) -> None:
        self._runtime._check(ok, self._name, what, self._messages)

    def capture(self) -> Callable[[], None] | None:
        if self._shares_context:
            return None
        graph: Graph = self._lane.capture(self.enqueue)
        return partial(self._lane.launch, graph)


def _check_types(runtime: TensorRt, engine: Any, spec: EngineSpec) -> None:
    """Inputs are of the precision's type, outputs float32."""
    trt = runtime.module
    for i in range(engine.num_io_tensors):
        tensor = engine.get_tensor_name(i)
        is_input = engine.get_tensor_mode(tensor) == trt.TensorIOMode.INPUT
        got, wanted = np.dtype(trt.nptype(engine.get_tensor_dtype(tensor))), spec.dtype if is_input else np.float32
        if got != wanted:
            raise InferenceError(
                f"network {spec.name}: {tensor} is {got}, expected {np.dtype(wanted)}", stage="runtime"
            )


def _make_logger(trt: Any, messages: Messages) -> Any:
    levels = {
        trt.ILogger.Severity.INTERNAL_ERROR: logging.ERROR,
        trt.ILogger.Severity.ERROR: logging.ERROR,
        trt.ILogger.Severity.WARNING: logging.DEBUG,  # about performance, and the same for every network
    }

    class Logger(trt.ILogger):  # type: ignore[misc]
        """TensorRT's messages become the log's; called from any thread."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            level = levels.get(severity)
            if level == logging.ERROR:
                messages.add(msg)
            if level is not None:
                log.log(logging.DEBUG, "tensorrt: %s", msg)  # errors are raised by whoever called

    return Logger()


def _make_recorder(trt: Any, messages: Messages) -> Any:
    class Recorder(trt.IErrorRecorder):  # type: ignore[misc]
        """Errors of one execution context, which come when its work is enqueued."""

        def __init__(self) -> None:
            trt.IErrorRecorder.__init__(self)
            self._errors: list[tuple[Any, str]] = []

        def num_errors(self) -> int:
            return len(self._errors)

        def get_error_code(self, index: int) -> Any:
            return self._errors[index][0]

        def get_error_desc(self, index: int) -> str:
            return self._errors[index][1]

        def has_overflowed(self) -> bool:
            return False

        def clear(self) -> None:
            self._errors.clear()

        def report_error(self, code: Any, description: str) -> bool:
            self._errors = [*self._errors[-7:], (code, description)]
            messages.add(description)
            return True

    return Recorder()


def _file_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", text)
