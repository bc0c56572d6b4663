"""How close a mixture of experts came to choosing others, found while it runs: rounding may turn such a choice over."""

from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class Routing(TorchFunctionMode):
    """While open, notes every choice of the largest that a model makes for each of `num_tokens` tokens.

    `margins_T`: for each token the smallest gap, in any layer, between the last that was chosen and the first that was
    not, as a share of the former; None where nothing is chosen.
    """

    def __init__(self, num_tokens: int) -> None:
        super().__init__()
        self._num_tokens = num_tokens
        self.margins_T: torch.Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func in (torch.topk, torch.Tensor.topk):
            self._note(args[0], found.values.shape[-1])
        return found

    def _note(self, scores: torch.Tensor, num_chosen: int) -> None:
        if num_chosen >= scores.shape[-1] or scores[..., 0].numel() % self._num_tokens:
            return
        last, next_ = scores.sort(descending=True).values[..., num_chosen - 1 : num_chosen + 1].unbind(-1)
        margins_T = ((last - next_) / last.abs().clamp(min=1e-30)).reshape(self._num_tokens, -1).amin(1).float()
        self.margins_T = margins_T if self.margins_T is None else torch.minimum(self.margins_T, margins_T)
