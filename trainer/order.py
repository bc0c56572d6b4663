"""What comes when: pure functions of (seed, epoch, global row index), so that a checkpoint saves only a step counter.

World size and micro-batch do not enter: they only divide the rows of a step among ranks and forward passes.
"""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import cache, lru_cache
from typing import Any

import numpy as np

BLOCK_ROWS = 8192  # of a mixture: in each block every source has its share of rows, to within one

# No step number reaches these, so no two kinds of seeds are the same.
_DRAWS, _HELD_OUT_DRAWS, _BLOCKS, _WINDOWS = 2**32 - 1, 2**32 - 2, 2**32 - 3, 2**32 - 4


def epoch_order(seed: int, epoch: int, num_rows: int, source: int = 0) -> np.ndarray:
    """Return the permutation of row indices, shape [num_rows], that `epoch` of a source is read in."""
    return _orders_of(source)(seed, epoch, num_rows)


@cache
def _orders_of(source: int) -> Callable[[int, int, int], np.ndarray]:
    """The orders of one source: of the last two epochs asked for they are kept, and so much of each source."""

    @lru_cache(maxsize=2)
    def permutation(seed: int, epoch: int, num_rows: int) -> np.ndarray:
        order = np.random.default_rng([seed, epoch, source]).permutation(num_rows)
        return order.astype(np.min_scalar_type(num_rows))

    return permutation


def rows_of_step(step: int, *, rows_per_step: int, num_rows: int, seed: int) -> list[int]:
    """Return the row indices of the global batch at 0-based `step`; a batch may straddle two epochs."""
    start = step * rows_per_step
    return rows_between(start, start + rows_per_step, sizes=[num_rows], weights=[1.0], seed=seed)[0].tolist()


def rows_between(
    start: int, stop: int, *, sizes: Sequence[int], weights: Sequence[float], seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows at the positions start..stop of a run, and which epoch of its source each belongs to.

    Sources are drawn from by weight, and each is read epoch by epoch. Its rows are numbered on from those of the
    sources before it.
    """
    sources, nths = sources_between(start, stop, weights=weights, seed=seed)
    epochs, rows = nths // np.asarray(sizes)[sources], np.zeros(stop - start, np.int64)
    first = np.cumsum([0, *sizes])
    for source, epoch in {*zip(sources.tolist(), epochs.tolist(), strict=True)}:
        here = (sources == source) & (epochs == epoch)
        places = nths[here] - epoch * sizes[source]
        rows[here] = first[source] + epoch_order(seed, epoch, sizes[source], source)[places]
    return rows, epochs


def sources_between(start: int, stop: int, *, weights: Sequence[float], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return, for each position of start..stop, the source of its row and how many rows of that source came before.

    Each weight is at least 1 / BLOCK_ROWS of their sum: see `block_counts`.
    """
    if len(weights) == 1:
        return np.zeros(stop - start, np.int64), np.arange(start, stop)
    first, last = start // BLOCK_ROWS, -(-stop // BLOCK_ROWS)
    blocks = [_block(block, tuple(weights), seed) for block in range(first, last)]
    part = slice(start - first * BLOCK_ROWS, stop - first * BLOCK_ROWS)
    sources, nths = (np.concatenate(arrays)[part] for arrays in zip(*blocks, strict=True))
    return sources, nths


def block_counts(block: int, weights: tuple[float, ...]) -> list[int]:
    """Return how many rows of each source stand before a 0-based block: the largest-remainder shares of all of them.

    No count falls from one block to the next where a block's own share of it is at least one row.
    """
    exact = [Fraction(weight) for weight in weights]
    shares = [weight * block * BLOCK_ROWS / sum(exact) for weight in exact]
    counts = [math.floor(share) for share in shares]
    missing = block * BLOCK_ROWS - sum(counts)
    by_remainder = sorted(range(len(weights)), key=lambda k: (counts[k] - shares[k], k))
    return [count + (k in by_remainder[:missing]) for k, count in enumerate(counts)]


@lru_cache(maxsize=4)
def _block(block: int, weights: tuple[float, ...], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """For each place in a block of a mixture: its source, and how many rows of that source came before it."""
    before, after = np.array(block_counts(block, weights)), np.array(block_counts(block + 1, weights))
    sources = np.repeat(np.arange(len(weights)), after - before)
    sources = np.random.default_rng([seed, _BLOCKS, block]).permutation(sources)
    nths = np.zeros(BLOCK_ROWS, np.int64)
    for source in range(len(weights)):
        places = np.flatnonzero(sources == source)
        nths[places] = before[source] + np.arange(len(places))
    return sources, nths


def window_order(seed: int, epoch: int, window: int, num_rows: int, source: int = 0) -> np.ndarray:
    """Return the permutation that the rows of a window of a stream are read in."""
    return np.random.default_rng([seed, _WINDOWS, epoch, window, source]).permutation(num_rows)


def rows_of_rank(rows: list[Any], *, rank: int, world_size: int, micro_rows: int) -> list[list[Any]]:
    """Return this rank's micro-batches: the step's rows cut into pieces of `micro_rows`, dealt to the ranks in turn.

    So a piece is the same for every number of ranks, and where rows are sorted by length, all ranks get long ones.
    """
    pieces = [rows[i : i + micro_rows] for i in range(0, len(rows), micro_rows)]
    return pieces[rank::world_size]


def draw_of_row(seed: int, epoch: int, row: int) -> int:
    """Return the seed of whatever is random about a row (which tokens are masked), new in each epoch of its source."""
    return _seed(seed, _DRAWS, epoch, row)


def draw_of_window_row(seed: int, epoch: int, window: int, row: int, source: int = 0) -> int:
    """Return the seed of whatever is random about a row of a stream's window."""
    return _seed(seed, _WINDOWS, epoch, window, row, source)


def draw_of_held_out_row(seed: int, row: int) -> int:
    """Return the seed of whatever is random about a held-out row: the same at every evaluation."""
    return _seed(seed, _HELD_OUT_DRAWS, row)


def dropout_seed(seed: int, step: int, micro_batch: int, rank: int) -> int:
    """Return the seed set before one forward pass: dropout is the same after a resume on the same layout."""
    return _seed(seed, step, micro_batch, rank)


def _seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
