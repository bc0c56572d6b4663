"""Which onnxruntime providers really take a session, and really run the kernel that decoding needs."""

import contextlib
import io
import math
import os
from typing import Any

from launch.doctor import repair
from launch.doctor.findings import Finding, collect

TRIED_PROVIDERS = {"CUDAExecutionProvider": "cuda", "CPUExecutionProvider": "cpu"}  # those that `trivet serve` offers

# An ONNX graph of one Identity node (float x[1] -> y[1]), to see which provider really takes a session.
IDENTITY_ONNX = bytes.fromhex(
    "08083a370a100a017812017922084964656e746974791201675a0f0a0178120a0a08080112040a020801620f0a"
    "0179120a0a08080112040a02080142040a00100d"
)
# An ONNX graph of one com.microsoft GroupQueryAttention node: one row, one head of size 8, scale 1, a cache of two
# tokens. Inputs q k v [1, 1, 8], pk pv [1, 1, 2, 8], s t int32 [1] (tokens before this one; with it); outputs o nk nv.
ATTENTION_ONNX = bytes.fromhex(
    "08083a81030a7e0a01710a016b0a01760a02706b0a0270760a01730a017412016f12026e6b12026e76221347726f75705175657279417474"
    "656e74696f6e2a130a0c6b765f6e756d5f68656164731801a001022a100a096e756d5f68656164731801a001022a0f0a057363616c651500"
    "00803fa001013a0d636f6d2e6d6963726f736f66741201675a170a017112120a100801120c0a0208010a0208010a0208085a170a016b1212"
    "0a100801120c0a0208010a0208010a0208085a170a017612120a100801120c0a0208010a0208010a0208085a1c0a02706b12160a14080112"
    "100a0208010a0208010a0208020a0208085a1c0a02707612160a14080112100a0208010a0208010a0208020a0208085a0f0a0173120a0a08"
    "080612040a0208015a0f0a0174120a0a08080612040a02080162170a016f12120a100801120c0a0208010a0208010a020808621c0a026e6b"
    "12160a14080112100a0208010a0208010a0208020a020808621c0a026e7612160a14080112100a0208010a0208010a0208020a0208084204"
    "0a00101242110a0d636f6d2e6d6963726f736f66741001"
)
# The same graph in half precision: the CUDA kernel takes no other. Element type 1 is float, 10 is float16.
ATTENTION_ONNX_HALF = ATTENTION_ONNX.replace(b"\x08\x01\x12", b"\x08\x0a\x12")


def serving(gpus: list[str]) -> list[Finding]:
    """Return which providers take a session, what attention gives on each, and how many threads one starts."""
    import onnxruntime

    if not hasattr(onnxruntime, "get_available_providers"):
        fix = repair.pip("install", "--force-reinstall", "--no-deps", "onnxruntime")
        return [Finding("onnxruntime", "an empty shell: another wheel's removal took its files", "problem", fix)]
    offered = onnxruntime.get_available_providers()
    working = [name for name in offered if name in TRIED_PROVIDERS and takes_a_session(onnxruntime, name)]
    checks = [lambda name=name: [decoding_attention(onnxruntime, name)] for name in working]
    return [
        _runs_on(onnxruntime.__version__, offered, working, gpus),
        *collect([*checks, lambda: threads(onnxruntime)], repair.reinstall()),
    ]


def _runs_on(version: str, offered: list[str], working: list[str], gpus: list[str]) -> Finding:
    subject = "serving runs on"
    found = ", ".join(name.removesuffix("ExecutionProvider") for name in working)
    if not working:
        return Finding(subject, "nothing: no provider takes a session", "problem", repair.reinstall())
    if "CUDAExecutionProvider" in offered and "CUDAExecutionProvider" not in working and gpus:
        fix = f"{repair.extra('serve-gpu')}  # it brings CUDA 13 and cuDNN 9"
        return Finding(subject, f"{found}; CUDA is offered but does not load", "problem", fix)
    if gpus and "CUDAExecutionProvider" not in offered:
        fix = f"{repair.pip('uninstall', '-y', 'onnxruntime')} && {repair.extra('serve-gpu')}"
        return Finding(subject, f"{found}; this onnxruntime has no CUDA", "note", fix)
    return Finding(subject, f"{found} (onnxruntime {version})")


def takes_a_session(onnxruntime: Any, provider: str) -> bool:
    """Whether a session really runs there: onnxruntime lists CUDA even where its libraries cannot be loaded."""
    if provider == "CUDAExecutionProvider" and hasattr(onnxruntime, "preload_dlls"):
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it cannot find
            onnxruntime.preload_dlls()
    try:
        return provider in _session(onnxruntime, IDENTITY_ONNX, provider).get_providers()
    except Exception:  # onnxruntime raises its own C++ exception types
        return False


def decoding_attention(onnxruntime: Any, provider: str) -> Finding:
    """Decode one token with the cache updated in place, as the engine does, and compare with the value by hand.

    The query is (1, 0 ...); the keys are 0 and (ln 3, 0 ...), so that the weights are 1/4 and 3/4; the values are 4
    and 8. So attention is 7, and the second row of the cache holds the new key and value.
    """
    import numpy as np

    device = TRIED_PROVIDERS[provider]
    dtype: Any
    dtype, graph = (np.float32, ATTENTION_ONNX) if device == "cpu" else (np.float16, ATTENTION_ONNX_HALF)
    first = np.eye(1, 8, dtype=dtype)[None]  # [1, 1, 8]
    keys, values = np.zeros((2, 1, 1, 2, 8), dtype)
    values[0, 0, 0] = 4
    session = _session(onnxruntime, graph, provider)
    binding = session.io_binding()
    token = {"q": first, "k": first * dtype(math.log(3)), "v": np.full_like(first, 8)}
    lengths = {"s": np.array([1], np.int32), "t": np.array([2], np.int32)}
    for name, array in (token | lengths).items():
        binding.bind_cpu_input(name, array)
    binding.bind_output("o")
    cache = {"k": keys, "v": values}
    placed = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array, device, 0) for name, array in cache.items()}
    for name, value in placed.items():
        binding.bind_ortvalue_input(f"p{name}", value)
        binding.bind_ortvalue_output(f"n{name}", value)
    session.run_with_iobinding(binding)
    out = binding.get_outputs()[0].numpy()
    new_key, new_value = (placed[name].numpy()[0, 0, 1, 0] for name in "kv")
    error = max(np.abs(out - 7).max(), abs(new_key - math.log(3)), abs(new_value - 8))
    subject, found = f"decoding on {device}", f"GroupQueryAttention in {np.dtype(dtype)}, the cache in place"
    if not error < 0.02:  # room for half precision
        found, fix = f"{found}: wrong by {error:.2g}", repair.reinstall()
        return Finding(subject, found, "problem", fix, value=float(error), unit="largest error")
    return Finding(subject, found)


def threads(onnxruntime: Any) -> list[Finding]:
    """How many threads a session computes with by itself: those that start with it, and the caller's."""
    before = _num_threads()
    session = _session(onnxruntime, IDENTITY_ONNX, "CPUExecutionProvider")
    num_threads = 1 + _num_threads() - before
    del session
    found = f"{num_threads} a session (onnxruntime's own choice)"
    return [Finding("serving threads", found, value=num_threads, unit="threads")]


def _num_threads() -> int:
    return len(os.listdir("/proc/self/task"))


def _session(onnxruntime: Any, graph: bytes, provider: str) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # a provider that cannot load is what we are looking for
    return onnxruntime.InferenceSession(graph, options, providers=[provider])
