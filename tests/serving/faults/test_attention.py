"""What attention is asked for and the exported one does not do: refused before any work."""

import torch


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
