"""A decoder for text: the graph over a cache in place, greedy continuations as the reference, and its settings."""

import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from serving import generation_config
from serving.export.graph import write_graph
from serving.export.reference import write_reference
from serving.export.source import Source

__all__ = ["write_graph", "write_reference", "write_settings"]


def write_settings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: Source, folder: Path
) -> dict[str, Any]:
    """Write generation_config.json; return what the engine needs to know, for the manifest."""
    settings = source.body / generation_config.NAME
    if settings.is_file():
        shutil.copyfile(settings, folder / settings.name)
    else:
        model.generation_config.to_json_file(folder / settings.name)
    return {
        "num_layers": len(source.layers),
        "num_kv_heads": source.layers[0].num_kv_heads,
        "head_dim": source.layers[0].head_dim,
        "vocab_size": source.config.vocab_size,
        "context_length": source.config.max_position_embeddings,
        "loras": [adapter.name for adapter in source.loras],
        "end_token_ids": _end_token_ids(model, tokenizer),
    }


def _end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that end an answer: what generation_config.json says, else the tokenizer's end token."""
    ids = model.generation_config.eos_token_id
    if ids is None:
        ids = tokenizer.eos_token_id
    if ids is None:
        return []
    return sorted(ids) if isinstance(ids, list) else [ids]
