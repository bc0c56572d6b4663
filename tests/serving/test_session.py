"""The session runs on the provider that was asked for, or says what to do."""

import numpy as np
import onnxruntime
import pytest

from serving.directory import BadInput
from serving.session import Session


def test_cuda_asked_for_and_not_installed_is_refused_with_the_repair(onnx_dir, monkeypatch):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(BadInput, match=r"provider: cuda was asked for.*has only CPUExecutionProvider.*pip install"):
        Session.open(onnx_dir, provider="cuda")


def test_cuda_that_falls_back_to_cpu_in_silence_is_refused(onnx_dir, monkeypatch):
    real = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    # What onnxruntime-gpu does where CUDA's libraries cannot be loaded: a session, on the CPU.
    monkeypatch.setattr(
        onnxruntime,
        "InferenceSession",
        lambda path, options, providers, **others: real(path, options, providers=["CPUExecutionProvider"]),
    )
    with pytest.raises(BadInput, match="fell back to CPUExecutionProvider"):
        Session.open(onnx_dir, provider="cuda")


def test_an_unknown_provider_names_the_accepted_ones(onnx_dir):
    with pytest.raises(BadInput, match="'tpu' is unknown; accepted: cpu, cuda"):
        Session.open(onnx_dir, provider="tpu")


def test_no_threads_is_refused(onnx_dir):
    with pytest.raises(BadInput, match="threads: 0 is out of range"):
        Session.open(onnx_dir, threads=0)


def test_on_cpu_the_cache_is_used_in_place(onnx_dir):
    array = np.zeros((2, 3), np.float32)
    placed = Session.open(onnx_dir).place({"keys.0": array})
    assert placed["keys.0"].data_ptr() == array.ctypes.data
