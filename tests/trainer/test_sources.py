"""Rows from files: every format, and one line that says where the bad one stands."""

import gzip
import json

import pytest

from trainer import corpus
from trainer.config import EmbeddedData, FileData
from trainer.sources import DataError, read_rows, read_splits, tell_left_out

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


# Without the time of day, which would be in the names of the tests: each worker collects them for itself.
TORN = gzip.compress(contents("jsonl") * 500, mtime=0)[:-40]
FLIPPED = bytearray(gzip.compress(contents("jsonl"), mtime=0))
FLIPPED[-8] ^= 0xFF  # in the checksum


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.jsonl", None, ["data: PATH: no such file"]),
        ("a.xlsx", b"", ["PATH has an unknown ending", ".jsonl, .csv, .txt", ".gz", ".json, .parquet"]),
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
        ("a.txt", b"a\nb\0c\n", ["PATH, line 2", "zero byte"]),
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


def put(folder, files: dict[str, str | bytes]):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def test_a_folder_of_texts_is_one_document_a_file(tmp_path):
    put(tmp_path, {"a.txt": "one\n\ntwo\n", "b.txt.gz": gzip.compress(b"three"), "notes.md": "no", ".c.txt": "hidden"})
    rows = {row["text"]: (row, row.place) for row in read_rows(tmp_path)}
    assert rows == {
        "one\n\ntwo\n": ({"text": "one\n\ntwo\n"}, str(tmp_path / "a.txt")),
        "three": ({"text": "three"}, str(tmp_path / "b.txt.gz")),
    }


def test_a_folder_of_folders_names_the_classes_and_mixes_their_order(tmp_path):
    put(tmp_path, {f"{label}/{i}.txt": f"{label} {i}" for label in ("cats", "dogs") for i in range(20)})
    rows = list(read_rows(tmp_path))
    assert sorted(row["text"] for row in rows) == sorted(
        f"{label} {i}" for label in ("cats", "dogs") for i in range(20)
    )
    assert all(row["text"].startswith(row["label"]) for row in rows)
    first = [row["label"] for row in rows[:20]]
    assert 4 < first.count("cats") < 16  # a held-out set's first rows must not be all of one class
    other = put(
        tmp_path / "elsewhere", {f"{label}/{i}.txt": f"{label} {i}" for label in ("dogs", "cats") for i in range(20)}
    )
    assert list(read_rows(other)) == rows


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, ["PATH is a folder without texts", ".txt files", "or name a file in it"]),
        ({"a.csv": "text\nx\n"}, ["PATH is a folder without texts"]),
        ({"a.txt": "x", "cats/b.txt": "y"}, ["PATH holds .txt files (a.txt) and folders of them (cats)"]),
        ({"a.txt": "x", "b.txt": b"one\n\xe9t\xe9\n"}, ["PATH/b.txt, line 2: not UTF-8"]),
    ],
    ids=["empty", "no texts", "both kinds", "latin-1"],
)
def test_a_folder_that_cannot_be_read_is_refused(tmp_path, files, said):
    (tmp_path / "data").mkdir()
    put(tmp_path / "data", files)
    message = refusal(tmp_path, "data", None)
    assert all(part in message for part in said), message


def test_a_txt_file_can_be_cut_at_blank_lines(tmp_path):
    (tmp_path / "a.txt").write_text("\none\ntwo\n\n \n\nthree\n")
    rows = list(read_rows(tmp_path / "a.txt", "blocks"))
    assert [(row["text"], row.place) for row in rows] == [
        ("one\ntwo", f"{tmp_path / 'a.txt'}, line 2"),
        ("three", f"{tmp_path / 'a.txt'}, line 7"),
    ]


LABELLED = [
    {"text": "a", "label": "x"},
    {"text": "", "label": "x"},
    {"text": "b"},
    {"text": "c", "label": "y"},
    {"text": " ", "label": "y"},
    {"text": "d", "label": 1.5},
    {"text": "e", "label": ""},
]


def test_bad_rows_are_left_out_and_counted_where_that_is_asked_for(tmp_path, write_rows):
    train = write_rows(tmp_path / "a.jsonl", LABELLED)
    held = write_rows(tmp_path / "b.jsonl", [{"text": "f", "label": "y"}, {"text": "g", "label": "z"}])
    data = FileData(type="files", train=train, validation=held, skip_bad_rows=True)
    splits = read_splits(data, "classification")
    assert [row["text"] for row in splits.train] == ["a", "c"]
    assert [row["text"] for row in splits.held_out] == ["f"]
    assert tell_left_out(splits) == (
        f"left out 6 of 9 rows: 2 with an empty 'text' (first: {train}, line 2), "
        f"1 without 'label' (first: {train}, line 3), "
        f"1 whose 'label' is no name or whole number (first: {train}, line 6), "
        f"1 with an empty 'label' (first: {train}, line 7), "
        f"1 whose label is in no training row (first: {held}, line 2)"
    )
    clean = [
        write_rows(tmp_path / f"{name}.jsonl", rows) for name, rows in (("c", splits.train), ("d", splits.held_out))
    ]
    same = read_splits(FileData(type="files", train=clean[0], validation=clean[1]), "classification")
    assert same.fingerprint == splits.fingerprint  # of what is trained on, not of what was left out
    assert same.left_out == ()


def test_where_the_labels_are_listed_rows_with_others_are_left_out_and_held_out_rows_with_listed_ones_are_kept(
    tmp_path, write_rows
):
    rows = [{"text": str(n), "label": label} for n, label in enumerate("xyxyw")]
    train = write_rows(tmp_path / "a.jsonl", rows)
    held = write_rows(tmp_path / "b.jsonl", [{"text": "f", "label": "z"}, {"text": "g", "label": "w"}])
    for streaming in (False, True):
        data = FileData(type="files", train=train, validation=held, skip_bad_rows=True, streaming=streaming)
        splits = read_splits(data, "classification", ["x", "y", "z"])
        assert [row["label"] for row in splits.train] == ["x", "y", "x", "y"]
        assert [row["label"] for row in splits.held_out] == ["z"], "nobody learned it, and it is an output of the model"
    splits = read_splits(data.model_copy(update={"streaming": False}), "classification", ["x", "y", "z"])
    assert tell_left_out(splits) == (
        f"left out 2 of 7 rows: 2 whose label is not in objective.labels (first: {train}, line 5)"
    )


def test_a_run_says_what_it_leaves_out_and_is_the_run_on_the_rest(tmp_path, write_rows, make_config, train, capfd):
    good = [{"text": f"list number {i}", "label": "ab"[i % 2]} for i in range(20)]
    clean, dirty = (write_rows(tmp_path / f"{i}.jsonl", rows) for i, rows in enumerate((good, [{"text": ""}, *good])))
    results = []
    for name, path, skip in (("clean", clean, False), ("dirty", dirty, True)):
        data = {"train": str(path), "validation": str(clean), "skip_bad_rows": skip}
        config = make_config("classification", "full", run={"name": name, "steps": 2}, data=data)
        assert train(config) == 0
        results.append(json.loads((config.run.folder / "result.json").read_text()))
    assert f"left out 1 of 41 rows: 1 with an empty 'text' (first: {dirty}, line 1)" in capfd.readouterr().err
    assert results[0]["data_fingerprint"] == results[1]["data_fingerprint"]
    assert results[0]["metrics"] == results[1]["metrics"]


def test_chats_and_pairs_without_an_answer_are_left_out(tmp_path, write_rows):
    user, empty, answer = (
        {"role": r, "content": c} for r, c in (("user", "q"), ("assistant", " "), ("assistant", "a"))
    )
    rows = [
        {"messages": [user, answer]},
        {"messages": [user]},
        {"messages": [user, empty]},
        {"messages": "hello"},
        {"prompt": "q", "completion": "a"},
        {"prompt": "q", "completion": ""},
        {"prompt": "q"},
    ]
    path = write_rows(tmp_path / "a.jsonl", rows)
    splits = read_splits(FileData(type="files", train=path, validation=path, skip_bad_rows=True), "sft")
    assert splits.train == [rows[0], rows[4]]
    assert {each.reason: each.count for each in splits.left_out} == {  # of both files
        "with no assistant turn": 4,
        "whose 'messages' is no list of {role, content} with text": 2,
        "with an empty 'completion'": 2,
        "without 'completion'": 2,
    }


def test_rows_that_are_all_left_out_are_refused_with_the_reasons(tmp_path):
    rows = b'{"text": "a"}\n{"text": "b"}\n'
    message = refusal(tmp_path, "a.jsonl", rows, "classification", skip_bad_rows=True)
    assert "data.train: no rows in PATH (left out 4 of 4 rows: 4 without 'label' (first: PATH, line 1))" in message


def test_a_context_column_that_no_row_has_is_refused(tmp_path):
    message = refusal(tmp_path, "a.jsonl", b'{"prompt": "a", "completion": "b"}\n', "sft", context="inptu")
    assert "data.context: no row has 'inptu'; the first has: prompt, completion" in message


def test_the_system_turn_is_part_of_the_fingerprint(tmp_path, write_rows):
    path = write_rows(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b"}])
    data = [FileData(type="files", train=path, validation=path, system=text) for text in (None, "be kind", "be brief")]
    assert len({read_splits(each, "sft").fingerprint for each in data}) == 3


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
