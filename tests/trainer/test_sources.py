"""Rows from files: every format, and one line that says where the bad one stands."""

import gzip
import json

import pytest

from trainer import corpus
from trainer.config import EmbeddedData, FileData
from trainer.sources import DataError, read_rows, read_splits

ROWS = [{"text": "one"}, {"text": "zwei ü"}, {"text": "three"}]


def contents(kind: str) -> bytes:
    match kind:
        case "jsonl":
            return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
        case "csv":
            return "text\r\none\r\nzwei ü\r\nthree\r\n".encode()
        case _:
            return "one\n\nzwei ü\nthree".encode()


def refusal(tmp_path, name: str, data: bytes | None, objective: str = "causal_lm", **settings) -> str:
    """The message for a bad training file, which must be one line."""
    path = tmp_path / name
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(DataError) as caught:
        read_splits(FileData(type="files", train=path, validation=path, **settings), objective)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(str(path), "PATH")


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "with byte order mark"])
@pytest.mark.parametrize("packed", [False, True], ids=["", "gz"])
@pytest.mark.parametrize("kind", ["jsonl", "csv", "txt"])
def test_every_format_gives_the_same_rows(tmp_path, kind, packed, mark):
    path = tmp_path / f"data.{kind}{'.gz' if packed else ''}"
    data = mark + contents(kind)
    path.write_bytes(gzip.compress(data) if packed else data)
    assert list(read_rows(path)) == ROWS


def test_a_csv_field_may_hold_lines_commas_and_whole_documents(tmp_path):
    long = "word " * 50_000  # Python's csv stops at 131,072 characters by default
    (tmp_path / "a.csv").write_text(f'text,label\n"a, ""b""\nc",x\n{long},y\n')
    assert list(read_rows(tmp_path / "a.csv")) == [{"text": 'a, "b"\nc', "label": "x"}, {"text": long, "label": "y"}]


def test_a_row_knows_where_it_stands(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\n')
    assert [row.place for row in read_rows(tmp_path / "a.jsonl")] == [
        f"{tmp_path / 'a.jsonl'}, line 1",
        f"{tmp_path / 'a.jsonl'}, line 3",
    ]


TORN = gzip.compress(contents("jsonl") * 500)[:-40]
FLIPPED = bytearray(gzip.compress(contents("jsonl")))
FLIPPED[-8] ^= 0xFF  # in the checksum


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.jsonl", None, ["data: PATH: no such file"]),
        ("a.parquet", b"", ["PATH has an unknown ending", ".jsonl, .csv, .txt", ".gz"]),
        ("a.jsonl", b"", ["data.train: no rows in PATH"]),
        ("a.txt", b"\n \n", ["data.train: no rows in PATH"]),
        ("a.csv", b"text,label\n", ["data.train: no rows in PATH"]),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', ["PATH, line 2", "not JSON"]),
        ("a.jsonl", b'{"text": "a"}\n["b"]\n', ["PATH, line 2", "a list"]),
        ("a.jsonl", b'{"text": "a"}\n' + b"[" * 200_000, ["PATH, line 2", "not JSON"]),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\\ud800"}\n', ["PATH, line 2", "not Unicode text"]),
        ("a.csv", b"text,label,text\na,b,c\n", ["PATH, line 1", "two columns are named 'text'"]),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', ["PATH, line 2", "not UTF-8"]),
        ("a.csv", b"text\na\n\xff\n", ["PATH, line 3", "not UTF-8"]),
        ("a.txt", b"a\nb\xff\n", ["PATH, line 2", "not UTF-8"]),
        ("a.csv", b"text,label\na,b\nc\n", ["PATH, line 3", "not 2 fields"]),
        ("a.csv", b"text,label\na,b\nc,d,e\n", ["PATH, line 3", "not 2 fields"]),
        ("a.csv", b'text\na\n"b\n', ["PATH", "after line 2", "unexpected end of data"]),
        ("a.jsonl.gz", TORN, ["PATH", "after line", "end-of-stream"]),
        ("a.jsonl.gz", bytes(FLIPPED), ["PATH", "after line", "CRC"]),
        ("a.jsonl.gz", contents("jsonl"), ["PATH", "after line 0", "gzip"]),
    ],
    ids=lambda value: None if isinstance(value, list) else str(value)[:24],
)
def test_a_bad_file_is_refused_in_one_line_that_says_where(tmp_path, name, data, said):
    message = refusal(tmp_path, name, data)
    assert all(part in message for part in said), message


def test_escaped_letters_of_any_plane_are_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "\\u00fc \\ud83d\\ude00"}\n')
    assert list(read_rows(tmp_path / "a.jsonl")) == [{"text": "ü 😀"}]


def test_a_folder_is_not_a_data_file(tmp_path):
    (tmp_path / "a.jsonl").mkdir()
    assert "no such file" in refusal(tmp_path, "a.jsonl", None)


def test_without_a_validation_file_rows_are_held_out_by_content(tmp_path, write_rows):
    rows = [{"text": f"row {i % 150}"} for i in range(300)]  # each twice
    path = write_rows(tmp_path / "a.jsonl", rows)
    splits = read_splits(FileData(type="files", train=path, validation_fraction=0.2), "causal_lm")
    sides = [{row["text"] for row in part} for part in (splits.train, splits.held_out)]
    assert not sides[0] & sides[1]
    assert len(splits.train) + len(splits.held_out) == 300
    assert 0.1 < len(splits.held_out) / 300 < 0.3
    reversed_path = write_rows(tmp_path / "b.jsonl", rows[::-1])
    other = read_splits(FileData(type="files", train=reversed_path, validation_fraction=0.2), "causal_lm")
    assert {row["text"] for row in other.held_out} == sides[1]  # wherever a row stands


def test_too_few_rows_to_hold_any_out_are_refused_with_the_way_out(tmp_path, write_rows):
    path = write_rows(tmp_path / "a.jsonl", ROWS[:2])
    with pytest.raises(DataError, match=r"data\.validation_fraction: 0\.01 .* 2 rows .*data\.validation"):
        read_splits(FileData(type="files", train=path, validation_fraction=0.01), "causal_lm")


def test_the_fingerprint_follows_content_and_order(tmp_path, write_rows):
    def fingerprint(train, validation):
        paths = [write_rows(tmp_path / f"{i}.jsonl", rows) for i, rows in enumerate((train, validation))]
        return read_splits(FileData(type="files", train=paths[0], validation=paths[1]), "causal_lm").fingerprint

    [a, b, c] = ROWS
    assert fingerprint([a, b], [c]) == fingerprint([a, b], [c])
    assert len({fingerprint(*split) for split in [([a, b], [c]), ([b, a], [c]), ([a], [b, c]), ([a, b], [a])]}) == 4


def test_max_rows_keeps_the_first_rows_of_the_embedded_corpus(monkeypatch):
    items = [corpus.Item(f"module{i}", f"module{i}", "module", f"Module number {i}.", "") for i in range(100)]
    monkeypatch.setattr(corpus, "read_items", lambda: items)
    few, everything = (read_splits(EmbeddedData(type="embedded", max_rows=rows), "sft") for rows in (16, None))
    assert few.train == everything.train[:16]
    assert few.held_out == everything.held_out
    assert len(everything.train) + len(everything.held_out) == 100
