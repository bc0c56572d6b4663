"""Rows to batches: every rank's part, and nothing twice."""

import itertools
from collections import Counter

import pytest

from trainer import build
from trainer.feed import Feed
from trainer.packing import IGNORED

BATCH = {"rows": 12, "micro_rows": 2, "max_length": 24}


@pytest.fixture
def feed_of(make_config):
    """Return a function that makes the feed of one rank of a tiny sft run, or one of another objective."""
    made = {}

    def make(rank: int, world_size: int, objective: str = "sft", micro_rows: int = 2) -> Feed:
        config = make_config(
            objective, "full", batch={**BATCH, "micro_rows": micro_rows}, evaluation={"max_rows": 7},
        )  # fmt: skip
        if objective not in made:
            made[objective] = build.build(config).feed
        whole = made[objective]
        rows = {"train": whole.train, "held_out": whole.held_out}
        return Feed(config, whole.objective, **rows, pad_id=0, rank=rank, world_size=world_size)

    return make


def documents(batches) -> list[list[int]]:
    """The token ids of every document in the packed batches, in order."""
    found = []
    for batch in batches:
        [[[ends]]] = batch["attention_mask"].tolist()
        ids = batch["input_ids"][0].tolist()
        found += [ids[start:stop] for start, stop in itertools.pairwise(ends)]
    return found


def texts(batches) -> list[tuple[int, ...]]:
    """The token ids and the target of every example in the padded batches, in order."""
    return [
        (*ids[mask.bool()].tolist(), target)
        for batch in batches
        for ids, mask, target in zip(
            batch["input_ids"], batch["attention_mask"], batch["targets"].tolist(), strict=True
        )
    ]


def padding(batches) -> int:
    return sum(int((batch["attention_mask"] == 0).sum()) for batch in batches)


@pytest.mark.parametrize("world_size", [2, 3, 6])
@pytest.mark.parametrize(("objective", "content"), [("sft", documents), ("classification", texts)])
def test_ranks_read_together_what_one_process_reads(feed_of, world_size, objective, content):
    alone = feed_of(0, 1, objective)
    ranks = [feed_of(rank, world_size, objective) for rank in range(world_size)]
    for step in (0, 5):
        dealt = zip(*(feed.micro_batches(step) for feed in ranks), strict=True)
        together = [batch for round_of_all in dealt for batch in round_of_all]
        assert content(together) == content(alone.micro_batches(step))
        assert {len(list(feed.micro_batches(step))) for feed in ranks} == {12 // world_size // 2}
        tokens = sum(int(batch["attention_mask"].sum()) for batch in together)
        if objective == "sft":
            tokens = sum(map(len, documents(together)))
        assert {feed.tokens_at(step) for feed in [alone, *ranks]} == {tokens}


def test_the_targets_of_a_step_are_those_of_its_batches(feed_of):
    ranks = [feed_of(rank, 3) for rank in range(3)]
    for step in (0, 5):
        targets = [batch["targets"] for feed in ranks for batch in feed.micro_batches(step)]
        count = sum(int((each != IGNORED).sum()) for each in targets)
        assert {feed.count_at(step) for feed in ranks} == {count}


@pytest.mark.parametrize("objective", ["sft", "classification"])
def test_another_micro_batch_reads_the_same_rows_with_the_same_draws(feed_of, monkeypatch, objective):
    seen = []
    for micro_rows in (1, 2, 3, 12):
        feed, read = feed_of(0, 1, objective, micro_rows), []
        collate = feed.objective.collate
        with monkeypatch.context() as patch:
            patch.setattr(
                feed.objective,
                "collate",
                lambda rows, pad, draws, read=read, collate=collate: (read.extend(draws), collate(rows, pad, draws))[1],
            )
            list(feed.micro_batches(4))
        seen.append((feed.rows_at(4), read))
    assert all(each == seen[0] for each in seen)
    assert len(set(seen[0][1])) == 12


def test_rows_of_one_example_are_padded_little_and_the_step_is_the_same(feed_of):
    feed = feed_of(0, 1, "classification")
    steps = range(6)
    unsorted = [[feed.train[row] for row in feed.rows_at(step)] for step in steps]
    padded_in_order = sum(
        2 * max(len(example.input_ids) for [example] in pair) - sum(len(example.input_ids) for [example] in pair)
        for rows in unsorted
        for pair in zip(rows[::2], rows[1::2], strict=True)
    )
    assert padding(batch for step in steps for batch in feed.micro_batches(step)) < padded_in_order / 3
    for step, rows in zip(steps, unsorted, strict=True):
        expected = [(*example.input_ids.tolist(), int(example.targets[0])) for [example] in rows]
        assert Counter(texts(feed.micro_batches(step))) == Counter(expected)


def test_a_batch_is_made_when_it_is_asked_for(feed_of, monkeypatch):
    """All of a step at once would need memory in proportion to batch.rows."""
    feed, made = feed_of(0, 1), []
    collate = feed.objective.collate
    monkeypatch.setattr(feed.objective, "collate", lambda *args: (made.append(1), collate(*args))[1])
    batches = feed.micro_batches(0)
    next(batches)
    assert len(made) == 1


@pytest.mark.parametrize("world_size", [2, 3, 6])
@pytest.mark.parametrize(("objective", "content"), [("sft", documents), ("classification", texts)])
def test_ranks_evaluate_together_what_one_process_evaluates(feed_of, world_size, objective, content):
    def counted(feed):
        return content(batch for batch, counts in feed.evaluation() if counts)

    alone = counted(feed_of(0, 1, objective))
    together = [counted(feed_of(rank, world_size, objective)) for rank in range(world_size)]
    assert sorted(document for part in together for document in part) == sorted(alone)
    assert len(alone) >= 7


def test_ranks_without_a_held_out_batch_run_one_that_does_not_count(feed_of):
    for rank, expected in ((0, [True]), (5, [False])):
        feed = feed_of(rank, 6)
        assert [counts for _, counts in feed.evaluation(feed.held_out[:2])] == expected


def test_the_held_out_rows_that_are_evaluated_are_spread_over_all_of_them(make_config):
    """Files are often sorted by label, and packed rows by length: the first ones alone would say little."""
    feed = build.build(make_config("classification", "full", evaluation={"max_rows": 3})).feed
    every = build.build(make_config("classification", "full")).feed
    assert len(every.held_out) == 8  # of 9: at most evaluation.max_rows
    spread = build.build(make_config("classification", "full", evaluation={"max_rows": 100})).feed
    ids = [row[0].input_ids.tolist() for row in spread.held_out]
    assert len(ids) == 9
    assert [row[0].input_ids.tolist() for row in feed.held_out] == [ids[0], ids[3], ids[6]]


def test_the_longest_micro_batch_holds_the_longest_rows(feed_of):
    feed = feed_of(0, 1, "classification")
    lengths = sorted((len(row[0].input_ids) for row in feed.train), reverse=True)
    assert feed.longest()["attention_mask"].sum(-1).tolist() == lengths[:2]
    assert feed.longest(1)["attention_mask"].sum(-1).tolist() == lengths[:1]
