"""Models: new from an architecture section, or any that transformers loads. Weights only from safetensors."""

from typing import Any

import torch
import transformers
from transformers import AutoConfig, LlamaConfig, PreTrainedTokenizerBase

from serving.directory import BadInput
from trainer.config import NewModel, PretrainedModel


def build_model(
    section: NewModel | PretrainedModel, tokenizer: PreTrainedTokenizerBase, head: str, labels: list[str] | None
) -> torch.nn.Module:
    """Return the model in fp32 with the head that `head` names (an AutoModelFor... class of transformers).

    `labels` sizes and names a classification head. New weights come from torch's global generator: seed it first.
    Raises BadInput if a pre-trained model cannot be loaded or the tokenizer has more entries than its embedding.
    """
    auto = getattr(transformers, head)
    extra: dict[str, Any] = {"pad_token_id": tokenizer.pad_token_id}
    if labels is not None:
        extra |= {"num_labels": len(labels), "id2label": dict(enumerate(labels)), "label2id": _numbered(labels)}
    if isinstance(section, NewModel):
        return auto.from_config(_new_config(section, tokenizer, extra), attn_implementation="sdpa").float()
    try:
        config = AutoConfig.from_pretrained(section.path, trust_remote_code=False, **extra)
        model = auto.from_pretrained(
            section.path, config=config, use_safetensors=True, trust_remote_code=False, dtype=torch.float32
        )
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise BadInput(f"model.path: no model can be loaded from {section.path} ({reason}); check the path") from None
    entries = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > entries:
        raise BadInput(f"tokenizer.path: {len(tokenizer)} entries, but {section.path} embeds {entries}; use its own")
    return model


def _new_config(section: NewModel, tokenizer: PreTrainedTokenizerBase, extra: dict[str, Any]) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=section.hidden_size,
        intermediate_size=section.intermediate_size,
        num_hidden_layers=section.num_layers,
        num_attention_heads=section.num_heads,
        num_key_value_heads=section.num_kv_heads,
        max_position_embeddings=section.context_length,
        tie_word_embeddings=section.tie_embeddings,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        **extra,
    )


def _numbered(labels: list[str]) -> dict[str, int]:
    return {label: number for number, label in enumerate(labels)}
