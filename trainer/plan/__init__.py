"""How much memory a run needs on one rank, told before it needs it, and which settings to lower where it does not fit.

Shape letters: B rows of a forward pass, T tokens of a row, V vocabulary.

Exact: weights, gradients, what the optimizer keeps, the tensors of a batch, and the arrays [B, T, V] of the loss, of
which three exist at once (log-probabilities, their gradient, the gradient of the logits), or one, of a part of the
B * T rows, where the loss takes them part by part. Estimated: activations. What autograd keeps of one and of two short
rows is counted at two lengths T; what a row adds is taken to grow as a * T + b * T * T, as if it held one example, and
what does not grow with the rows (weights cast to bf16) to stay. Where activations are computed again, those of one
block count.

Not counted: what one operation needs while it runs, the libraries, and the allocator's slack. Measured on a CPU (Llama
of 2 to 5 M weights, 1,000 to 8,000 tokens a pass), the peak was 0.85 to 1.15 times the plan in fp32 where malloc gave
every freed block back, and 1.6 times in bf16, for which oneDNN keeps some 80 MB of its own; 1.2 to 1.4 times as glibc
comes. DeepSpeed's sharding of gradients and moments is not counted, so there the plan would be too high.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from trainer.config import RunConfig
from trainer.modes import micro_rows
from trainer.objectives import Objective
from trainer.optim import state_numel
from trainer.packing import Batch, repeated

_PROBE_LENGTH = 32  # tokens of the longer probe: long enough that T * T shows, short enough to cost nothing
_FP32_BYTES = 4
_LOSS_ARRAYS = 3


@dataclass(frozen=True)
class Plan:
    """Bytes on one rank. Per token and per pair of tokens (of one row) come first, what the config asks for last."""

    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activation_fixed_bytes: int
    activation_token_bytes: float
    activation_pair_bytes: float
    batch_token_bytes: float
    batch_pair_bytes: float
    logits_token_bytes: int
    rows: int  # of an optimizer step, on this rank
    micro_rows: int
    length: int
    logits_at_once: int | None = None  # rows
    tied_head_bytes: int = 0  # the gradient of an output layer, beside that of the embedding it shares weights with

    @property
    def activations_bytes(self) -> int:
        """Estimated: what autograd keeps of one forward pass."""
        per_row = self.activation_token_bytes * self.length + self.activation_pair_bytes * self.length**2
        return self.activation_fixed_bytes + int(self.micro_rows * per_row)

    @property
    def logits_bytes(self) -> int:
        """The arrays that the loss needs at once; 0 where there is one logit row per text."""
        tokens = self.micro_rows * self.length
        return min(tokens, self.logits_at_once or tokens) * self.logits_token_bytes + self.tied_head_bytes

    @property
    def batch_bytes(self) -> int:
        """The tensors of one forward pass: those of the next are made when it is done."""
        return int(self.micro_rows * (self.batch_token_bytes * self.length + self.batch_pair_bytes * self.length**2))

    @property
    def certain_bytes(self) -> int:
        """What the run needs whatever the estimate is worth."""
        return self.weights_bytes + self.gradients_bytes + self.optimizer_bytes + self.batch_bytes + self.logits_bytes

    @property
    def total_bytes(self) -> int:
        return self.certain_bytes + self.activations_bytes


def make_plan(
    model: torch.nn.Module,
    objective: Objective,
    row: Batch,
    config: RunConfig,
    *,
    world_size: int,
    autocast: Callable[[], AbstractContextManager],
) -> Plan:
    """Return the plan of a built model. `row` is a batch of the longest row alone; short pieces of it are run."""
    parameters, buffers = list(model.parameters()), list(model.buffers())
    learning = sum(parameter.nbytes for parameter in parameters if parameter.requires_grad)
    length = row["input_ids"].shape[1]
    head = model.get_output_embeddings() if row["targets"].dim() > 1 else None
    vocabulary = 0 if head is None else head.weight.shape[0]
    kept_logits = vocabulary if objective.logits_at_once is None else 0
    longer = min(length, _PROBE_LENGTH)
    shorter = max(1, longer // 2)

    def kept(num_rows: int, num_tokens: int) -> int:
        counted = _kept_bytes(model, objective, repeated(row, num_tokens, num_rows), autocast)
        return counted - num_rows * num_tokens * kept_logits * _FP32_BYTES  # one array of the loss, counted as such

    kept_by_one = kept(1, longer)
    row_bytes: list[float] = [kept(2, shorter) - kept(1, shorter), kept(2, longer) - kept_by_one]
    with nothing_again(model) as num_blocks:  # computed again, one block at a time has all its activations
        for i, t in enumerate((shorter, longer) if num_blocks else ()):
            row_bytes[i] += (kept(2, t) - kept(1, t) - row_bytes[i]) / num_blocks
    activation_token, activation_pair = _fit(shorter, longer, *row_bytes)
    tensors = [sum(tensor.nbytes for tensor in repeated(row, t, 1).values()) for t in (shorter, longer)]
    batch_token, batch_pair = _fit(shorter, longer, *tensors)
    return Plan(
        weights_bytes=sum(tensor.nbytes for tensor in parameters + buffers),
        gradients_bytes=learning,
        optimizer_bytes=_FP32_BYTES * state_numel(model, config.optim),
        activation_fixed_bytes=max(0, kept_by_one - round(row_bytes[1])),
        activation_token_bytes=activation_token,
        activation_pair_bytes=activation_pair,
        batch_token_bytes=batch_token,
        batch_pair_bytes=batch_pair,
        logits_token_bytes=(_LOSS_ARRAYS if kept_logits else 1) * vocabulary * _FP32_BYTES,
        rows=config.batch.rows // world_size,
        micro_rows=micro_rows(config, world_size),
        length=length,
        logits_at_once=objective.logits_at_once,
        tied_head_bytes=_tied_head_bytes(model, head) if objective.logits_at_once else 0,
    )


def advice(plan: Plan, config: RunConfig, limit_bytes: int) -> str:
    """Return the settings, with values, that bring the plan under `limit_bytes`, the least harmful ones only.

    `batch.micro_rows` first, since the global batch and so the result stay the same; then `batch.max_length`, which
    cuts longer examples; then what makes it another run: LoRA, or a smaller model.
    """
    for micro in _divisors(plan.rows):
        if micro < plan.micro_rows and replace(plan, micro_rows=micro).total_bytes <= limit_bytes:
            return f"batch.micro_rows={micro} (the result stays the same)"
    settings = ["batch.micro_rows=1"] if plan.micro_rows > 1 else []
    for length in range((plan.length - 1) // 8 * 8, 7, -8):
        if replace(plan, micro_rows=1, length=length).total_bytes <= limit_bytes:
            return " ".join([*settings, f"batch.max_length={length}"])
    if config.strategy.type == "full":
        return " ".join([*settings, "strategy.type=lora"]) + ", or a smaller model"
    sizes = " (model.hidden_size, model.num_layers, tokenizer.vocab_size)" if config.model.type == "new" else ""
    return " and ".join([*settings, f"a smaller model{sizes}"])


def _divisors(number: int) -> list[int]:
    """Every whole number that divides `number`, largest first."""
    small = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return sorted({*small, *(number // divisor for divisor in small)}, reverse=True)


def _kept_bytes(model: torch.nn.Module, objective: Objective, batch: Batch, autocast) -> int:
    """The bytes that autograd keeps for the backward pass, each storage once, without those of the model itself."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast():
        loss = objective.sums(model, batch)["loss"]  # while it lives, no storage is given to another tensor
    del loss
    return sum(kept.values())


def _tied_head_bytes(model: torch.nn.Module, head: torch.nn.Module | None) -> int:
    if head is None or not head.weight.requires_grad or head.weight is not model.get_input_embeddings().weight:
        return 0
    return _FP32_BYTES * head.weight.numel()


@contextmanager
def nothing_again(model: torch.nn.Module) -> Iterator[int]:
    """While open, no block computes its activations again; yields how many blocks do otherwise."""
    switched = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    for module in switched:
        module.gradient_checkpointing = False
    try:
        yield sum(isinstance(module, GradientCheckpointingLayer) for module in switched)
    finally:
        for module in switched:
            module.gradient_checkpointing = True


def _fit(shorter: int, longer: int, at_shorter: float, at_longer: float) -> tuple[float, float]:
    """Return a and b of a * T + b * T * T through two points; b is 0 where there is one length only."""
    if shorter == longer:
        return at_longer / longer, 0.0
    pair = max(0.0, (at_longer / longer - at_shorter / shorter) / (longer - shorter))
    return at_longer / longer - pair * longer, pair
