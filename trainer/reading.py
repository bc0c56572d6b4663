"""What a run reads, position by position: position p is row p % batch.rows of step p // batch.rows."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from serving.directory import BadInput
from trainer import order
from trainer.packing import Row
from trainer.stored_rows import JoinedRows, lengths_of, num_tokens


@dataclass(frozen=True)
class Drawn:
    """A row that a step reads: where it stands in the data, and the seed of what is random about it."""

    place: int | str
    row: Row
    draw: int


class Reading(ABC):
    """The training rows of a run in the order in which they are read, the same on every rank.

    `rows` are those that can be looked at before the run: all of them, or of a stream the first window.
    """

    rows: Sequence[Row]

    @abstractmethod
    def between(self, start: int, stop: int) -> list[Drawn]:
        """Return what is read at the positions start..stop."""

    @abstractmethod
    def tokens_between(self, start: int, stop: int) -> int:
        """Return the number of real tokens that are read at the positions start..stop."""

    @abstractmethod
    def outlook(self, stop: int) -> str:
        """Say how much is read up to a position, in tokens and epochs."""

    def state_at(self, position: int) -> Any:
        """Return what a later process needs, besides the position itself, to read on from it: JSON, or None."""
        return None

    def go_on(self, position: int, state: Any) -> None:
        """Read on from a position as the process did that gave this `state`."""
        assert state is None, f"a position is enough to read on, but {state} was kept"


class RowsReading(Reading):
    """Rows that can be read in any order: each epoch of each source is shuffled as a whole."""

    def __init__(self, sources: Sequence[Sequence[Row]], weights: Sequence[float], seed: int) -> None:
        check_weights(weights)
        self.rows = sources[0] if len(sources) == 1 else JoinedRows(sources)
        self._order: dict[str, Any] = {"sizes": [len(rows) for rows in sources], "weights": weights, "seed": seed}
        self._lengths = lengths_of(self.rows)

    def between(self, start: int, stop: int) -> list[Drawn]:
        rows, epochs = order.rows_between(start, stop, **self._order)
        return [
            Drawn(row, self.rows[row], order.draw_of_row(self._order["seed"], epoch, row))
            for row, epoch in zip(rows.tolist(), epochs.tolist(), strict=True)
        ]

    def tokens_between(self, start: int, stop: int) -> int:
        rows, _ = order.rows_between(start, stop, **self._order)
        return int(self._lengths[rows].sum())

    def outlook(self, stop: int) -> str:
        part = order.BLOCK_ROWS  # at a time, so that a long run needs no more memory than a short one
        tokens = sum(self.tokens_between(start, min(start + part, stop)) for start in range(0, stop, part))
        weights, sizes = self._order["weights"], self._order["sizes"]
        epochs = [stop * weight / sum(weights) / size for weight, size in zip(weights, sizes, strict=True)]
        of_sources = f" to {max(epochs):.2f}" if len(epochs) > 1 else ""
        return f"{tokens:,} tokens, {min(epochs):.2f}{of_sources} epochs"


def check_weights(weights: Sequence[float]) -> None:
    """Raise BadInput for a weight that is too small to be kept to."""
    least = sum(weights) / order.BLOCK_ROWS
    if small := [weight for weight in weights if weight < least]:
        raise BadInput(
            f"data.sources: weight {small[0]:g} is less than one row in {order.BLOCK_ROWS:,}; raise it to at least "
            f"{least:.2g}, or leave the source out"
        )


__all__ = ["Drawn", "Reading", "RowsReading", "check_weights", "num_tokens"]
