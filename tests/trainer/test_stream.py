"""Streams: windows in a fixed order, bounded memory, and a way to go on that reads one window again."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest

from trainer.data_files import DataError
from trainer.order import BLOCK_ROWS
from trainer.packing import Example
from trainer.rows import KeptRows
from trainer.stream import StreamReading, StreamSource


class Counted(KeptRows):
    """Rows that count how often they were read."""

    def __init__(self, rows):
        super().__init__(rows)
        self.read = 0

    def from_position(self, position=None):
        for after, row in super().from_position(position):
            self.read += 1
            yield after, row


def rows_of(rows, first):
    """One row of a batch for each row of data that has tokens: its number."""
    return [[Example(np.full(row["tokens"], row["number"]), np.zeros(1))] for row in rows if row["tokens"]]


def data_of(count: int, *, source: int = 0, empty: range = range(0)) -> Counted:
    return Counted(
        {"number": 1000 * source + number, "tokens": 0 if number in empty else number % 7 + 1}
        for number in range(count)
    )


def stream_of(*data: Counted, weights=(1.0,), window_rows: int = 8, seed: int = 0) -> StreamReading:
    sources = [
        StreamSource(
            each, rows_of, window_rows=window_rows, seed=seed, number=number,
            nothing_left=lambda num_rows: f"all {num_rows} rows are empty",
        )
        for number, each in enumerate(data)
    ]  # fmt: skip
    return StreamReading(sources, weights, seed)


def numbers(stream: StreamReading, start: int, stop: int, step: int = 4) -> list[int]:
    """The rows that are read from start to stop, in steps."""
    parts = [stream.between(at, min(at + step, stop)) for at in range(start, stop, step)]
    return [int(drawn.row[0].input_ids[0]) for part in parts for drawn in part]


def test_each_epoch_reads_every_row_once_window_by_window_and_in_an_order_of_its_own():
    read = numbers(stream_of(data_of(30)), 0, 90)
    epochs = [read[i : i + 30] for i in (0, 30, 60)]
    for epoch in epochs:
        windows = [epoch[i : i + 8] for i in range(0, 30, 8)]
        assert [sorted(window) for window in windows] == [
            list(range(0, 8)), list(range(8, 16)), list(range(16, 24)), list(range(24, 30)),
        ]  # fmt: skip
        assert all(window != sorted(window) for window in windows)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert numbers(stream_of(data_of(30), seed=1), 0, 30) != epochs[0]


def test_windows_that_divide_the_data_evenly_end_the_epoch_too():
    read = numbers(stream_of(data_of(16)), 0, 48)
    assert [sorted(read[i : i + 16]) for i in (0, 16, 32)] == [list(range(16))] * 3


def test_what_is_random_about_a_row_is_new_in_each_epoch_and_for_each_row():
    stream = stream_of(data_of(16), data_of(16, source=1), weights=(1.0, 1.0))
    drawn = [each for at in range(0, 64, 8) for each in stream.between(at, at + 8)]
    assert len({each.draw for each in drawn}) == 64
    assert len({each.place for each in drawn}) == 64


@pytest.mark.parametrize("stop_at", [0, 4, 8, 12, 28, 32, 36, 60, 64, 100])
def test_a_stream_goes_on_where_it_stood(stop_at):
    """Through JSON, as in a checkpoint; in the middle of a window, at its end, at the end of an epoch."""
    sources = (data_of(30), data_of(13, source=1))
    undisturbed = stream_of(*sources, weights=(2.0, 1.0))
    numbers(undisturbed, 0, stop_at)
    state = json.loads(json.dumps(undisturbed.state_at(stop_at)))
    expected = [undisturbed.between(at, at + 4) for at in range(stop_at, stop_at + 80, 4)]

    resumed = stream_of(*(Counted(each.kept) for each in sources), weights=(2.0, 1.0))
    resumed.go_on(stop_at, state)
    found = [resumed.between(at, at + 4) for at in range(stop_at, stop_at + 80, 4)]
    for ours, theirs in zip(itertools.chain(*found), itertools.chain(*expected), strict=True):
        assert (ours.place, ours.draw) == (theirs.place, theirs.draw)
        assert np.array_equal(ours.row[0].input_ids, theirs.row[0].input_ids)


def test_going_on_reads_one_window_and_not_what_came_before_it():
    data = data_of(1000)
    stream = stream_of(data)
    numbers(stream, 0, 500)
    state = stream.state_at(500)
    resumed = stream_of(data)
    data.read = 0
    resumed.go_on(500, state)
    assert data.read == 8
    numbers(resumed, 500, 504)
    assert data.read == 8


def test_a_step_can_be_asked_for_again_and_the_next_one_ahead():
    """Loss, tokens and batches of a step are asked for one by one; a batch may be made a step ahead of a save."""
    stream = stream_of(data_of(30))
    first = stream.between(0, 4)
    state = stream.state_at(4)
    stream.between(4, 8)
    assert stream.between(0, 4) == first
    assert stream.state_at(4) == state != stream.state_at(8)
    assert stream.tokens_between(0, 4) == sum(len(drawn.row[0].input_ids) for drawn in first)


def test_no_more_than_a_few_windows_are_in_memory():
    data = data_of(1000)
    stream = stream_of(data)
    for at in range(0, 400, 4):
        stream.between(at, at + 4)
        assert data.read <= at + 4 + 8
        assert len(stream.sources[0].rows) <= 8
    assert len(stream._read) <= 4


def test_weights_of_streams_hold_in_the_long_run_and_each_is_read_epoch_by_epoch():
    stream = stream_of(data_of(40), data_of(25, source=1), weights=(3.0, 1.0))
    read = numbers(stream, 0, BLOCK_ROWS, step=64)
    first, second = [n for n in read if n < 1000], [n - 1000 for n in read if n >= 1000]
    assert (len(first), len(second)) == (BLOCK_ROWS * 3 // 4, BLOCK_ROWS // 4)
    for rows, size in ((first, 40), (second, 25)):
        assert all(sorted(rows[i : i + size]) == list(range(size)) for i in range(0, len(rows) - size, size))


def test_windows_without_anything_to_learn_are_passed_over():
    data = data_of(40, empty=range(0, 21))
    read = numbers(stream_of(data), 0, 38)
    assert Counter(read) == Counter([*range(21, 40)] * 2)


def test_a_stream_without_anything_to_learn_is_an_error_after_one_epoch():
    with pytest.raises(DataError, match="all 20 rows are empty"):
        stream_of(data_of(20, empty=range(20)))
