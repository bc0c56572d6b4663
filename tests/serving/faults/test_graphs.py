"""Faults that are put into a graph on purpose, once the source has answered: each is refused, with the difference.

`benchmarks/support_tables.py` makes the table of docs/export.md from what the tests of this folder record.
"""

import shutil
from collections.abc import Callable

import pytest
import torch

from serving.export import export_model

Change = Callable[[torch.nn.Module, pytest.MonkeyPatch], None]


def another_lora_scale(model, monkeypatch) -> None:
    generator = torch.Generator().manual_seed(3)
    for layer in model.model.layers:
        weight = layer.self_attn.q_proj.weight
        a, b = (
            torch.randn(2, weight.shape[1], generator=generator),
            torch.randn(weight.shape[0], 2, generator=generator),
        )
        weight.data += (2.0 - 1.0) * 0.05 * b @ a  # merged with alpha / r = 2 instead of 1


def positions_shifted_by_one(model, monkeypatch) -> None:
    forward = model.forward
    monkeypatch.setattr(
        model, "forward", lambda *args, position_ids, **kw: forward(*args, position_ids=position_ids + 1, **kw)
    )


def two_layers_swapped(model, monkeypatch) -> None:
    layers = model.model.layers
    layers[0], layers[1] = layers[1], layers[0]
    for number, layer in enumerate(layers):
        layer.self_attn.layer_idx = number


def a_matrix_one_per_cent_too_large(model, monkeypatch) -> None:
    model.model.layers[1].mlp.down_proj.weight.data *= 1.01


def a_query_matrix_half_as_large_again(model, monkeypatch) -> None:
    model.model.layers[0].self_attn.q_proj.weight.data *= 1.5


def every_row_as_long_as_the_longest(model, monkeypatch) -> None:
    """Padding is taken for text: attention reads what lies beyond a row's end."""
    from serving.export import graph

    forward = graph.Step.forward

    def forgets_lengths(self, input_ids, position_ids, seqlens_k, total_length, keep, past):
        return forward(self, input_ids, position_ids, seqlens_k * 0 + total_length - 1, total_length, keep, past)

    monkeypatch.setattr(graph.Step, "forward", forgets_lengths)


def attention_without_its_scale(model, monkeypatch) -> None:
    for layer in model.model.layers:
        layer.self_attn.scaling = 0.5


def a_norm_without_its_epsilon(model, monkeypatch) -> None:
    for layer in model.model.layers:
        layer.input_layernorm.variance_epsilon = 1.0


AFTER_THE_SOURCE_ANSWERED = {
    "LoRA merged with another scale": ("llama", another_lora_scale),
    "position ids shifted by one": ("gpt2", positions_shifted_by_one),
    "two layers swapped": ("llama", two_layers_swapped),
    "a matrix 1 % too large": ("llama", a_matrix_one_per_cent_too_large),
    "a query matrix x1.5": ("llama", a_query_matrix_half_as_large_again),
    "padding taken for text": ("gpt2", every_row_as_long_as_the_longest),
    "another attention scale": ("llama", attention_without_its_scale),
    "another norm epsilon": ("llama", a_norm_without_its_epsilon),
}


@pytest.mark.parametrize("fault", AFTER_THE_SOURCE_ANSWERED)
def test_a_fault_of_the_graph_is_refused_with_the_difference(fault, model_dir, refused, monkeypatch):
    kind = put_into_the_graph(fault, monkeypatch)
    evidence = r"(logits differ by [0-9.e+-]+, accepted [0-9.e-]+|cannot be run)"
    refused(model_dir(kind), f"nothing was published: .*{evidence}")


@pytest.mark.parametrize("quantization", ["int8-weights", "int4"])
@pytest.mark.parametrize("fault", ["LoRA merged with another scale", "a query matrix x1.5", "two layers swapped"])
def test_a_fault_is_not_hidden_by_rounding(fault, quantization, model_dir, refused, monkeypatch):
    """It costs less perplexity than quantisation may: only the graph before rounding shows it."""
    kind = put_into_the_graph(fault, monkeypatch)
    evidence = r"published: before quantisation, in fp32: logits_one_by_one: logits differ by [0-9.e+-]+, accepted"
    refused(model_dir(kind), evidence, quantization=quantization)


def put_into_the_graph(fault: str, monkeypatch) -> str:
    """Let the next export have the fault once the source has answered; return the kind of model that it is for."""
    from serving.export import decoder

    kind, change = AFTER_THE_SOURCE_ANSWERED[fault]
    write_graph = decoder.write_graph

    def faulty(model, source, options, path):
        change(model, monkeypatch)
        return write_graph(model, source, options, path)

    monkeypatch.setattr(decoder, "write_graph", faulty)
    return kind


def test_a_half_precision_overflow_is_refused(model_dir, refused, tmp_path):
    model = shutil.copytree(model_dir("llama"), tmp_path / "model")
    from safetensors.torch import load_file, save_file

    weights = load_file(model / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] *= 3e4
    weights["model.layers.0.mlp.down_proj.weight"] *= 3e-4
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    export_model(model, tmp_path / "fp32")
    shutil.rmtree(tmp_path / "fp32")
    refused(model, "65504", dtype="fp16")
