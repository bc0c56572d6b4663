"""The columns of a table: the type of each and what is in it, before anything is known about their use."""

import json
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from trainer.corpus import Row

_FEWEST_WORDS_OF_PROSE = 3.0
_NEARLY_ALL = 0.9  # of the values of a column: what the others are does not change its type
_YES_OR_NO = {"0", "1", "0.0", "1.0", "true", "false"}

# Letters of scripts that put no space between words (Thai to Khmer, Japanese, Chinese): about four make a word here,
# so that a short name such as a category is no prose.
_UNSPACED = re.compile(
    "[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
_UNSPACED_PER_WORD = 4


@dataclass(frozen=True)
class Column:
    """A column of the training rows: what is in it."""

    name: str
    type: str  # text, whole number (also 1.0), number, true or false, list, object, chat, mixed, empty
    is_str: bool  # nearly all values are strings; in a csv file they always are
    filled: int
    filled_share: float
    distinct: int
    example: str
    mean_chars: float
    mean_words: float
    is_binary: bool  # 0 and 1 or true and false, both of them and nothing else

    @property
    def is_prose(self) -> bool:
        return self.type == "text" and self.mean_words >= _FEWEST_WORDS_OF_PROSE


def columns_of(rows: list[Row]) -> list[Column]:
    """Return the columns of rows in the order in which they appear."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    return [_column(name, [row.get(name) for row in rows]) for name in names]


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
        mean_words=sum(map(_num_words, strings)) / max(1, len(strings)),
        is_binary=len({str(value).lower() for value in filled} & _YES_OR_NO) == 2
        and all(isinstance(value, str | int | float) and str(value).lower() in _YES_OR_NO for value in filled),
    )


def _num_words(text: str) -> float:
    unspaced = 0 if text.isascii() else len(_UNSPACED.findall(text))
    return text.count(" ") + 1 + unspaced / _UNSPACED_PER_WORD


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
            return "whole number" if value.is_integer() else "number"
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
    try:
        return "whole number" if float(value).is_integer() else "number"
    except ValueError:
        return "text"


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
