"""Best fit over lengths: as good as placing one example after the other, and every example once."""

import bisect

import numpy as np
import pytest

from trainer.best_fit import best_fit


def rows_one_by_one(lengths: list[int], row_length: int) -> int:
    """How many rows best fit, longest first, needs: by the book, an example at a time."""
    spaces: list[int] = []
    for length in sorted(lengths, reverse=True):
        at = bisect.bisect_left(spaces, length)
        free = spaces.pop(at) if at < len(spaces) else row_length
        bisect.insort(spaces, free - length)
    return len(spaces)


@pytest.mark.parametrize("seed", range(20))
def test_rows_are_as_few_as_by_placing_one_example_after_the_other(seed):
    random = np.random.default_rng(seed)
    row_length = int(random.integers(1, 300))
    lengths = np.minimum(random.geometric(3 / row_length, random.integers(1, 2000)), row_length)
    members, starts = best_fit(lengths, row_length)
    assert sorted(members.tolist()) == list(range(len(lengths)))
    tokens = np.add.reduceat(lengths[members], starts[:-1])
    assert tokens.max() <= row_length
    assert len(tokens) == rows_one_by_one(lengths.tolist(), row_length)


def test_a_case_worked_by_hand():
    # Longest first: 8 opens a row of 10 (2 left), 6 another (4 left), 4 fits the second exactly, 2 the first exactly,
    # 1 opens a third.
    lengths = np.array([2, 8, 1, 6, 4])
    members, starts = best_fit(lengths, 10)
    assert [lengths[part].tolist() for part in np.split(members, starts[1:-1])] == [[8, 2], [6, 4], [1]]


def test_equal_examples_fill_a_row_before_the_next_is_opened():
    members, starts = best_fit(np.full(7, 3), 10)
    assert np.diff(starts).tolist() == [3, 3, 1]
    assert len(members) == 7


@pytest.mark.parametrize(("lengths", "wrong"), [([3, 11], 11), ([3, 0], 0)])
def test_a_length_that_fits_no_row_is_refused(lengths, wrong):
    with pytest.raises(ValueError, match=f"{wrong} tokens does not fit a row of 10"):
        best_fit(np.array(lengths), 10)


def test_no_examples_are_no_rows():
    members, starts = best_fit(np.zeros(0, np.int64), 10)
    assert (len(members), starts.tolist()) == (0, [0])
