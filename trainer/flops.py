"""How much arithmetic a token of training takes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch.utils.flop_counter import FlopCounterMode

from trainer.objectives import Objective
from trainer.packing import Batch, repeated

_LENGTH = 256  # tokens: the counter keeps all activations, so not the whole batch


def flops_per_token(
    model: torch.nn.Module, objective: Objective, row: Batch, autocast: Callable[[], AbstractContextManager]
) -> float:
    """Return the floating-point operations of matrices and attention, forward and back, that a token takes.

    Counted over the beginning of one row; a longer text has more attention. What activation checkpointing computes
    again is not counted: it is not what the model needs.
    """
    length = min(_LENGTH, row["input_ids"].shape[1])
    # Left out of torch's own list: the product that is added in place, as the loss does.
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _addmm})
    with _nothing_again(model), torch.compiler.set_stance("force_eager"), counter:
        with autocast():
            loss = objective.sums(model, repeated(row, length, 1))["loss"]
        if loss.requires_grad:
            (loss * 0.0).backward()
    model.zero_grad()
    return counter.get_total_flops() / length


def _addmm(total: Sequence[int], left: Sequence[int], right: Sequence[int], **_: object) -> int:
    return 2 * left[0] * left[1] * right[1]


@contextmanager
def _nothing_again(model: torch.nn.Module) -> Iterator[None]:
    """While open, no block computes its activations again."""
    switched = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    for module in switched:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module in switched:
            module.gradient_checkpointing = True
