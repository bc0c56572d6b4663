"""What comes when: pure functions of (seed, epoch, global row index), so that a checkpoint saves only a step counter.

World size and micro-batch do not enter: they only divide the rows of a step among ranks and forward passes.
"""

from functools import lru_cache
from typing import Any

import numpy as np

# No step number reaches these, so no two kinds of seeds are the same.
_DRAWS, _HELD_OUT_DRAWS = 2**32 - 1, 2**32 - 2


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, num_rows: int) -> np.ndarray:
    """Return the permutation of row indices, shape [num_rows], that `epoch` is read in."""
    return np.random.default_rng([seed, epoch]).permutation(num_rows)


def rows_of_step(step: int, *, rows_per_step: int, num_rows: int, seed: int) -> list[int]:
    """Return the row indices of the global batch at 0-based `step`; a batch may straddle two epochs."""
    positions = range(step * rows_per_step, (step + 1) * rows_per_step)
    return [int(epoch_order(seed, i // num_rows, num_rows)[i % num_rows]) for i in positions]


def rows_of_rank(rows: list[Any], *, rank: int, world_size: int, micro_rows: int) -> list[list[Any]]:
    """Return this rank's micro-batches: its contiguous share of the step's rows, cut into pieces of `micro_rows`."""
    share = len(rows) // world_size
    mine = rows[rank * share : (rank + 1) * share]
    return [mine[i : i + micro_rows] for i in range(0, share, micro_rows)]


def draw_of_row(seed: int, position: int, num_rows: int, row: int) -> int:
    """Return the seed of whatever is random about a row (which tokens are masked), new in each epoch.

    `position` is that of the row in the whole run, 0-based: the epoch is position // num_rows.
    """
    return _seed(seed, _DRAWS, position // num_rows, row)


def draw_of_held_out_row(seed: int, row: int) -> int:
    """Return the seed of whatever is random about a held-out row: the same at every evaluation."""
    return _seed(seed, _HELD_OUT_DRAWS, row)


def dropout_seed(seed: int, step: int, micro_batch: int, rank: int) -> int:
    """Return the seed set before one forward pass: dropout is the same after a resume on the same layout."""
    return _seed(seed, step, micro_batch, rank)


def _seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
