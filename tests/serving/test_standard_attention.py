"""Attention in standard operators: the engine's inputs and outputs are the same, and the cache is not copied."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from serving.directory import read_manifest
from serving.engine import Engine
from serving.export import Options, export_model
from serving.request import Sampling
from serving.session import Session
from serving.verify import verify

IN_PLACE_FAILED = "in-place optimization not activated"


@pytest.fixture(scope="module")
def standard_dir(model_dir, tmp_path_factory) -> Path:
    """The tiny Llama in fp32 for CUDA, to be read only."""
    folder = tmp_path_factory.mktemp("standard") / "llama"
    export_model(model_dir("llama"), folder, Options(optimize_for="cuda"))
    return folder


def test_the_graph_has_the_inputs_and_outputs_that_the_engine_knows(standard_dir, onnx_dir):
    standard, usual = (read_manifest(folder, "onnx") for folder in (standard_dir, onnx_dir))
    assert [standard["inputs"], standard["outputs"]] == [usual["inputs"], usual["outputs"]]
    assert [standard["optimize_for"], usual["optimize_for"]] == ["cuda", "cpu"]


def test_it_gives_transformers_tokens_in_a_crowd_with_chunks(standard_dir, source_tokens, prompts):
    engine = Engine.open(standard_dir, slots=4, step_tokens=7)
    found = engine.generate(prompts, Sampling(max_new_tokens=8, ignore_end=True))
    assert [request.output_ids for request in found] == source_tokens("llama", prompts, 8)


def test_the_cache_is_written_in_place(standard_dir, monkeypatch, capfd):
    import onnxruntime

    session = Session.open(standard_dir)
    loud = onnxruntime.InferenceSession(standard_dir / "model.onnx")  # which warns
    monkeypatch.setattr(session, "_session", loud)
    engine = Engine(read_manifest(standard_dir, "onnx"), session, slots=2)
    engine.generate([[5, 6, 7], [8]], Sampling(max_new_tokens=3, ignore_end=True))
    assert IN_PLACE_FAILED not in capfd.readouterr().err
    step = {"input_ids": [[5]], "position_ids": [[0]], "seqlens_k": [0], "total_length": 1, "keep": [0]}
    types = {each.name: np.int32 if "int32" in each.type else np.int64 for each in loud.get_inputs()}
    feeds = {name: np.array(value, types[name]) for name, value in step.items()}
    cache = {name: np.zeros((1, 2, 8, 8), np.float32) for name in types if name.startswith("past_")}
    loud.run(None, {**feeds, **cache})  # into memory of its own
    assert IN_PLACE_FAILED in capfd.readouterr().err


def test_half_precision_for_cuda_keeps_the_fused_attention(model_dir, tmp_path):
    import onnx

    export_model(model_dir("llama"), tmp_path / "onnx", Options(dtype="fp16", optimize_for="cuda"))
    nodes = [node.op_type for node in onnx.load(tmp_path / "onnx" / "model.onnx", load_external_data=False).graph.node]
    assert (nodes.count("GroupQueryAttention"), nodes.count("Attention")) == (2, 0)


def test_a_window_of_another_length_is_seen(save_model, tmp_path, change_graph, failed_checks):
    source = save_model(tmp_path / "model", "mistral", sliding_window=16)
    export_model(source, tmp_path / "onnx", Options(optimize_for="cuda"))

    def widen(graph):
        import numpy as np
        from onnx import numpy_helper

        [window] = [each for each in graph.initializer if each.name == "attention.1.16"]
        window.CopyFrom(numpy_helper.from_array(np.array([17], np.int64), window.name))

    change_graph(tmp_path / "onnx", widen)
    assert "logits_one_by_one" in failed_checks(tmp_path / "onnx")


def test_it_may_be_verified_again_from_a_copy(standard_dir, tmp_path):
    assert verify(shutil.copytree(standard_dir, tmp_path / "copy"))["passed"]
