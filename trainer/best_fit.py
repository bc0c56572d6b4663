"""Which examples share a row: best fit, longest first, over lengths alone. A million of them take under a second."""

import numpy as np


def best_fit(lengths: np.ndarray, row_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return rows of at most `row_length` tokens that hold every example once: (members [N], starts [R + 1]).

    Row r holds the examples members[starts[r] : starts[r + 1]]. Deterministic. Raises ValueError for a length that is
    not in 1..row_length. The longest example comes first, and each goes where it leaves the least space. Equal ones
    are placed together, so the work grows with the number of different lengths, not with that of examples.
    """
    if len(lengths) and not 1 <= lengths.min() <= lengths.max() <= row_length:
        wrong = lengths.max() if lengths.max() > row_length else lengths.min()
        raise ValueError(f"example of {wrong} tokens does not fit a row of {row_length}")
    # Small numbers: of some arrays as long as the data, several are in memory at once.
    order = np.argsort(-lengths.astype(np.int32), kind="stable").astype(np.int32)
    row_of = np.empty(len(lengths), np.int32)  # of each example, in `order`
    sizes, counts = np.unique(lengths, return_counts=True)
    spaces, placed = _Spaces(row_length), 0
    for size, left in zip(sizes[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while left:
            rows, each = spaces.fill(size, left)
            stop = placed + len(rows) * each
            row_of[placed:stop] = np.repeat(rows, each)
            placed, left = stop, left - len(rows) * each
    members = order[np.argsort(row_of, kind="stable")]
    starts = np.zeros(spaces.num_rows + 1, np.int64)
    np.cumsum(np.bincount(row_of, minlength=spaces.num_rows), out=starts[1:])
    return members, starts


class _Spaces:
    """The rows opened so far by the tokens that are still free in them."""

    def __init__(self, row_length: int) -> None:
        self.row_length, self.num_rows = row_length, 0
        self._rows: dict[int, list[np.ndarray]] = {}  # free tokens -> rows, never empty
        self._present = 0  # a bit for each free space that some row has: the tightest fit is its lowest bit

    def fill(self, size: int, count: int) -> tuple[np.ndarray, int]:
        """Place some of `count` examples of `size` tokens; return the rows they go to, and how many go to each.

        What is left of a row that one example went to is tighter for the next than any other row: the same number of
        them goes to every row with that space, as if they came one by one.
        """
        space, rows = self._tightest(size, count)
        each = space // size
        full = min(count // each, len(rows))
        if not full:
            full, each = 1, count
        if full < len(rows):
            self._put(space, rows[full:])
        self._put(space - each * size, rows[:full])
        return rows[:full], each

    def _tightest(self, size: int, count: int) -> tuple[int, np.ndarray]:
        fitting = self._present >> size
        if not fitting:
            opened = max(1, count // (self.row_length // size))
            rows = np.arange(self.num_rows, self.num_rows + opened)
            self.num_rows += opened
            return self.row_length, rows
        space = size + (fitting & -fitting).bit_length() - 1
        stack = self._rows[space]
        rows = stack.pop()
        if not stack:
            del self._rows[space]
            self._present ^= 1 << space
        return space, rows

    def _put(self, space: int, rows: np.ndarray) -> None:
        self._rows.setdefault(space, []).append(rows)
        self._present |= 1 << space
