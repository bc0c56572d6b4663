"""Faults that show only beyond the prompts of the proof: it looks far on too."""

from pathlib import Path


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
