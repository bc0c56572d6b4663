"""Faults that show only beyond the prompts of the proof: it looks far on too."""

from pathlib import Path

import numpy as np
import pytest

from serving.export import export_model


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


@pytest.mark.parametrize("part", [0.25, 0.5, 0.75])
def test_learned_positions_that_are_wrong_in_the_middle_of_the_context_are_refused(
    tmp_path, save_with_tokenizer, change_graph, failed_checks, part
):
    from onnx import numpy_helper
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=320, n_embd=32, n_layer=2, n_head=4, n_positions=2048, bos_token_id=0, eos_token_id=0
    )
    export_model(save_with_tokenizer(tmp_path / "model", GPT2LMHeadModel(config).eval()), tmp_path / "onnx")

    def forget(graph):
        [table] = [each for each in graph.initializer if list(each.dims) == [2048, 32]]
        positions = numpy_helper.to_array(table).copy()
        middle = int(2048 * part)
        positions[middle - 30 : middle + 30] = 0
        table.CopyFrom(numpy_helper.from_array(positions, table.name))

    change_graph(tmp_path / "onnx", forget)
    assert failed_checks(tmp_path / "onnx") == ["logits_far_on"]


# --- models over whole texts -----------------------------------------------------------------------------------------


LONG = {"max_position_embeddings": 700}  # where the others of its proof end at 512 tokens


@pytest.mark.parametrize("asked", ["label", "tags", "masks", "vector", "pair"])
def test_the_longest_text_that_is_served_is_asked_about_first(tmp_path, save_text_model, asked):
    """Its answer is compared by hand, beside transformers' of the same tokens."""
    import torch
    import transformers

    from serving.verify_rows import Reference

    model = save_text_model(tmp_path / "model", "bert", asked, **LONG)
    export_model(model, tmp_path / "onnx")
    reference = Reference.load(tmp_path / "onnx")
    lengths = [len(row.ids) for row in reference.rows]
    assert 680 <= lengths[0] <= 700
    assert max(lengths[1:]) == 512 if asked != "masks" else max(lengths[1:]) <= 512
    if asked == "label":
        source = transformers.AutoModelForSequenceClassification.from_pretrained(model).eval()
        with torch.no_grad():
            logits = source(torch.tensor([reference.rows[0].ids])).logits.numpy()
        np.testing.assert_allclose(reference.outputs_RL[:1], logits, atol=1e-5)


def test_far_positions_of_a_text_that_are_wrong_are_refused(tmp_path, save_text_model, change_graph, failed_checks):
    from onnx import numpy_helper

    from serving.task_engine import TaskEngine

    model = save_text_model(tmp_path / "model", "bert", "label", **LONG)
    export_model(model, tmp_path / "onnx")

    def shift(graph):
        [table] = [each for each in graph.initializer if list(each.dims) == [700, 32]]
        positions = numpy_helper.to_array(table).copy()
        positions[600:] = positions[600:][::-1]
        table.CopyFrom(numpy_helper.from_array(positions, table.name))

    change_graph(tmp_path / "onnx", shift)
    failed = failed_checks(tmp_path / "onnx", opened_by=TaskEngine)
    assert failed == ["logits_one_by_one", "logits_padded_batch", "answers"]


def test_attention_that_is_another_for_long_texts_is_refused(tmp_path, refused, save_with_tokenizer):
    """A short text turns BigBird's sparse attention off for good: the model is no more what it was."""
    from transformers import BigBirdConfig, BigBirdForSequenceClassification

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = BigBirdConfig(
        vocab_size=320, max_position_embeddings=768, block_size=16, num_random_blocks=1, num_labels=3, **sizes
    )
    model = save_with_tokenizer(tmp_path / "model", BigBirdForSequenceClassification(config).eval())
    refused(model, "published: logits_one_by_one: logits differ")
