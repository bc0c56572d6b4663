"""The output head of a language model, given other work: it makes the loss of its input, and never all logits.

The model itself is called, wrapped as it may be, so that hooks of DDP, DeepSpeed and FSDP see every pass; and the work
is done inside the head, where modes that divide the weights among the ranks have gathered its own.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from trainer.losses import linear_cross_entropy_sum
from trainer.packing import Batch

_CLOSE = 1e-4  # of the largest logit: more than rounding makes, less than any further step on the logits would


Work = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class Head:
    linear: torch.nn.Linear
    _work: Work | None = None

    def loss_sum(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the summed cross-entropy, a scalar in fp32, of what the head is given."""
        return linear_cross_entropy_sum(hidden, self.linear.weight, self.linear.bias, targets)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return what the head makes of so much of what it is given."""
        return F.linear(hidden, self.linear.weight, self.linear.bias)

    @contextmanager
    def doing(self, work: Work) -> Iterator[None]:
        """While open, the model returns as logits what `work` makes of the input of its head."""
        self._work, self.linear.forward = work, self._forward
        try:
            yield
        finally:
            self._work = None
            del self.linear.forward

    @torch.compiler.disable  # compiled, each batch would need code of its own
    def _forward(self, hidden: torch.Tensor) -> torch.Tensor:
        assert self._work is not None, "the head works only while `doing` is open"
        return self._work(hidden)


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
        with head.doing(lambda hidden: hidden):
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
