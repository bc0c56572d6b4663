"""Text that a model was not trained on, to tell what quantising costs: a file, the run's own, or Python's library."""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serving.directory import BadInput
from serving.export_paths import find_model

if TYPE_CHECKING:
    from serving.export import HeldOutRows
    from trainer.columns import Messages
    from trainer.config import Columns

NAMES = ("text", "text_pair", "label")
ACCEPTED = "give each row a text, messages, or a prompt and a completion"
MAX_ROWS = 20_000  # that are read; of them as many are used as need be, evenly spread

Row = dict[str, Any]


def held_out_rows(model: Path, data: Path | None) -> "HeldOutRows":
    """Return held-out rows: of the file `data`, else of the run behind `model`, else of the standard library.

    Raises BadInput for a file that is missing, empty or holds no text.
    """
    from serving.export import HeldOutRows

    if data is not None:
        rows = list(islice(_of_file(data), MAX_ROWS))
        if not rows:
            raise BadInput(f"--data: {data} has no text; give a .txt file, or a .jsonl file with a text in each row")
        return HeldOutRows(rows, str(data))
    folder = find_model(model)
    config = folder.parent / "config.yaml"
    if folder.name == "model" and config.is_file():
        return HeldOutRows(_of_run(config), f"what {folder.parent} held out")
    from trainer import corpus

    return HeldOutRows(corpus.split(corpus.documents(corpus.read_items()))[1], "the Python standard library")


def refuse_data(data: Path | None) -> None:
    """Raise BadInput for held-out text that nothing would be measured on."""
    if data is not None:
        raise BadInput(f"--data: {data} is only read for what quantisation costs; add --quantize, or leave it out")


def _of_file(path: Path) -> Iterator[Row]:
    """Yield the rows of a data file with the columns as they are usually named, chats as the trainer reads them."""
    from trainer.columns import place
    from trainer.data_files import read_rows

    for index, row in enumerate(read_rows(path)):
        named = {name: value for name, value in row.items() if value is not None}
        if "messages" not in named and not isinstance(named.get("text"), str):
            named["messages"] = _asked_and_answered(row, index)
        elif "messages" in named:
            named["messages"] = _chat(named["messages"], place(row, index))
        if not isinstance(named.get("text"), str):
            named.pop("text", None)
        yield named


def _chat(messages: Any, where: str) -> "Messages":
    """Return a chat, which need not have an answer to learn from. Raises BadInput for what is none."""
    from trainer.columns import turns_of

    turns = turns_of(messages)
    if not turns:
        raise BadInput(
            f"--data: {where}: messages is no chat; accepted: a list of {{role, content}}, both of them text"
        )
    return turns


def _asked_and_answered(row: Row, index: int) -> "Messages":
    """Return the chat of a prompt and a completion. Raises BadInput for a row without them."""
    from trainer.columns import BadRow, chat_of, place
    from trainer.config import Columns

    if "prompt" not in row and "completion" not in row:
        raise BadInput(f"--data: {place(row, index)} has no text; {ACCEPTED}")
    try:
        return chat_of({name: row[name] for name in ("prompt", "completion") if name in row}, index, Columns())
    except BadRow as error:
        raise BadInput(f"--data: {place(row, index)}: a row {error.reason}; {ACCEPTED}") from None


def _of_run(path: Path) -> list[Row]:
    """Return the held-out rows of a run. Raises BadInput where its data is gone."""
    from launch.config_file import load
    from trainer.config import RunConfig
    from trainer.sources import read_splits

    config = load(path, [], RunConfig)
    try:
        takes = config.objective.takes
        held_out = read_splits(config.data, takes, getattr(config.objective, "labels", None)).held_out
        return list((_chats if takes == "sft" else _named)(islice(held_out, MAX_ROWS), config.data.columns))
    except BadInput as error:
        raise BadInput(f"{error}; or give held-out text with --data FILE") from None


def _chats(rows: Iterable[Row], columns: "Columns") -> Iterator[Row]:
    """Yield the chats that the trainer makes of the rows. Raises BadInput for a row without one."""
    from trainer.columns import chat_of

    for index, row in enumerate(rows):
        yield {"messages": chat_of(row, index, columns)}


def _named(rows: Iterable[Row], columns: "Columns") -> Iterator[Row]:
    """Yield the rows with our names for what `columns` says is in them."""
    for row in rows:
        named = {name: row.get(getattr(columns, name) or name) for name in NAMES}
        words = row.get(columns.tokens)
        if named["text"] is None and words is not None:
            named["text"] = words if isinstance(words, str) else " ".join(words)
        yield {name: value for name, value in named.items() if value is not None}
