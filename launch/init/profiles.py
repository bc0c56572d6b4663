"""What a data set holds: columns, lengths in tokens, labels, duplicates, rows that cannot be learned from."""

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from launch.init.token_counter import TokenCounter
from trainer.columns import TAKES, chat_of, text_of
from trainer.config import FileData
from trainer.corpus import Row
from trainer.sources import Splits

_SAMPLED_ROWS = 2_000  # lengths are counted on so many, spread evenly
_LONGEST_CHECKED = 20  # and on these, so that the longest is not missed


@dataclass(frozen=True)
class Lengths:
    """Tokens per example over the rows that were counted; `by` says how they were counted."""

    median: int
    p95: int
    longest: int
    mean: float
    num_counted: int
    by: str
    is_estimate: bool


@dataclass(frozen=True)
class Profile:
    """What the training and held-out rows of an objective hold."""

    splits: Splits
    lengths: Lengths
    labels: list[tuple[str, int]]  # of the training rows, the commonest first; empty where there are none
    held_out_labels: list[str]  # row by row
    duplicates: int  # training rows that say the same as an earlier one
    shared: int  # held-out rows whose text is also trained on
    contradictions: int  # training texts that stand there with different labels
    prompts: list[int]  # of chats: tokens before the first answer, row by row; empty for other objectives
    held_out_prompts: list[int]


def profile(splits: Splits, objective: str, data: FileData, counter: TokenCounter) -> Profile:
    """Return what the rows hold, all of which can be learned from."""
    take: Callable[..., Any] = TAKES[objective]
    taken = [take(row, index, data) for index, row in enumerate(splits.train)]
    keys = [_digest(value) for value in taken]
    inputs = [_digest(_input(value)) for value in taken]
    labels = Counter(value[1] for value in taken) if objective == "classification" else Counter()
    trained_on = set(inputs)
    held_out = [take(row, index, data) for index, row in enumerate(splits.held_out)]
    return Profile(
        splits,
        lengths(splits.train, objective, data, counter),
        labels.most_common(),
        [value[1] for value in held_out if objective == "classification"],
        duplicates=len(keys) - len(set(keys)),
        shared=sum(_digest(_input(value)) in trained_on for value in held_out),
        contradictions=sum(
            count > 1 for count in Counter(text for text, _ in {*zip(inputs, keys, strict=True)}).values()
        ),
        prompts=_prompts(splits.train, data, counter) if objective == "sft" else [],
        held_out_prompts=_prompts(splits.held_out, data, counter) if objective == "sft" else [],
    )


def lengths(rows: Iterable[Row], objective: str, data: FileData, counter: TokenCounter) -> Lengths:
    """Return the lengths of the rows in tokens: of a chat all its turns, without what the template adds."""
    texts = [_whole_text(row, index, objective, data) for index, row in enumerate(rows)]
    every = max(1, len(texts) // _SAMPLED_ROWS)
    sample = sorted(counter.count(texts[::every]))
    longest = max(counter.count(sorted(texts, key=len)[-_LONGEST_CHECKED:]))
    return Lengths(
        median=quantile(sample, 0.5),
        p95=quantile(sample, 0.95),
        longest=max(longest, sample[-1]),
        mean=sum(sample) / len(sample),
        num_counted=len(sample),
        by=counter.by,
        is_estimate=counter.is_estimate,
    )


def quantile(ordered: list[int], part: float) -> int:
    """Return the smallest value that at least `part` of the ordered values do not exceed."""
    return ordered[max(0, -int(-part * len(ordered) // 1) - 1)]


def _prompts(rows: Iterable[Row], data: FileData, counter: TokenCounter) -> list[int]:
    """The tokens that stand before the first answer of each chat, with what the template adds."""
    chats = (chat_of(row, index, data) for index, row in enumerate(rows))
    asked = (itertools.takewhile(lambda turn: turn["role"] != "assistant", chat) for chat in chats)
    return [count + counter.template_tokens for count in counter.count(["\n".join(_contents(each)) for each in asked])]


def _input(value: Any) -> Any:
    """What is given of an example: of a labelled text the text, else all of it."""
    return value[0] if isinstance(value, tuple) else value


def _digest(value: Any) -> bytes:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).digest()


def _whole_text(row: Row, index: int, objective: str, data: FileData) -> str:
    if objective != "sft":
        return text_of(row, index, data)
    return "\n".join(_contents(chat_of(row, index, data)))


def _contents(turns: Iterable[dict[str, str]]) -> list[str]:
    return [turn["content"] for turn in turns]
