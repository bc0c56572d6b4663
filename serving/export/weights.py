"""Weights read whole, as they were saved, and refused where something is missing, left over or no number."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from serving.export.refusing import refusing
from serving.export_paths import ExportError

# What transformers calls heads and poolers: of another task than the model's they may lie beside its weights.
_HEADS = {
    *("lm_head", "cls", "classifier", "pre_classifier", "score", "qa_outputs", "pooler", "predictions"),
    *("generator_predictions", "generator_lm_head", "discriminator_predictions", "sequence_summary", "sop_classifier"),
    *("vocab_transform", "vocab_layer_norm", "vocab_projector", "seq_relationship"),
}


def read_model(auto_class: Any, folder: Path, *, may_lack: tuple[str, ...] = ()) -> PreTrainedModel:
    """Return the model of a folder in fp32 with its own plain attention and experts.

    Raises ExportError when the weights cannot be read, are not all there (transformers would make up the rest), or more
    of them are there than the config asks for (transformers would drop them). Those whose names begin with one of
    `may_lack` may be missing.
    """
    with refusing(f"{folder}/config.json: transformers cannot make a model of it", "mend it, or save the model again"):
        try:
            model, loaded = auto_class.from_pretrained(
                folder,
                dtype=torch.float32,
                attn_implementation="eager",
                experts_implementation="eager",
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
    wrong = {name for name in wrong if not name.startswith(may_lack)}
    if wrong:
        named = ", ".join(sorted(wrong)[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        raise ExportError(f"{folder}: its weights lack {named}, or hold another shape of it; save the model again")
    # Without those that transformers itself knows to be harmless: old buffers of positions, layers that only train.
    _check_left_over(
        folder, model, sorted(name for name in loaded["unexpected_keys"] if not _of_other_task(name, model))
    )
    return model


def names_in(adapter: Path) -> tuple[str, ...]:
    """Return the names, in the model, of the weights that lie in an adapter's folder; of what is none, nothing."""
    names: list[str] = []
    for path in adapter.glob("*.safetensors"):
        with suppress(SafetensorError, OSError), safe_open(path, framework="numpy") as file:
            names += file.keys()
    return tuple(name.removeprefix("base_model.model.") for name in names)


def _of_other_task(name: str, model: PreTrainedModel) -> bool:
    """Whether a weight that the model does not read is of a head or pooler that it does not have."""
    if name.endswith(".position_ids"):
        return True
    inner = name.removeprefix(f"{model.base_model_prefix}.").removeprefix("cls.")  # BERT has its heads in `cls`
    head = inner.split(".")[0]
    path = name.removesuffix(inner) + head
    return head in _HEADS and path not in dict(model.named_modules())


def _check_left_over(folder: Path, model: PreTrainedModel, names: list[str]) -> None:
    if names:
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise ExportError(
            f"{folder}: its weights hold {names[0]}{others}, which {type(model).__name__} does not read as config.json "
            "describes it; mend config.json, or merge and save the model again"
        )


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
    try:
        entries = model.get_input_embeddings().weight.shape[0]
    except (NotImplementedError, AttributeError):
        raise ExportError(
            f"{folder}: {type(model).__name__} has no table of embeddings, or an adapter is laid over it; accepted: "
            "models that read tokens, merged"
        ) from None
    needed = max(tokenizer.get_vocab().values()) + 1
    if needed > entries:
        raise ExportError(
            f"{folder}: its tokenizer has {needed} entries, but the model embeds {entries}; "
            "save the tokenizer that it was trained with"
        )
