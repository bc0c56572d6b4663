"""Rows of a batch whose examples lie on disk: a row is read when it is asked for."""

import bisect
import itertools
from collections.abc import Sequence
from typing import overload

import numpy as np

from trainer.best_fit import best_fit
from trainer.example_store import ExampleStore
from trainer.packing import Row


class _ReadRows(Sequence[Row]):
    """Rows that are made when they are asked for; `lengths` are the tokens of each, shape [R]."""

    lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self._read(i) for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return self._read(index % len(self))

    def _read(self, index: int) -> Row:
        raise NotImplementedError


class StoredRows(_ReadRows):
    """The rows of stored examples: packed up to `row_length` tokens, or with None one example each."""

    def __init__(self, store: ExampleStore, row_length: int | None) -> None:
        self.store = store
        self._starts: np.ndarray | None = None
        self.lengths = store.lengths
        if row_length is not None:
            members, starts = best_fit(store.lengths, row_length)
            self.lengths = np.add.reduceat(store.lengths[members], starts[:-1]).astype(np.int32)
            # A number each of every example stays in memory, whatever the size of the data: small ones.
            self._members, self._starts = (each.astype(np.min_scalar_type(len(store))) for each in (members, starts))

    def _read(self, index: int) -> Row:
        if self._starts is None:
            return [self.store[index]]
        start, stop = self._starts[index : index + 2].tolist()
        return [self.store[example] for example in self._members[start:stop].tolist()]


class JoinedRows(_ReadRows):
    """The rows of several sources, one source after the other."""

    def __init__(self, sources: Sequence[Sequence[Row]]) -> None:
        self.sources = sources
        self.lengths = np.concatenate([lengths_of(rows) for rows in sources])
        self._stops = list(itertools.accumulate(map(len, sources)))

    def _read(self, index: int) -> Row:
        source = bisect.bisect_right(self._stops, index)
        return self.sources[source][index - (self._stops[source] - len(self.sources[source]))]


class SomeRows(_ReadRows):
    """At most `most` rows of a whole, evenly spread over it: files are often sorted, and packed rows are."""

    def __init__(self, whole: Sequence[Row], most: int) -> None:
        self.whole = whole
        self.places = np.arange(min(most, len(whole))) * len(whole) // max(1, min(most, len(whole)))
        self.lengths = lengths_of(whole)[self.places]

    def _read(self, index: int) -> Row:
        return self.whole[int(self.places[index])]


def lengths_of(rows: Sequence[Row]) -> np.ndarray:
    """Return the tokens of each row, shape [R]."""
    return rows.lengths if isinstance(rows, _ReadRows) else np.array([num_tokens(row) for row in rows], np.int64)


def num_tokens(row: Row) -> int:
    """Return the number of real tokens in a row."""
    return sum(len(example.input_ids) for example in row)
