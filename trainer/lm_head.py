"""The output head of a language model, held back: the model returns hidden states, and the loss does the head's work.

The model itself is called, wrapped as it may be, so that hooks of DDP and of DeepSpeed see every pass.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from trainer.losses import linear_cross_entropy_sum
from trainer.packing import Batch

_CLOSE = 1e-4  # of the largest logit: more than rounding makes, less than any further step on the logits would


@dataclass(frozen=True)
class Head:
    linear: torch.nn.Linear

    def loss_sum(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the summed cross-entropy, a scalar in fp32, of what the model returned while held back."""
        return linear_cross_entropy_sum(hidden, self.linear.weight, self.linear.bias, targets)

    @contextmanager
    def held_back(self) -> Iterator[None]:
        """While open, the model returns as logits what its head was given."""
        self.linear.forward = _hand_on
        try:
            yield
        finally:
            del self.linear.forward


def find(model: torch.nn.Module, sample: Batch) -> Head | None:
    """Return the head of a model, or None where the logits are not just what a linear head makes of hidden states.

    That is tried out on `sample`, inputs of the model, which must be in evaluation mode: a model that scales or bends
    its logits after the head, or a head that a fine-tuning method has wrapped, is found out.
    """
    linear: Any = getattr(model, "get_output_embeddings", lambda: None)()
    if type(linear) is not torch.nn.Linear:
        return None
    head = Head(linear)
    given: list[torch.Tensor] = []
    watch = linear.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    try:
        logits = model(**sample).logits
        with head.held_back():
            returned = model(**sample).logits
    except Exception:  # whatever a model raises, it wants logits of its head
        return None
    finally:
        watch.remove()
    if len(given) != 2 or returned.shape != given[1].shape or not torch.equal(returned, given[1]):
        return None
    expected = F.linear(given[0], linear.weight, linear.bias)
    is_same = expected.shape == logits.shape and bool((expected - logits).abs().max() <= _CLOSE * logits.abs().max())
    return head if is_same else None


def _hand_on(hidden: torch.Tensor) -> torch.Tensor:
    return hidden
