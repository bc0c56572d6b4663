"""What an objective takes from a row: a text, labels, tags, a chat. A row that lacks it is refused, or left out."""

import math
import re
from collections.abc import Callable
from typing import Any

from trainer.config import Columns
from trainer.data_files import DataError, Row

Messages = list[dict[str, str]]

_LARGEST_NUMBER = 1e18  # a loss adds up squares in fp32: a hundred of these are still finite
_LONGEST_SHOWN = 60  # characters of a value in an error

# A list as programs write it into one field of a csv file. Its marks would become parts of names and words.
_WRITTEN_LIST = re.compile(r"""\s*\[["'\d].*\]\s*""", re.DOTALL)

# Chats are also written as {"from": "human", "value": ...}.
_ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}


class BadRow(DataError):
    """A row that cannot be learned from: where it stands, and a `reason` that completes "rows ..." ("without 'label'").

    The message names the setting of the column, the row, and the `problem` with it.
    """

    def __init__(self, row: Row, index: int, setting: str, problem: str, reason: str) -> None:
        self.place, self.reason = place(row, index), reason
        super().__init__(f"data.{setting}: {self.place}{problem}")


def place(row: Row, index: int) -> str:
    """Say where a row stands: file and line, or its number."""
    return getattr(row, "place", f"row {index + 1}")


def text_of(row: Row, index: int, data: Columns, setting: str = "text") -> str:
    """Return the text in the column that `data.<setting>` names.

    Raises BadRow if it is missing, no text, or, where rows may be left out, empty.
    """
    name, text = getattr(data, setting), _value(row, index, data, setting)
    if not isinstance(text, str):
        problem = f" holds a {type(text).__name__}; expected text"
        raise BadRow(row, index, setting, problem, f"whose {name!r} is no text")
    if data.skip_bad_rows and not text.strip():
        raise BadRow(row, index, setting, f" has an empty {name!r}", f"with an empty {name!r}")
    return text


def pair_of(row: Row, index: int, data: Columns) -> tuple[str, str | None]:
    """Return the text of a row, and the one that is judged with it where `data.text_pair` names a column."""
    return text_of(row, index, data), text_of(row, index, data, "text_pair") if data.text_pair else None


def label_of(row: Row, index: int, data: Columns) -> str:
    """Return the class of a row: a name, a whole number (1.0 is 1), true or false. Raises BadRow for anything else."""
    label = _value(row, index, data, "label")
    name = _name(label)
    if name is None:
        hint = {list: "; for lists: objective.problem multi_label", float: "; for these: objective.problem regression"}
        reason = f"with an empty {data.label!r}" if label == "" else f"whose {data.label!r} is no name or whole number"
        problem = f": {_short(label)} found; expected a name or a whole number{hint.get(type(label), '')}"
        raise BadRow(row, index, "label", problem, reason)
    return name


def labels_of(row: Row, index: int, data: Columns) -> list[str]:
    """Return the classes of a row, maybe none: a list, or a text with `data.label_separator` between. Raises BadRow."""
    if data.label not in row:
        _value(row, index, data, "label")
    value = row[data.label]
    _refuse_written_list(row, index, "label", value, f"names with {data.label_separator!r} between")
    if isinstance(value, str):
        value = [part.strip() for part in value.split(data.label_separator) if part.strip()]
    names = [_name(each) for each in value] if isinstance(value, list) else [] if value is None else [None]
    if None in names:
        problem = f": {_short(value)} found; expected a list of names, or a text with {data.label_separator!r} between"
        raise BadRow(row, index, "label", problem, f"whose {data.label!r} is no list of names")
    return list(dict.fromkeys(name for name in names if name is not None))


def number_of(row: Row, index: int, data: Columns) -> float:
    """Return the number of a row, also one written as text. Raises BadRow for what is none or too large, and NaN."""
    value = _value(row, index, data, "label")
    try:
        number = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not abs(number) <= _LARGEST_NUMBER:
        problem = f": {_short(value)} found; expected a number; for classes: objective.problem single_label"
        if math.isfinite(number):
            problem = f": {_short(value)} found; expected a number up to {_LARGEST_NUMBER:g}; give all in a larger unit"
        raise BadRow(row, index, "label", problem, f"whose {data.label!r} is no number")
    return number


def tagged_words_of(row: Row, index: int, data: Columns) -> tuple[list[str], list[str]]:
    """Return the words of a row and the tag of each: lists, or texts with white space between, as in csv.

    Raises BadRow if either is missing, empty or no list of such, or they are not equally many.
    """
    words, tags = (_list(row, index, data, setting) for setting in ("tokens", "tags"))
    if wrong := [word for word in words if not isinstance(word, str)]:
        problem = f": the word {_short(wrong[0])} found; expected text"
        raise BadRow(row, index, "tokens", problem, f"whose {data.tokens!r} are no words")
    names = [_name(tag) for tag in tags]
    if None in names:
        problem = f": the tag {_short(tags[names.index(None)])} found; expected a name or a whole number"
        raise BadRow(row, index, "tags", problem, f"whose {data.tags!r} are no names")
    if len(words) != len(tags):
        problem = f" has {len(words)} words in {data.tokens!r}, but {len(tags)} in {data.tags!r}; expected a tag a word"
        raise BadRow(row, index, "tags", problem, "with another number of tags than words")
    return words, [name for name in names if name is not None]


def labelled_text_of(row: Row, index: int, data: Columns) -> tuple[str, str]:
    """Return the text of a row and its class. Raises BadRow, also for a second text that is asked for and missing."""
    return pair_of(row, index, data)[0], label_of(row, index, data)


def chat_of(row: Row, index: int, data: Columns) -> Messages:
    """Return the turns of a row: those of its `messages`, or its prompt (system and context with it) and completion.

    Raises BadRow if they are missing, not well formed, or the assistant says nothing.
    """
    if data.messages not in row:
        return _pair(row, index, data)
    messages = turns_of(row[data.messages])
    if messages is None:
        problem = " holds no list of {role, content} with text; mend the row"
        reason = f"whose {data.messages!r} is no list of {{role, content}} with text"
        raise BadRow(row, index, "messages", problem, reason)
    if messages and messages[0]["role"] == "assistant":  # chat templates take no empty conversation before it
        problem = " starts with a turn of the assistant, which nothing asks for; start with the user's, or remove it"
        raise BadRow(row, index, "messages", problem, "that start with a turn of the assistant")
    said = [turn["content"] for turn in messages if turn["role"] == "assistant"]
    if not said or (data.skip_bad_rows and not "".join(said).strip()):
        problem = " has no assistant turn to learn from; remove it"
        raise BadRow(row, index, "messages", problem, "with no assistant turn")
    return messages


def turns_of(messages: Any) -> Messages | None:
    """Return the turns as {role, content} with text, or None if they are not a chat."""
    if not isinstance(messages, list) or not all(isinstance(turn, dict) for turn in messages):
        return None
    turns = [
        {"role": _ROLES.get(str(turn["from"])), "content": turn.get("value")}
        if "from" in turn and "role" not in turn
        else turn
        for turn in messages
    ]
    well_formed = all(isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str) for turn in turns)
    return turns if well_formed else None


def _labels_and_text_of(row: Row, index: int, data: Columns) -> object:
    return pair_of(row, index, data), labels_of(row, index, data)


def _number_and_text_of(row: Row, index: int, data: Columns) -> object:
    return pair_of(row, index, data), number_of(row, index, data)


# What is taken from a row, by `takes` of the objective section. Raises BadRow if the row cannot be learned from.
TAKES: dict[str, Callable[..., object]] = {
    "causal_lm": text_of,
    "masked_lm": text_of,
    "sft": chat_of,
    "classification": labelled_text_of,
    "multi_label": _labels_and_text_of,
    "regression": _number_and_text_of,
    "token_classification": tagged_words_of,
}


def _name(value: Any) -> str | None:
    """The name of a class: text, a whole number (1.0 is 1), true or false; None for anything else, and for no text."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value) if isinstance(value, str | int) and value != "" else None


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= _LONGEST_SHOWN else f"{shown[:_LONGEST_SHOWN]}..."


def _list(row: Row, index: int, data: Columns, setting: str) -> list[Any]:
    value = _value(row, index, data, setting)
    _refuse_written_list(row, index, setting, value, "one entry a word, with white space between")
    value = value.split() if isinstance(value, str) else value
    if not isinstance(value, list) or not value:
        name, wrong = getattr(data, setting), f"no list ({_short(value)})" if value != [] else "an empty list"
        problem = f" has {wrong} in {name!r}; expected one entry a word, at least one"
        raise BadRow(row, index, setting, problem, f"with {'an empty' if value == [] else 'no list in'} {name!r}")
    return value


def _refuse_written_list(row: Row, index: int, setting: str, value: Any, expected: str) -> None:
    """Raise BadRow for a text that is a list in the writing of some language."""
    if isinstance(value, str) and _WRITTEN_LIST.fullmatch(value):
        problem = f": {_short(value)} found, a list written as text; expected {expected}, or a list in .jsonl"
        raise BadRow(row, index, setting, problem, "with a list written as text")


def _value(row: Row, index: int, data: Columns, setting: str) -> Any:
    name = getattr(data, setting)
    if row.get(name) is None:
        problem = f" has no {name!r}; it has: {', '.join(row) or 'none'}; name one of them"
        if name in row:
            problem = f" has nothing (null) in {name!r}; mend the row, or set data.skip_bad_rows=true"
        raise BadRow(row, index, setting, problem, f"without {name!r}")
    return row[name]


def _pair(row: Row, index: int, data: Columns) -> Messages:
    prompt, completion = text_of(row, index, data, "prompt"), text_of(row, index, data, "completion")
    if data.context is not None and row.get(data.context):  # many rows of such data have none
        prompt = f"{prompt}\n\n{text_of(row, index, data, 'context')}"
    system = [] if data.system is None else [{"role": "system", "content": data.system}]
    return [*system, {"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
