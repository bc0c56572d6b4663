"""Where a run's rows come from: the embedded corpus, the user's files, a data set of the hub, or several of these."""

from collections.abc import Sequence

from trainer import cache, corpus, mixture, splits
from trainer.config import EmbeddedData, FileSource, HubSource, MixtureData
from trainer.data_files import DataError, FileRows, read_rows
from trainer.hub_data import HubRows
from trainer.left_out import LeftOut
from trainer.rows import Rows
from trainer.splits import NothingHeldOut, Splits, divide, tell_left_out

__all__ = ["DataError", "LeftOut", "NothingHeldOut", "Splits", "divide", "read_rows", "read_splits", "tell_left_out"]

_WORTH_KEEPING_BYTES = 2**26  # of files: a pass over less takes a second or two
_VERSION = 2  # of what a pass finds out; kept results of another are not used


def read_splits(
    data: EmbeddedData | FileSource | HubSource | MixtureData, takes: str, labels: Sequence[str] | None = None
) -> Splits:
    """Return the rows of a run; `takes` says what is taken from each (a key of `columns.TAKES`).

    `labels` are those that the objective lists, if it does: rows with others may be left out.

    Raises DataError for missing or empty data and rows that cannot be read.
    """
    if isinstance(data, MixtureData):
        sources = [_read(source.data, takes, labels, streaming=data.streaming) for source in data.sources]
        return mixture.mixed(data, takes, sources)
    return _read(data, takes, labels, streaming=getattr(data, "streaming", False))


def _read(
    data: EmbeddedData | FileSource | HubSource, takes: str, labels: Sequence[str] | None, *, streaming: bool
) -> Splits:
    if isinstance(data, EmbeddedData):
        train, held_out = corpus.split(corpus.VIEWS[takes](corpus.read_items()))
        return splits.of_lists(train[: data.max_rows], held_out)
    parts = _files(data) if isinstance(data, FileSource) else _hub(data, streaming=streaming)
    rows, validation, test = parts
    assert rows is not None
    if streaming:
        return splits.stream(data, takes, rows, validation, test, labels=labels)
    return divide(data, takes, rows, validation, test, labels=labels, key=_key(data, takes, labels, parts))


def _files(data: FileSource) -> list[Rows | None]:
    parts = (data.train, data.validation, data.test)
    return [None if paths is None else FileRows(paths, data.split_txt) for paths in parts]


def _hub(data: HubSource, *, streaming: bool) -> list[Rows | None]:
    parts = (data.train_split, data.validation_split, data.test_split)
    return [None if split is None else HubRows(data, split, streaming=streaming) for split in parts]


def _key(
    data: FileSource | HubSource, takes: str, labels: Sequence[str] | None, parts: list[Rows | None]
) -> str | None:
    """The key under which what a pass over large files finds out is kept; None where a pass is quick."""
    states = [state for part in parts if isinstance(part, FileRows | HubRows) for state in part.states()]
    if sum(state[1] for state in states) < _WORTH_KEEPING_BYTES:
        return None
    about = {"data": data.model_dump(mode="json"), "takes": takes, "labels": labels}
    return cache.key_of(splits=_VERSION, states=states, **about)
