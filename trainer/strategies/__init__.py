"""Which weights learn: one function per strategy, independent of the objective; a plain torch module will do."""

from collections.abc import Callable

import torch

from trainer.config import Full, Scratch
from trainer.strategies.adapter import apply_adapter
from trainer.strategies.linear_probe import apply_linear_probe
from trainer.strategies.lora import apply_lora
from trainer.strategies.partial import apply_partial, check_world, later, tell_tied, unfreeze

__all__ = ["STRATEGIES", "check_world", "count_parameters", "tell_learning", "tell_tied", "unfreeze"]


def apply_all(model: torch.nn.Module, config: Scratch | Full) -> torch.nn.Module:
    """Let every weight learn."""
    return model.requires_grad_(True)


# Each returns the model in which just the weights that learn, now or in a later stage, require gradients.
STRATEGIES: dict[str, Callable[..., torch.nn.Module]] = {
    "scratch": apply_all,
    "full": apply_all,
    "linear_probe": apply_linear_probe,
    "partial": apply_partial,
    "adapter": apply_adapter,
    "lora": apply_lora,
}


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """Return (weights that learn, all weights), each shared tensor counted once."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)


def tell_learning(model: torch.nn.Module) -> str:
    """Return how many weights of a model as its strategy returned it learn, and from which steps on."""
    learning, total = count_parameters(model)
    joining = "".join(f", {count:,} of them from step {step}" for step, count in sorted(later(model).items()))
    return f"{learning:,} of {total:,} weights learn{joining}"
