"""The model of a run without its numbers: on the meta device, run in the way that the real one is run.

Which layers are lean, whose attention it is and whether the loss can do without all logits is found out by computing.
So it is found out on a narrow twin: the same layers under the same names, with few and random numbers.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from trainer import attention, compute, lean
from trainer.config import NewModel, RunConfig
from trainer.lm_head import Head
from trainer.model_folder import load_config
from trainer.new_model import new_config
from trainer.objectives import Objective
from trainer.strategies import STRATEGIES
from trainer.token_model import TokenModel

_SMALL_NUMEL = 10_000_000  # so many numbers are drawn in a moment: no twin is needed
# What families call their widths. A head is 16 wide, and there are 4 of them at most.
_HEADS = ("num_attention_heads", "n_head", "n_heads")
_WIDTHS = ("hidden_size", "n_embd", "dim", "word_embed_proj_dim", "d_model")
_INNER = ("intermediate_size", "n_inner", "hidden_dim", "ffn_dim")
_HEAD_WIDTH, _MOST_HEADS = 16, 4


@dataclass(frozen=True)
class Sketch:
    """A model on the meta device, the objective that runs it, and what could not be found out, or nothing."""

    model: torch.nn.Module
    objective: Objective
    doubt: str = ""


def sketch(config: RunConfig, objective: Objective, tokenizer: PreTrainedTokenizerBase) -> Sketch:
    """Return the model with its strategy, of which nothing is loaded but its config.

    `objective` finds out on the twin how it can be run, as `try_out` says.
    """
    own = _config_of(config, objective, tokenizer)
    with torch.device("meta"):
        outline = _built(config, own, objective)
    is_small = sum(parameter.numel() for parameter in outline.parameters()) <= _SMALL_NUMEL
    try:
        twin = _built(config, own if is_small else _narrow(own), objective)
        objective.try_out(twin, config.batch.max_length)
        found = run_like(outline, twin, objective)
    except Exception as error:  # whatever a family's own code raises at widths that nobody foresaw
        doubt = f"how the model can be run was not found out ({type(error).__name__}), so the most memory is counted"
        found = Sketch(outline, objective, doubt)
    compute.set_up(outline, config.batch.model_copy(update={"compile": False}))
    return found


def run_like(outline: torch.nn.Module, model: torch.nn.Module, objective: Objective) -> Sketch:
    """Let `outline` be run as `model` is: its attention, its lean layers, and the loss in its own head.

    `objective` runs the model as before; the sketch has one of its own.
    """
    for name, module in model.named_modules():
        if vars(type(module)).get("forward") in (lean._norm, lean._gated):
            outline.get_submodule(name).__class__ = type(module)
    own: Any = copy.copy(objective)
    tried = getattr(objective, "token_model", None)
    if tried is not None and tried.first_position is not None:
        outline.set_attn_implementation(attention.NAME)
    if tried is not None and tried.head is not None:
        own.token_model = TokenModel(tried.first_position, Head(outline.get_output_embeddings()))
    return Sketch(outline, own)


def _config_of(config: RunConfig, objective: Objective, tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    extra: dict[str, Any] = {} if objective.labels is None else {"num_labels": len(objective.labels)}
    if isinstance(config.model, NewModel):
        return new_config(config.model, tokenizer, objective.head, extra)
    return load_config(config.model.path, trusted=config.model.trust_remote_code, **extra)


def _built(config: RunConfig, own: PretrainedConfig, objective: Objective) -> torch.nn.Module:
    trusted = {} if isinstance(config.model, NewModel) else {"trust_remote_code": config.model.trust_remote_code}
    model = getattr(transformers, objective.head).from_config(copy.deepcopy(own), **trusted).float()
    return STRATEGIES[config.strategy.type](model, config.strategy).train()


def _narrow(config: PretrainedConfig) -> PretrainedConfig:
    """The config of a model with as many layers and entries, whose layers hold next to nothing."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    heads = next(getattr(text, name) for name in _HEADS if hasattr(text, name))
    few = min(heads, _MOST_HEADS)
    keys = getattr(text, "num_key_value_heads", None) or heads
    sizes = {"head_dim": _HEAD_WIDTH, "num_key_value_heads": max(1, few * keys // heads)}
    for names, size in ((_HEADS, few), (_WIDTHS, few * _HEAD_WIDTH), (_INNER, 2 * _HEAD_WIDTH)):
        sizes |= dict.fromkeys(names, size)
    for name, size in sizes.items():
        if getattr(text, name, None) is not None:
            setattr(text, name, size)
    return config
