"""Training, validation and test rows: by file or by content, never in two; a stream gives the same rows."""

import pytest
from pydantic import ValidationError

from trainer.columns import text_of
from trainer.config import FileData
from trainer.data_files import DataError
from trainer.left_out import left_out_of
from trainer.sources import read_splits

ROWS = [{"text": f"row {i}", "label": "ab"[i % 2]} for i in range(400)]


def texts(rows) -> list[str]:
    return [row["text"] for row in rows]


@pytest.fixture
def files(tmp_path, write_rows):
    """Return a function that makes a data section for ROWS."""
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    return lambda **settings: FileData(type="files", train=path, **settings)


def test_a_part_for_the_test_is_disjoint_and_leaves_the_validation_rows_as_they_were(files):
    both, without = read_splits(files(test_fraction=0.2), "causal_lm"), read_splits(files(), "causal_lm")
    sides = [set(texts(rows)) for rows in both.parts().values()]
    assert [*both.parts()] == ["train", "validation", "test"]
    assert sum(map(len, sides)) == len(set.union(*sides)) == 400
    assert 50 < len(both.test) < 110
    assert both.held_out == without.held_out
    assert set(texts(without.train)) == sides[0] | sides[2]
    assert read_splits(files(test_fraction=0.2, validation_fraction=0.3), "causal_lm").test == both.test
    assert without.test is None
    assert both.fingerprint != without.fingerprint


def test_a_test_file_is_read_as_it_is_and_counts_for_the_fingerprint(files, tmp_path, write_rows):
    prints = set()
    for rows in (ROWS[:3], ROWS[3:6]):
        splits = read_splits(files(test=write_rows(tmp_path / "test.jsonl", rows)), "causal_lm")
        assert splits.test == rows
        prints.add(splits.fingerprint)
    assert len({*prints, read_splits(files(), "causal_lm").fingerprint}) == 3


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"test": "t.jsonl", "test_fraction": 0.1}, "test data and test_fraction are both given"),
        ({"validation_fraction": 0.5, "test_fraction": 0.5}, "leave nothing to train on"),
        ({"test_fraction": 1.0}, "less than 1"),
        ({"train": []}, "at least 1 item"),
        ({"leaks": "no"}, "'report', 'refuse' or 'off'"),
        ({"window_rows": 0}, "greater than or equal to 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_name(settings, said):
    with pytest.raises(ValidationError, match=said):
        FileData(type="files", **{"train": "a.jsonl", **settings})


def test_a_fraction_that_leaves_nothing_to_test_says_what_to_change(tmp_path, write_rows):
    path = write_rows(tmp_path / "a.jsonl", ROWS[:60])
    data = FileData(type="files", train=path, validation_fraction=0.3, test_fraction=0.0001)
    with pytest.raises(DataError, match=r"data\.test_fraction: 0\.0001 .* none to test; .* a file as data\.test"):
        read_splits(data, "causal_lm")


def test_an_empty_test_file_is_refused(files, tmp_path):
    (tmp_path / "t.txt").write_text("")
    with pytest.raises(DataError, match=r"data\.test: no rows in .*t\.txt; at least one is needed"):
        read_splits(files(test=tmp_path / "t.txt"), "causal_lm")


# --- streams ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"test_fraction": 0.2, "validation_fraction": 0.3}, {"skip_bad_rows": True}])
def test_a_stream_has_the_rows_that_were_counted_otherwise_and_none_was_read_before(files, settings, monkeypatch):
    counted, streamed = (read_splits(files(**settings, streaming=each), "classification") for each in (False, True))
    assert streamed.streaming
    assert [part.num_rows for part in streamed.parts().values()] == [None] * len(streamed.parts())
    assert streamed.parts() == counted.parts()
    positions = [position for position, _ in streamed.train.from_position()]
    assert texts(row for _, row in streamed.train.from_position(positions[99])) == texts(counted.train)[100:]


def test_a_stream_reads_no_further_than_the_first_row_of_each_part(files, monkeypatch):
    from trainer import data_files

    read = []
    real = data_files.FileRow.__init__
    monkeypatch.setattr(data_files.FileRow, "__init__", lambda self, *args: (read.append(args), real(self, *args))[1])
    read_splits(files(streaming=True, validation_fraction=0.5), "causal_lm")
    assert 0 < len(read) < 40


def test_the_fingerprint_of_a_stream_sees_another_file_and_another_fraction(files, tmp_path, write_rows):
    def fingerprint(**settings):
        return read_splits(files(streaming=True, **settings), "causal_lm").fingerprint

    first = fingerprint()
    assert fingerprint() == first != fingerprint(validation_fraction=0.1)
    write_rows(tmp_path / "rows.jsonl", [*ROWS[:-1], {"text": "another"}])
    assert fingerprint() != first


def test_bad_rows_of_a_stream_are_passed_over_or_named(files, tmp_path, write_rows):
    write_rows(tmp_path / "rows.jsonl", [{"text": "a"}, {"n": 1}, {"text": "b"}, {"text": " "}] * 20)
    settings = {"streaming": True, "validation": tmp_path / "rows.jsonl"}
    splits = read_splits(files(skip_bad_rows=True, **settings), "causal_lm")
    assert texts(splits.train) == ["a", "b"] * 20
    assert [(each.reason, each.count) for each in splits.train.left_out] == [
        ("without 'text'", 20),
        ("with an empty 'text'", 20),
    ]
    row = read_splits(files(**settings), "causal_lm").train[1]
    with pytest.raises(DataError, match=r"rows\.jsonl, line 2 has no 'text'"):
        text_of(row, 0, files())


def test_what_is_left_out_of_a_stream_is_counted_apart_from_passes_over_other_parts(files, tmp_path, write_rows):
    write_rows(tmp_path / "rows.jsonl", [{"text": f"a {n}"} if n % 3 else {"n": n} for n in range(60)])
    splits = read_splits(files(skip_bad_rows=True, streaming=True), "causal_lm")
    reading = iter(splits.train)
    for _ in range(10):
        next(reading)
    list(splits.held_out)  # an evaluation in between
    list(reading)
    [met] = left_out_of(splits.train)
    assert (met.reason, met.count) == ("without 'text'", 20)
    next(iter(splits.train))  # another epoch begins: what is known stays known
    assert left_out_of(splits.train) == (met,)


def test_a_stream_that_holds_out_nothing_says_which_setting_to_change(files, tmp_path, write_rows):
    write_rows(tmp_path / "rows.jsonl", [{"text": "a"}])
    with pytest.raises(DataError, match=r"data\.validation_fraction: 0\.01 holds out none of .*rows\.jsonl"):
        read_splits(files(streaming=True, validation_fraction=0.01), "causal_lm")


def test_a_stream_without_rows_is_refused(files, tmp_path):
    (tmp_path / "v.txt").write_text("")
    with pytest.raises(DataError, match=r"data\.validation: no rows in .*v\.txt"):
        read_splits(files(streaming=True, validation=tmp_path / "v.txt"), "causal_lm")
