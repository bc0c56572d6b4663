"""Rows that are read from where they lie in every pass, in one fixed order, so that data may be larger than memory."""

import hashlib
import itertools
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import overload

from trainer.corpus import Row

Position = list[int]  # where reading goes on: small, JSON, and meant only for the rows that gave it

_ENCODER = json.JSONEncoder(sort_keys=True, ensure_ascii=False, default=str)


@dataclass(frozen=True)
class Facts:
    """What a pass over rows finds out: how many there are, and a hash of them in order.

    Of a stream, which is never read whole, the number is None, and the hash is of what can be seen without reading.
    """

    num_rows: int | None
    fingerprint: str


class Rows(ABC):
    """Rows in one fixed order that can be read again and again; nothing of them need be in memory.

    They read like a list (iteration, len, index, slice, ==), but each of these may take a pass over the files. `len`
    and `fingerprint` are known once `sources.read_splits` has returned, but the length of a stream: it is None as
    `num_rows`, and takes a pass.
    """

    facts: Facts | None = None

    @abstractmethod
    def from_position(self, position: Position | None = None) -> Iterator[tuple[Position, Row]]:
        """Yield each row after `position` (all of them without one) with the position after it.

        Reading on from any of these positions, in this process or another, gives the rows that come after.
        """

    def __iter__(self) -> Iterator[Row]:
        return (row for _, row in self.from_position())

    @property
    def num_rows(self) -> int | None:
        """How many rows there are; None where no whole pass was made yet."""
        return self.facts.num_rows if self.facts else None

    @property
    def fingerprint(self) -> str:
        """A hash of the rows' content, in order; of a stream, of what can be seen without reading it."""
        return self._facts().fingerprint

    def glance(self) -> Facts:
        """Return what can be seen of the rows without reading them."""
        return self._facts()

    def __len__(self) -> int:
        num_rows = self._facts().num_rows
        return sum(1 for _ in self) if num_rows is None else num_rows

    def __bool__(self) -> bool:
        return next(iter(self), None) is not None

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            start, stop, step = (index.start or 0), index.stop, (index.step or 1)
            if min(start, step, stop or 0) < 0:
                start, stop, step = index.indices(len(self))
            return list(itertools.islice(self, start, stop, step))
        at = index + len(self) if index < 0 else index
        try:
            return next(itertools.islice(self, at, None))
        except (StopIteration, ValueError):
            raise IndexError(f"row {index} of rows that end before it") from None

    def __eq__(self, other: object) -> bool:
        return list(self) == list(other) if isinstance(other, Rows | list) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def _facts(self) -> Facts:
        if self.facts is None:
            tally = Tally()
            for row in self:
                tally.add(digest(encoded(row)))
            self.facts = tally.facts()
        return self.facts


class KeptRows(Rows):
    """Rows that are in memory. A position is the number of rows before it."""

    def __init__(self, rows: Iterable[Row], facts: Facts | None = None) -> None:
        self.kept, self.facts = list(rows), facts

    def from_position(self, position: Position | None = None) -> Iterator[tuple[Position, Row]]:
        first = position[0] if position else 0
        yield from (([index + 1], self.kept[index]) for index in range(first, len(self.kept)))

    def __iter__(self) -> Iterator[Row]:
        return iter(self.kept)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        return self.kept[index]

    def __len__(self) -> int:
        return len(self.kept)


class ChosenRows(Rows):
    """The rows that `change` does not turn into None, as it returns them. Positions are those of the whole."""

    def __init__(self, whole: Rows, change: Callable[[Row], Row | None], facts: Facts | None = None) -> None:
        self.whole, self.change, self.facts = whole, change, facts

    def from_position(self, position: Position | None = None) -> Iterator[tuple[Position, Row]]:
        for after, row in self.whole.from_position(position):
            if (changed := self.change(row)) is not None:
                yield after, changed


class ChainedRows(Rows):
    """The rows of several sources, one after the other. A position is the source's number and a position in it."""

    def __init__(self, parts: Iterable[Rows]) -> None:
        self.parts = tuple(parts)

    def from_position(self, position: Position | None = None) -> Iterator[tuple[Position, Row]]:
        first, *inner = position or [0]
        for number, part in enumerate(self.parts[first:], first):
            for after, row in part.from_position(inner or None):
                yield [number, *after], row
            inner = []

    @property
    def num_rows(self) -> int | None:
        numbers = [part.num_rows for part in self.parts]
        return None if None in numbers else sum(number for number in numbers if number)

    def _facts(self) -> Facts:
        hashes = [part.fingerprint for part in self.parts]
        return Facts(self.num_rows, hash_of(hashes))


@dataclass(frozen=True)
class WeightedRows:
    """The training rows of one source of a mixture, and its weight (they need not add up to one)."""

    rows: Rows
    weight: float


class Tally:
    """Counts rows and hashes their content while they pass by; keeps each row's hash where that is asked for."""

    def __init__(self, *, one_by_one: bool = False) -> None:
        self.num_rows, self._total = 0, hashlib.sha256()
        self.digests, self._one_by_one = bytearray(), one_by_one

    def add(self, hashed: bytes) -> None:
        self.num_rows += 1
        self._total.update(hashed)
        if self._one_by_one:
            self.digests += hashed

    def hasher(self) -> "hashlib._Hash":
        """Return a hash of what was added, that can go on."""
        return self._total.copy()

    def facts(self) -> Facts:
        return Facts(self.num_rows, self._total.hexdigest())


def encoded(row: Row) -> bytes:
    """Return what the row holds as text, the same whatever the order of its columns."""
    return _ENCODER.encode(row).encode()


def digest(text: bytes) -> bytes:
    return hashlib.sha256(text).digest()


def hash_of(parts: list[str]) -> str:
    """Return one hash of several texts, in their order."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
