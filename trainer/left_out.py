"""Rows that cannot be learned from: passed over, counted by reason, the first ones named."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from trainer.columns import BadRow
from trainer.corpus import Row
from trainer.rows import ChainedRows, ChosenRows, Facts, Position, Rows

_PLACES_KEPT = 3


@dataclass(frozen=True)
class LeftOut:
    """Rows that are not trained or evaluated on: how many, why ("without 'label'"), and where the first ones stand."""

    reason: str
    count: int
    places: list[str]


class UsableRows(Rows):
    """The rows that pass a check, which raises BadRow.

    `left_out` says what the last pass has met of the others, and `most_left_out` the pass that met the most of them.
    """

    def __init__(self, whole: Rows, check: Callable[[Row, int], object]) -> None:
        self.whole, self.check = whole, check
        self._left_out: dict[str, LeftOut] = {}
        self._most: tuple[LeftOut, ...] = ()

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        return tuple(self._left_out.values())

    @property
    def most_left_out(self) -> tuple[LeftOut, ...]:
        return max(self._most, self.left_out, key=_total)

    def again(self) -> "UsableRows":
        """Return the same rows, to be read and counted apart from these."""
        return UsableRows(self.whole, self.check)

    def from_position(self, position: Position | None = None) -> Iterator[tuple[Position, Row]]:
        if position is None:
            self._most, self._left_out = self.most_left_out, {}
        for index, (after, row) in enumerate(self.whole.from_position(position)):
            try:
                self.check(row, index)
            except BadRow as error:
                self._left_out[error.reason] = _one_more(self._left_out.get(error.reason), error)
            else:
                yield after, row

    def glance(self) -> Facts:
        return self.whole.glance()


def left_out_of(rows: Rows) -> tuple[LeftOut, ...]:
    """Return what was met so far of rows that are left out of `rows`, whatever these are made of."""
    if isinstance(rows, ChosenRows):
        return left_out_of(rows.whole)
    if isinstance(rows, ChainedRows):
        return together(each for part in rows.parts for each in left_out_of(part))
    return together(rows.most_left_out) if isinstance(rows, UsableRows) else ()


def together(found: Iterable[LeftOut]) -> tuple[LeftOut, ...]:
    """Return what was left out with equal reasons joined, the commonest first."""
    joined: dict[str, LeftOut] = {}
    for each in found:
        old = joined.get(each.reason, LeftOut(each.reason, 0, []))
        joined[each.reason] = LeftOut(each.reason, old.count + each.count, [*old.places, *each.places][:_PLACES_KEPT])
    return tuple(sorted(joined.values(), key=lambda each: -each.count))


def _total(found: Iterable[LeftOut]) -> int:
    return sum(each.count for each in found)


def _one_more(old: LeftOut | None, error: BadRow) -> LeftOut:
    if old is None:
        return LeftOut(error.reason, 1, [error.place])
    return LeftOut(old.reason, old.count + 1, [*old.places, error.place][:_PLACES_KEPT])
