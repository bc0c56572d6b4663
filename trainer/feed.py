"""Rows in memory -> the batches of a step, for this rank, as `order` says."""

import heapq
from collections.abc import Iterator

from serving.directory import BadInput
from trainer import order
from trainer.config import RunConfig
from trainer.objectives import Objective
from trainer.packing import Batch, Row


class Feed:
    """Training batches by step and held-out batches, divided among ranks; the division never changes what is seen."""

    def __init__(
        self,
        config: RunConfig,
        objective: Objective,
        train: list[Row],
        held_out: list[Row],
        *,
        pad_id: int,
        rank: int,
        world_size: int,
    ) -> None:
        self.objective, self.train, self.pad_id = objective, train, pad_id
        self.held_out = held_out[: config.evaluation.max_rows]
        self.rank, self.world_size = rank, world_size
        self.rows_per_step, self.seed = config.batch.rows, config.run.seed
        self.micro_rows = micro_rows(config, world_size)
        self.accumulation = self.rows_per_step // (self.micro_rows * world_size)

    def micro_batches(self, step: int) -> Iterator[Batch]:
        """Yield this rank's batches of 0-based `step`, in the order they are run, each made when it is asked for."""
        parts = order.rows_of_rank(
            self._drawn_at(step), rank=self.rank, world_size=self.world_size, micro_rows=self.micro_rows
        )
        for part in parts:
            yield self._collate([self.train[row] for row, _ in part], [draw for _, draw in part])

    def rows_at(self, step: int) -> list[int]:
        """Return the row indices of the global batch at `step`."""
        return order.rows_of_step(step, rows_per_step=self.rows_per_step, num_rows=len(self.train), seed=self.seed)

    def tokens_at(self, step: int) -> int:
        """Return the number of real tokens, over all ranks, that `step` reads."""
        return sum(num_tokens(self.train[i]) for i in self.rows_at(step))

    def count_at(self, step: int) -> float:
        """Return what the loss of `step` is divided by, over all ranks: its targets that carry loss."""
        return sum(self.objective.count(self.train[row], draw) for row, draw in self._drawn_at(step))

    def longest(self, num_rows: int | None = None) -> Batch:
        """Return the micro-batch that needs the most memory, or only its first `num_rows`: the longest rows.

        Where there are fewer rows than that, a step takes them more than once, and so does this.
        """
        wanted = num_rows or self.micro_rows
        rows = heapq.nlargest(wanted, self.train, key=num_tokens)
        return self._collate([rows[i % len(rows)] for i in range(wanted)], [0] * wanted)

    def evaluation(self) -> Iterator[tuple[Batch, bool]]:
        """Yield this rank's part of the held-out batches, and whether each counts.

        Every rank gets the same number of them, since some modes run forward passes together: where the last ones
        are missing, a rank gets one that does not count.
        """
        size = self.micro_rows
        starts = range(0, len(self.held_out), size)
        for i in range(0, len(starts), self.world_size):
            at = i + self.rank
            start = starts[at if at < len(starts) else i]
            rows = range(start, min(start + size, len(self.held_out)))
            draws = [order.draw_of_held_out_row(self.seed, row) for row in rows]
            yield self._collate([self.held_out[row] for row in rows], draws), at < len(starts)

    def _drawn_at(self, step: int) -> list[tuple[int, int]]:
        """The rows of the global batch at `step`, each with its seed."""
        start, num_rows = step * self.rows_per_step, len(self.train)
        return [
            (row, order.draw_of_row(self.seed, start + i, num_rows, row)) for i, row in enumerate(self.rows_at(step))
        ]

    def _collate(self, rows: list[Row], draws: list[int]) -> Batch:
        return self.objective.collate(rows, self.pad_id, draws)


def micro_rows(config: RunConfig, world_size: int) -> int:
    """Return the rows of one forward pass on one rank. Raises BadInput where the batch cannot be divided evenly."""
    rows, micro = config.batch.rows, config.batch.micro_rows
    if rows % world_size:
        raise BadInput(f"batch.rows: {rows} rows cannot be shared by {world_size} processes; use a multiple of it")
    share = rows // world_size
    if micro is not None and share % micro:
        raise BadInput(f"batch.micro_rows: {micro} does not divide the {share} rows of a process; use a divisor")
    return micro or share


def num_tokens(row: Row) -> int:
    """Return the number of real tokens in a row."""
    return sum(len(example.input_ids) for example in row)
