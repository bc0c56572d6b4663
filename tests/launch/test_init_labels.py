"""Which columns `trivet init` takes for labels: never in silence, and never against the values."""

import json
from pathlib import Path

import pytest

from launch import config_file
from launch.init import column
from launch.init.guesses import Guess, Wish, guess
from serving.directory import BadInput
from trainer.columns import label_of
from trainer.config import RunConfig
from trainer.sources import read_splits

HANZI = "今天天气很好我们去公园散步吧"


def table(**columns) -> list[dict]:
    """Sixty rows: a column is a function of the row's number, or a value for all."""
    return [{name: value(i) if callable(value) else value for name, value in columns.items()} for i in range(60)]


def prose(i: int) -> str:
    return f"a sentence with the number {i}"


def of_two(i: int) -> str:
    return ("yes", "no")[i % 2]


def guessed(rows: list[dict], objective: str | None = None, **columns: str) -> Guess:
    return guess(Path("data.csv"), column.columns_of(rows), Wish(objective, columns))


def refusal(rows: list[dict], **columns: str) -> str:
    with pytest.raises(BadInput) as caught:
        guessed(rows, **columns)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def written(trivet, rows: list[dict], *options: str) -> tuple[str, RunConfig]:
    """What init says about the rows, in one line, and the config it writes."""
    Path("a.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    code, out, err = trivet("init", "x", "--from", "a.jsonl", "--force", *options)
    assert code == 0, err
    return " ".join(out.split()), config_file.load(Path("x.yaml"), [], RunConfig)


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("values", "labels"), [((True, False), {"true", "false"}), ((1.0, 2.0), {"1", "2"}), ((1, 1.0, 2), {"1", "2"})]
)
def test_booleans_and_whole_floats_are_labels(trivet, values, labels):
    out, config = written(trivet, table(text=prose, label=lambda i: values[i % len(values)]))
    assert config.objective.type == "classification"
    assert "left out" not in out
    splits = read_splits(config.data, "classification")
    assert len(splits.train) + len(splits.held_out) == 60
    assert {label_of(row, 0, config.data) for row in (*splits.train, *splits.held_out)} == labels


@pytest.mark.parametrize(
    ("label", "words"),
    [
        (lambda i: i + 0.5, "such as 0.5; to learn numbers, set objective.problem=regression in a config of your own"),
        (
            lambda i: f"{i}",
            "60 different values in 60 rows, fewer than two rows for each; to learn numbers, set objective.",
        ),
        (["a", "b"], "'label' holds lists, for which init writes no config: set objective.problem=multi_label in "),
        ({"a": 1}, "'label' holds nested values, which must be flattened"),
        ("", "'label' is empty"),
    ],
    ids=["fractions", "too many", "lists", "nested", "empty"],
)
def test_a_label_that_cannot_be_used_is_not_passed_over(label, words):
    message = refusal(table(text=prose, label=label, kind=of_two))
    assert words in message
    assert message.endswith("to learn the plain text: --objective causal_lm")
    assert ("--label label" in message) == ("different values" in message)  # is only advised where it works


def test_what_is_advised_about_an_unusable_label_works():
    rows = table(text=prose, label=lambda i: f"{i}")
    assert guessed(rows, label="label").objective == "classification"
    assert guessed(rows, objective="causal_lm").columns == {"text": "text"}


def test_several_columns_of_0_and_1_are_several_labels():
    rows = table(text=prose, toxic=lambda i: i % 2, **{"severe threat": lambda i: f"{i // 2 % 2}"})
    message = refusal(rows)
    assert "'toxic', 'severe threat' hold 0 and 1: several labels in a row, for which init writes no config" in message
    assert "set objective.problem=multi_label" in message
    assert "--label toxic; to learn the plain text: --objective causal_lm" in message
    assert guessed(rows, label="severe threat").columns == {"text": "text", "label": "severe threat"}


@pytest.mark.parametrize(
    "name",
    "id user_id userId split source created_date year lang language url index row_number Unnamed:_0".split(),  # noqa: SIM905
)
def test_columns_that_only_sort_the_rows_are_no_weak_labels(name):
    assert guessed(table(remark=prose, **{name: lambda i: i % 3})).objective == "causal_lm"
    assert guessed(table(remark=prose, urgent=of_two, **{name: lambda i: i % 3})).columns["label"] == "urgent"
    assert guessed(table(remark=prose, **{name: lambda i: i % 3}), label=name).columns["label"] == name


def test_a_weak_label_is_said_to_be_guessed(trivet):
    note = "is a label is guessed; if not: --objective causal_lm"
    assert f"that `urgent` {note}" in written(trivet, table(remark=prose, urgent=of_two))[0]
    assert note not in written(trivet, table(remark=prose, label=of_two))[0]


def test_columns_without_spaces_between_words_are_prose(trivet):
    rows = table(正文=lambda i: HANZI[i % 5 :] + str(i), 标签=lambda i: "好坏"[i % 2])
    assert guessed(rows).columns == {"text": "正文", "label": "标签"}
    out, config = written(trivet, table(text=lambda i: f"{HANZI[:12]}{i}", label=of_two))
    assert "half of the training rows have up to 37" in out  # twelve letters of three bytes each, and two digits
    assert "are estimated to fit" in Path("x.yaml").read_text()
    assert config.batch.max_length == 128
    assert "fit whole" not in Path("x.yaml").read_text()


def test_labels_that_differ_in_case_or_spaces_are_doubted(trivet):
    labels = ["Pos", "pos", "pos ", "neg"]
    out, _ = written(trivet, table(text=prose, label=lambda i: labels[i % 4]))
    assert "differ only in case or spaces are classes of their own: 'Pos', 'pos', 'pos '; are they one?" in out
    assert "differ only" not in written(trivet, table(text=prose, label=of_two))[0]


def test_labels_that_look_like_missing_values_are_doubted(trivet):
    labels = ["a", "b", "nan", "N/A", "None", "null"]
    out, _ = written(trivet, table(text=prose, label=lambda i: labels[i % 6]))
    assert all(repr(label) in out.partition("labels that look like missing values: ")[2] for label in labels[2:])
    assert "'a'" not in out
    assert "missing values" not in written(trivet, table(text=prose, label=of_two))[0]


def test_a_column_has_one_use():
    assert "--text, --label: both name the column 'label'" in refusal(
        table(text=prose, label=of_two), text="label", label="label"
    )
    assert guessed(table(text=prose, label=of_two), text="label").columns == {"text": "label"}
    assert guessed(table(question=prose, answer=prose), prompt="answer", completion="question").columns == {
        "prompt": "answer",
        "completion": "question",
    }


def test_summaries_may_be_called_highlights():
    assert guessed(table(article=prose, highlights=prose)).columns == {"prompt": "article", "completion": "highlights"}


def test_nested_values_are_said_to_need_flattening():
    assert "nested values must be flattened" in refusal(table(data={"text": "a b c"}, meta={"lang": "en"}))


def test_a_classifier_of_short_texts_has_room_for_longer_ones_when_it_is_served(trivet):
    _, config = written(trivet, table(text=lambda i: f"late {i}", label=of_two))
    assert config.batch.max_length == 128
    assert "only the start is read, in training and when served" in Path("x.yaml").read_text()
