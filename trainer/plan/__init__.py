"""How much memory a run needs on one rank, told before it needs it, and which settings to lower where it does not fit.

The passes of the run itself, forward and back, are run on tensors that have no memory (passes.py): so nothing of the
model is estimated, and any model, strategy, precision and loss counts as what it is. What a mode adds is in timeline.py
and divided.py, what malloc keeps on a CPU in glibc.py.

Not counted: what one operation needs while it runs, the libraries' own, and on a GPU what its allocator cannot use.
Larger batches than `_MOST_TOKENS` are extrapolated, and so is the advice: what a row adds is taken to grow as
a * T + b * T * T with its T tokens, as if it held one example, and what does not grow with the rows to stay.
"""

import math
from dataclasses import dataclass, replace

import torch

from trainer.config import RunConfig
from trainer.packing import Batch, repeated
from trainer.plan.modes import ModePlan, mode_plan
from trainer.plan.passes import record
from trainer.plan.sketch import Sketch

_MOST_TOKENS = 2**18  # of a pass that is run as it is
_FP32_BYTES = 4


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
    logits_token_bytes: float
    rows: int  # of an optimizer step, on this rank
    micro_rows: int
    length: int
    logits_at_once: int | None = None  # rows
    buffers_bytes: int = 0  # of what ranks gather and add up
    of_mode: ModePlan | None = None  # at just these rows and this length

    @property
    def activations_bytes(self) -> int:
        """What is there for a forward pass and its backward pass, besides weights, gradients and logits."""
        per_row = self.activation_token_bytes * self.length + self.activation_pair_bytes * self.length**2
        return self.activation_fixed_bytes + int(self.micro_rows * per_row)

    @property
    def logits_bytes(self) -> int:
        """The arrays as wide as the vocabulary; 0 where there is one logit row per text."""
        tokens = self.micro_rows * self.length
        return int(min(tokens, self.logits_at_once or tokens) * self.logits_token_bytes)

    @property
    def batch_bytes(self) -> int:
        """The tensors of one forward pass: those of the next are made when it is done."""
        return int(self.micro_rows * (self.batch_token_bytes * self.length + self.batch_pair_bytes * self.length**2))

    @property
    def certain_bytes(self) -> int:
        """What is there in the optimizer's step, however the passes went."""
        return self.weights_bytes + self.gradients_bytes + self.optimizer_bytes + self.batch_bytes

    @property
    def total_bytes(self) -> int:
        """The most at once; where that was extrapolated, all terms together, which is more."""
        if self.of_mode is not None:
            return max(self.certain_bytes, self.of_mode.total_bytes)
        return self.certain_bytes + self.logits_bytes + self.activations_bytes + self.buffers_bytes

    def cut(self, *, micro_rows: int, length: int) -> "Plan":
        """Return the plan of smaller passes."""
        return replace(self, micro_rows=micro_rows, length=length, of_mode=None)


def make_plan(
    sketch: Sketch, config: RunConfig, batch: Batch, row: Batch, mode: str, *, world_size: int, on_gpu: bool
) -> Plan:
    """Return the plan of a rank in a mode.

    `batch` is its largest micro-batch, or the first rows of it; `row` the longest row alone; both on the CPU.
    """
    of_mode = mode_plan(sketch, config, batch, mode, world_size=world_size, on_gpu=on_gpu)
    length = row["input_ids"].shape[1]
    halves = max(1, length // 2), length

    def needed(num_rows: int, num_tokens: int) -> int:
        probe = repeated(row, num_tokens, num_rows)
        passes = record(sketch.model, sketch.objective, probe, precision=config.precision.type, on_gpu=on_gpu)
        return passes.learning.most_bytes(of_logits=False)

    by_one = [needed(1, t) for t in halves]
    of_row = [needed(2, t) - one for t, one in zip(halves, by_one, strict=True)]
    tensors = [sum(tensor.nbytes for tensor in repeated(row, t, 1).values()) for t in halves]
    activation_token, activation_pair = _fit(*halves, *of_row)
    batch_token, batch_pair = _fit(*halves, *tensors)
    tokens, at_once = batch["input_ids"].numel(), sketch.objective.logits_at_once
    terms = of_mode.by_term
    return Plan(
        weights_bytes=terms["weights"],
        gradients_bytes=terms["gradients"],
        optimizer_bytes=terms["optimizer"],
        activation_fixed_bytes=max(0, by_one[1] - of_row[1]),
        activation_token_bytes=activation_token,
        activation_pair_bytes=activation_pair,
        batch_token_bytes=batch_token,
        batch_pair_bytes=batch_pair,
        logits_token_bytes=terms["logits"] / min(tokens, at_once or tokens),
        rows=config.batch.rows // world_size,
        micro_rows=of_mode.micro_rows,
        length=length,
        logits_at_once=at_once,
        buffers_bytes=terms["buffers"],
        of_mode=of_mode if holds_all(of_mode.micro_rows, length) else None,
    )


def holds_all(micro_rows: int, length: int) -> bool:
    """Whether a pass of so many rows is run as it is."""
    return micro_rows * length <= _MOST_TOKENS


def rows_run(micro_rows: int, length: int) -> int:
    """Return of how many rows the pass is run, where it has `micro_rows`."""
    return min(micro_rows, max(1, _MOST_TOKENS // length))


def advice(plan: Plan, config: RunConfig, limit_bytes: int) -> str:
    """Return the settings, with values, that bring the plan under `limit_bytes`, the least harmful ones only.

    `batch.micro_rows` first, since the global batch and so the result stay the same; then `batch.max_length`, which
    cuts longer examples; then what makes it another run: LoRA, or a smaller model.
    """
    for micro in _divisors(plan.rows):
        if micro < plan.micro_rows and plan.cut(micro_rows=micro, length=plan.length).total_bytes <= limit_bytes:
            return f"batch.micro_rows={micro} (the result stays the same)"
    settings = ["batch.micro_rows=1"] if plan.micro_rows > 1 else []
    for length in range((plan.length - 1) // 8 * 8, 7, -8):
        if plan.cut(micro_rows=1, length=length).total_bytes <= limit_bytes:
            return " ".join([*settings, f"batch.max_length={length}"])
    if config.strategy.type == "full":
        return " ".join([*settings, "strategy.type=lora"]) + ", or a smaller model"
    sizes = " (model.hidden_size, model.num_layers, tokenizer.vocab_size)" if config.model.type == "new" else ""
    return " and ".join([*settings, f"a smaller model{sizes}"])


def _divisors(number: int) -> list[int]:
    """Every whole number that divides `number`, largest first."""
    small = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return sorted({*small, *(number // divisor for divisor in small)}, reverse=True)


def _fit(shorter: int, longer: int, at_shorter: float, at_longer: float) -> tuple[float, float]:
    """Return a and b of a * T + b * T * T through two points; b is 0 where there is one length only."""
    if shorter == longer:
        return at_longer / longer, 0.0
    pair = max(0.0, (at_longer / longer - at_shorter / shorter) / (longer - shorter))
    return at_longer / longer - pair * longer, pair
