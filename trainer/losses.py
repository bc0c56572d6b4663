"""Losses as sums over what is learned from: the loop divides by the global count of the whole optimizer step."""

import torch
import torch.nn.functional as F

from trainer.packing import IGNORED


def cross_entropy_sum(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the summed cross-entropy, a scalar in fp32, of logits [..., V] and targets [...] (but IGNORED)."""
    return F.cross_entropy(logits.float().flatten(0, -2), targets.flatten(), ignore_index=IGNORED, reduction="sum")
