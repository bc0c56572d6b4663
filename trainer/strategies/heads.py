"""What every strategy asks of a model: which part is the task's head, and that frozen means bit for bit."""

from collections.abc import Iterable
from typing import Any

import torch
from torch.nn.modules.batchnorm import _NormBase
from transformers import PreTrainedModel

from trainer.strategies.names import is_inside

_IS_NEW = "trivet_is_new"  # on a weight


def freeze(model: torch.nn.Module) -> None:
    """Freeze every weight, and the running statistics of each layer none of whose own weights learn."""
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, _NormBase) and module.track_running_stats:
            module.register_forward_pre_hook(_keep_statistics)


def _keep_statistics(module: torch.nn.Module, inputs: Any) -> None:
    if not any(parameter.requires_grad for parameter in module.parameters()):
        module.training = False  # `model.train()` comes after every evaluation


def output_layer(model: torch.nn.Module) -> torch.nn.Module | None:
    """Return the layer of a language model that makes logits over the vocabulary; None of any other model."""
    return model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None


def task_head(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Return the modules, by name, that always learn because they were made for the task.

    Of a classifier: what stands outside the pre-trained body and has weights, and what its files lacked inside (a
    pooler). Of a plain module: its last layer with weights. A language model has none: its output layer is pre-trained.
    """
    if output_layer(model) is not None:
        return {}
    if isinstance(model, PreTrainedModel) and model.base_model is not model:
        parts = {name: part for name, part in model.named_children() if part is not model.base_model}
        parts = {name: part for name, part in parts.items() if next(part.parameters(), None) is not None}
        new = [name.rpartition(".")[0] for name, parameter in model.named_parameters() if hasattr(parameter, _IS_NEW)]
        return parts | {name: model.get_submodule(name) for name in new if not is_inside(name, parts)}
    layers = {
        name: part for name, part in model.named_modules() if next(part.parameters(recurse=False), None) is not None
    }
    return dict([layers.popitem()]) if layers else {}


def mark_new(model: torch.nn.Module, names: Iterable[str]) -> None:
    """Remember the weights that a pre-trained model's files lacked: `task_head` counts them in."""
    new = set(names)
    for name, parameter in model.named_parameters():
        if name in new:
            setattr(parameter, _IS_NEW, True)


def train_head(model: torch.nn.Module) -> None:
    """Let the task's head learn."""
    for module in task_head(model).values():
        module.requires_grad_(True)


def is_tied(model: torch.nn.Module) -> bool:
    """Return whether a language model's output layer shares a weight with the rest of it."""
    layer = output_layer(model)
    return layer is not None and any(_shared_with_others(model, layer))


def untie(model: torch.nn.Module) -> None:
    """Give a language model's output layer weights of its own, equal to those that it shared."""
    layer = output_layer(model)
    assert layer is not None, f"{type(model).__name__} has no output layer"
    if not is_tied(model):
        return
    for name in _shared_with_others(model, layer):
        setattr(layer, name, torch.nn.Parameter(getattr(layer, name).detach().clone()))
    model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def _shared_with_others(model: torch.nn.Module, layer: torch.nn.Module) -> list[str]:
    """The names, in the layer, of the weights that stand elsewhere in the model too."""
    inside = dict(layer.named_parameters(recurse=False))
    uses = [parameter for _, parameter in model.named_parameters(remove_duplicate=False)]
    return [name for name, parameter in inside.items() if sum(parameter is use for use in uses) > 1]
