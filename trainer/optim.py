"""AdamW with decay on matrices only, and the learning rate as a pure function of our own step.

Accelerate's scheduler wrapper steps once per process, so a wrapped schedule runs `num_processes` times too fast.
"""

import math

import torch

from trainer.config import Optim


def build_optimizer(model: torch.nn.Module, config: Optim, *, fused: bool) -> torch.optim.AdamW:
    """Return AdamW over the weights that learn: matrices with weight decay, norms and biases without."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in learning if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in learning if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=config.lr, betas=config.betas, eps=config.eps, fused=fused
    )


def learning_rate(step: int, config: Optim, total_steps: int) -> float:
    """Return the learning rate at 0-based `step`: linear warm-up, then the schedule down to `floor` times the peak."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    done = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    left = (1 + math.cos(math.pi * done)) / 2 if config.schedule == "cosine" else 1 - done
    return config.lr * (config.floor + (1 - config.floor) * left)
