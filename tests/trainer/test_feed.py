"""Rows to batches: every rank's part, and nothing twice."""

import pytest

from trainer import build
from trainer.feed import Feed
from trainer.packing import IGNORED


@pytest.fixture
def feed_of(make_config):
    """Return a function that makes the feed of one rank of a tiny sft run."""
    config = make_config(
        "sft", "full", batch={"rows": 12, "micro_rows": 2, "max_length": 24}, evaluation={"max_rows": 7}
    )
    whole = build.build(config).feed

    def make(rank: int, world_size: int) -> Feed:
        rows = {"train": whole.train, "held_out": whole.held_out}
        return Feed(config, whole.objective, **rows, pad_id=0, rank=rank, world_size=world_size)

    return make


def documents(batches) -> list[list[int]]:
    """The token ids of every document in the batches, in order: positions start at 0 with each."""
    found = []
    for batch in batches:
        visible = batch["attention_mask"][:, 0].diagonal(dim1=-2, dim2=-1)
        assert visible.all()
        for ids, positions, targets in zip(batch["input_ids"], batch["position_ids"], batch["targets"], strict=True):
            for token, position, _ in zip(ids.tolist(), positions.tolist(), targets.tolist(), strict=True):
                if position == 0:
                    found.append([])
                found[-1].append(token)
    return [document for document in found if document != [0]]  # padding is id 0 at position 0


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_ranks_read_together_what_one_process_reads(feed_of, world_size):
    alone = feed_of(0, 1)
    ranks = [feed_of(rank, world_size) for rank in range(world_size)]
    for step in (0, 5):
        together = [batch for feed in ranks for batch in feed.micro_batches(step)]
        assert documents(together) == documents(alone.micro_batches(step))
        assert {len(list(feed.micro_batches(step))) for feed in ranks} == {12 // world_size // 2}
        tokens = sum(len(document) for document in documents(together))
        assert {feed.tokens_at(step) for feed in [alone, *ranks]} == {tokens}


def test_the_targets_of_a_step_are_those_of_its_batches(feed_of):
    ranks = [feed_of(rank, 3) for rank in range(3)]
    for step in (0, 5):
        targets = [batch["targets"] for feed in ranks for batch in feed.micro_batches(step)]
        count = sum(int((each != IGNORED).sum()) for each in targets)
        assert {feed.count_at(step) for feed in ranks} == {count}


def test_a_batch_is_made_when_it_is_asked_for(feed_of, monkeypatch):
    """All of a step at once would need memory in proportion to batch.rows."""
    feed, made = feed_of(0, 1), []
    collate = feed.objective.collate
    monkeypatch.setattr(feed.objective, "collate", lambda *args: (made.append(1), collate(*args))[1])
    batches = feed.micro_batches(0)
    next(batches)
    assert len(made) == 1


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_ranks_evaluate_together_what_one_process_evaluates(feed_of, world_size):
    def counted(feed):
        return documents(batch for batch, counts in feed.evaluation() if counts)

    alone = counted(feed_of(0, 1))
    together = [counted(feed_of(rank, world_size)) for rank in range(world_size)]
    assert sorted(document for part in together for document in part) == sorted(alone)
    assert alone


def test_ranks_without_a_held_out_batch_run_one_that_does_not_count(feed_of):
    for rank, expected in ((0, [True]), (5, [False])):
        feed = feed_of(rank, 6)
        feed.held_out = feed.held_out[:2]
        assert [counts for _, counts in feed.evaluation()] == expected
