"""Vocabularies learned from text, the same every time: one function per algorithm of the `tokenizers` library.

It counts words in a hash map whose order differs from call to call. BPE and word-level break ties by name and do not
mind; WordPiece and Unigram do, and are made independent of the order here.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

UNKNOWN = "[UNK]"  # must be among the special tokens of the algorithms in HAS_UNKNOWN
CONTINUED = "##"  # before a WordPiece entry that goes on with a word
LONGEST_WORD = 100  # of WordPiece, in characters: a longer one is unknown
_SCORE_DIGITS = 4
_WORDS_PER_FEED = 10_000


def learn_bpe(texts: Iterable[str], special: list[str], vocab_size: int, *, lowercase: bool, least: int) -> Tokenizer:
    """Return a byte-level BPE: any text round-trips, there is no unknown token."""
    tokenizer = _byte_level(models.BPE(), lowercase)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=least,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def learn_unigram(
    texts: Iterable[str], special: list[str], vocab_size: int, *, lowercase: bool, least: int
) -> Tokenizer:
    """Return a byte-level Unigram model (arXiv:1804.10959): any text round-trips, there is no unknown token.

    `least` is not used: pieces are dropped by likelihood, not by count.
    """
    tokenizer = _byte_level(models.Unigram(), lowercase)
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    pieces = json.loads(tokenizer.to_str())["model"]["vocab"]
    settled = _byte_level(models.Unigram(_settled(pieces, special)), lowercase)
    settled.add_special_tokens(special)
    return settled


def learn_wordlevel(
    texts: Iterable[str], special: list[str], vocab_size: int, *, lowercase: bool, least: int
) -> Tokenizer:
    """Return the commonest words and signs; the rest is UNKNOWN."""
    tokenizer = _word_based(models.WordLevel(unk_token=UNKNOWN), lowercase)
    trainer = trainers.WordLevelTrainer(
        vocab_size=vocab_size, min_frequency=least, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def learn_wordpiece(
    texts: Iterable[str], special: list[str], vocab_size: int, *, lowercase: bool, least: int
) -> Tokenizer:
    """Return a WordPiece model; what its pieces cannot spell is UNKNOWN.

    Characters take at most half of the entries, the commonest first: the rarer ones of a script with thousands are
    unknown.
    """
    all_counts = _word_counts(texts, _word_based(models.WordLevel(), lowercase))
    counts, alphabet = _within_alphabet(all_counts, vocab_size // 4)
    # The library numbers the characters inside words as its hash map has them; as special tokens they come in order.
    inside = sorted({character for word in counts for character in word[1:]})
    numbered = [*special, *alphabet, *(CONTINUED + character for character in inside)]
    pieces = Tokenizer(models.WordPiece(unk_token=UNKNOWN))
    pieces.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=least,
        special_tokens=numbered,
        continuing_subword_prefix=CONTINUED,
        show_progress=False,
    )
    pieces.train_from_iterator(_repeated(counts), trainer)
    model = models.WordPiece(
        pieces.get_vocab(), unk_token=UNKNOWN, max_input_chars_per_word=LONGEST_WORD
    )  # a new tokenizer: in the one that was trained every character is special
    tokenizer = _word_based(model, lowercase)
    # Without `cleanup`, which takes back spaces that it has written: a stream of text cannot.
    tokenizer.decoder = decoders.WordPiece(prefix=CONTINUED, cleanup=False)
    tokenizer.add_special_tokens(special)
    return tokenizer


ALGORITHMS: dict[str, Callable[..., Tokenizer]] = {
    "bpe": learn_bpe,
    "unigram": learn_unigram,
    "wordpiece": learn_wordpiece,
    "wordlevel": learn_wordlevel,
}
HAS_UNKNOWN = ("wordpiece", "wordlevel")


def _byte_level(model: models.Model, lowercase: bool) -> Tokenizer:
    tokenizer = Tokenizer(model)
    if lowercase:
        tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _word_based(model: models.Model, lowercase: bool) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase, strip_accents=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def _settled(pieces: list[tuple[str, float]], special: list[str]) -> list[tuple[str, float]]:
    """Return Unigram's pieces with scores and order that do not depend on the order in which it summed.

    The pieces are the same each time (their counts are whole numbers), their scores differ in the last bits. Bytes
    that no text holds get the lowest score, plus 0.0001 for each that came before.
    """
    learned = [(piece, score) for piece, score in pieces if piece not in special]
    lowest = min(score for _, score in learned)
    unseen = lowest + 1e-4 * len(pre_tokenizers.ByteLevel.alphabet())
    scores = {piece: lowest if len(piece) == 1 and score < unseen else score for piece, score in learned}
    rounded = [(piece, round(score, _SCORE_DIGITS)) for piece, score in scores.items()]
    return [(token, 0.0) for token in special] + sorted(rounded, key=lambda entry: (-entry[1], entry[0]))


def _word_counts(texts: Iterable[str], tokenizer: Tokenizer) -> Counter[str]:
    counts: Counter[str] = Counter()
    for text in texts:
        words = tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(text))
        counts.update(word for word, _ in words if len(word) <= LONGEST_WORD)
    return counts


def _within_alphabet(counts: Counter[str], num_characters: int) -> tuple[dict[str, int], list[str]]:
    """Return the words that the commonest characters spell, in order, and those characters, in order."""
    seen: Counter[str] = Counter()
    for word, count in counts.items():
        for character in word:
            seen[character] += count
    commonest = sorted(seen, key=lambda character: (-seen[character], character))[:num_characters]
    alphabet = frozenset(commonest)
    return {word: counts[word] for word in sorted(counts) if alphabet.issuperset(word)}, sorted(commonest)


def _repeated(counts: dict[str, int]) -> Iterator[str]:
    """Yield each word as often as it was counted: the library takes texts, not counts."""
    for word, count in counts.items():
        for start in range(0, count, _WORDS_PER_FEED):
            yield f"{word} " * min(_WORDS_PER_FEED, count - start)
