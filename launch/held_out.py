"""Text that a model was not trained on, to tell what quantising costs: a file, the run's own, or Python's library."""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serving.directory import BadInput

if TYPE_CHECKING:
    from serving.export import HeldOutRows

NAMES = ("text", "text_pair", "label", "messages")
MAX_ROWS = 20_000  # that are read; of them as many are used as need be, evenly spread

Row = dict[str, Any]


def held_out_rows(model: Path, data: Path | None) -> "HeldOutRows":
    """Return held-out rows: of the file `data`, else of the run behind `model`, else of the standard library.

    Raises BadInput for a file that is missing, empty or holds no text.
    """
    from serving.export import HeldOutRows
    from serving.export.source import find_model

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
    """Yield the rows of a data file with the columns as they are usually named."""
    from trainer.data_files import read_rows

    for row in read_rows(path):
        if not isinstance(row.get("text"), str) and "messages" not in row:
            raise BadInput(f"--data: {getattr(row, 'place', path)} has no text; give each row a text, or messages")
        if "messages" in row and not _is_chat(row["messages"]):
            raise BadInput(
                f"--data: {getattr(row, 'place', path)}: messages is no chat; accepted: a list of {{role, content}}, "
                "both of them text"
            )
        yield dict(row)


def _is_chat(messages: Any) -> bool:
    return isinstance(messages, list) and all(
        isinstance(turn, dict) and all(isinstance(turn.get(key), str) for key in ("role", "content"))
        for turn in messages
    )


def _of_run(path: Path) -> list[Row]:
    """Return the held-out rows of a run. Raises BadInput where its data is gone."""
    from launch.config_file import load
    from trainer.config import RunConfig
    from trainer.sources import read_splits

    config = load(path, [], RunConfig)
    try:
        held_out = read_splits(config.data, config.objective.takes, getattr(config.objective, "labels", None)).held_out
        return list(_named(islice(held_out, MAX_ROWS), config.data))
    except BadInput as error:
        raise BadInput(f"{error}; or give held-out text with --data FILE") from None


def _named(rows: Iterable[Row], columns: Any) -> Iterator[Row]:
    """Yield the rows with our names for what `columns` says is in them."""
    for row in rows:
        named = {
            name: row.get(getattr(columns, name, None) or name) for name in ("text", "text_pair", "label", "messages")
        }
        words = row.get(getattr(columns, "tokens", None) or "tokens")
        if named["text"] is None and words is not None:
            named["text"] = words if isinstance(words, str) else " ".join(words)
        yield {name: value for name, value in named.items() if value is not None}
