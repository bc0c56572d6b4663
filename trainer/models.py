"""Models: new from an architecture section, or any that transformers loads. Weights only from safetensors."""

from typing import Any

import torch
import transformers
from transformers import PreTrainedTokenizerBase

from serving.directory import BadInput
from trainer.config import NewModel, PretrainedModel
from trainer.model_fit import check_loaded, check_padding, check_task, label_order, reorder_head, settle
from trainer.model_folder import UNLOADABLE, load_config, refuse_foreign_weights, tell_unloadable
from trainer.new_model import new_config
from trainer.strategies.heads import mark_new
from trainer.tokenizers import num_entries


def build_model(
    section: NewModel | PretrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    head: str,
    labels: list[str] | None,
    *,
    problem_type: str | None = None,
    attn_implementation: str | None = None,
) -> torch.nn.Module:
    """Return the model in fp32 with the head that `head` names (an AutoModelFor... class of transformers).

    `labels` sizes and names a classification head; its config says `problem_type`, if one is given.
    New weights come from torch's global generator: seed it first.
    `attn_implementation` names an attention function that transformers knows; by default its own choice.
    The tokenizer's longest text becomes the model's where it says none or a longer one.
    Raises BadInput if a pre-trained model cannot be loaded whole or the tokenizer has more entries than its embedding.
    """
    extra: dict[str, Any] = {} if problem_type is None else {"problem_type": problem_type}
    if labels is not None:
        extra |= {"num_labels": len(labels), "id2label": dict(enumerate(labels)), "label2id": _numbered(labels)}
    if isinstance(section, NewModel):
        config = new_config(section, tokenizer, head, extra)
        model = getattr(transformers, head).from_config(config, attn_implementation=attn_implementation).float()
    else:
        model = _load(section, tokenizer, head, labels, extra, attn_implementation)
        entries = model.get_input_embeddings().num_embeddings
        if (needed := num_entries(tokenizer)) > entries:
            raise BadInput(f"tokenizer.path: {needed} entries, but {section.path} embeds {entries}; use its own")
    settle(model, tokenizer)
    return model


def _load(
    section: PretrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    head: str,
    labels: list[str] | None,
    extra: dict[str, Any],
    attention: str | None,
) -> torch.nn.Module:
    path, trusted = section.path, section.trust_remote_code
    own = load_config(path, trusted=trusted)
    refuse_foreign_weights(path, own)
    check_task(path, own, head, trusted=trusted)
    order = label_order(path, own, labels, head) if labels is not None else None
    config = load_config(path, trusted=trusted, **extra)
    # A config.json may ask for attention code from the hub: what runs is chosen here.
    config._attn_implementation = attention
    try:
        # Sizes are compared by `check_loaded`: transformers would print a table and raise without a name.
        model, loaded = getattr(transformers, head).from_pretrained(
            path, config=config, use_safetensors=True, trust_remote_code=trusted, dtype=torch.float32,
            output_loading_info=True, ignore_mismatched_sizes=True,
        )  # fmt: skip
    except UNLOADABLE as error:
        raise BadInput(tell_unloadable(path, error)) from None
    check_loaded(path, model, loaded, new_head=labels is not None)
    mark_new(model, [*loaded["missing_keys"], *(name for name, *_ in loaded["mismatched_keys"])])
    check_padding(model, own.pad_token_id, tokenizer)
    if order is not None:
        reorder_head(model, order)
    return model


def _numbered(labels: list[str]) -> dict[str, int]:
    return {label: number for number, label in enumerate(labels)}
