"""Rows that are read again and again: the same from any position, in little memory, and from files that stay put."""

import csv
import gzip
import itertools
import json
import os
import tracemalloc

import pytest

from trainer import splits
from trainer.config import FileData
from trainer.data_files import DataError, FileRows
from trainer.rows import ChainedRows, ChosenRows, KeptRows
from trainer.sources import read_splits

TEXTS = [f"text number {i}, {'ü' * (i % 5)}\nin two lines" for i in range(23)]


def write(folder, kind: str):
    """Write the texts in one format; return the path. A csv field holds its line break, a block is two lines."""
    path = folder / f"data.{kind}"
    match kind.removesuffix(".gz"):
        case "jsonl":
            content = "\n".join(json.dumps({"text": text}) for text in TEXTS)
        case "csv":
            content = "text,n\r\n" + "".join(f'"{text}",{i}\r\n' for i, text in enumerate(TEXTS))
        case "txt":
            content = "\n\n \n".join(TEXTS)
        case "json":
            content = json.dumps({"data": [{"text": text} for text in TEXTS]})
        case "parquet":
            return write_parquet(path, [{"text": text} for text in TEXTS])
        case _:
            for i, text in enumerate(TEXTS):
                (folder / f"{i}.txt").write_text(text)
            return folder
    path.write_bytes(gzip.compress(content.encode()) if kind.endswith(".gz") else content.encode())
    return path


def write_parquet(path, rows, **options):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path, **{"row_group_size": 7, **options})
    return path


KINDS = ["jsonl", "jsonl.gz", "csv", "csv.gz", "txt", "txt.gz", "json", "parquet", "folder"]


@pytest.mark.parametrize("kind", KINDS)
def test_reading_on_from_any_position_gives_the_rows_that_come_after(tmp_path, kind):
    rows = FileRows(write(tmp_path, kind), "blocks")
    whole = list(rows.from_position())
    assert sorted(row["text"] for _, row in whole) == sorted(TEXTS)
    places = [row.place for _, row in whole]
    assert len(set(places)) == len(TEXTS)
    for count, (position, _) in enumerate(whole, 1):
        later = FileRows(rows.files[0][0].parent if kind == "folder" else rows.files[0][0], "blocks")
        rest = list(later.from_position(json.loads(json.dumps(position))))
        assert rest == whole[count:]
        assert [row.place for _, row in rest] == places[count:]


def test_the_rows_of_several_files_come_in_their_order_and_positions_span_them(tmp_path, write_rows):
    paths = tuple(write_rows(tmp_path / f"{i}.jsonl", [{"text": f"{i} {j}"} for j in range(3)]) for i in (2, 0, 1))
    rows = FileRows(paths)
    assert [row["text"] for row in rows] == [f"{i} {j}" for i in (2, 0, 1) for j in range(3)]
    positions = [position for position, _ in rows.from_position()]
    assert [[row["text"] for _, row in rows.from_position(each)][:1] for each in positions[2:4]] == [["0 0"], ["0 1"]]
    assert list(FileRows(tmp_path / "?.jsonl")) == [*rows][3:6] + [*rows][6:] + [*rows][:3]  # a pattern: by name


@pytest.mark.parametrize(
    ("paths", "said"),
    [
        ("*.jsonl", r"\*\.jsonl: no file matches the pattern"),
        (("a.txt", "a.txt"), r"a\.txt: named twice"),
        (("a.txt", "?.txt"), r"a\.txt: named twice"),
        (("a.txt", "b.txt"), r"b\.txt: no such file"),
        ("a.parquet.gz", r"a\.parquet\.gz has an unknown ending"),
    ],
)
def test_files_that_are_not_there_or_twice_are_refused(tmp_path, monkeypatch, paths, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "a.parquet.gz").write_bytes(b"x")
    data = FileData(type="files", train=paths)
    with pytest.raises(DataError, match=said):
        read_splits(data, "causal_lm")


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path):
    (tmp_path / "a[1].txt").write_text("one")
    (tmp_path / "a1.txt").write_text("two")
    assert list(FileRows(tmp_path / "a[1].txt")) == [{"text": "one"}]


def test_parquet_keeps_what_json_can_hold_and_says_the_row(tmp_path):
    rows = [{"text": "a", "tags": ["x", "y"], "n": 1, "none": None}, {"text": "b", "tags": [], "n": 2, "none": "c"}]
    found = list(FileRows(write_parquet(tmp_path / "a.parquet", rows)))
    assert found == rows
    assert [row.place for row in found] == [f"{tmp_path / 'a.parquet'}, row {i}" for i in (1, 2)]


def damaged_parquet(path):
    write_parquet(path, [{"text": text * 50} for text in TEXTS], compression="none", use_dictionary=False)
    content = bytearray(path.read_bytes())
    at = content.index(b"text number 15")
    content[at - 40 : at + 200] = b"\xff" * 240
    path.write_bytes(content)


BAD = {
    "torn.parquet": (
        lambda path: path.write_bytes(write_parquet(path, [{"a": 1}]).read_bytes()[:-9]),
        "cannot be read",
    ),
    "damaged.parquet": (damaged_parquet, r"damaged\.parquet, after row 14: cannot be read"),
    "text.parquet": (lambda path: path.write_text("text\none\n" * 9), r"after row 0: cannot be read .*; mend it"),
    "lines.json": (
        lambda path: path.write_text('{"text": "a"}\n{"text": "b"}\n'),
        "an object per line, name it .jsonl",
    ),
    "object.json": (lambda path: path.write_text('{"text": "a"}'), "holds no list of rows"),
    "list.json": (lambda path: path.write_text('[{"text": "a"}, "b"]'), "row 2: a str; expected a list of objects"),
    "half.json": (lambda path: path.write_text('[{"text": "a"},'), "not JSON"),
    "latin.json": (lambda path: path.write_bytes(b'[{"text": "\xe9"}]'), "not JSON"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_table_is_refused_in_one_line_that_says_where(tmp_path, name):
    make, said = BAD[name]
    make(tmp_path / name)
    with pytest.raises(DataError, match=said) as caught:
        list(FileRows(tmp_path / name))
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


def test_a_column_that_a_parquet_file_lacks_is_named_with_the_row(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [{"body": "a"}, {"body": "b"}])
    rows = FileRows(path)
    from trainer.columns import text_of

    with pytest.raises(DataError, match=r"data\.text: .*a\.parquet, row 1 has no 'text'; it has: body"):
        text_of(rows[0], 0, FileData(type="files", train=path))


@pytest.mark.parametrize("when", ["between two passes", "during a pass"])
def test_a_file_that_changes_while_it_is_used_ends_the_reading(tmp_path, write_rows, when):
    path = write_rows(tmp_path / "a.jsonl", [{"text": "one"}, {"text": "two"}])
    rows = FileRows(path)
    reading = iter(rows)
    if when == "between two passes":
        list(rows)
    else:
        next(reading)
    write_rows(path, [{"text": "one"}, {"text": "new"}])
    os.utime(path, (1, 1))
    with pytest.raises(DataError, match=r"a\.jsonl: has changed while the run was reading it"):
        list(rows if when == "between two passes" else reading)


def test_rows_from_disk_read_like_a_list(tmp_path, write_rows):
    expected = [{"text": str(i)} for i in range(10)]
    rows = FileRows(write_rows(tmp_path / "a.jsonl", expected))
    assert (len(rows), bool(rows), rows[3], rows[-1]) == (10, True, expected[3], expected[9])
    for part in (slice(2), slice(3, 7), slice(8, 20), slice(None, None, 3), slice(-3, None), slice(None, -8)):
        assert rows[part] == expected[part]
    assert rows == expected
    assert rows != expected[1:]
    with pytest.raises(IndexError):
        rows[10]
    for same in (KeptRows(expected), ChosenRows(rows, lambda row: row), FileRows(tmp_path / "a.jsonl")):
        assert (list(same), same.fingerprint) == (expected, rows.fingerprint)


def test_rows_one_after_the_other_are_read_on_in_the_right_part():
    parts = [KeptRows([{"n": i} for i in range(start, stop)]) for start, stop in ((0, 3), (3, 3), (3, 7))]
    rows = ChainedRows(parts)
    whole = list(rows.from_position())
    assert [row["n"] for _, row in whole] == list(range(7))
    assert len(rows) == 7
    for count, (position, _) in enumerate(whole, 1):
        assert list(rows.from_position(position)) == whole[count:]


def test_what_does_not_fit_in_memory_is_read_from_disk_each_time(tmp_path, monkeypatch):
    """3 MB of rows of three formats, of which a run may keep 20 KB."""
    monkeypatch.setattr(splits, "_KEPT_CHARS", 20_000)
    rows = [{"text": f"{i} " + "word " * 200, "label": "ab"[i % 2]} for i in range(3_000)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with (tmp_path / "b.csv").open("w") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows(rows)
    write_parquet(tmp_path / "c.parquet", rows, row_group_size=500)
    expected = None
    for name in ("a.jsonl", "b.csv", "c.parquet"):
        data = FileData(type="files", train=tmp_path / name, skip_bad_rows=True, test_fraction=0.1)
        rows = read_splits(data, "causal_lm") if name == "c.parquet" else None  # imports are no rows
        tracemalloc.start()
        found = read_splits(data, "causal_lm")
        sizes = [sum(1 for _ in part) for part in found.parts().values()]
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 1_500_000, f"{name}: {peak:,} bytes"
        assert sizes == [len(part) for part in found.parts().values()]
        assert sum(sizes) == 3_000
        expected = expected or found
        assert found.fingerprint == expected.fingerprint
    assert [row["text"] for row in itertools.islice(expected.train, 3)] == [row["text"] for row in expected.train[:3]]


def test_rows_kept_in_memory_and_rows_read_again_are_the_same(tmp_path, monkeypatch, write_rows):
    rows = [{"text": f"row {i}", "label": "abc"[i % 3] if i % 7 else ""} for i in range(200)]
    path = write_rows(tmp_path / "a.jsonl", [*rows, {"text": "new", "label": "d"}])
    data = FileData(type="files", train=path, skip_bad_rows=True, validation_fraction=0.3, test_fraction=0.2)
    kept = read_splits(data, "classification")
    monkeypatch.setattr(splits, "_KEPT_CHARS", 0)
    again = read_splits(data, "classification")
    assert isinstance(kept.train, KeptRows)
    assert not isinstance(again.train, KeptRows)
    assert again.parts() == kept.parts()
    assert (again.fingerprint, again.left_out) == (kept.fingerprint, kept.left_out)
    for name, part in again.parts().items():
        assert part.fingerprint == kept.parts()[name].fingerprint


def test_what_a_pass_over_large_files_found_is_known_the_next_time(tmp_path, monkeypatch, write_rows):
    from trainer import sources

    monkeypatch.setenv("TRIVET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sources, "_WORTH_KEEPING_BYTES", 0)
    path = write_rows(tmp_path / "a.jsonl", [{"text": f"row {i}"} for i in range(100)] + [{"n": 1}])
    data = FileData(type="files", train=path, skip_bad_rows=True)
    first = read_splits(data, "causal_lm")
    passes = []
    monkeypatch.setattr(splits, "_read", lambda *args: passes.append(args))
    second = read_splits(data, "causal_lm")
    assert not passes
    assert second.parts() == first.parts()
    assert (second.fingerprint, second.left_out) == (first.fingerprint, first.left_out)
    write_rows(path, [{"text": "another"}])
    with pytest.raises(TypeError):  # read again: what stands in for the pass gives nothing
        read_splits(data, "causal_lm")
    assert passes
