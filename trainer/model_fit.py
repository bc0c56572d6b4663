"""Whether a model is what a run needs: its task, its labels, its weights, its length and its special tokens."""

from typing import Any

import torch
import transformers
from transformers import AutoModelForMaskedLM, PretrainedConfig, PreTrainedTokenizerBase

from serving.directory import BadInput

_OBJECTIVES = {
    "AutoModelForCausalLM": "causal_lm and sft",
    "AutoModelForMaskedLM": "masked_lm",
    "AutoModelForSequenceClassification": "classification",
    "AutoModelForTokenClassification": "token_classification",
}


def check_task(path: str, config: PretrainedConfig, head: str, *, trusted: bool) -> None:
    """Raise BadInput if transformers has no such head for this type of model, or the model cannot learn by it."""
    kind, objective = config.model_type, _OBJECTIVES.get(head, head)
    auto = getattr(transformers, head)
    known = type(config) in auto._model_mapping or (trusted and head in getattr(config, "auto_map", {}))
    if getattr(config, "is_encoder_decoder", False):
        raise BadInput(f"model.path: {path}: is a {kind}, an encoder with a decoder; accepted: one of the two alone")
    if not known:
        raise BadInput(
            f"model.path: {path}: is of type {kind}, for which transformers has nothing that learns {objective}; use "
            f"another model{', such as a BERT' if head == 'AutoModelForMaskedLM' else ''}"
        )
    both_ways = type(config) in AutoModelForMaskedLM._model_mapping and not getattr(config, "is_decoder", False)
    if head == "AutoModelForCausalLM" and both_ways:
        raise BadInput(
            f"model.path: {path}: is a {kind}, which reads both ways and would see what it has to predict; "
            f"{objective} need a decoder, such as a Llama"
        )
    if quantized := getattr(config, "quantization_config", None):
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized.quant_method
        raise BadInput(f"model.path: {path}: its weights are quantized ({method}); use the model as it was before")


def label_order(path: str, config: PretrainedConfig, labels: list[str], head: str) -> list[int] | None:
    """Return, for each of `labels`, its row in the head that the model has already; None where the head is new.

    Names like LABEL_0 are none: such rows are taken in order. Raises BadInput for a head of other labels.
    """
    if not any(head.removeprefix("AutoModel") in name for name in config.architectures or ()):
        return None
    known = [str(name) for name in (config.id2label or {}).values()]
    unnamed = all(name == f"LABEL_{number}" for number, name in enumerate(known))
    if len(known) != len(labels) or not (unnamed or set(known) == set(labels)):
        raise BadInput(
            f"model.path: {path} tells {_shown(known)} apart, but data.label has {_shown(labels)}; use the model that "
            "it was made from, or data with its labels"
        )
    return list(range(len(labels))) if unnamed else [known.index(label) for label in labels]


def reorder_head(model: torch.nn.Module, order: list[int]) -> None:
    """Put the rows of a classification head, one a label, into `order`."""
    body = f"{model.base_model_prefix}."
    for name, parameter in model.named_parameters():
        if not name.startswith(body) and len(parameter) == len(order):
            parameter.data = parameter.data[order].clone()


def check_loaded(path: str, model: torch.nn.Module, loaded: dict[str, Any], *, new_head: bool) -> None:
    """Raise BadInput naming weights that the files lack or hold in another shape; transformers made those up.

    With `new_head`, those of the head may be missing or of another size, and a pooler, which only heads use.
    """
    body = f"{model.base_model_prefix}."

    def is_needed(name: str) -> bool:
        return not new_head or (name.startswith(body) and ".pooler." not in name)

    missing = sorted(filter(is_needed, loaded["missing_keys"]))
    unknown = sorted(loaded["unexpected_keys"])
    if unknown and 2 * len(missing) > len(model.state_dict()):
        raise BadInput(
            f"model.path: {path}: its weights are of another model than its config.json, a {model.config.model_type}: "
            f"they hold {unknown[0]}, not {missing[0]}; get both from one place"
        )
    if missing and not any(name.startswith(body) for name in missing):
        raise BadInput(
            f"model.path: {path}: was saved without the head that this objective trains ({_shown(missing, 3)}); use a "
            "model that was saved with it"
        )
    other_shape = sorted(name for name, *_ in loaded["mismatched_keys"] if is_needed(name))
    for names, what in ((missing, "missing"), (other_shape, "of another shape than this run needs")):
        if names:
            raise BadInput(f"model.path: {path}: weights {what}: {_shown(names, 3)}; get the whole model again")


def longest_text(model: torch.nn.Module) -> int | None:
    """Return how many tokens a row may have, None where positions have no end."""
    config = model.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None)
    if not isinstance(longest, int) or longest <= 0:
        return None
    padding = _padding_position(model)
    return longest if padding is None else longest - padding - 1


def check_padding(model: torch.nn.Module, own_id: int | None, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise BadInput if positions are counted from a padding id, `own_id`, that the tokenizer does not pad with."""
    if _padding_position(model) is not None and tokenizer.pad_token_id != own_id:
        raise BadInput(
            f"tokenizer.path: pads with id {tokenizer.pad_token_id}, but the model counts positions from its own "
            f"padding id {own_id}; use the model's tokenizer"
        )


def check_length(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
    """Raise BadInput if rows of `max_length` tokens are longer than the model or its tokenizer is made for."""
    longest = longest_text(model)
    if longest is not None and max_length > longest:
        raise BadInput(f"batch.max_length: {max_length} found; the model takes at most {longest}; lower it")
    if max_length > tokenizer.model_max_length:
        raise BadInput(
            f"batch.max_length: {max_length} found; the tokenizer says that its model takes at most "
            f"{tokenizer.model_max_length}; lower it, or set tokenizer.max_length if the model takes more"
        )


def settle(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make model and tokenizer say the same of padding, the end and the longest text, in what is saved of both."""
    config = model.config.get_text_config()
    config.pad_token_id = tokenizer.pad_token_id  # by which a decoder finds the last token of a text to classify
    if (longest := longest_text(model)) is not None:
        tokenizer.model_max_length = min(tokenizer.model_max_length, longest)
    if (generation := getattr(model, "generation_config", None)) is None:
        return
    generation.pad_token_id = tokenizer.pad_token_id
    ends = generation.eos_token_id
    if tokenizer.eos_token_id not in (ends if isinstance(ends, list) else [ends]):
        generation.eos_token_id = config.eos_token_id = tokenizer.eos_token_id  # what training ends a text by


def _padding_position(model: torch.nn.Module) -> int | None:
    """RoBERTa and its kin count the positions of a text from the row after padding's."""
    tables = [module for name, module in model.named_modules() if name.endswith("position_embeddings")]
    return next((table.padding_idx for table in tables if getattr(table, "padding_idx", None) is not None), None)


def _shown(names: list[str], most: int = 10) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
