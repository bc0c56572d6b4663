"""What `trivet init` refuses: one line that says what to change, and nothing written."""

import gzip
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


TEXTS = "".join(f'{{"text": "once upon a time {i}"}}\n' for i in range(60)).encode()


@pytest.mark.parametrize(
    ("arguments", "name", "data", "words"),
    [
        (["x"], None, b"", ["--from is missing", "trivet init x --from data.csv"]),
        (["--from", "a.csv"], "a.csv", b"", ["NAME is missing", "--from a.csv"]),
        (["--base", "b"], None, b"", ["NAME and --from are missing"]),
        (["x", "--from", "a.csv"], None, b"", ["--from: a.csv: no such file or folder"]),
        (["a/b", "--from", "a.jsonl"], "a.jsonl", TEXTS, ["NAME: 'a/b' found", "letters, digits"]),
        (["x.yaml", "--from", "a.jsonl"], "a.jsonl", TEXTS, ["give it without the ending: trivet init x "]),
        (["x", "--from", "a.xlsx"], "a.xlsx", b"PK", ["unknown ending", ".jsonl, .csv", "pandas.read_excel"]),
        (["x", "--from", "a.parquet"], "a.parquet", b"PAR1", ["a.parquet, after row 0: cannot be read"]),
        (["x", "--from", "a.csv"], "a.csv", b"", ["a.csv holds no rows"]),
        (["x", "--from", "a.csv"], "a.csv", b"text,label\n", ["a.csv holds no rows"]),
        (["x", "--from", "a.txt"], "a.txt", b"\x7fELF\x00\x01\n", ["a.txt, line 1", "zero byte"]),
        (["x", "--from", "a.txt"], "a.txt", b"one\nna\xefve\n", ["a.txt, line 2", "not UTF-8"]),
        (["x", "--from", "a.jsonl"], "a.jsonl", TEXTS + b"{oops\n", ["a.jsonl, line 61", "not JSON"]),
        (["x", "--from", "a.csv"], "a.csv", b"text,label\na,b\nc\n", ["a.csv, line 3", "not 2 fields"]),
        (["x", "--from", "a.csv"], "a.csv", b"en;de\na;b\n", ["one column, 'en;de'", "separated by commas"]),
        (["x", "--from", "a.csv"], "a.csv", b"en,de\na b c,d e f\n", ["nothing fits", "en (text), de (text)"]),
        (["x", "--from", "a.jsonl", "--text", "txet"], "a.jsonl", TEXTS, ["--text", "no column 'txet'", "mean 'text'"]),
        (["x", "--from", "a.jsonl", "--objective", "stf"], "a.jsonl", TEXTS, ["--objective: 'stf'", "mean sft?"]),
        (
            ["x", "--from", "a.jsonl", "--objective", "token_classification"], "a.jsonl", TEXTS,
            ["writes no config for token_classification", "data.tokens and data.tags", "configs/tag.yaml"],
        ),
        (
            ["x", "--from", "a.jsonl", "--objective", "masked_lm"], "a.jsonl", TEXTS,
            ["writes no config for masked_lm", "objective.type=masked_lm", "configs/pretrain_encoder.yaml"],
        ),
        (["x", "--from", "a.jsonl", "--objective", "sft"], "a.jsonl", TEXTS, ["sft does not fit its columns: text"]),
        (
            ["x", "--from", "a.jsonl", "--objective", "causal_lm", "--label", "text"], "a.jsonl", TEXTS,
            ["--label: does not go with --objective causal_lm, which takes --text"],
        ),
        (["x", "--from", "a.jsonl", "--label", "text", "--prompt", "text"], "a.jsonl", TEXTS, ["no objective takes"]),
        (["x", "--from", "a.csv"], "a.csv", b"text,label\na b c,x\nd e f,x\n", ["the same 'label' (x)"]),
        (["x", "--from", "a.csv", "--label", "label"], "a.csv", b"text,label\na,x\nb,x\nc,x\nd,x\n", ["the label 'x'"]),
        (["x", "--from", "a.jsonl"], "a.jsonl", b'{"text": "one"}\n', ["rows too few or too alike", "(1)"]),
        (["x", "--from", "a.jsonl", "--base", "./gone"], "a.jsonl", TEXTS, ["--base: ./gone: no such folder"]),
        (["x", "--from", "a.jsonl", "--base", "."], "a.jsonl", TEXTS, ["--base: . holds no config.json"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_what_a_user_can_mend_is_one_line_and_writes_nothing(trivet, arguments, name, data, words):
    if name:
        Path(name).write_bytes(data)
    before = sorted(Path().rglob("*"))
    code, out, err = trivet("init", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert all(word in err for word in words), err
    assert sorted(Path().rglob("*")) == before


def test_two_train_files_in_a_folder_are_refused(trivet):
    Path("d").mkdir()
    Path("d/train.csv").write_text("text,label\na,b\n")
    Path("d/train.jsonl.gz").write_bytes(gzip.compress(TEXTS))
    _, _, err = trivet("init", "x", "--from", "d")
    assert "--from: both d/train.csv and d/train.jsonl.gz; name one of them" in err


def test_a_path_in_advice_is_quoted_for_the_shell(trivet):
    assert "trivet init my-task --from 'my data.csv'\n" in trivet("init", "--from", "my data.csv")[2]
