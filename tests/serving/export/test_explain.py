"""--explain tells what the graph is made of, who runs it, and what is in pieces."""

import onnx
import pytest

from serving.export import export_model
from serving.export.explain import explain


def test_the_nodes_are_those_of_the_file_and_each_is_run_by_the_provider(onnx_dir):
    found = explain(onnx_dir, "cpu")
    graph = onnx.load(onnx_dir / "model.onnx", load_external_data=False).graph
    assert found.nodes.total() == len(graph.node)
    assert found.nodes["GroupQueryAttention"] == 2
    assert found.runs["GroupQueryAttention", "CPUExecutionProvider"] == 2
    assert {provider for _, provider in found.runs} == {"CPUExecutionProvider"}


def test_what_is_left_in_pieces_is_named_with_how_often(model_dir, tmp_path, monkeypatch):
    from serving.export import graph

    monkeypatch.setattr(graph, "fuse", lambda model, context_length, target: None)
    export_model(model_dir("llama"), tmp_path / "llama")
    assert set(explain(tmp_path / "llama", "cpu").not_fused) == {
        "2 x queries, keys and values that come to attention one by one",
        "4 x rotary embedding of single nodes",
        "5 x norm of single nodes",
        "2 x silu of single nodes",
    }
    export_model(model_dir("gpt2"), tmp_path / "gpt2")
    assert {"2 x gelu of single nodes", "5 x sum that the norm after it could do"} <= set(
        explain(tmp_path / "gpt2", "cpu").not_fused
    )


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_a_graph_with_nothing_left_says_nothing(exported, kind):
    left = explain(exported(kind), "cpu").not_fused
    assert left == ([] if kind == "gpt2" else ["2 x queries, keys and values that come to attention one by one"])


def test_what_is_left_of_encoders_is_named(text_model, tmp_path, save_with_tokenizer):
    from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

    left = explain(text_model("bert", "label")[1], "cpu").not_fused
    assert left == ["2 x queries, keys and values that come to attention one by one"]
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = DebertaV2Config(
        vocab_size=320, max_position_embeddings=130, relative_attention=True, pos_att_type=["p2c", "c2p"],
        pad_token_id=0, num_labels=3, **sizes,
    )  # fmt: skip
    model = save_with_tokenizer(tmp_path / "model", DebertaV2ForSequenceClassification(config).eval())
    export_model(model, tmp_path / "onnx")
    assert explain(tmp_path / "onnx", "cpu").not_fused == ["2 x attention of single nodes (softmax)"]


def test_the_command_prints_it(model_dir, tmp_path, trivet):
    code, told, _ = trivet("export", model_dir("gpt2"), tmp_path / "onnx", "--explain")
    assert code == 0
    assert "nodes; onnxruntime runs" in told
    assert "GroupQueryAttention" in told
    assert "not fused: nothing that could be" in told
