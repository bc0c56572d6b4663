"""Several sources as one: every row with its place, under the usual names, on the side that its source puts it."""

import json

import pytest
from pydantic import ValidationError

from trainer.config import EmbeddedData, FileData, HubData, MixtureData
from trainer.data_files import DataError
from trainer.sources import read_splits, tell_left_out

ROWS = [{"text": f"row {i}", "label": "ab"[i % 2]} for i in range(400)]


def texts(rows) -> list[str]:
    return [row["text"] for row in rows]


def mixture(*sources, **settings) -> MixtureData:
    return MixtureData(
        type="mixture", sources=[{"weight": weight, "data": data} for weight, data in sources], **settings
    )


@pytest.mark.parametrize("streaming", [False, True])
def test_the_sources_of_a_mixture_keep_their_columns_and_held_out_parts(tmp_path, write_rows, streaming):
    a = write_rows(tmp_path / "a.jsonl", [{"body": f"a {i}", "label": "other", "kind": "x"} for i in range(100)])
    b = write_rows(tmp_path / "b.jsonl", [{"text": f"b {i}", "label": "y"} for i in range(50)])
    v = write_rows(tmp_path / "v.jsonl", [{"text": "v", "label": "y"}])
    one = {"type": "files", "train": a, "text": "body", "label": "kind", "test_fraction": 0.1}
    other = {"type": "files", "train": b, "validation": v}
    splits = read_splits(mixture((3, one), (0.5, other), streaming=streaming), "classification")
    alone = read_splits(FileData(**one), "classification")
    assert [(each.weight, len(each.rows)) for each in splits.sources] == [(3.0, len(alone.train)), (0.5, 50)]
    assert splits.train == [row for each in splits.sources for row in each.rows]
    assert {(row["text"][0], row["label"]) for row in splits.train} == {("a", "x"), ("b", "y")}
    assert texts(splits.held_out) == [row["body"] for row in alone.held_out] + ["v"]
    assert texts(splits.test) == [row["body"] for row in alone.test]
    assert splits.train[0].place.startswith(f"{a}, line ")
    assert splits.streaming == streaming


def test_chats_of_a_mixture_are_made_by_the_settings_of_their_source(tmp_path, write_rows):
    a = write_rows(tmp_path / "a.jsonl", [{"q": f"q{i}", "more": "m", "a": "yes"} for i in range(60)])
    chat = [{"from": "human", "value": "why"}, {"from": "gpt", "value": "because"}]
    b = write_rows(tmp_path / "b.jsonl", [{"messages": [*chat, {"from": "human", "value": str(i)}]} for i in range(60)])
    one = {"type": "files", "train": a, "prompt": "q", "completion": "a", "context": "more", "system": "be kind"}
    splits = read_splits(mixture((1, one), (1, {"type": "files", "train": b})), "sft")
    assert splits.sources[0].rows[0] == {
        "messages": [
            {"role": "system", "content": "be kind"},
            {"role": "user", "content": f"{splits.sources[0].rows[0]['messages'][1]['content'][:2]}\n\nm"},
            {"role": "assistant", "content": "yes"},
        ]
    }
    assert [turn["role"] for turn in splits.sources[1].rows[0]["messages"]] == ["user", "assistant", "user"]


def test_a_bad_row_of_a_mixture_is_named_by_its_file_line_and_column(tmp_path, write_rows):
    a = write_rows(tmp_path / "a.jsonl", [{"body": "x"}] * 50 + [{"text": "y"}])
    b = write_rows(tmp_path / "b.jsonl", ROWS)
    data = mixture(
        (1, {"type": "files", "train": a, "validation": b, "text": "body"}), (1, {"type": "files", "train": b})
    )
    with pytest.raises(DataError, match=r"data\.text: .*a\.jsonl, line 51 has no 'body'; it has: text"):
        list(read_splits(data, "causal_lm").train)
    skipping = {"type": "files", "train": a, "validation": a, "text": "body", "skip_bad_rows": True}
    splits = read_splits(mixture((1, skipping), (1, {"type": "files", "train": b})), "causal_lm")
    assert "left out 2 of " in tell_left_out(splits)
    assert f"2 without 'body' (first: {a}, line 51)" in tell_left_out(splits)


def test_the_embedded_corpus_can_be_one_source(tmp_path, write_rows, monkeypatch):
    from trainer import corpus

    items = [corpus.Item(f"m{i}", f"m{i}", "module", f"Module number {i}.", "") for i in range(60)]
    monkeypatch.setattr(corpus, "read_items", lambda: items)
    path = write_rows(tmp_path / "b.jsonl", ROWS)
    splits = read_splits(mixture((1, {"type": "embedded"}), (1, {"type": "files", "train": path})), "causal_lm")
    assert splits.train[0]["text"].startswith("Module number")
    assert len(splits.train) + len(splits.held_out) == 460


FILE = {"type": "files", "train": "a.jsonl"}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"sources": [{"weight": 1, "data": FILE}]}, "at least 2 items"),
        ({"sources": [{"weight": 0, "data": FILE}, {"weight": 1, "data": FILE}]}, "greater than 0"),
        ({"sources": [{"data": FILE}, {"weight": 1, "data": FILE}]}, "weight\n"),
        ({"sources": [{"weight": 1, "wieght": 2, "data": FILE}, {"weight": 1, "data": FILE}]}, "wieght"),
        ({"sources": [{"weight": 1, "data": {**FILE, "streaming": True}}, {"weight": 1, "data": FILE}]}, "streaming"),
        ({"sources": [{"weight": 1, "data": {**FILE, "leaks": "off"}}, {"weight": 1, "data": FILE}]}, "leaks"),
        (
            {"sources": [{"weight": 1, "data": {"type": "mixture", "sources": []}}, {"weight": 1, "data": FILE}]},
            "mixture",
        ),
        ({"sources": [{"weight": 1, "data": {**FILE, "text_pair": "b"}}, {"weight": 1, "data": FILE}]}, "text_pair"),
        (
            {"sources": [{"weight": 1, "data": {"type": "embedded"}}, {"weight": 1, "data": FILE}], "streaming": True},
            "embedded",
        ),
        ({"sources": [{"weight": 1, "data": FILE}] * 2, "text": "body"}, "text"),
    ],
)
def test_a_mixture_that_cannot_be_drawn_from_is_refused(values, said):
    with pytest.raises(ValidationError, match=said):
        MixtureData(type="mixture", **values)


def test_a_saved_data_section_reads_back_as_it_was():
    for data in (
        FileData(type="files", train=("a.jsonl", "b.jsonl"), test_fraction=0.1),
        HubData(type="hub", path="a/b", validation_split="dev"),
        mixture((1, FILE), (2, {"type": "hub", "path": "x"}), streaming=True),
    ):
        assert type(data).model_validate(json.loads(json.dumps(data.model_dump(mode="json")))) == data
    assert EmbeddedData(type="embedded").columns.text == "text"
