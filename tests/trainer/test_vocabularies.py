"""Vocabularies: the same every time, of the size that was asked for, read from a stream."""

import json
import os
import subprocess
import sys
import weakref
from pathlib import Path
from random import Random

import pytest

from trainer.vocabularies import ALGORITHMS, HAS_UNKNOWN, UNKNOWN

ROOT = Path(__file__).resolve().parents[2]
SPECIAL = ["[PAD]", UNKNOWN]


def make_texts(num_texts: int = 400) -> list[str]:
    """Words of random letters, whose pieces are often equally likely: a tie that is broken by chance would show."""
    random = Random(0)
    words = ["".join(random.choices("aeioubcdxyzéß", k=random.randint(2, 9))) for _ in range(900)]
    return [" ".join(random.choices(words, k=12)) + f", {random.randint(0, 99)}." for _ in range(num_texts)]


def learn(algorithm: str, texts, vocab_size: int = 500, *, lowercase: bool = False, least: int = 1):
    return ALGORITHMS[algorithm](iter(texts), SPECIAL, vocab_size, lowercase=lowercase, least=least)


def learn_all() -> dict[str, str]:
    return {name: learn(name, make_texts()).to_str() for name in ALGORITHMS}


def test_training_twice_gives_the_same_tokenizer_in_this_process_and_in_others():
    first = learn_all()
    assert learn_all() == first
    command = [sys.executable, "-c", "import json; from tests.trainer import test_vocabularies as t\n"
               "print(json.dumps(t.learn_all()))"]  # fmt: skip
    for seed, threads in (("1", "4"), ("2", "1")):
        env = {**os.environ, "PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "true"}
        other = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=True)
        assert json.loads(other.stdout) == first


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("vocab_size", [300, 700])
def test_a_vocabulary_is_as_large_as_asked_for_and_every_entry_has_a_number(algorithm, vocab_size):
    tokenizer = learn(algorithm, make_texts(), vocab_size)
    assert tokenizer.get_vocab_size() == vocab_size
    assert sorted(tokenizer.get_vocab().values()) == list(range(vocab_size))
    assert [tokenizer.token_to_id(token) for token in SPECIAL] == [0, 1]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_special_tokens_are_special_and_no_others_are(algorithm):
    added = learn(algorithm, make_texts()).get_added_tokens_decoder()
    assert {number: (token.content, token.special) for number, token in added.items()} == {
        number: (token, True) for number, token in enumerate(SPECIAL)
    }


@pytest.mark.parametrize("algorithm", ["bpe", "unigram"])
@pytest.mark.parametrize("text", ["naïve  café\t\n\n日本語 🦊", " leading and trailing ", "\x00\x7f", "don't [ PAD ]"])
def test_pieces_of_bytes_give_any_text_back(algorithm, text):
    tokenizer = learn(algorithm, ["the quick brown fox"])
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.parametrize("algorithm", HAS_UNKNOWN)
def test_what_words_cannot_spell_is_unknown(algorithm):
    tokenizer = learn(algorithm, make_texts())
    assert tokenizer.encode("日 QQQ").tokens == [UNKNOWN, UNKNOWN]


def test_pieces_of_words_are_marked_and_join_again():
    tokenizer = learn("wordpiece", ["play playing played plays"] * 20 + ["sing singing"] * 20, 300)
    assert tokenizer.encode("playing singed").tokens == ["playing", "sing", "##ed"]
    assert tokenizer.decode(tokenizer.encode("playing\n singed").ids) == "playing singed"


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_lower_case_reads_both_cases_alike_and_only_where_asked_for(algorithm):
    texts = ["The Quick fox", "the quick fox"] * 10
    for lowercase in (True, False):
        tokenizer = learn(algorithm, texts, lowercase=lowercase)
        assert (tokenizer.encode("The Quick").ids == tokenizer.encode("the quick").ids) == lowercase


@pytest.mark.parametrize("algorithm", ["bpe", "wordpiece", "wordlevel"])
def test_what_is_rarer_than_min_frequency_is_no_entry(algorithm):
    texts = ["often often often", "seldom"]
    often, seldom = ("Ġoften", "seldom") if algorithm == "bpe" else ("often", "seldom")
    assert {often, seldom} <= learn(algorithm, texts).get_vocab().keys()
    vocabulary = learn(algorithm, texts, least=2).get_vocab()
    assert often in vocabulary
    assert seldom not in vocabulary


def test_a_script_of_thousands_of_characters_leaves_room_for_words():
    texts = [chr(0x4E00 + number) for number in range(3000)] + ["狐 the fox"] * 10
    tokenizer = learn("wordpiece", texts, 300)
    assert tokenizer.get_vocab_size() <= 300
    assert tokenizer.encode("狐 the fox").tokens == ["狐", "the", "fox"]
    assert tokenizer.encode(chr(0x4E00 + 2999)).tokens == [UNKNOWN]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_texts_are_read_as_they_come_and_not_kept(algorithm):
    class Text(str):
        __slots__ = ("__weakref__",)

    alive: set = set()
    most = 0

    def stream():
        nonlocal most
        for number in range(4000):
            text = Text(f"the fox reads line {number % 7}")
            alive.add(number)
            weakref.finalize(text, alive.discard, number)
            most = max(most, len(alive))
            yield text

    ALGORITHMS[algorithm](stream(), SPECIAL, 300, lowercase=False, least=1)
    assert most < 1000
