"""The only file that knows onnxruntime: open a graph on the provider that was asked for, bind its memory, run it."""

import contextlib
import io
import json
import os
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from serving.directory import BadInput, read_manifest
from serving.loras import read_stacks

# Before the import, and here too for who serves without the command line: it would send its maker the names and hashes
# of models, and keep a device id in the home folder.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime as ort
from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NoKernel

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
GRAPH = "model.onnx"
_NUMPY_TYPES = {
    "tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(float)": np.float32, "tensor(float16)": np.float16
}  # fmt: skip

# numpy has no bfloat16: its cache is made as uint16, all zeros, and bound under the number that ONNX gives the format.
_BFLOAT16 = 16
_CACHE_TYPES: dict[str, Any] = {
    "tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(bfloat16)": _BFLOAT16,
}  # fmt: skip
_BYTES = {"tensor(float)": 4, "tensor(float16)": 2, "tensor(bfloat16)": 2}

# In fp16 on the CPU it makes of a transposed activation before a MatMul what ends the process later on (1.31.1).
_SKIPPED_IN_HALF = ["MatmulTransposeFusion"]


Cache: TypeAlias = "dict[str, ort.OrtValue]"
Binding: TypeAlias = "ort.IOBinding"


def onnxruntime_version() -> str:
    """Return the version of the installed onnxruntime."""
    return ort.__version__


class RunFailed(RuntimeError):
    """A run of the graph ended with an error of onnxruntime, whose first line is the message."""


class Session:
    """One opened graph. `provider` is one of PROVIDERS, and is what really runs: never a silent fallback."""

    def __init__(
        self, session: ort.InferenceSession, provider: str, constants: Mapping[str, np.ndarray] | None = None
    ) -> None:
        self.provider = provider
        self._session = session
        self._device = "cpu" if provider == "cpu" else "cuda"
        self._input_types = {each.name: each.type for each in session.get_inputs()}
        self._constants = self._placed(constants or {})

    @classmethod
    def open(cls, folder: Path, *, provider: str = "cpu", threads: int | None = None) -> "Session":
        """Open the folder's graph; `threads` None leaves the number to onnxruntime.

        Raises BadInput when the provider is unknown, not part of this onnxruntime, did not start, or lacks an operator.
        """
        check_provider(provider)
        options = ort.SessionOptions()
        options.enable_mem_pattern = False  # it keeps one plan for each input shape seen; chunks come in many shapes
        if threads is not None:
            if threads < 1:
                raise BadInput(f"threads: {threads} is out of range; accepted: 1 or more, or leave it out")
            options.intra_op_num_threads = threads
        skipped = _skipped(Path(folder))
        try:
            session = _start(str(Path(folder) / GRAPH), provider, options, skipped)
        except NoKernel as error:
            reason = _first_line(error)
            raise BadInput(
                f"{folder}: {provider} lacks an operator of this graph ({reason}); take another provider, or export it "
                "for this one (--optimize-for, --dtype)"
            ) from None
        except BadInput:
            raise
        except Exception as error:  # onnxruntime's own have no common class
            reason = _first_line(error)
            raise BadInput(f"{folder}: onnxruntime cannot open its graph ({reason}); export the model again") from None
        return cls(session, provider, read_stacks(Path(folder)))

    @property
    def inputs(self) -> list[str]:
        """The names of the graph's inputs."""
        return list(self._input_types)

    def place(self, arrays: Mapping[str, np.ndarray]) -> Cache:
        """Return the cache where the provider computes: on cpu the same memory, on a GPU a copy on the device.

        Raises BadInput where the arrays are of another number format than the graph's.
        """
        for name, array in arrays.items():
            if (kind := self._input_types.get(f"past_{name}")) and _BYTES.get(kind) != array.itemsize:
                raise BadInput(
                    f"the manifest's dtype makes a cache of {array.dtype}, the graph asks for {kind}; "
                    "export the model again"
                )
        return self._placed(arrays)

    def _placed(self, arrays: Mapping[str, np.ndarray]) -> Cache:
        return {name: ort.OrtValue.ortvalue_from_numpy(array, self._device, 0) for name, array in arrays.items()}

    def bind(self, feeds: Mapping[str, np.ndarray], logits: np.ndarray, cache: Cache, first_slot: int) -> Binding:
        """Bind a run whose batch is rows [first_slot : first_slot + batch) of the cache, updated in place.

        The memory of `feeds`, `logits` and `cache` is used as it is on every run: fill it anew, run again. The caller
        keeps it alive. An input that the graph does not have (a model without position ids) is left out.
        """
        binding = self._session.io_binding()
        for name, array in feeds.items():
            if name in self._input_types:
                binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        binding.bind_output("logits", "cpu", 0, logits.dtype.type, logits.shape, logits.ctypes.data)
        for name, value in self._constants.items():
            kind = _CACHE_TYPES[self._input_types[name]]
            binding.bind_input(name, self._device, 0, kind, value.shape(), value.data_ptr())
        num_rows = len(feeds["input_ids"])
        for name, value in cache.items():
            _, *row_shape = value.shape()
            kind = self._input_types[f"past_{name}"]
            pointer = value.data_ptr() + first_slot * int(np.prod(row_shape)) * _BYTES[kind]
            shape = (num_rows, *row_shape)
            # The same pointer on both sides is what makes attention write the new keys and values in place.
            binding.bind_input(f"past_{name}", self._device, 0, _CACHE_TYPES[kind], shape, pointer)
            binding.bind_output(f"present_{name}", self._device, 0, _CACHE_TYPES[kind], shape, pointer)
        return binding

    def run(self, binding: Binding) -> None:
        """Run once; when this returns, the bound logits and cache rows hold the result. Raises RunFailed."""
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # onnxruntime's own have no common class
            raise RunFailed(_first_line(error)) from error

    def compute(self, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Run once over memory of its own; return the outputs in the graph's order, in its number format.

        Raises RunFailed.
        """
        try:
            return self._session.run(None, dict(feeds))
        except Exception as error:  # onnxruntime's own have no common class
            raise RunFailed(_first_line(error)) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def node_providers(folder: Path, provider: str) -> Counter[tuple[str, str]]:
    """Return how many nodes of each type each provider runs, after onnxruntime's own changes to the folder's graph.

    The graph is run once, on one token, under onnxruntime's profiler.
    """
    check_provider(provider)
    options = ort.SessionOptions()
    options.enable_profiling = True
    with tempfile.TemporaryDirectory() as scratch:
        options.profile_file_prefix = f"{scratch}/profile"
        session = _start(str(Path(folder) / GRAPH), provider, options, _skipped(Path(folder)))
        session.run(None, {each.name: _one_token(each) for each in session.get_inputs()})
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    ran = {event["name"]: event["args"] for event in events if event.get("name", "").endswith("_kernel_time")}
    return Counter((each["op_name"], each["provider"]) for each in ran.values())


def _one_token(graph_input: ort.NodeArg) -> np.ndarray:
    """Return the value of an input of the graph for one row of one token, the first of its text."""
    shape = [size if isinstance(size, int) else 1 for size in graph_input.shape]
    value = 1 if graph_input.name in ("total_length", "attention_mask") else 0
    return np.full(shape, value, _NUMPY_TYPES[graph_input.type])


def _skipped(folder: Path) -> Sequence[str]:
    """Return which of onnxruntime's optimizers a directory's graph is opened without."""
    return () if read_manifest(folder, "onnx").get("dtype") == "fp32" else _SKIPPED_IN_HALF


def why_not(graph: bytes, provider: str) -> str | None:
    """Return why the provider cannot run this graph here, in one line; None where it can."""
    try:
        check_provider(provider)
        _start(graph, provider, ort.SessionOptions())
    except Exception as error:  # onnxruntime's own have no common class
        return _first_line(error)
    return None


def _start(
    graph: str | bytes, provider: str, options: ort.SessionOptions, skipped: Sequence[str] = ()
) -> ort.InferenceSession:
    """Open a graph, a file or its bytes, without the `skipped` optimizers.

    Raises BadInput where another provider than the one asked for started.
    """
    options.log_severity_level = 3
    if provider != "cpu":
        # Its libraries come as Python packages; nothing but this tells the loader where they are.
        with contextlib.redirect_stdout(io.StringIO()):  # it prints those that it does not find
            ort.preload_dlls()
    # TensorRT has none of the operators of com.microsoft; what it does not take, CUDA runs.
    providers = [PROVIDERS[each] for each in ((provider, "cuda") if provider == "tensorrt" else (provider,))]
    session = ort.InferenceSession(graph, options, providers=providers, disabled_optimizers=list(skipped))
    _check_started(provider, session.get_providers()[0])
    return session


def check_provider(provider: str) -> None:
    """Raise BadInput when the provider is unknown or not part of the installed onnxruntime."""
    if provider not in PROVIDERS:
        raise BadInput(f"provider: {provider!r} is unknown; accepted: {', '.join(PROVIDERS)}")
    available = ort.get_available_providers()
    if PROVIDERS[provider] not in available:
        raise BadInput(
            f"provider: {provider} was asked for, but the installed onnxruntime {ort.__version__} has only "
            f"{', '.join(available)}; use provider cpu, or: pip uninstall -y onnxruntime onnxruntime-gpu && "
            "pip install onnxruntime-gpu"
        )


def _check_started(provider: str, running: str) -> None:
    if running != PROVIDERS[provider]:
        raise BadInput(
            f"provider: {provider} was asked for, but onnxruntime fell back to {running}: its libraries or the driver "
            "cannot be loaded; run `trivet doctor`, or use provider cpu"
        )
