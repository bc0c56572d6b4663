"""Which settings to lower where a run does not fit."""

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence

from trainer.config import RunConfig
from trainer.plan.plan import Plan


def advice(plan: Plan, config: RunConfig, limit_bytes: int) -> str:
    """Return the settings, with values, that bring the plan under `limit_bytes`, the least harmful ones only.

    `batch.micro_rows` first, since the global batch and so the result stay the same; then `batch.max_length`, which
    cuts longer examples; then what makes it another run: LoRA, or a smaller model.
    """
    fewer = [rows for rows in _divisors(plan.rows) if rows < plan.micro_rows]
    if micro := _most(fewer, lambda rows: plan.total_of(micro_rows=rows, length=plan.length) <= limit_bytes):
        return f"batch.micro_rows={micro} (the result stays the same)"
    settings = ["batch.micro_rows=1"] if plan.micro_rows > 1 else []
    shorter = range(8, plan.length, 8)
    if length := _most(shorter, lambda length: plan.total_of(micro_rows=1, length=length) <= limit_bytes):
        return " ".join([*settings, f"batch.max_length={length}"])
    if config.strategy.type == "full":
        return " ".join([*settings, "strategy.type=lora"]) + ", or a smaller model"
    sizes = " (model.hidden_size, model.num_layers, tokenizer.vocab_size)" if config.model.type == "new" else ""
    return " and ".join([*settings, f"a smaller model{sizes}"])


def _most(candidates: Sequence[int], fits: Callable[[int], bool]) -> int | None:
    """The largest candidate that fits, of ascending ones: where one fits, every smaller one does."""
    count = bisect_left(candidates, True, key=lambda candidate: not fits(candidate))
    return candidates[count - 1] if count else None


def _divisors(number: int) -> list[int]:
    """Every whole number that divides `number`, smallest first."""
    small = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return sorted({*small, *(number // divisor for divisor in small)})
