"""Weights read whole, as they were saved, and refused where something is missing or no number."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from serving.export.attention import ExportError


def read_model(auto_class: Any, folder: Path, *, unused: str | None = None) -> PreTrainedModel:
    """Return the model of a folder in fp32 with its own plain attention.

    Raises ExportError when the weights cannot be read or are not all there: transformers would make up the rest. Those
    whose names begin with `unused` may be missing.
    """
    try:
        model, loaded = auto_class.from_pretrained(
            folder,
            dtype=torch.float32,
            attn_implementation="eager",
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # so that the names of the tensors are told
            output_loading_info=True,
        )
    except (SafetensorError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ExportError(f"{folder}: its weights cannot be read ({reason}); save the model again") from None
    wrong = {*loaded["missing_keys"], *(name for name, *_ in loaded["mismatched_keys"])}
    wrong = {name for name in wrong if unused is None or not name.startswith(unused)}
    if wrong:
        named = ", ".join(sorted(wrong)[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        raise ExportError(f"{folder}: its weights lack {named}, or hold another shape of it; save the model again")
    return model


def check_numbers(folder: Path, model: PreTrainedModel) -> None:
    """Raise ExportError where a weight is no finite number, if only for a token that no text of the proof has."""
    for name, weight in model.state_dict().items():
        # isfinite of the whole would copy a large one
        if weight.numel() and not all(torch.isfinite(end) for end in torch.aminmax(weight)):
            raise ExportError(
                f"{folder}: its weight {name} holds NaN or infinity; its training diverged: export an earlier one"
            )


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Raise ExportError where the tokenizer gives ids that the model has no embedding for."""
    entries, needed = model.get_input_embeddings().num_embeddings, max(tokenizer.get_vocab().values()) + 1
    if needed > entries:
        raise ExportError(
            f"{folder}: its tokenizer has {needed} entries, but the model embeds {entries}; "
            "save the tokenizer that it was trained with"
        )
