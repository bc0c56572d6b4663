"""What one rank holds of one tensor that the ranks hold together."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Held:
    """This rank's part [start, stop) of one flattened tensor: views, by role.

    Roles: weight and what the optimizer keeps in its shape (exp_avg, momentum_buffer ...), or buffer, or factor.
    """

    name: str
    shape: list[int]
    start: int
    stop: int
    views: dict[str, torch.Tensor]
    replicated: bool  # every rank holds the same whole tensor
