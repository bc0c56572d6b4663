"""What comes when: pure functions, and a division among ranks that changes nothing."""

from collections import Counter

import pytest

from trainer import order


def test_an_epoch_reads_every_row_once():
    assert sorted(order.epoch_order(0, 0, 37)) == list(range(37))


def test_the_order_depends_on_seed_and_epoch_and_on_nothing_else():
    first = order.epoch_order(3, 1, 50).tolist()
    order.epoch_order.cache_clear()
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
    order.epoch_order.cache_clear()
    assert order.rows_of_step(1000, rows_per_step=8, num_rows=11, seed=5) == far


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("micro_rows", [1, 2, 3, 6])
def test_the_ranks_rows_together_are_the_single_process_rows_in_order(world_size, micro_rows):
    rows = list(range(100, 136))  # 36: every world size and micro-batch above divides it evenly or leaves a short one
    parts = [
        order.rows_of_rank(rows, rank=rank, world_size=world_size, micro_rows=micro_rows) for rank in range(world_size)
    ]
    assert [row for part in parts for micro_batch in part for row in micro_batch] == rows
    assert {sum(map(len, part)) for part in parts} == {36 // world_size}


def test_each_micro_batch_of_each_rank_draws_its_own_dropout():
    places = [(seed, step, micro, rank) for seed in (0, 1) for step in (0, 1) for micro in (0, 1) for rank in (0, 1)]
    seeds = [order.dropout_seed(*place) for place in places]
    assert len(set(seeds)) == len(places)
    assert seeds == [order.dropout_seed(*place) for place in places]
    assert all(0 <= seed < 2**63 for seed in seeds)  # what torch.manual_seed takes


def test_what_is_drawn_for_a_row_changes_with_the_epoch_and_not_with_the_place_in_it():
    first, later = (order.draw_of_row(0, position, 10, 3) for position in (2, 9))
    assert first == later
    assert (
        len({first, order.draw_of_row(0, 10, 10, 3), order.draw_of_row(0, 2, 10, 4), order.draw_of_row(1, 2, 10, 3)})
        == 4
    )
    assert order.draw_of_held_out_row(0, 3) not in {first, order.draw_of_held_out_row(0, 4)}
