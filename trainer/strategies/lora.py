"""Low-rank updates (arXiv:2106.09685) through PEFT, DoRA and rsLoRA among them."""

import re
import warnings
from typing import NoReturn

import torch
from transformers import PreTrainedModel

from serving.directory import BadInput
from trainer.config import Lora
from trainer.strategies.heads import freeze, is_tied, output_layer, task_head, untie
from trainer.strategies.names import CONVOLUTION, LINEAR, is_inside, layers, near

_WRAPPED = (*LINEAR, *CONVOLUTION, torch.nn.Embedding, torch.nn.MultiheadAttention)


def apply_lora(model: torch.nn.Module, config: Lora) -> torch.nn.Module:
    """Freeze the model and add low-rank updates through PEFT; the task's head learns whole.

    At step 0 the result equals the model bit for bit, because B starts at zero. Updates of an embedding that is tied
    to the output layer untie the two, or merging one would change the other.
    """
    names, head = _targets(model, config.targets), task_head(model)
    embeddings = [part for part in (output_layer(model), _input_embedding(model)) if part is not None]
    if is_tied(model) and any(model.get_submodule(name) is part for name in names for part in embeddings):
        untie(model)
    freeze(model)
    # PEFT finds modules to save by the end of their names, and in a plain module "6" ends "16" too.
    by_peft = list(head) if isinstance(model, PreTrainedModel) else []
    wrapped = _wrap(model, config, names, by_peft)
    for name, module in head.items():
        if name not in by_peft:
            module.requires_grad_(True)
    if any(isinstance(module, torch.nn.TransformerEncoderLayer) for module in model.modules()):
        torch.backends.mha.set_fastpath_enabled(False)  # in evaluation it reads weights past PEFT's wrappers
    return wrapped


def _wrap(model: torch.nn.Module, config: Lora, names: list[str], head: list[str]) -> torch.nn.Module:
    """Return PEFT's model. Raises BadInput for layers that it cannot wrap in this way."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=names,
        modules_to_save=head or None,
        use_dora=config.dora,
        use_rslora=config.rslora,
        task_type=task_type(model),
    )
    try:
        with warnings.catch_warnings():
            # PEFT 0.21 asks transformers by a name that is on its way out.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            # It then turns it round by itself, which is right: GPT-2's Conv1D keeps its weights transposed.
            warnings.filterwarnings("ignore", "fan_in_fan_out is set to False but the target module is `Conv1D`")
            wrapped = get_peft_model(model, lora)
    except ValueError as error:
        raise BadInput(f"strategy.targets: {config.targets!r} found; {str(error).splitlines()[0]}") from None
    found = set(wrapped.base_model.targeted_module_names)
    assert found == set(names), f"PEFT took the names otherwise: {sorted(found ^ set(names))}"
    for name, lengths in wrapped.named_parameters():
        if "lora_magnitude_vector" in name and not bool((lengths != 0).all()):
            layer = name.removeprefix("base_model.model.").partition(".lora_magnitude_vector")[0]
            raise BadInput(
                f"strategy.dora: {layer} has a row of zeros, and DoRA divides by its length: do not target it"
            )
    return wrapped


def task_type(model: torch.nn.Module) -> str | None:
    """Return PEFT's word for what the model's head does, None where it has none."""
    words = {"ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForSequenceClassification": "SEQ_CLS",
             "ForTokenClassification": "TOKEN_CLS"}  # fmt: skip
    return next((word for end, word in words.items() if type(model).__name__.endswith(end)), None)


def _input_embedding(model: torch.nn.Module) -> torch.nn.Module | None:
    return model.get_input_embeddings() if isinstance(model, PreTrainedModel) else None


def _targets(model: torch.nn.Module, targets: str | list[str]) -> list[str]:
    """The full names of the layers that `targets` means. Raises BadInput for a target that means none."""
    head = task_head(model)
    names = [name for name, _ in layers(model, _WRAPPED)]
    if targets == "all-linear":
        is_output = output_layer(model)
        linear = [name for name, layer in layers(model, LINEAR) if layer is not is_output and not is_inside(name, head)]
        if not linear:
            _refuse("all-linear", "the model has no linear layer outside its head", names)
        return linear
    try:
        fits = {
            target: [name for name in names if _fits(name, target, is_regex=isinstance(targets, str))]
            for target in ([targets] if isinstance(targets, str) else targets)
        }
    except re.error as error:
        raise BadInput(f"strategy.targets: {targets!r} found; it is no regular expression ({error})") from None
    for target, found in fits.items():
        if not found:
            _refuse(target, "no layer that LoRA can wrap has that name", names)
        if inside := [name for name in found if is_inside(name, head)]:
            raise BadInput(
                f"strategy.targets: {target!r} found; {inside[0]} is the task's head, which learns whole: leave it out"
            )
    return list(dict.fromkeys(name for found in fits.values() for name in found))


def _fits(name: str, target: str, *, is_regex: bool) -> bool:
    return re.fullmatch(target, name) is not None if is_regex else f".{name}".endswith(f".{target}")


def _refuse(target: str, why: str, names: list[str]) -> NoReturn:
    raise BadInput(f"strategy.targets: {target!r} found; {why}; near to it: {near(target, names)}")
