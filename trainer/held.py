"""What one rank holds of one tensor that the ranks hold together."""

from collections.abc import Iterable, Iterator
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

    def overlaps(self, slices: Iterable[tuple[str, int, int]]) -> Iterator[tuple[str, int, int, int]]:
        """Yield of each slice of a checkpoint that has something of this part: its file, where it begins, and what
        range of the flattened tensor both have."""
        for file, start, stop in slices:
            low, high = max(start, self.start), min(stop, self.stop)
            if low < high:
                yield file, start, low, high
