"""What columns are taken for: usual tables, unusual ones, and well-known data sets where they lie beside the clone."""

import os
from pathlib import Path

import pytest

from launch.init import profiles, user_data
from launch.init.column import columns_of
from launch.init.guesses import Guess, Wish, guess
from launch.init.profiles import quantile
from serving.directory import BadInput

DATA_SETS = Path(os.environ.get("TRIVET_DATA_SETS", Path(__file__).resolve().parents[2].parent / "shared" / "data"))
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def table(**columns) -> list[dict]:
    """Forty rows: a column is a function of the row's number, or a value for all."""
    return [{name: value(i) if callable(value) else value for name, value in columns.items()} for i in range(40)]


def prose(i: int) -> str:
    return f"a sentence with the number {i}"


def longer(i: int) -> str:
    return f"a sentence that is quite a bit longer and has the number {i}"


def of_two(i: int) -> str:
    return ("yes", "no")[i % 2]


def guessed(rows: list[dict], objective: str | None = None, **columns: str) -> Guess:
    return guess(Path("data.csv"), columns_of(rows), Wish(objective, columns))


@pytest.mark.parametrize(
    ("rows", "objective", "columns"),
    [
        (table(text=prose), "causal_lm", {"text": "text"}),
        (table(id=lambda i: i, story=prose), "causal_lm", {"text": "story"}),
        (table(title=prose, content=longer), "causal_lm", {"text": "content"}),
        (table(text=prose, label=lambda i: i % 3), "classification", {"text": "text", "label": "label"}),
        (
            table(text=prose, label=lambda i: i % 2, label_name=of_two),
            "classification",
            {"text": "text", "label": "label_name"},
        ),
        (
            table(
                tweet_id=lambda i: i,
                airline_sentiment=of_two,
                negativereason=lambda i: of_two(i) if i % 3 else "",
                airline=lambda i: "abc"[i % 3],
                text=prose,
                tweet_created=lambda i: f"2/{i % 28}/2015 5:39",
            ),
            "classification",
            {"text": "text", "label": "airline_sentiment"},
        ),
        (  # a label that half of the rows have not is second to one that all have
            table(text=prose, label=lambda i: of_two(i // 2) if i % 2 else "", topic=of_two),
            "classification",
            {"text": "text", "label": "topic"},
        ),
        (table(remark=prose, urgent=of_two), "classification", {"text": "remark", "label": "urgent"}),
        (
            table(title=prose, review=longer, stars=of_two, sentiment=of_two),
            "classification",
            {"text": "review", "label": "sentiment"},
        ),
        (table(messages=CHAT), "sft", {"messages": "messages"}),
        (table(conversations=[{"from": "human", "value": "hi"}]), "sft", {"messages": "conversations"}),
        (table(prompt=prose, completion=longer), "sft", {"prompt": "prompt", "completion": "completion"}),
        (
            table(instruction=prose, input=lambda i: prose(i) if i % 2 else "", output=longer),
            "sft",
            {"prompt": "instruction", "completion": "output", "context": "input"},
        ),
        (table(instruction=prose, input="", output=longer), "sft", {"prompt": "instruction", "completion": "output"}),
        (
            table(instruction=prose, context=longer, response=longer, category=of_two),
            "sft",
            {"prompt": "instruction", "completion": "response", "context": "context"},
        ),
        (table(question=prose, answer=lambda i: f"{i}"), "sft", {"prompt": "question", "completion": "answer"}),
        (table(question=prose, target=of_two), "classification", {"text": "question", "label": "target"}),
        (table(source=of_two, text=prose, label=of_two), "classification", {"text": "text", "label": "label"}),
    ],
    ids=lambda value: " ".join(value[0]) if isinstance(value, list) else "",
)
def test_usual_tables_are_taken_for_what_they_are(rows, objective, columns):
    found = guessed(rows)
    assert (found.objective, found.columns) == (objective, columns)
    assert all(f"`{name}`" in found.reason for name in columns.values())


def test_a_few_odd_values_do_not_change_what_a_column_is():
    chats = [{"messages": CHAT if i % 20 else []} for i in range(40)]
    texts = [{"text": prose(i) if i % 20 else 5, "label": i % 2 if i != 7 else None} for i in range(40)]
    assert guessed(chats).columns == {"messages": "messages"}
    assert guessed(texts).columns == {"text": "text", "label": "label"}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (table(tokens=["a"], ner_tags=["O"]), "single tokens"),
        (table(prompt=CHAT, chosen=prose, rejected=prose), "preference pairs"),
        (table(query=prose, choices=["a", "b"], gold=0), "questions with choices"),
        (table(context=longer, question=prose, answers={"text": ["a"]}), "extractive question answering"),
        (table(premise=prose, hypothesis=prose, label=of_two), "pairs of texts"),
        (table(en=prose, de=longer), "nothing fits its columns: en (text), de (text)"),
        (table(a=lambda i: i, b=1.5, c=True), "a (whole number), b (number), c (true or false)"),
        (table(text=prose, label="x"), "the same 'label' (x)"),
    ],
    ids=lambda value: " ".join(value[0]) if isinstance(value, list) else "",
)
def test_what_cannot_be_learned_from_is_refused_by_name(rows, words):
    with pytest.raises(BadInput) as caught:
        guessed(rows)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("objective", "asked", "columns"),
    [
        (None, {"prompt": "en", "completion": "de"}, {"prompt": "en", "completion": "de"}),
        (None, {"text": "de"}, {"text": "de"}),
        (None, {"label": "en"}, {"text": "de", "label": "en"}),
        ("causal_lm", {}, {"text": "de"}),  # the longer one
        ("causal_lm", {"text": "en"}, {"text": "en"}),
    ],
    ids=str,
)
def test_what_is_asked_for_wins(objective, asked, columns):
    assert guessed(table(en=prose, de=longer), objective, **asked).columns == columns


def test_columns_are_described_as_they_are():
    rows = [
        {"n": "1", "f": 1.5, "mixed": 1, "text": "one two", "some": None, "list": [1], "chat": CHAT},
        {"n": "2", "f": 2, "mixed": [1], "text": "one\ntwo", "some": "", "list": [1], "chat": CHAT, "late": True},
        {"n": "", "f": 2, "mixed": 1, "text": "one two", "some": "x", "list": [2], "chat": CHAT},
    ]
    found = {column.name: column for column in columns_of(rows)}
    assert list(found) == ["n", "f", "mixed", "text", "some", "list", "chat", "late"]
    assert [column.type for column in found.values()] == [
        "whole number", "number", "mixed", "text", "text", "list", "chat", "true or false",
    ]  # fmt: skip
    assert [column.filled for column in found.values()] == [2, 3, 3, 3, 1, 3, 3, 1]
    assert [column.distinct for column in found.values()] == [2, 2, 2, 2, 1, 2, 1, 1]
    assert found["text"].example == "one two"
    assert found["some"].filled_share == pytest.approx(1 / 3)


def test_quantiles_worked_by_hand():
    assert [quantile([1, 2, 3, 4], part) for part in (0.25, 0.5, 0.51, 0.95)] == [1, 2, 3, 4]
    assert [quantile(list(range(1, 101)), part) for part in (0.5, 0.95)] == [50, 95]
    assert quantile([7], 0.5) == 7


def test_long_data_is_sampled_and_its_longest_row_is_not_missed():
    from trainer.config import FileData

    rows = [{"text": "x" * 10} for _ in range(6_000)]
    rows[4_001] = {"text": "x" * 999}  # every third row is counted, and this is none of them
    counter = profiles.TokenCounter(lambda texts: [len(text) for text in texts], by="letters")
    found = profiles.lengths(rows, "causal_lm", FileData(type="files", train="a.txt"), counter)
    assert (found.median, found.p95, found.longest, found.num_counted) == (10, 10, 999, 2_000)


@pytest.mark.skipif(not DATA_SETS.is_dir(), reason=f"the data sets are not at {DATA_SETS}")
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("airline_tweets", {"text": "text", "label": "airline_sentiment"}),
        ("alpaca_en_demo", {"prompt": "instruction", "context": "input", "completion": "output"}),
        ("bbc_news", {"text": "text", "label": "label_name"}),
        ("conll2003", "token classification"),
        ("dialogsum", {"prompt": "dialogue", "completion": "summary"}),
        ("dolly_hhrlhf_small", {"prompt": "instruction", "completion": "output"}),
        ("lm_evals", "has no train file"),
        ("lm_evals/boolq.jsonl.gz", "questions with choices"),
        ("lm_evals/gsm8k.jsonl.gz", {"prompt": "context", "completion": "answer"}),
        ("preferences_en_demo", "preference pairs"),
        ("review_sentences", {"text": "text", "label": "label_name"}),
        ("robert_frost", {"text": "text"}),
        ("squad_xquad_en", "extractive question answering"),
        ("tinyshakespeare", {"text": "text"}),
        ("translation_en_es", "nothing fits its columns: kind (text), en (text), es (text)"),
        ("trec", {"text": "text", "label": "label_name"}),
        ("web_text/c4_demo.jsonl.gz", {"text": "text"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_well_known_data_sets_are_understood_or_refused(name, expected):
    def columns() -> dict[str, str]:
        found = user_data.find(DATA_SETS / name)
        return guess(found.train, columns_of(found.train_rows), Wish(None, {})).columns

    if isinstance(expected, str):
        with pytest.raises(BadInput) as caught:
            columns()
        assert expected in str(caught.value)
    else:
        assert columns() == expected
