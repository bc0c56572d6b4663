"""Models: new from an architecture section, or any that transformers loads. Weights only from safetensors."""

import hashlib
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, LlamaConfig, PreTrainedTokenizerBase

from serving import directory
from serving.directory import BadInput
from trainer.config import NewModel, PretrainedModel


def build_model(
    section: NewModel | PretrainedModel, tokenizer: PreTrainedTokenizerBase, head: str, labels: list[str] | None
) -> torch.nn.Module:
    """Return the model in fp32 with the head that `head` names (an AutoModelFor... class of transformers).

    `labels` sizes and names a classification head. New weights come from torch's global generator: seed it first.
    Raises BadInput if a pre-trained model cannot be loaded whole or the tokenizer has more entries than its embedding.
    """
    auto = getattr(transformers, head)
    extra: dict[str, Any] = {"pad_token_id": tokenizer.pad_token_id}
    if labels is not None:
        extra |= {"num_labels": len(labels), "id2label": dict(enumerate(labels)), "label2id": _numbered(labels)}
    if isinstance(section, NewModel):
        return auto.from_config(_new_config(section, tokenizer, extra), attn_implementation="sdpa").float()
    if labels is not None:
        _check_labels(section.path, labels)
    try:
        config = AutoConfig.from_pretrained(section.path, trust_remote_code=False, **extra)
        # Sizes are compared by `_check_loaded`: transformers would print a table and raise without a name.
        model, loaded = auto.from_pretrained(
            section.path, config=config, use_safetensors=True, trust_remote_code=False, dtype=torch.float32,
            output_loading_info=True, ignore_mismatched_sizes=True,
        )  # fmt: skip
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise BadInput(f"model.path: no model can be loaded from {section.path} ({reason}); check the path") from None
    _check_loaded(section.path, model, loaded, new_head=labels is not None)
    entries = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > entries:
        raise BadInput(f"tokenizer.path: {len(tokenizer)} entries, but {section.path} embeds {entries}; use its own")
    return model


def check_folder(path: str) -> None:
    """Raise BadInput if `path` is a folder in which no model lies."""
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        raise BadInput(f"model.path: {path}: holds no config.json, so it is no model folder; check the path")


def check_length(model: torch.nn.Module, max_length: int) -> None:
    """Raise BadInput if rows of `max_length` tokens are longer than the model is made for."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and max_length > longest:
        raise BadInput(f"batch.max_length: {max_length} found; the model takes at most {longest}; lower it")


def fingerprint(path: str) -> str | None:
    """Return a hash of the model in a folder (None for a hub name).

    Raises DirectoryError if the folder has a trivet.json and any file is not as that says.
    """
    folder = Path(path)
    if not folder.is_dir():
        return None
    if (folder / directory.MANIFEST).exists():
        directory.check_files(folder, directory.read_manifest(folder, "model"))
        return directory.identity(folder)
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    hashes = [f"{file.name} {directory.sha256(file)}" for file in files if file.is_file()]
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def _check_labels(path: str, labels: list[str]) -> None:
    """Raise BadInput if the model is a classifier already, of other labels than these; names like LABEL_0 are none."""
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError):
        return  # said where the model is loaded
    is_classifier = any("ForSequenceClassification" in name for name in config.architectures or ())
    known = [str(name) for name in (config.id2label or {}).values()]
    unnamed = all(name == f"LABEL_{number}" for number, name in enumerate(known))
    if is_classifier and (len(known) != len(labels) or not (unnamed or set(known) == set(labels))):
        raise BadInput(
            f"model.path: {path} tells {_shown(known)} apart, but data.label has {_shown(labels)}; use the model that "
            "it was made from, or data with its labels"
        )


def _shown(labels: list[str]) -> str:
    return ", ".join(labels[:10]) + (f" and {len(labels) - 10} more" if len(labels) > 10 else "")


def _check_loaded(path: str, model: torch.nn.Module, loaded: dict[str, Any], *, new_head: bool) -> None:
    """Raise BadInput naming weights that the files lack or hold in another shape; transformers made those up."""
    body = f"{model.base_model_prefix}."
    missing = sorted(name for name in loaded["missing_keys"] if name.startswith(body) or not new_head)
    other_shape = sorted(name for name, *_ in loaded["mismatched_keys"])
    for names, what in ((missing, "missing"), (other_shape, "of another shape than this run needs")):
        if names:
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise BadInput(f"model.path: {path}: weights {what}: {shown}; get the whole model again")


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
