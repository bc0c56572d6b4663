"""Texts as small sketches of numbers, by which equal and nearly equal ones are found without keeping the texts.

A text is a row of words, in small letters and without what stands between them; every Chinese or Japanese character is
a word. Its sketch is the smallest hashes of its runs of three words (Broder 1997, "On the resemblance and containment
of documents"), from which the part of the runs that two texts share is estimated. The same on every machine.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RUN_WORDS = 3
SIZE = 64  # hashes kept of a text: a share is estimated to about 0.06
FEWEST_RUNS = 6  # a text of fewer is compared word for word only
NONE = np.uint64(2**64 - 1)  # where a text has no further hash

_TEXT_BITS = 16  # of a sorting key: the text's number, above the hash of a run
_MOST_TEXTS = 2**_TEXT_BITS
_BASE = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Sketches:
    """Of N texts: a hash of all words, 0 where there are none [N], the smallest hashes of runs, ascending and filled
    up with NONE [N, SIZE], and whether these are all of the text's [N]."""

    whole: np.ndarray
    smallest: np.ndarray
    complete: np.ndarray

    def __len__(self) -> int:
        return len(self.whole)


def sketch(texts: Sequence[str]) -> Sketches:
    """Return the sketches of texts, at most 65,536 of them."""
    assert len(texts) <= _MOST_TEXTS, "more texts than a sorting key can number"
    words, text_of_word = _words(texts)
    whole = np.zeros(len(texts), np.uint64)
    if len(words):
        first = np.flatnonzero(np.diff(text_of_word, prepend=-1))
        place = np.arange(len(words)) - np.repeat(first, np.diff(first, append=len(words)))
        whole[text_of_word[first]] = np.add.reduceat(_mixed(words + place.astype(np.uint64) * _BASE), first)
    smallest, complete = _smallest(_runs(words, text_of_word), len(texts))
    return Sketches(whole, smallest, complete)


def joined(parts: Sequence[Sketches]) -> Sketches:
    """Return the sketches of several parts one after the other."""
    fields = ("whole", "smallest", "complete")
    return Sketches(*(np.concatenate([getattr(part, field) for part in parts]) for field in fields))


def shares(one: Sketches, other: Sketches, pairs: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Return about what part of their runs each pair of texts shares, shape [P], of those that either has.

    Both are known whole up to the smaller of their largest hashes: what lies there is compared.
    """
    left, right = one.smallest[pairs[0]], other.smallest[pairs[1]]
    limit = np.full(len(left), NONE - np.uint64(1))
    for part, complete in ((left, one.complete[pairs[0]]), (right, other.complete[pairs[1]])):
        limit = np.where(complete, limit, np.minimum(limit, part[:, -1]))
    limit = limit[:, None]
    both = np.sort(np.concatenate([left, right], axis=1), axis=1)
    shared = ((both[:, 1:] == both[:, :-1]) & (both[:, 1:] <= limit)).sum(1)
    either = (left <= limit).sum(1) + (right <= limit).sum(1) - shared
    return shared / np.maximum(either, 1)


def _words(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """A hash of every word [W], and the number of the text that it stands in [W]."""
    folded = [text.casefold() for text in texts]
    joined = "\n".join([*folded, ""])
    if joined.isascii():
        codes = np.frombuffer(joined.encode("ascii"), np.uint8)
    else:
        codes = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), np.uint32)
    kinds = _kinds()[codes if joined.isascii() else np.minimum(codes, 2**16)]
    edges = np.diff((kinds == 1).view(np.int8), prepend=0)
    starts, stops = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    if len(alone := np.flatnonzero(kinds == 2)):
        starts, stops = np.sort(np.concatenate([starts, alone])), np.sort(np.concatenate([stops, alone + 1]))
    # A word is a number whose digits are its characters; those of all text before it are taken off.
    powers, inverses = _powers(len(codes) + 1)
    before = np.zeros(len(codes) + 1, np.uint64)
    np.cumsum((codes + np.uint64(1)) * powers[:-1], out=before[1:])
    hashes = _mixed((before[stops] - before[starts]) * inverses[starts])
    ends = np.cumsum([len(text) + 1 for text in folded])
    return hashes, np.searchsorted(ends, starts, side="right")


def _powers(count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first powers of the base, and of its inverse, modulo 2**64."""
    whole = _computed_powers(1 << (count - 1).bit_length())
    return whole[0][:count], whole[1][:count]


@functools.lru_cache(maxsize=2)  # texts come in chunks of much the same length
def _computed_powers(count: int) -> tuple[np.ndarray, np.ndarray]:
    powers = np.full((2, count), 1, np.uint64)
    powers[:, 1:] = [[_BASE], [np.uint64(pow(int(_BASE), -1, 2**64))]]
    np.cumprod(powers, axis=1, out=powers)
    return powers[0], powers[1]


def _runs(words: np.ndarray, text_of_word: np.ndarray) -> np.ndarray:
    """A key of every run of words, without repetitions and sorted: the text's number, then the hash of the run."""
    if len(words) < RUN_WORDS:
        return np.zeros(0, np.uint64)
    count = len(words) - RUN_WORDS + 1
    run = words[:count]
    for shift in range(1, RUN_WORDS):
        run = _mixed(run + words[shift : shift + count])
    inside = text_of_word[:count] == text_of_word[RUN_WORDS - 1 :]
    text = text_of_word[:count][inside].astype(np.uint64) << np.uint64(64 - _TEXT_BITS)
    keys = np.sort(text | (run[inside] >> np.uint64(_TEXT_BITS)))
    return keys[np.diff(keys, prepend=NONE) != 0] if len(keys) else keys


def _smallest(keys: np.ndarray, num_texts: int) -> tuple[np.ndarray, np.ndarray]:
    smallest = np.full((num_texts, SIZE), NONE)
    texts = (keys >> np.uint64(64 - _TEXT_BITS)).astype(np.int64)
    counts = np.bincount(texts, minlength=num_texts)
    rank = np.arange(len(keys)) - np.repeat(np.cumsum(counts) - counts, counts)
    kept = rank < SIZE
    smallest[texts[kept], rank[kept]] = keys[kept] & np.uint64(2 ** (64 - _TEXT_BITS) - 1)
    return smallest, counts <= SIZE


def _mixed(values: np.ndarray) -> np.ndarray:
    """Spread 64 bits over 64 bits (splitmix64, Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@functools.cache
def _kinds() -> np.ndarray:
    """What a character is, by code point: 0 between words, 1 part of a word, 2 a word itself, as all past the table."""
    kinds = np.array([chr(code).isalnum() for code in range(2**16)] + [True], np.uint8)
    kinds[2**16] = 2
    for start, stop in ((0x3040, 0x3100), (0x3400, 0xA000), (0xF900, 0xFB00)):
        kinds[start:stop] *= 2
    return kinds
