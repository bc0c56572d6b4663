"""What a data set holds: columns, lengths in tokens, labels, duplicates, rows that cannot be learned from."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from trainer.columns import TAKES, chat_of, text_of
from trainer.config import FileData
from trainer.corpus import Row
from trainer.sources import Splits

_SAMPLED_ROWS = 2_000  # lengths are counted on so many, spread evenly
_LONGEST_CHECKED = 20  # and on these, so that the longest is not missed
_FEWEST_WORDS_OF_PROSE = 3.0
_NEARLY_ALL = 0.9  # of the values of a column: what the others are does not change its type


@dataclass(frozen=True)
class Column:
    """A column of the training rows: what is in it."""

    name: str
    type: str  # text, whole number, number, true or false, list, object, chat, mixed, empty
    is_str: bool  # nearly all values are strings; in a csv file they always are
    filled: int
    filled_share: float
    distinct: int
    example: str
    mean_chars: float
    mean_words: float

    @property
    def is_prose(self) -> bool:
        return self.type == "text" and self.mean_words >= _FEWEST_WORDS_OF_PROSE


@dataclass(frozen=True)
class TokenCounter:
    """Counts the tokens of texts, or estimates them: `by` says how."""

    count: Callable[[list[str]], list[int]]
    by: str


@dataclass(frozen=True)
class Lengths:
    """Tokens per example over the rows that were counted; `by` says how they were counted."""

    median: int
    p95: int
    longest: int
    mean: float
    num_counted: int
    by: str


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


def columns_of(rows: list[Row]) -> list[Column]:
    """Return the columns of rows in the order in which they appear."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    return [_column(name, [row.get(name) for row in rows]) for name in names]


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
    )


def lengths(rows: list[Row], objective: str, data: FileData, counter: TokenCounter) -> Lengths:
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
    )


def quantile(ordered: list[int], part: float) -> int:
    """Return the smallest value that at least `part` of the ordered values do not exceed."""
    return ordered[max(0, -int(-part * len(ordered) // 1) - 1)]


def _column(name: str, values: list[Any]) -> Column:
    filled = [value for value in values if value is not None and value != ""]
    strings = [value for value in filled if isinstance(value, str)]
    return Column(
        name,
        type=_type_of(filled),
        is_str=len(strings) >= _NEARLY_ALL * len(filled),
        filled=len(filled),
        filled_share=len(filled) / len(values),
        distinct=len({value if isinstance(value, str) else json.dumps(value) for value in filled}),
        example=" ".join(_shown(filled[0]).split()) if filled else "",
        mean_chars=sum(map(len, strings)) / max(1, len(strings)),
        mean_words=sum(value.count(" ") + 1 for value in strings) / max(1, len(strings)),
    )


def _type_of(values: list[Any]) -> str:
    """The kind of nearly all values: the few others are rows that will be left out."""
    kinds = Counter(map(_kind, values))
    if kinds["number"]:  # a column of both holds numbers
        kinds["number"] += kinds.pop("whole number", 0)
    if kinds["text"]:  # numbers in a column of texts are texts
        kinds["text"] += sum(kinds.pop(kind, 0) for kind in ("whole number", "number"))
    kind, count = max(kinds.items(), key=lambda item: item[1], default=("empty", 0))
    return kind if count >= _NEARLY_ALL * len(values) else "mixed"


def _kind(value: Any) -> str:
    match value:
        case bool():
            return "true or false"
        case int():
            return "whole number"
        case float():
            return "number"
        case str():
            return _kind_of_text(value)
        case [{"role": _}, *_] | [{"from": _}, *_]:
            return "chat"
        case list():
            return "list"
        case _:
            return "object"


def _kind_of_text(value: str) -> str:
    """Numbers in a csv file are texts too."""
    for kind, number in (("whole number", int), ("number", float)):
        try:
            number(value)
            return kind
        except ValueError:
            pass
    return "text"


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


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
