"""What an objective takes from a row: a text, a label, a chat. A row that lacks it is refused, and can be left out."""

from collections.abc import Callable
from typing import Any

from trainer.config import Columns
from trainer.data_files import DataError, Row

Messages = list[dict[str, str]]

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


def label_of(row: Row, index: int, data: Columns) -> str:
    """Return the class of a row: a name, a whole number (1.0 is 1), true or false. Raises BadRow for anything else."""
    label = _value(row, index, data, "label")
    if isinstance(label, bool):
        return "true" if label else "false"
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    if not isinstance(label, str | int) or label == "":
        reason = f"with an empty {data.label!r}" if label == "" else f"whose {data.label!r} is no name or whole number"
        raise BadRow(row, index, "label", f": {label!r} found; expected a name or a whole number", reason)
    return str(label)


def labelled_text_of(row: Row, index: int, data: Columns) -> tuple[str, str]:
    """Return the text of a row and its class. Raises BadRow."""
    return text_of(row, index, data), label_of(row, index, data)


def chat_of(row: Row, index: int, data: Columns) -> Messages:
    """Return the turns of a row: those of its `messages`, or its prompt (system and context with it) and completion.

    Raises BadRow if they are missing, not well formed, or the assistant says nothing.
    """
    if data.messages not in row:
        return _pair(row, index, data)
    messages = _turns(row[data.messages])
    if messages is None:
        problem = " holds no list of {role, content} with text; mend the row"
        reason = f"whose {data.messages!r} is no list of {{role, content}} with text"
        raise BadRow(row, index, "messages", problem, reason)
    said = [turn["content"] for turn in messages if turn["role"] == "assistant"]
    if not said or (data.skip_bad_rows and not "".join(said).strip()):
        problem = " has no assistant turn to learn from; remove it"
        raise BadRow(row, index, "messages", problem, "with no assistant turn")
    return messages


# By objective: what it takes from a row. Raises BadRow if the row cannot be learned from.
TAKES: dict[str, Callable[..., object]] = {"causal_lm": text_of, "sft": chat_of, "classification": labelled_text_of}


def _value(row: Row, index: int, data: Columns, setting: str) -> Any:
    name = getattr(data, setting)
    if row.get(name) is None:
        problem = f" has no {name!r}; it has: {', '.join(row) or 'none'}; name one of them"
        raise BadRow(row, index, setting, problem, f"without {name!r}")
    return row[name]


def _pair(row: Row, index: int, data: Columns) -> Messages:
    prompt, completion = text_of(row, index, data, "prompt"), text_of(row, index, data, "completion")
    if data.context is not None and row.get(data.context):  # many rows of such data have none
        prompt = f"{prompt}\n\n{text_of(row, index, data, 'context')}"
    system = [] if data.system is None else [{"role": "system", "content": data.system}]
    return [*system, {"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]


def _turns(messages: Any) -> Messages | None:
    """The turns as {role, content} with text, or None if they are not a chat."""
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
