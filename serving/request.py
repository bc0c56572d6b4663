"""One request to the engine: what was asked (`Sampling`, prompt) and how far it has come (`Request`). Plain Python."""

import math
from dataclasses import dataclass, field
from typing import Literal

from serving.directory import BadInput

MAX_NEW_TOKENS = 1_000_000
MAX_TEMPERATURE = 100.0
MAX_TOP_K = 1_000_000
MAX_SEED = 2**63 - 1

FinishReason = Literal["stop", "length", "cancelled", "error"]


class QueueFull(Exception):
    """The engine holds as many waiting requests as it may; try again later."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is picked. Raises BadInput for a value outside its range.

    `temperature` 0 is greedy, `top_k` 0 and `top_p` 1 are off. With a `seed` every draw is a function of the seed and
    the position alone; without one each draw is fresh. `ignore_end` generates on past the end token (benchmarks).
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    ignore_end: bool = False

    def __post_init__(self) -> None:
        _check_int("max_new_tokens", self.max_new_tokens, 1, MAX_NEW_TOKENS)
        _check_number("temperature", self.temperature, 0.0, MAX_TEMPERATURE)
        _check_int("top_k", self.top_k, 0, MAX_TOP_K)
        _check_number("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0:
            raise BadInput("top_p: 0 leaves no token to pick; use temperature 0 for greedy, or 0 < top_p <= 1")
        if self.seed is not None:
            _check_int("seed", self.seed, 0, MAX_SEED)
        if not isinstance(self.ignore_end, bool):
            raise BadInput(f"ignore_end: {self.ignore_end!r} is not true or false")

    @property
    def is_greedy(self) -> bool:
        """True when the pick is the largest logit: no randomness at all."""
        return self.temperature == 0


@dataclass(eq=False)
class Request:
    """A prompt on its way through the engine; only the engine changes it. Compared and hashed by identity."""

    id: str
    prompt_ids: list[int]
    sampling: Sampling
    lora: str | None = None  # the adapter that answers, by its name in the manifest; None is the base alone
    output_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: str | None = None
    num_computed: int = 0  # tokens whose keys and values are in the cache: one counter for prompt and decode
    near_ties: int = 0  # greedy picks whose two best logits lay closer than 1e-4

    @property
    def is_finished(self) -> bool:
        """True once a finish reason is set; no token follows."""
        return self.finish_reason is not None


def _check_int(name: str, value: object, lowest: int, highest: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise BadInput(f"{name}: {value!r} is not a whole number; accepted: {lowest} to {highest}")
    if not lowest <= value <= highest:
        raise BadInput(f"{name}: {value} is out of range; accepted: {lowest} to {highest}")


def _check_number(name: str, value: object, lowest: float, highest: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise BadInput(f"{name}: {value!r} is not a finite number; accepted: {lowest:g} to {highest:g}")
    if not lowest <= value <= highest:
        raise BadInput(f"{name}: {value} is out of range; accepted: {lowest:g} to {highest:g}")
