"""Losses as sums over what is learned from: the loop divides by the global count of the whole optimizer step.

Shape letters: N targets, C targets of one chunk, D width of the hidden states, V vocabulary.
"""

import torch
import torch.nn.functional as F

from trainer.packing import IGNORED

_CHUNK_BYTES = 64 * 2**20  # of logits in fp32 at once; with less, the weights are read too often to be fast
_CHUNK_ROWS = (64, 512)  # fewest and most: products of fewer rows are slow, more rows fall out of the cache


def cross_entropy_sum(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the summed cross-entropy, a scalar in fp32, of logits [..., V] and targets [...] (but IGNORED)."""
    return F.cross_entropy(logits.float().flatten(0, -2), targets.flatten(), ignore_index=IGNORED, reduction="sum")


def linear_cross_entropy_sum(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor
) -> torch.Tensor:
    """Return `cross_entropy_sum(F.linear(hidden, weight, bias), targets)` without ever holding all logits.

    `hidden` is [..., D], `weight` [V, D], `bias` [V], `targets` [...]. The gradients are made in the forward pass,
    chunk by chunk: three matrix products in all and none done twice. They are kept in fp32, so one backward pass is all
    that can be made. Under autocast the products are in its type; the sums are in fp32 at least.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
    else:
        dtype = weight.dtype
    with torch.autocast(hidden.device.type, enabled=False):
        return _LinearCrossEntropy.apply(
            hidden.flatten(0, -2), weight, bias, targets.flatten(), dtype, torch.is_grad_enabled()
        )


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, dtype, learning):
        needs_hidden, needs_weight, needs_bias = (learning and needed for needed in ctx.needs_input_grad[:3])
        learned = (targets != IGNORED).nonzero().squeeze(1)
        inputs, cast_weight = hidden.to(dtype), weight.to(dtype)
        grad_hidden = torch.zeros_like(hidden) if needs_hidden else None
        grad_weight = _fp32_like(weight).zero_() if needs_weight else None
        grad_bias = _fp32_like(bias).zero_() if needs_bias else None
        loss = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for rows in learned.split(chunk_rows(weight.shape[0])):
            chunk = inputs if len(rows) == len(inputs) else inputs[rows]  # [C, D]
            logits = torch.mm(chunk, cast_weight.t()).to(_fp32_at_least(dtype))
            if bias is not None:
                logits += bias
            loss += _to_gradients(logits, targets[rows, None])
            gradients = logits.to(dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = torch.mm(gradients, cast_weight).to(hidden.dtype)
            if grad_weight is not None:
                _add_product(grad_weight, gradients.t(), chunk)
            if grad_bias is not None:
                grad_bias += logits.sum(0)
        ctx.gradients = [grad_hidden, grad_weight, grad_bias]
        ctx.dtypes = [hidden.dtype, weight.dtype, bias.dtype if bias is not None else None]
        return loss.to(_fp32_at_least(dtype))

    @staticmethod
    def backward(ctx, grad_output):
        gradients, ctx.gradients = ctx.gradients, None
        assert gradients is not None, "this loss keeps its gradients for one backward pass"
        # In place: a copy would be as large as the head.
        scaled = [g if g is None else g.mul_(grad_output).to(d) for g, d in zip(gradients, ctx.dtypes, strict=True)]
        return *scaled, None, None, None


def _to_gradients(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the summed loss of logits [C, V] and targets [C, 1], and turn the logits into their gradient in place."""
    of_targets, highest = logits.gather(1, targets), logits.amax(1, keepdim=True)
    probabilities = torch.softmax(logits, -1, out=logits)
    # log of the sum of exp(logits), from the largest probability: that one is never 0.
    log_sums = highest - probabilities.amax(1, keepdim=True).log()
    probabilities.scatter_add_(1, targets, torch.full_like(of_targets, -1.0))
    return (log_sums - of_targets).sum(dtype=torch.float64)


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += torch.mm(left, right)


def chunk_rows(vocab_size: int) -> int:
    """Return of how many targets the logits are held at once."""
    fewest, most = _CHUNK_ROWS
    return max(fewest, min(most, _CHUNK_BYTES // (4 * vocab_size)))


def _fp32_like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(tensor, dtype=_fp32_at_least(tensor.dtype))


def _fp32_at_least(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
