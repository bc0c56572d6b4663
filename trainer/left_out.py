"""Rows that cannot be learned from: passed over, counted by reason, the first ones named."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from trainer.columns import BadRow
from trainer.corpus import Row
from trainer.rows import Facts, Position, Rows

_PLACES_KEPT = 3


@dataclass(frozen=True)
class LeftOut:
    """Rows that are not trained or evaluated on: how many, why ("without 'label'"), and where the first ones stand."""

    reason: str
    count: int
    places: list[str]


class UsableRows(Rows):
    """The rows that pass a check, which raises BadRow; `left_out` says what the last pass has met of the others."""

    def __init__(self, whole: Rows, check: Callable[[Row, int], object]) -> None:
        self.whole, self.check = whole, check
        self._left_out: dict[str, LeftOut] = {}

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        return tuple(self._left_out.values())

    def from_position(self, position: Position | None = None) -> Iterator[tuple[Position, Row]]:
        if position is None:
            self._left_out = {}
        for index, (after, row) in enumerate(self.whole.from_position(position)):
            try:
                self.check(row, index)
            except BadRow as error:
                self._left_out[error.reason] = _one_more(self._left_out.get(error.reason), error)
            else:
                yield after, row

    def glance(self) -> Facts:
        return self.whole.glance()


def together(found: Iterable[LeftOut]) -> tuple[LeftOut, ...]:
    """Return what was left out with equal reasons joined, the commonest first."""
    joined: dict[str, LeftOut] = {}
    for each in found:
        old = joined.get(each.reason, LeftOut(each.reason, 0, []))
        joined[each.reason] = LeftOut(each.reason, old.count + each.count, [*old.places, *each.places][:_PLACES_KEPT])
    return tuple(sorted(joined.values(), key=lambda each: -each.count))


def _one_more(old: LeftOut | None, error: BadRow) -> LeftOut:
    if old is None:
        return LeftOut(error.reason, 1, [error.place])
    return LeftOut(old.reason, old.count + 1, [*old.places, error.place][:_PLACES_KEPT])
