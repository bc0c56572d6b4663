"""What is read at a step -> the batches of this rank. The division among ranks never changes what is seen."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from trainer import order
from trainer.config import RunConfig
from trainer.modes import micro_rows
from trainer.objectives import Objective
from trainer.packing import Batch, Row
from trainer.reading import Drawn, Reading, RowsReading
from trainer.stored_rows import SomeRows, lengths_of, num_tokens

_SAMPLE_ROWS = 10_000


class Feed:
    """Training batches by step, held-out batches, and test batches, divided among ranks.

    `train` are the rows to look at before the run: all of them, or of a stream the first window; `sample` are so many
    of them that what is counted in them fits into memory.
    """

    def __init__(
        self,
        config: RunConfig,
        objective: Objective,
        train: Reading | Sequence[Row],
        held_out: Sequence[Row],
        test: Sequence[Row] = (),
        *,
        pad_id: int,
        rank: int,
        world_size: int,
    ) -> None:
        self.reading = train if isinstance(train, Reading) else RowsReading([train], [1.0], config.run.seed)
        self.objective, self.pad_id, self.seed = objective, pad_id, config.run.seed
        self.train, self.test = self.reading.rows, test
        self.sample: Sequence[Row] = SomeRows(self.train, _SAMPLE_ROWS)
        self.held_out: Sequence[Row] = SomeRows(held_out, config.evaluation.max_rows)
        self.rank, self.world_size = rank, world_size
        self.rows_per_step, self.micro_rows = config.batch.rows, micro_rows(config, world_size)
        self.accumulation = self.rows_per_step // (self.micro_rows * world_size)
        self._last: tuple[int, list[Drawn]] = (-1, [])

    def micro_batches(self, step: int) -> Iterator[Batch]:
        """Yield this rank's batches of 0-based `step`, in the order they are run, each made when it is asked for.

        Where a row is one example, the rows of the step are sorted by length first: micro-batches hold rows of about
        the same length and little padding. It is the same step: its rows, what is random about each, and its sums.
        """
        for part in self.parts_at(step):
            yield self._collate([each.row for each in part], [each.draw for each in part])

    def parts_at(self, step: int) -> list[list[Drawn]]:
        """Return what each of this rank's batches of `step` is made of."""
        drawn = self._drawn_at(step)
        if not self.objective.packs:
            drawn = sorted(drawn, key=lambda each: num_tokens(each.row))
        return order.rows_of_rank(drawn, rank=self.rank, world_size=self.world_size, micro_rows=self.micro_rows)

    def rows_at(self, step: int) -> list[int | str]:
        """Return the places in the data of the global batch at `step`, in the order in which they are read."""
        return [each.place for each in self._drawn_at(step)]

    def tokens_at(self, step: int) -> int:
        """Return the number of real tokens, over all ranks, that `step` reads."""
        return self.reading.tokens_between(step * self.rows_per_step, (step + 1) * self.rows_per_step)

    def count_at(self, step: int) -> float:
        """Return what the loss of `step` is divided by, over all ranks: its targets that carry loss."""
        return sum(self.objective.count(each.row, each.draw) for each in self._drawn_at(step))

    def outlook(self, steps: int) -> str:
        """Say how much so many steps read, in tokens and epochs."""
        return self.reading.outlook(steps * self.rows_per_step)

    def state_after(self, steps: int) -> Any:
        """Return what a checkpoint keeps to go on after so many steps, besides their number: JSON, or None."""
        return self.reading.state_at(steps * self.rows_per_step)

    def go_on_after(self, steps: int, state: Any) -> None:
        """Read on after so many steps of an earlier process, which gave `state`."""
        self.reading.go_on(steps * self.rows_per_step, state)

    def longest(self, num_rows: int | None = None) -> Batch:
        """Return the micro-batch that needs the most memory, or only its first `num_rows`: the longest rows.

        Where there are fewer rows than that, a step takes them more than once, and so does this.
        """
        wanted = num_rows or self.micro_rows
        by_length = np.argsort(-lengths_of(self.train), kind="stable")[:wanted].tolist()
        rows = [self.train[i] for i in by_length]
        return self._collate([rows[i % len(rows)] for i in range(wanted)], [0] * wanted)

    def evaluation(self, rows: Sequence[Row] | None = None) -> Iterator[tuple[Batch, bool]]:
        """Yield this rank's part of the batches of `rows` (by default those held out), and whether each counts.

        Every rank gets the same number of them, since some modes run forward passes together: where the last ones
        are missing, a rank gets one that does not count. What is random about a row is the same each time.
        """
        rows = self.held_out if rows is None else rows
        places = np.arange(len(rows))
        if not self.objective.packs:
            places = np.argsort(lengths_of(rows), kind="stable")
        parts = [places[i : i + self.micro_rows].tolist() for i in range(0, len(places), self.micro_rows)]
        for i in range(0, len(parts), self.world_size):
            at = i + self.rank
            part = parts[at if at < len(parts) else i]
            draws = [order.draw_of_held_out_row(self.seed, place) for place in part]
            yield self._collate([rows[place] for place in part], draws), at < len(parts)

    def _drawn_at(self, step: int) -> list[Drawn]:
        """What is read at `step`, over all ranks. Kept until another step is asked for."""
        if self._last[0] != step:
            start = step * self.rows_per_step
            self._last = step, self.reading.between(start, start + self.rows_per_step)
        return self._last[1]

    def _collate(self, rows: list[Row], draws: list[int]) -> Batch:
        return self.objective.collate(rows, self.pad_id, draws)
