"""Examples on disk: what was written is read, whatever the fields hold."""

import json

import numpy as np
import pytest

from trainer.example_store import ExampleStore, write_examples
from trainer.packing import IGNORED, Example
from trainer.stored_rows import JoinedRows, SomeRows, StoredRows, lengths_of


def language(random, count: int, vocabulary: int) -> list[Example]:
    """Examples of a language model; some targets are ignored."""
    found = []
    for length in random.integers(1, 40, count):
        ids = random.integers(0, vocabulary, length + 1).astype(np.int32)
        found.append(Example(ids[:-1], np.where(random.random(length) < 0.3, IGNORED, ids[1:]).astype(np.int32)))
    return found


def same(first: Example, second: Example) -> bool:
    def equal(a, b) -> bool:
        if a is None or b is None:
            return a is b
        return a.dtype == b.dtype and np.array_equal(a, b)

    return all(equal(getattr(first, name), getattr(second, name)) for name in Example.__dataclass_fields__)


@pytest.fixture
def stored(tmp_path):
    """Return a function that writes parts of examples, and returns the store and the examples."""

    def store(*parts):
        number = write_examples(tmp_path, iter(parts))
        examples = [example for part in parts for example in part]
        assert number == len(examples)
        return ExampleStore(tmp_path), examples

    return store


def test_every_example_comes_back_as_it_was_though_later_ones_need_wider_numbers(stored):
    random = np.random.default_rng(0)
    store, examples = stored(*(language(random, 9, vocabulary) for vocabulary in (100, 250, 300, 40_000, 70_000, 50)))
    assert len(store) == len(examples)
    assert all(map(same, store, examples))
    assert same(store[-1], examples[-1])
    assert store.lengths.tolist() == [len(example.input_ids) for example in examples]
    with pytest.raises(IndexError):
        store[len(examples)]


@pytest.mark.parametrize(("vocabulary", "bytes_each"), [(150, 1), (50_000, 2), (70_000, 4)])
def test_whole_numbers_take_the_fewest_bytes_that_hold_them(stored, tmp_path, vocabulary, bytes_each):
    store, _ = stored(language(np.random.default_rng(0), 500, vocabulary))
    for name in ("input_ids", "targets"):  # the targets too, though they hold -100
        assert (tmp_path / f"{name}.values").stat().st_size == store.lengths.sum() * bytes_each


def test_targets_may_be_numbers_or_of_another_length_and_token_types_may_be_there(stored):
    ids = np.arange(5, dtype=np.int32)
    regression = Example(ids, np.array([0.1], np.float32), token_type_ids=np.array([0, 0, 1, 1, 1], np.int32))
    longer = Example(ids[:2], np.linspace(0, 1, 9, dtype=np.float32), token_type_ids=np.array([0, 1], np.int32))
    store, examples = stored([regression], [longer, regression])
    assert all(map(same, store, examples))


def test_a_field_that_only_some_examples_have_is_absent_from_the_others(stored):
    ids = np.arange(3, dtype=np.int64)
    plain, pair = Example(ids, ids), Example(ids, ids, token_type_ids=np.array([0, 0, 1], np.int64))
    store, examples = stored([plain], [plain, pair], [plain])
    assert all(map(same, store, examples))


def test_no_more_than_a_part_is_in_memory(tmp_path):
    """Parts are asked for one after the other, and none is held on to."""
    alive, most = set(), []

    class Part(list):
        def __init__(self, number):
            super().__init__(language(np.random.default_rng(number), 3, 100))
            self.number = number
            alive.add(number)
            most.append(len(alive))

        def __del__(self):
            alive.discard(self.number)

    write_examples(tmp_path, (Part(number) for number in range(20)))
    assert max(most) <= 2  # the one that is written, and the next while it is made


def test_a_file_cut_short_under_a_run_is_an_error_that_names_it(stored, tmp_path):
    store, _ = stored(language(np.random.default_rng(0), 50, 100))
    with (tmp_path / "targets.values").open("r+b") as file:
        file.truncate(10)
    with pytest.raises(OSError, match=r"targets.values: cut short since the run started"):
        store[49]


def test_the_index_says_what_lies_there(stored, tmp_path):
    stored(language(np.random.default_rng(0), 5, 100))
    index = json.loads((tmp_path / "examples.json").read_text())
    assert index["num_examples"] == 5
    assert {name: (column["dtype"], column["stored"], column["base"]) for name, column in index["columns"].items()} == {
        "input_ids": ("<i4", "|u1", 0), "targets": ("<i4", "|u1", -100),
    }  # fmt: skip


def test_rows_hold_every_stored_example_once_and_know_their_lengths(stored):
    store, examples = stored(language(np.random.default_rng(0), 200, 1000))
    for rows in (StoredRows(store, 64), StoredRows(store, None)):
        assert sum(map(len, rows)) == len(examples)
        assert sorted(example.input_ids.tolist() for row in rows for example in row) == sorted(
            example.input_ids.tolist() for example in examples
        )
        assert lengths_of(rows).tolist() == lengths_of(list(rows)).tolist()


def test_joined_rows_are_those_of_one_source_after_the_other(stored):
    store, _ = stored(language(np.random.default_rng(0), 10, 1000))
    first, second = StoredRows(store, None), [[store[3]], [store[1], store[2]]]
    joined = JoinedRows([first, second])
    assert [len(row) for row in joined] == [1] * 10 + [1, 2]
    assert same(joined[9][0], store[9])
    assert same(joined[11][1], store[2])
    assert joined.lengths.tolist() == lengths_of(list(joined)).tolist()


def test_some_rows_are_spread_evenly_over_the_whole():
    rows = [[Example(np.arange(i), np.arange(i))] for i in range(1, 11)]
    assert lengths_of(SomeRows(rows, 5)).tolist() == [1, 3, 5, 7, 9]
    assert lengths_of(SomeRows(rows, 10)).tolist() == lengths_of(SomeRows(rows, 99)).tolist() == list(range(1, 11))
    assert len(SomeRows([], 5)) == 0
