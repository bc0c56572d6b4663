"""The cache that transformers sees while the graph is made: it hands the new keys and values straight through."""

from typing import Any

import torch
from transformers.cache_utils import Cache


class PassThroughCache(Cache):
    """Keeps nothing: the past lives in the graph's own inputs, which only the attention function touches.

    `shapes` notes what each layer would cache: the heads and their size, of its keys and of its values. Attention may
    be given others, as where the cache holds what both are made of.
    """

    is_compileable = False

    def __init__(self) -> None:
        self.layers: list[Any] = []
        self.shapes: dict[int, tuple[tuple[int, int], tuple[int, int]]] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return this step's keys and values as they came."""
        keys, values = ((each.shape[1], each.shape[3]) for each in (key_states, value_states))
        self.shapes[layer_idx] = keys, values
        return key_states, value_states

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        """Return 0: positions are given to the model, never counted from the cache."""
        return 0

    def get_mask_sizes(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """Return 0, 0: no mask is built, since attention knows each row's length."""
        return 0, 0

    def __len__(self) -> int:
        return 0
