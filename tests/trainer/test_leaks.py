"""Rows on two sides: word for word or nearly, against counts made with plain sets of words."""

import gzip
import json
import re
from collections import Counter
from pathlib import Path
from random import Random

import numpy as np
import pytest

from serving.directory import BadInput
from trainer import leaks
from trainer.config import EmbeddedData, FileData
from trainer.sketches import NONE, RUN_WORDS, SIZE, shares, sketch
from trainer.sources import read_splits

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
WORDS = [f"word{i}" for i in range(400)]


def document(seed: int, length: int = 60) -> str:
    random = Random(seed)
    return " ".join(random.choice(WORDS) for _ in range(length))


def changed(text: str, every: int) -> str:
    """The text with every so manieth word replaced."""
    return " ".join(f"x{i}" if i % every == every - 1 else word for i, word in enumerate(text.split()))


def runs(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.casefold())
    return {tuple(words[i : i + RUN_WORDS]) for i in range(len(words) - RUN_WORDS + 1)}


def jaccard(one: str, other: str) -> float:
    return len(runs(one) & runs(other)) / len(runs(one) | runs(other))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIVET_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def found(tmp_path, write_rows):
    """Return a function that looks for leaks between files of texts, and returns the splits."""

    def look(train: list[str], validation: list[str], test: list[str] | None = None, **settings):
        rows = {"train": train, "validation": validation, "test": test}
        paths = {
            name: write_rows(tmp_path / f"{name}.jsonl", [{"text": text} for text in texts])
            for name, texts in rows.items()
            if texts is not None
        }
        data = FileData(type="files", **paths, **settings)
        return leaks.searched(data, read_splits(data, "causal_lm"), "causal_lm")

    return look


# --- sketches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "mean_error", "largest_error"), [(50, 1e-9, 1e-9), (2_000, 0.06, 0.25)])
def test_the_share_of_short_texts_is_that_of_their_runs_and_of_long_ones_about_it(length, mean_error, largest_error):
    one = [document(seed, length) for seed in range(30)]
    other = [changed(text, 3 + seed) for seed, text in enumerate(one)]
    got = shares(sketch(one), sketch(other), (np.arange(30), np.arange(30)))
    expected = np.array([jaccard(*pair) for pair in zip(one, other, strict=True)])
    assert max(expected) > 0.5 > min(expected)
    error = np.abs(got - expected)
    assert error.mean() < mean_error
    assert error.max() < largest_error
    assert abs((got - expected).mean()) < 0.05


def test_equal_words_have_one_hash_whatever_stands_between_them_and_other_words_another():
    same = ["The cat, sat!", "the   CAT sat", "\nthe\tcat sat.", "THE-CAT-SAT"]
    other = ["the cat sat on", "cat the sat", "thecat sat", "", "...", "the c at sat", "the cat sat the cat sat"]
    whole = sketch([*same, *other]).whole
    assert len(set(whole[:4].tolist())) == 1
    assert len(set(whole.tolist())) == 1 + len(other) - 1  # the two without a word have none
    assert whole[7] == whole[8] == 0


def test_every_chinese_and_japanese_character_is_a_word():
    assert (sketch(["今天天气很好我们去公园玩"]).smallest != NONE).sum() == 10
    assert (sketch(["ein Haus, zwei Häuser"]).smallest != NONE).sum() == 2


def test_a_sketch_does_not_depend_on_the_texts_around_it():
    texts = [document(seed, 5 + 7 * seed) for seed in range(40)] + ["", "a", "a b", "\ud800 lone 😀😀 ﬁ İ"]
    together = sketch(texts)
    for number, text in enumerate(texts):
        alone = sketch([text])
        assert (alone.whole[0], alone.complete[0]) == (together.whole[number], together.complete[number])
        assert np.array_equal(alone.smallest[0], together.smallest[number])
    assert together.smallest.shape == (len(texts), SIZE)


# --- candidates ------------------------------------------------------------------------------------------------------


@pytest.fixture
def compared(monkeypatch):
    """The number of pairs of texts that are compared, added up."""
    counts = []
    real = leaks.shares
    monkeypatch.setattr(leaks, "shares", lambda a, b, pairs: (counts.append(len(pairs[0])), real(a, b, pairs))[1])
    return counts


def test_the_shortest_texts_that_can_be_nearly_equal_are_compared(found, compared):
    # Of 8 words and 6 runs each, 5 in common: 5 / 7 of all, and no two such texts have fewer in common.
    words = document(0, 9).split()
    one, other = " ".join(words[:8]), " ".join(words[1:])
    assert jaccard(one, other) == pytest.approx(5 / 7)
    [pair] = found([one], [other]).leaks["pairs"]
    assert (pair["exact"], pair["near"], sum(compared)) == (0, 1, 1)


def test_texts_with_a_phrase_in_common_are_not_compared(found, compared):
    def looked_up(text: str) -> set[int]:
        return set(sketch([text]).smallest[0, :16].tolist())

    phrase = document(0, 5)
    texts = [f"{phrase} {document(seed, 20)}" for seed in range(1, 40)]
    pairs = [(a, b) for a in texts for b in texts if len(looked_up(a) & looked_up(b)) == 3]
    assert pairs, "some share the three runs of the phrase"
    assert found([pairs[0][0]], [pairs[0][1]]).leaks["pairs"][0]["near"] == 0
    assert sum(compared) == 0


# --- reports ---------------------------------------------------------------------------------------------------------


def test_planted_copies_are_counted_and_named_and_nothing_else_is(found, tmp_path):
    train = [document(seed) for seed in range(300)]
    validation = [document(1000 + seed) for seed in range(50)]
    validation[7] = train[120].upper() + " !"
    validation[30] = changed(train[200], 20)
    validation[31] = changed(train[201], 4)  # shares too little
    test = [document(2000 + seed) for seed in range(20)]
    test[3], test[4] = validation[9], train[0]
    assert jaccard(validation[30], train[200]) > leaks.NEARLY > 0.5 > jaccard(validation[31], train[201])
    report = found(train, validation, test).leaks
    counts = {(pair["of"], pair["in"]): (pair["rows"], pair["exact"], pair["near"]) for pair in report["pairs"]}
    assert counts == {
        ("validation", "train"): (50, 1, 1),
        ("test", "train"): (20, 1, 0),
        ("test", "validation"): (20, 1, 0),
    }
    [first, second] = report["pairs"][0]["examples"]
    assert first == {
        "row": f"{tmp_path / 'validation.jsonl'}, line 8",
        "like": f"{tmp_path / 'train.jsonl'}, line 121",
        "share": 1.0,
    }
    assert second["row"].endswith("line 31")
    assert second["share"] == pytest.approx(jaccard(validation[30], train[200]), abs=0.1)
    assert leaks.tell(report) == (
        f"2 of 50 validation rows are trained on too, 1 word for word, 1 nearly (first: {first['row']} and "
        f"{first['like']}); 1 of 20 test rows are trained on too, 1 word for word, 0 nearly "
        f"(first: {tmp_path / 'test.jsonl'}, line 5 and {tmp_path / 'train.jsonl'}, line 1); "
        f"1 of 20 test rows are validation rows too, 1 word for word, 0 nearly "
        f"(first: {tmp_path / 'test.jsonl'}, line 4 and {tmp_path / 'validation.jsonl'}, line 10)"
    )
    assert not any(text in json.dumps(report) for text in ("word1", "WORD1"))  # places, never texts


def test_near_copies_are_those_that_comparing_all_pairs_finds(found):
    train = [document(seed, 40) for seed in range(200)]
    validation = [changed(train[seed], 3 + seed) for seed in range(35)]
    expected = sum(max(jaccard(text, other) for other in train) >= leaks.NEARLY for text in validation)
    assert 15 < expected < 30
    assert found(train, validation).leaks["pairs"][0]["near"] == expected


def test_a_validation_file_that_is_the_training_file_is_found_whole(found):
    texts = [document(seed, length) for seed, length in enumerate([1, 2, 3, 8, 60, 500])] + ["yes", "yes"]
    pair = found(texts, texts).leaks["pairs"][0]
    assert (pair["rows"], pair["exact"], pair["near"]) == (8, 8, 0)


def test_refuse_ends_the_run_and_off_does_not_look(found):
    texts = [document(seed) for seed in range(20)]
    with pytest.raises(BadInput, match=r"data\.leaks: refuse, and 20 of 20 validation rows .*; remove those rows, or"):
        found(texts, texts, leaks="refuse")
    assert found(texts, [document(100)], leaks="refuse").leaks["pairs"][0]["exact"] == 0
    assert found(texts, texts, leaks="off").leaks is None
    assert leaks.searched(EmbeddedData(type="embedded"), None, "causal_lm") is None


def test_a_stream_is_looked_at_in_its_first_window(found):
    texts = [document(seed) for seed in range(30)]
    report = found(texts, [texts[5], texts[25]], streaming=True, window_rows=10).leaks
    assert report["pairs"][0]["exact"] == 1
    assert leaks.tell(report).endswith("(looked at the first window of the stream)")


def test_only_so_many_held_out_rows_are_looked_at_and_the_report_says_so(found, monkeypatch):
    monkeypatch.setattr(leaks, "MOST_ROWS", 3)
    texts = [document(seed) for seed in range(10)]
    report = found(texts, texts).leaks
    assert (report["pairs"][0]["rows"], report["pairs"][0]["exact"]) == (3, 3)
    assert report["looked_at"] == "the first 3 of each"


def test_what_was_found_is_kept_for_the_same_data_and_looked_for_again_in_other_data(found, monkeypatch):
    texts = [document(seed) for seed in range(20)]
    first = found(texts, texts[:3]).leaks
    looks = []
    look = leaks._look
    monkeypatch.setattr(leaks, "_look", lambda *args: (looks.append(1), look(*args))[1])
    assert found(texts, texts[:3]).leaks == first
    assert not looks
    assert found(texts, texts[:4]).leaks["pairs"][0]["exact"] == 4
    assert looks


@pytest.mark.parametrize(
    ("takes", "row", "same"),
    [
        ("classification", {"text": "a b c", "label": "x"}, {"text": "A b, c", "label": "y"}),
        (
            "token_classification",
            {"tokens": ["a", "b", "c"], "tags": ["O"] * 3},
            {"tokens": ["a", "b", "c"], "tags": ["X"] * 3},
        ),
        (
            "sft",
            {"prompt": "a", "completion": "b"},
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        ),
    ],
)
def test_what_a_model_is_given_counts_and_not_the_labels(tmp_path, write_rows, takes, row, same):
    paths = {
        name: write_rows(tmp_path / f"{name}.jsonl", [each]) for name, each in (("train", row), ("validation", same))
    }
    data = FileData(type="files", **paths)
    report = leaks.searched(data, read_splits(data, takes), takes).leaks
    assert report["pairs"][0]["exact"] == 1


def test_a_run_says_what_leaks_and_writes_it_into_its_folder(tmp_path, write_rows, make_config, train, capfd):
    path = write_rows(tmp_path / "rows.jsonl", [{"text": document(seed)} for seed in range(30)])
    config = make_config("causal_lm", "scratch", run={"steps": 2}, data={"train": str(path), "validation": str(path)})
    assert train(config) == 0
    assert "30 of 30 validation rows are trained on too, 30 word for word, 0 nearly" in capfd.readouterr().err
    report = json.loads((config.run.folder / "leaks.json").read_text())
    assert report["pairs"][0]["exact"] == 30
    assert "format_version" in report


# --- real data -------------------------------------------------------------------------------------------------------


def texts_of(path: Path) -> list[str]:
    with gzip.open(path, "rt") as lines:
        return [json.loads(line)["text"] for line in lines]


def real(name: str) -> Path:
    if not (DATA / name).is_dir():
        pytest.skip(f"../shared/data/{name} is not there")
    return DATA / name


@pytest.mark.slow
def test_the_near_copies_of_bbc_news_are_those_of_comparing_all_pairs():
    folder = real("bbc_news")
    data = FileData(type="files", train=folder / "train.jsonl.gz", validation=folder / "test.jsonl.gz")
    pair = leaks.searched(data, read_splits(data, "classification"), "classification").leaks["pairs"][0]
    train, test = ([runs(text) for text in texts_of(folder / f"{name}.jsonl.gz")] for name in ("train", "test"))
    places: dict[tuple[str, ...], list[int]] = {}
    for number, each in enumerate(train):
        for run in each:
            places.setdefault(run, []).append(number)
    best = np.zeros(len(test))
    for number, each in enumerate(test):
        shared = Counter(other for run in each for other in places.get(run, []))
        best[number] = max((n / (len(each) + len(train[other]) - n) for other, n in shared.items()), default=0.0)
    assert pair["exact"] == 0
    assert (best >= leaks.NEARLY + 0.15).sum() <= pair["near"] <= (best >= leaks.NEARLY - 0.15).sum()
    assert pair["near"] > 0


@pytest.mark.slow
def test_imdb_has_the_123_reviews_that_stand_in_both_of_its_parts():
    folder = real("imdb")
    data = FileData(type="files", train=folder / "train.jsonl.gz", validation=folder / "test.jsonl.gz")
    pair = leaks.searched(data, read_splits(data, "classification"), "classification").leaks["pairs"][0]
    train, test = (
        [" ".join(re.findall(r"\w+", text.casefold())) for text in texts_of(folder / f"{name}.jsonl.gz")]
        for name in ("train", "test")
    )
    known = set(train)
    assert pair["exact"] == sum(text in known for text in test) == 123
