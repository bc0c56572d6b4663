"""What comes when: pure functions, and a division among ranks that changes nothing."""

import itertools
from collections import Counter

import pytest

from serving.directory import BadInput
from trainer import order
from trainer.reading import check_weights


def test_an_epoch_reads_every_row_once():
    assert sorted(order.epoch_order(0, 0, 37)) == list(range(37))


def test_the_order_depends_on_seed_and_epoch_and_on_nothing_else():
    first = order.epoch_order(3, 1, 50).tolist()
    order._orders_of.cache_clear()
    assert order.epoch_order(3, 1, 50).tolist() == first
    others = [order.epoch_order(4, 1, 50).tolist(), order.epoch_order(3, 2, 50).tolist()]
    assert first not in others


def test_steps_read_epochs_one_after_the_other_without_a_gap():
    num_rows, rows_per_step, epochs = 10, 4, 6
    read = [
        row
        for step in range(num_rows * epochs // rows_per_step)
        for row in order.rows_of_step(step, rows_per_step=rows_per_step, num_rows=num_rows, seed=0)
    ]
    # Step 2 reads the last two rows of the first epoch and the first two of the second.
    assert all(sorted(read[i : i + num_rows]) == list(range(num_rows)) for i in range(0, len(read), num_rows))
    assert len({tuple(read[i : i + num_rows]) for i in range(0, len(read), num_rows)}) == epochs


def test_a_step_larger_than_the_data_reads_each_row_equally_often():
    rows = order.rows_of_step(0, rows_per_step=12, num_rows=4, seed=0)
    assert set(Counter(rows).values()) == {3}


def test_a_step_can_be_asked_for_without_those_before_it():
    far = order.rows_of_step(1000, rows_per_step=8, num_rows=11, seed=5)
    order._orders_of.cache_clear()
    assert order.rows_of_step(1000, rows_per_step=8, num_rows=11, seed=5) == far


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("micro_rows", [1, 2, 3])
def test_the_ranks_rows_dealt_in_turn_are_the_single_process_rows_in_order(world_size, micro_rows):
    rows = list(range(100, 172))  # 72: every world size and micro-batch above divides it evenly
    parts = [
        order.rows_of_rank(rows, rank=rank, world_size=world_size, micro_rows=micro_rows) for rank in range(world_size)
    ]
    together = [row for turn in zip(*parts, strict=True) for micro_batch in turn for row in micro_batch]
    assert together == rows
    assert {len(micro_batch) for part in parts for micro_batch in part} == {micro_rows}


def test_each_micro_batch_of_each_rank_draws_its_own_dropout():
    places = [(seed, step, micro, rank) for seed in (0, 1) for step in (0, 1) for micro in (0, 1) for rank in (0, 1)]
    seeds = [order.dropout_seed(*place) for place in places]
    assert len(set(seeds)) == len(places)
    assert seeds == [order.dropout_seed(*place) for place in places]
    assert all(0 <= seed < 2**63 for seed in seeds)  # what torch.manual_seed takes


def draws(seed: int, start: int, stop: int, *, num_rows: int = 10) -> dict[int, int]:
    """The draw of each row that is read at the positions start..stop."""
    rows, epochs = order.rows_between(start, stop, sizes=[num_rows], weights=[1.0], seed=seed)
    return {row: order.draw_of_row(seed, epoch, row) for row, epoch in zip(rows.tolist(), epochs.tolist(), strict=True)}


def test_what_is_drawn_for_a_row_changes_with_the_epoch_and_not_with_the_place_in_it():
    first, second, other = draws(0, 0, 10), draws(0, 10, 20), draws(1, 0, 10)
    assert first == draws(0, 0, 4) | draws(0, 4, 10)
    assert first.keys() == second.keys() == other.keys()
    assert len({*first.values(), *second.values(), *other.values()}) == 30
    held_out = [order.draw_of_held_out_row(0, row) for row in range(10)]
    windows = [order.draw_of_window_row(0, 0, window, row) for window in range(2) for row in range(10)]
    assert len({*first.values(), *held_out, *windows}) == 40


# --- mixtures ---------------------------------------------------------------------------------------------------------

SIZES, WEIGHTS = [50, 3000, 400], [1.0, 6.0, 3.0]


def mixed(start: int, stop: int, seed: int = 0) -> list[int]:
    return order.rows_between(start, stop, sizes=SIZES, weights=WEIGHTS, seed=seed)[0].tolist()


def source_of(row: int) -> int:
    return 0 if row < 50 else 1 if row < 3050 else 2


def test_the_rows_of_a_block_go_by_the_largest_remainder():
    # 6 : 3 : 1 of 8,192 are 4,915.2, 2,457.6 and 819.2: the row that is left goes to the second.
    assert order.block_counts(1, (6.0, 3.0, 1.0)) == [4915, 2458, 819]


@pytest.mark.parametrize("num_blocks", [1, 2, 5])
def test_each_source_has_its_share_of_a_mixture_to_within_a_row(num_blocks):
    stop = num_blocks * order.BLOCK_ROWS
    counts = Counter(order.sources_between(0, stop, weights=WEIGHTS, seed=0)[0].tolist())
    for source, weight in enumerate(WEIGHTS):
        assert abs(counts[source] - stop * weight / sum(WEIGHTS)) < 1


def test_the_sources_of_a_mixture_come_in_turn_and_not_one_after_the_other():
    for start in range(0, 5000, 500):
        counts = Counter(source_of(row) for row in mixed(start, start + 500))
        expected = [50, 300, 150]
        assert all(abs(counts[k] - share) < 5 * share**0.5 for k, share in enumerate(expected)), counts  # 5 sigma


def test_each_source_of_a_mixture_is_read_epoch_by_epoch():
    read = {0: [], 1: [], 2: []}
    for row in mixed(0, 3 * order.BLOCK_ROWS):
        read[source_of(row)].append(row)
    first = 0
    for source, size in enumerate(SIZES):
        rows = read[source]
        epochs = [rows[i : i + size] for i in range(0, len(rows) - size, size)]
        assert len(epochs) >= 4
        assert all(sorted(epoch) == list(range(first, first + size)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs)
        first += size


def test_any_part_of_a_mixture_can_be_asked_for_without_what_came_before_it():
    block = order.BLOCK_ROWS
    whole = mixed(0, 2 * block + 100)
    order._block.cache_clear()
    order._orders_of.cache_clear()
    assert mixed(block - 7, block + 9) == whole[block - 7 : block + 9]
    assert mixed(2 * block + 50, 2 * block + 60) == whole[2 * block + 50 : 2 * block + 60]
    assert mixed(0, 100, seed=1) != whole[:100]


def test_the_counts_of_a_mixture_never_fall_from_block_to_block():
    weights = (1.0, 0.3, 4e-4, 1 / 3, 2e-4, 2e-4)  # the smallest get two rows a block
    counts = [order.block_counts(block, weights) for block in range(200)]
    for before, after in itertools.pairwise(counts):
        assert all(0 <= old <= new for old, new in zip(before, after, strict=True))
        assert sum(after) - sum(before) == order.BLOCK_ROWS


def test_a_mixture_of_one_source_is_that_source():
    alone, _ = order.rows_between(0, 100, sizes=[37], weights=[2.0], seed=4)
    assert alone.tolist() == [
        row for step in range(10) for row in order.rows_of_step(step, rows_per_step=10, num_rows=37, seed=4)
    ]


def test_a_weight_too_small_to_be_kept_to_is_refused_with_the_least_one():
    with pytest.raises(
        BadInput, match=r"data.sources: weight 0.0001 is less than one row in 8,192; .* at least 0.00012"
    ):
        check_weights([1.0, 1e-4])
    check_weights([1.0, 1.3e-4])
