"""Rows in memory -> the batches of a step, for this rank, as `order` says."""

import heapq
from collections.abc import Iterator

from serving.directory import BadInput
from trainer import order
from trainer.config import RunConfig
from trainer.objectives import Objective
from trainer.packing import IGNORED, Batch, Row


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
            self.rows_at(step), rank=self.rank, world_size=self.world_size, micro_rows=self.micro_rows
        )
        yield from (self._collate([self.train[i] for i in part]) for part in parts)

    def rows_at(self, step: int) -> list[int]:
        """Return the row indices of the global batch at `step`."""
        return order.rows_of_step(step, rows_per_step=self.rows_per_step, num_rows=len(self.train), seed=self.seed)

    def tokens_at(self, step: int) -> int:
        """Return the number of real tokens, over all ranks, that `step` reads."""
        return sum(num_tokens(self.train[i]) for i in self.rows_at(step))

    def targets_at(self, step: int) -> int:
        """Return the number of targets that carry loss, over all ranks, in `step`."""
        return sum(num_targets(self.train[i]) for i in self.rows_at(step))

    def longest(self, num_rows: int | None = None) -> Batch:
        """Return the micro-batch that needs the most memory, or only its first `num_rows`: the longest rows.

        Where there are fewer rows than that, a step takes them more than once, and so does this.
        """
        wanted = num_rows or self.micro_rows
        rows = heapq.nlargest(wanted, self.train, key=num_tokens)
        return self._collate([rows[i % len(rows)] for i in range(wanted)])

    def evaluation(self) -> list[Batch]:
        """Return this rank's part of the held-out batches."""
        size = self.micro_rows
        batches = [self.held_out[i : i + size] for i in range(0, len(self.held_out), size)]
        return [self._collate(batch) for batch in batches[self.rank :: self.world_size]]

    def _collate(self, rows: list[Row]) -> Batch:
        return self.objective.collate(rows, self.pad_id)


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


def num_targets(row: Row) -> int:
    """Return the number of targets in a row that carry loss."""
    return sum(int((example.targets != IGNORED).sum()) for example in row)
