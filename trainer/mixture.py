"""Several sources as one: each with its own columns and held-out part, all with the usual column names."""

from collections.abc import Callable
from typing import Any

from trainer.columns import TAKES
from trainer.config import Columns, EmbeddedData, MixtureData
from trainer.corpus import Row
from trainer.left_out import together
from trainer.rows import ChainedRows, ChosenRows, Rows, WeightedRows, hash_of
from trainer.splits import Splits


def mixed(data: MixtureData, takes: str, sources: list[Splits]) -> Splits:
    """Return the splits of a mixture: the parts of its sources one after the other, each row under the usual names."""
    renamed = [
        {name: _renamed(rows, source.data, takes) for name, rows in splits.parts().items()}
        for source, splits in zip(data.sources, sources, strict=True)
    ]
    tests = [parts["test"] for parts in renamed if "test" in parts]
    return Splits(
        train=ChainedRows(parts["train"] for parts in renamed),
        held_out=ChainedRows(parts["validation"] for parts in renamed),
        fingerprint=hash_of([splits.fingerprint for splits in sources]),
        left_out=together(each for splits in sources for each in splits.left_out),
        test=ChainedRows(tests) if tests else None,
        sources=tuple(
            WeightedRows(parts["train"], source.weight) for source, parts in zip(data.sources, renamed, strict=True)
        ),
        streaming=data.streaming,
    )


def _renamed(rows: Rows, data: Any, takes: str) -> Rows:
    if isinstance(data, EmbeddedData):
        return rows
    return ChosenRows(rows, _renamer(data, takes), rows.facts)


def _renamer(data: Columns, takes: str) -> Callable[[Row], Row]:
    """What returns a row under the usual names (a chat as `messages`, several labels as a list).

    It raises BadRow, which names the source's own columns, for a row that cannot be learned from.
    """
    usual = Columns(text_pair="text_pair", context="context").names()

    def rename(row: Row) -> Row:
        taken: Any = TAKES[takes](row, 0, data=data)
        values = {usual[setting]: row[name] for setting, name in data.names().items() if name in row}
        if takes == "sft":
            values = {usual["messages"]: taken}
        if takes == "multi_label":
            values[usual["label"]] = taken[1]
        return _PlacedRow(values, getattr(row, "place", None))

    return rename


class _PlacedRow(Row):
    """A row that knows where the one that it was made of stands."""

    def __init__(self, values: Row, place: str | None) -> None:
        super().__init__(values)
        if place is not None:
            self.place = place
