"""Faults that are put into an export on purpose: each is refused, with the evidence, and nothing is published.

`benchmarks/support_tables.py` makes the table of docs/export.md from what these tests record.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from serving.directory import BadInput
from serving.export import HeldOutRows, Options, export_model
from serving.verify import verify

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


@pytest.fixture
def refused(tmp_path, record_property):
    """Return a function that exports, expects a refusal that says `evidence`, and that nothing is left of it."""

    def by(model: Path, evidence: str, **options) -> None:
        held_out = (
            HeldOutRows([{"text": "the quick brown fox " * 200}], "one fox") if "quantization" in options else None
        )
        with pytest.raises(BadInput, match=evidence) as caught:
            export_model(model, tmp_path / "onnx", Options(**options), held_out=held_out)
        assert not (tmp_path / "onnx").exists()
        assert not list(tmp_path.glob(".*"))
        record_property(
            "evidence",
            str(caught.value).replace(str(tmp_path), "").partition("published: ")[2]
            or str(caught.value).rpartition("/")[2],
        )

    return by


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


def another_tokenizer(tokenizer, folder, make_tokenizer) -> None:
    make_tokenizer(text="a wholly other text about llamas, ducks and geese").save_pretrained(folder)


def another_template(tokenizer, folder, make_tokenizer) -> None:
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>\n", "<|im_end|>")
    type(tokenizer).save_pretrained(tokenizer, folder)


@pytest.mark.parametrize(
    ("saved", "evidence"), [(another_tokenizer, "texts, chats and decodings differ, first encode"),
                            (another_template, "texts, chats and decodings differ, first chat")],
    ids=["another tokenizer", "another chat template"],
)  # fmt: skip
def test_a_fault_of_the_text_is_refused_with_the_first_text(
    saved, evidence, model_dir, refused, monkeypatch, make_tokenizer
):
    from serving.export.source import Source

    load = Source.load_tokenizer

    def faulty(source):
        tokenizer = load(source)
        tokenizer.save_pretrained = lambda folder: saved(tokenizer, folder, make_tokenizer)
        return tokenizer

    monkeypatch.setattr(Source, "load_tokenizer", faulty)
    refused(model_dir("llama"), evidence)


def of_an_older_export(folder: Path, exported) -> None:
    shutil.copyfile(exported("gpt2") / "model.onnx.data", folder / "model.onnx.data")


def one_bit(folder: Path, exported) -> None:
    data = bytearray((folder / "model.onnx.data").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "model.onnx.data").write_bytes(data)


def cut_short(folder: Path, exported) -> None:
    data = (folder / "model.onnx.data").read_bytes()
    (folder / "model.onnx.data").write_bytes(data[:-64])


def elsewhere(folder: Path, exported) -> None:
    (folder / "model.onnx.data").rename(folder.parent / "weights")
    (folder / "model.onnx.data").symlink_to(folder.parent / "weights")


@pytest.mark.parametrize(
    ("change", "evidence"),
    [
        (of_an_older_export, "altered since it was written"),
        (one_bit, "altered since it was written"),
        (cut_short, "altered since it was written"),
        (elsewhere, "points outside the directory"),
    ],
)
def test_external_data_that_is_not_what_was_written_is_refused(onnx_copy, exported, record_property, change, evidence):
    change(onnx_copy, exported)
    with pytest.raises(BadInput, match=evidence) as caught:
        verify(onnx_copy)
    record_property("evidence", str(caught.value).rpartition("/")[2])


def test_external_data_in_another_folder_is_refused_although_the_hashes_are_right(
    onnx_copy, change_graph, reseal, record_property
):
    import onnx

    model = onnx.load(onnx_copy / "model.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../weights"
    shutil.copyfile(onnx_copy / "model.onnx.data", onnx_copy.parent / "weights")
    onnx.save(model, onnx_copy / "model.onnx")
    reseal(onnx_copy)
    with pytest.raises(BadInput, match="escapes model directory") as caught:
        verify(onnx_copy)
    record_property("evidence", str(caught.value))


def test_attention_sinks_are_refused_before_any_work(tmp_path, refused, save_with_tokenizer, tiny_config):
    from transformers import AutoModelForCausalLM

    model = save_with_tokenizer(tmp_path / "model", AutoModelForCausalLM.from_config(tiny_config("gpt_oss")))
    refused(model, "asks attention for s_aux, which the exported attention does not do")


def test_a_bias_that_attention_would_ignore_is_refused_before_any_work(model_dir, refused, monkeypatch):
    from transformers.models.gpt2 import modeling_gpt2

    forward = modeling_gpt2.GPT2Attention.forward

    def biased(self, hidden_states, *args, **kwargs):
        return forward(self, hidden_states, *args, **kwargs, position_bias=torch.ones(()))

    monkeypatch.setattr(modeling_gpt2.GPT2Attention, "forward", biased)
    refused(model_dir("gpt2"), "asks attention for position_bias, which the exported attention does not do")


def test_a_stale_proof_is_refused_by_who_serves(onnx_copy, record_property):
    from serving.engine import Engine

    records = json.loads((onnx_copy / "verification.json").read_text())
    records["records"][-1]["onnxruntime"] = "1.0.0"
    (onnx_copy / "verification.json").write_text(json.dumps(records))
    with pytest.raises(
        BadInput, match=r"verified with onnxruntime 1\.0\.0, this is .* \(stale\); run: trivet verify"
    ) as caught:
        Engine.open(onnx_copy)
    record_property("evidence", str(caught.value).partition(": ")[2])


def long_mistral(folder: Path, save) -> Path:
    """Save a model whose window and context are longer than every prompt of the proof."""
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=320, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=96, max_position_embeddings=2048, sliding_window=400, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return save(folder, MistralForCausalLM(config).eval())


def test_a_window_longer_than_the_prompts_that_is_forgotten_is_refused(
    tmp_path, refused, save_with_tokenizer, monkeypatch
):
    from serving.export.attention import InPlaceAttention

    attend = InPlaceAttention.__call__

    def forgetful(self, *args, sliding_window=None, **kwargs):
        return attend(self, *args, sliding_window=None if self.past else sliding_window, **kwargs)

    monkeypatch.setattr(InPlaceAttention, "__call__", forgetful)
    refused(long_mistral(tmp_path / "model", save_with_tokenizer), "published: logits_far_on: logits differ")


def test_rotary_tables_that_are_wrong_beyond_the_prompts_are_refused(
    tmp_path, refused, save_with_tokenizer, monkeypatch
):
    from serving.export.rotary_tables import RotaryTables

    write = RotaryTables._initializer

    def cut(self, name, table, like):
        table = table.copy()
        table[400:] = 0
        return write(self, name, table, like)

    monkeypatch.setattr(RotaryTables, "_initializer", cut)
    refused(long_mistral(tmp_path / "model", save_with_tokenizer), "published: logits_far_on: logits differ")
