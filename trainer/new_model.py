"""New models: a Llama that reads to the left, a BERT that reads both ways.

Both take position ids and call transformers' attention interface once a layer with nothing but queries, keys, values
and a mask, so that rows can be packed; both are exported. ModernBERT reads longer texts, but two attentions take turns
in it (global, sliding window) and it knows no token types, by which a BERT tells the texts of a pair apart.
"""

from typing import Any

from transformers import BertConfig, LlamaConfig, PretrainedConfig, PreTrainedTokenizerBase

from serving.directory import BadInput
from trainer.config import NewModel
from trainer.tokenizers import num_entries

_REFUSED = {
    ("decoder", "AutoModelForMaskedLM"): "objective.type masked_lm hides tokens from a model that reads both ways",
    ("encoder", "AutoModelForCausalLM"): "objective.type causal_lm and sft predict from the left only",
}


def new_config(
    section: NewModel, tokenizer: PreTrainedTokenizerBase, head: str, extra: dict[str, Any]
) -> PretrainedConfig:
    """Return the config of a new model with `head`, its vocabulary and special tokens those of the tokenizer.

    Raises BadInput where the architecture cannot learn what the head is for.
    """
    if reason := _REFUSED.get((section.architecture, head)):
        other = "encoder" if section.architecture == "decoder" else "decoder"
        raise BadInput(f"model.architecture: {section.architecture} found, but {reason}; accepted: {other}")
    sizes: dict[str, Any] = {
        "vocab_size": num_entries(tokenizer),
        "hidden_size": section.hidden_size,
        "intermediate_size": section.intermediate_size,
        "num_hidden_layers": section.num_layers,
        "num_attention_heads": section.num_heads,
        "max_position_embeddings": section.context_length,
        "tie_word_embeddings": section.tie_embeddings,
        "eos_token_id": tokenizer.eos_token_id,
        # The embedding of this id never learns from being read, which an end token must.
        "pad_token_id": None if tokenizer.pad_token_id == tokenizer.eos_token_id else tokenizer.pad_token_id,
    }
    if section.architecture == "decoder":
        return LlamaConfig(**sizes, num_key_value_heads=section.num_kv_heads, bos_token_id=None, **extra)
    # Dropout, BERT's own habit, makes packed rows differ from unpacked ones and slows learning from few passes.
    return BertConfig(**sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **extra)
