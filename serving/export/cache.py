"""The cache that transformers sees while the graph is made: it hands the new keys and values straight through."""

from typing import Any

import torch
from transformers.cache_utils import Cache


class PassThroughCache(Cache):
    """Keeps nothing: the past lives in the graph's own inputs, which only the attention function touches."""

    is_compileable = False

    def __init__(self) -> None:
        self.layers: list[Any] = []

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return this step's keys and values as they came."""
        return key_states, value_states

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        """Return 0: positions are given to the model, never counted from the cache."""
        return 0

    def get_mask_sizes(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """Return 0, 0: no mask is built, since attention knows each row's length."""
        return 0, 0

    def __len__(self) -> int:
        return 0
