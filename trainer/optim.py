"""The optimizers, with decay on matrices only, and the learning rate as a pure function of our own step.

Accelerate's scheduler wrapper steps once per process, so a wrapped schedule runs `num_processes` times too fast.
"""

import math
from collections.abc import Callable

import torch

from trainer.config import SGD, Adafactor, AdamW, Optim

State = dict[str, torch.Tensor]


def build_optimizer(model: torch.nn.Module, config: Optim, *, fused: bool) -> torch.optim.Optimizer:
    """Return the optimizer over the weights that learn: matrices with weight decay, norms and biases without."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in learning if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in learning if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return _BUILDERS[config.type]([group for group in groups if group["params"]], config, fused)


def initial_state(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> State:
    """Return what the optimizer keeps for a weight, as it is before the weight's first step: zeros.

    `step`, where there is one, counts the weight's own steps. Nothing is kept by an SGD without momentum.
    """
    match optimizer:
        case torch.optim.AdamW():
            # The fused one keeps its counter beside the weights.
            device = parameter.device if optimizer.defaults.get("fused") else torch.device("cpu")
            moments = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
            return {"step": torch.zeros((), device=device), **moments}
        case torch.optim.SGD():
            return {"momentum_buffer": torch.zeros_like(parameter)} if optimizer.defaults["momentum"] else {}
        case torch.optim.Adafactor():
            return {"step": torch.zeros(()), **_factors(parameter)}
    raise AssertionError(f"what {type(optimizer).__name__} keeps is not known here")


def state_numel(model: torch.nn.Module, config: Optim) -> int:
    """Return how many numbers the optimizer will keep for the weights of a model that learn."""
    optimizer = build_optimizer(model, config, fused=False)
    learning = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    kept = [initial_state(optimizer, torch.empty_like(parameter, device="meta")) for parameter in learning]
    return sum(tensor.numel() for state in kept for key, tensor in state.items() if key != "step")


def learning_rate(step: int, config: Optim, total_steps: int) -> float:
    """Return the learning rate at 0-based `step`: linear warm-up, then the schedule down to `floor` times the peak."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    falls_from = total_steps - decay_steps(config, total_steps)
    done = max(0, step - falls_from) / max(1, total_steps - falls_from)
    left = (1 + math.cos(math.pi * done)) / 2 if config.schedule == "cosine" else 1 - done
    return config.lr * (config.floor + (1 - config.floor) * left)


def decay_steps(config: Optim, total_steps: int) -> int:
    """Return in how many steps, the last ones of the run, the learning rate falls: after warm-up at the earliest."""
    after_warmup = max(0, total_steps - config.warmup_steps)
    if config.schedule != "wsd":
        return after_warmup
    wanted = config.decay_steps or math.ceil(total_steps * (config.decay_fraction or 0.1))
    return min(wanted, after_warmup)


def _factors(parameter: torch.Tensor) -> State:
    """Adafactor's mean squared gradient: of a matrix by rows and by columns."""
    if parameter.dim() < 2:
        return {"variance": torch.zeros_like(parameter)}
    *rows, height, width = parameter.shape
    return {"row_var": parameter.new_zeros([*rows, height, 1]), "col_var": parameter.new_zeros([*rows, 1, width])}


def _adamw(groups: list[dict], config: AdamW, fused: bool) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)


def _sgd(groups: list[dict], config: SGD, fused: bool) -> torch.optim.Optimizer:
    # Not fused: torch 2.13 then wants momenta of all weights or of none, and some may join late.
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov)


def _adafactor(groups: list[dict], config: Adafactor, fused: bool) -> torch.optim.Optimizer:
    return torch.optim.Adafactor(groups, lr=config.lr, beta2_decay=config.beta2_decay, d=config.max_update)


_BUILDERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"adamw": _adamw, "sgd": _sgd, "adafactor": _adafactor}
