"""Rows that are encoded while they are learned from: window by window, each packed and shuffled by itself.

What comes when is a function of (seed, epoch, window): nothing is known of what comes later in the file, and nothing is
kept of what came before. To go on, one window of each source is read again.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from trainer import order
from trainer.data_files import DataError
from trainer.packing import Row
from trainer.reading import Drawn, Reading, check_weights
from trainer.rows import Position, Rows
from trainer.stored_rows import JoinedRows, num_tokens

MakeRows = Callable[[list[dict[str, Any]], int], list[Row]]  # (rows of the data, the number of the first) -> rows

_STATES_KEPT = 4  # of the last steps: whoever reads a step ahead can still save the one before


@dataclass(frozen=True)
class Cursor:
    """Where a source stands: the next row is number `read` of a window, whose data rows come after `position`."""

    epoch: int = 0
    window: int = 0
    position: Position | None = None
    read: int = 0


class StreamSource:
    """The rows of one source, in windows of `window_rows` rows of the data, epoch after epoch.

    Raises DataError with what `nothing_left` says of so many rows of the data, where a whole epoch gives no row.
    """

    def __init__(
        self,
        data: Rows,
        make_rows: MakeRows,
        *,
        window_rows: int,
        seed: int,
        nothing_left: Callable[[int], str],
        number: int = 0,
    ) -> None:
        self.data, self.make_rows, self.window_rows = data, make_rows, window_rows
        self.seed, self.nothing_left, self.number = seed, nothing_left, number
        self.go_on(Cursor())
        while not self.rows:
            self._next_window()

    def go_on(self, cursor: Cursor) -> None:
        """Read on from a cursor: its window is read again."""
        self.cursor = cursor
        self._reader = self.data.from_position(cursor.position)
        self._has_rows = cursor != Cursor()  # in this epoch
        self._open(cursor.epoch, cursor.window, cursor.position, cursor.read)

    def next(self) -> Drawn:
        """Return the next row, and move on."""
        at = self.cursor
        while at.read == len(self.rows):
            at = self._next_window()
        row = int(self._order[at.read])
        self.cursor = Cursor(at.epoch, at.window, at.position, at.read + 1)
        place = f"{row} of window {at.window} in epoch {at.epoch}" + (f" of source {self.number}" * bool(self.number))
        draw = order.draw_of_window_row(self.seed, at.epoch, at.window, row, self.number)
        return Drawn(place, self.rows[row], draw)

    def _next_window(self) -> Cursor:
        at = self.cursor
        if self._is_last:
            if not self._has_rows:
                raise DataError(self.nothing_left(self._num_rows))
            self._reader, self._has_rows = self.data.from_position(), False
            return self._open(at.epoch + 1, 0, None, 0)
        return self._open(at.epoch, at.window + 1, self._stop, 0)

    def _open(self, epoch: int, window: int, position: Position | None, read: int) -> Cursor:
        found = list(itertools.islice(self._reader, self.window_rows))
        self._is_last = len(found) < self.window_rows
        self._stop = found[-1][0] if found else position
        self.rows = self.make_rows([row for _, row in found], window * self.window_rows) if found else []
        self._has_rows |= bool(self.rows)
        self._num_rows = window * self.window_rows + len(found)  # of the data, in this epoch
        self._order = order.window_order(self.seed, epoch, window, len(self.rows), self.number)
        self.cursor = Cursor(epoch, window, position, read)
        return self.cursor


class StreamReading(Reading):
    """The rows of one or several streams, drawn from by weight. Steps are read one after the other."""

    def __init__(self, sources: Sequence[StreamSource], weights: Sequence[float], seed: int) -> None:
        check_weights(weights)
        self.sources, self.weights, self.seed = sources, weights, seed
        self.rows = JoinedRows([source.rows for source in sources])
        self._stop, self._read = 0, dict[int, list[Drawn]]()
        self._states = {0: self._state()}

    def between(self, start: int, stop: int) -> list[Drawn]:
        """Return what is read there: the part that follows those read so far, or again one of the last."""
        if start not in self._read:
            assert start == self._stop, f"a stream that was read up to {self._stop} cannot be read at {start}"
            sources, _ = order.sources_between(start, stop, weights=self.weights, seed=self.seed)
            self._read[start] = [self.sources[source].next() for source in sources.tolist()]
            self._stop = stop
            self._states[stop] = self._state()
            for kept in (self._read, self._states):
                for old in list(kept)[:-_STATES_KEPT]:
                    del kept[old]
        return self._read[start]

    def tokens_between(self, start: int, stop: int) -> int:
        return sum(num_tokens(drawn.row) for drawn in self.between(start, stop))

    def outlook(self, stop: int) -> str:
        return "of a stream, which is not read to count its tokens"

    def state_at(self, position: int) -> Any:
        return self._states[position]

    def go_on(self, position: int, state: Any) -> None:
        for source, cursor in zip(self.sources, state, strict=True):
            source.go_on(Cursor(**cursor))
        self._stop, self._read, self._states = position, {}, {position: state}

    def _state(self) -> list[dict[str, Any]]:
        return [asdict(source.cursor) for source in self.sources]
