"""Attention over whole texts as one operator: that it is there, with masks that are right, or not there at all."""

import onnx
import pytest
import torch

from serving.export import export_model, whole_attention


def attention_of(onnx_dir):
    """Return the operators' (padding mask, additive mask) inputs: "" where one is not there."""
    graph = onnx.load(onnx_dir / "model.onnx", load_external_data=False).graph
    nodes = [node for node in graph.node if node.op_type == "MultiHeadAttention"]
    return [(node.input[4], node.input[5] if len(node.input) > 5 else "") for node in nodes]


@pytest.mark.parametrize(
    ("kind", "asked"), [("bert", "label"), ("distilbert", "tags"), ("electra", "labels"), ("roberta", "masks")]
)
def test_an_encoders_attention_is_one_operator_a_layer_that_takes_the_padding_alone(text_model, kind, asked):
    masks = attention_of(text_model(kind, asked)[1])
    assert len(masks) == 2
    assert all(padding and not added for padding, added in masks)


@pytest.mark.parametrize(("kind", "asked"), [("llama", "tags"), ("gpt2", "number")])
def test_a_decoder_over_whole_texts_keeps_its_causal_mask(text_model, kind, asked):
    masks = attention_of(text_model(kind, asked)[1])
    assert len(masks) == 2
    assert all(added and not padding for padding, added in masks)


def test_a_window_shorter_than_the_texts_is_kept(save_text_model, tmp_path):
    source = save_text_model(tmp_path / "model", "mistral", "tags", sliding_window=8)
    record = export_model(source, tmp_path / "onnx")
    assert record["passed"]
    assert len(attention_of(tmp_path / "onnx")) == 2


def test_a_causal_mask_that_is_left_out_is_seen(text_model, tmp_path, change_graph, failed_checks):
    import shutil

    from serving.tasks import Tagger

    def see_all(graph):
        for node in graph.node:
            if node.op_type == "MultiHeadAttention":
                node.input[5] = ""

    folder = tmp_path / "onnx"
    shutil.copytree(text_model("llama", "tags")[1], folder)
    change_graph(folder, see_all)
    assert failed_checks(folder, Tagger) == ["logits_one_by_one", "logits_padded_batch", "answers"]


@pytest.mark.parametrize(
    ("asked", "named"),
    [({"s_aux": torch.zeros(4)}, "s_aux"), ({"softcap": 30.0}, "softcap"), ({"dropout": 0.1}, "dropout")],
)
def test_what_the_operator_does_not_do_is_refused_not_ignored(asked, named):
    rows, module = torch.zeros(2, 4, 3, 8), torch.nn.Linear(1, 1)
    with pytest.raises(whole_attention.CannotFuse, match=f"Linear asks attention for .*{named}"):
        whole_attention.whole_attention(module, rows, rows, rows, torch.ones(2, 3), **asked)
    with pytest.raises(whole_attention.CannotFuse, match="no mask"):
        whole_attention.whole_attention(module, rows, rows, rows, None)


def test_a_model_that_asks_for_more_is_exported_with_its_own_attention(save_text_model, tmp_path, monkeypatch):
    """Gemma 2 bends its attention scores (softcap)."""
    from transformers import Gemma2Config

    config = Gemma2Config(
        vocab_size=320, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=64, max_position_embeddings=128, attn_logit_softcapping=2.0, sliding_window=16,
        pad_token_id=0, bos_token_id=0, eos_token_id=0, id2label={0: "O", 1: "B-X"}, label2id={"O": 0, "B-X": 1},
    )  # fmt: skip
    monkeypatch.setitem(save_text_model.__globals__, "_classifier_config", lambda kind, **changes: config)
    source = save_text_model(tmp_path / "model", "gemma2", "tags")
    assert export_model(source, tmp_path / "onnx")["passed"]
    assert attention_of(tmp_path / "onnx") == []
