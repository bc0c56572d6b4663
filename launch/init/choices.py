"""Settings of a new run, chosen from its data and its model for minutes on two CPU cores, each with its reason."""

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

from launch.init.bases import Base
from launch.init.profiles import Profile, quantile
from serving.directory import BadInput

_BUDGET_S = 180
# Measured on two CPU cores in fp32: LoRA on 135M weights about 200 tokens/s, 1M weights about 8,000.
_WEIGHT_TOKENS_PER_S = 2.7e10
_MOST_TOKENS_PER_S = 8_000
_ASSUMED_PARAMETERS = 135_000_000  # of a model that is not here
_SMALL_PARAMETERS = 20_000_000  # up to here every weight is trained
_MAKE_BASE_S = 60

_MOST_EPOCHS = 3
_FEWEST_STEPS = 10
_LONGEST = {"causal_lm": 256, "sft": 512, "classification": 256}  # for CPU cores; a GPU takes more
_LONGEST_CHAT = 2048  # where shorter rows would cut answers away
_NEARLY_ALL = 0.99  # of the prompts, for which rows grow beyond the usual
_ANSWER_TOKENS = 64  # that are to fit behind a long prompt
_ROOM_FOR_TEXTS = 128  # tokens
_MOST_HELD_OUT = 512
_COMMON = 0.05  # the share of a class that must not be missing where evaluation stops


@dataclass(frozen=True)
class Settings:
    """The sections of a config that are chosen, a reason for some keys, and how long the run may take."""

    sections: dict[str, dict[str, Any]]
    reasons: dict[str, str]  # by dotted key
    seconds: float


def choose(objective: str, profile: Profile, base: Base) -> Settings:
    """Return settings that see as much of the data as a few minutes allow, and at most three times all of it."""
    size = base.num_parameters or _ASSUMED_PARAMETERS
    is_small = size <= _SMALL_PARAMETERS
    speed = min(_MOST_TOKENS_PER_S, _WEIGHT_TOKENS_PER_S / size)
    budget = speed * _BUDGET_S
    length, why_length = _max_length(objective, profile, base)
    rows, row_tokens = _rows(objective, profile, length, is_small)
    per_step = rows * row_tokens
    available = num_rows(objective, profile, length)
    epoch = max(1, math.ceil(available / rows))
    steps = max(_FEWEST_STEPS, min(int(budget / per_step), _MOST_EPOCHS * epoch))
    held_out, why_held_out = _held_out(objective, profile, int(budget * 0.375 / row_tokens))
    evaluation_s = 2 * min(held_out, available) * row_tokens / speed / 3  # before step 0 and at the end; forward only
    seconds = steps * per_step / speed + evaluation_s + (0 if base.is_there or not base.made_by else _MAKE_BASE_S)
    sections = {
        "strategy": {"type": "full"} if is_small else {"type": "lora", "rank": 16, "alpha": 32},
        "optim": {"lr": 0.001 if is_small else 0.0005, "warmup_steps": max(1, steps // 10)},
        "batch": {"rows": rows, "max_length": length} | _micro_rows(rows, row_tokens, is_small),
        "evaluation": {"max_rows": held_out},
        "checkpoint": {"every": max(5, steps // 2)},
    }
    reasons = {
        "run.steps": _why_steps(steps, epoch, seconds),
        "strategy": _why_strategy(size, base, is_small),
        "optim.lr": "usual for training every weight of a small model"
        if is_small
        else "usual for LoRA; try half and double",
        "batch.rows": _why_rows(objective, rows, per_step),
        "batch.micro_rows": "rows at a time, to keep memory low; the result is the same",
        "batch.max_length": why_length,
        "evaluation.max_rows": why_held_out,
        "checkpoint.every": "a run that is stopped goes on from its last checkpoint when it is started again",
    }
    return Settings({"run": {"steps": steps}} | sections, reasons, seconds)


def _max_length(objective: str, profile: Profile, base: Base) -> tuple[int, str]:
    lengths = profile.lengths
    most = min(_LONGEST[objective], base.context_length or _LONGEST[objective])
    if objective == "causal_lm":
        return most, "tokens per row; longer texts are cut into pieces, short ones share a row, nothing is lost"
    if objective == "sft":
        return _chat_length(profile, base)
    needed = _up(lengths.p95 + 2, 16)
    # Room beyond the data's own texts costs nothing, since batches are padded to the longest text in them.
    length = min(most, max(_ROOM_FOR_TEXTS, needed))
    cut = "of longer ones only the start is read, in training and when served"
    if needed > length:
        return length, f"95% of the texts would need {needed}, which is slower; {cut}"
    return length, f"95% of the texts {_fit(profile)}; {cut}"


def _chat_length(profile: Profile, base: Base) -> tuple[int, str]:
    """Longer than usual where prompts alone would fill rows. Raises BadInput where they do so in all."""
    cap = min(_LONGEST_CHAT, base.context_length or _LONGEST_CHAT)
    needed = _up(profile.lengths.p95 + base.counter.template_tokens, 32)
    length = min(cap, _LONGEST["sft"], max(256, needed))
    if num_lost(profile, length):
        asked = quantile(sorted(profile.prompts), _NEARLY_ALL) + _ANSWER_TOKENS
        length = max(length, min(cap, _up(asked, 32)))
    for prompts in (profile.prompts, profile.held_out_prompts):
        if min(prompts) >= length:
            context = (
                f"the context of {base.path} is {base.context_length:,}" if base.context_length else "for CPU cores"
            )
            have = "are estimated to have" if base.counter.is_estimate else "have"
            raise BadInput(
                f"--from: no answer would be learned: the prompts {have} {min(prompts):,} to {max(prompts):,} tokens, "
                f"and a row at most {length:,} ({context}); shorten them, or take a --base with a longer context"
            )
    fits = f"95% of the chats {_fit(profile)}" if needed <= length else f"95% of the chats would need {needed}"
    return length, f"tokens per row, short chats share one; {fits}, longer ones are cut"


def num_rows(objective: str, profile: Profile, length: int) -> int:
    """Return how many rows of a batch the training data fills: texts, or full rows of `length` tokens."""
    examples = len(profile.splits.train)
    if objective == "classification":
        return examples
    return max(1, math.ceil(examples * (profile.lengths.mean + 1) / length))


def num_lost(profile: Profile, length: int) -> int:
    """Return how many training rows teach nothing, because their prompt alone fills `length` tokens."""
    return sum(tokens >= length for tokens in profile.prompts)


def _fit(profile: Profile) -> str:
    return "are estimated to fit" if profile.lengths.is_estimate else "fit whole"


def _rows(objective: str, profile: Profile, length: int, is_small: bool) -> tuple[int, int]:
    """Rows per step, and the tokens that one costs: packed rows are full, others padded to the longest beside them."""
    if objective == "classification":
        return (32 if is_small else 16), min(length, max(8, profile.lengths.p95))
    return max(2, (2048 if is_small else 1024) // length), length


def _held_out(objective: str, profile: Profile, affordable: int) -> tuple[int, str]:
    """How many held-out rows to evaluate on; all of them where the first ones would lack a class."""
    rows = max(16, min(_MOST_HELD_OUT, affordable))
    why = "held-out rows to evaluate on, before the first step and after the last"
    if objective == "classification" and len(profile.splits.held_out) > rows:
        labels = profile.held_out_labels
        common = {label for label, count in Counter(labels).items() if count >= _COMMON * len(labels)}
        if not common <= set(labels[:rows]):
            return len(labels), "all held-out rows: the file is sorted, and its first rows lack a class"
    return rows, why


def _micro_rows(rows: int, row_tokens: int, is_small: bool) -> dict[str, int]:
    most = 8192 if is_small else 1024
    fitting = next(
        micro for micro in range(rows, 0, -1) if rows % micro == 0 and (micro * row_tokens <= most or micro == 1)
    )
    return {} if fitting == rows else {"micro_rows": fitting}


def _why_steps(steps: int, epoch: int, seconds: float) -> str:
    seen = steps / epoch
    passes = f"{seen:.1f} times all of the data" if seen >= 1 else f"{seen:.0%} of the data"
    longer = (
        f"; once through all of it: run.steps={epoch}"
        if seen < 1
        else "; longer: raise it while the held-out score improves"
    )
    return f"{passes}, {duration(seconds)} on two CPU cores (an estimate){longer}"


def _why_strategy(size: int, base: Base, is_small: bool) -> str:
    millions = f"{size / 1e6:,.1f}M" if size >= 100_000 else f"{size:,}"
    known = f"{millions} weights" if base.num_parameters else "a model of unknown size"
    if is_small:
        return f"every weight learns: {known} are few enough"
    return f"LoRA, for {known}: under 4% of them learn; type: full needs four times the memory"


def _why_rows(objective: str, rows: int, per_step: int) -> str:
    what = "texts" if objective == "classification" else "full rows"
    return f"{rows} {what} are about {per_step:,} tokens a step"


def duration(seconds: float) -> str:
    """Return a time as a person would say it."""
    return f"about {max(10, round(seconds, -1)):.0f} seconds" if seconds < 90 else f"about {seconds / 60:.0f} minutes"


def _up(value: int, multiple: int) -> int:
    return math.ceil(value / multiple) * multiple
