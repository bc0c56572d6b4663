"""A document longer than a row, cut into chunks: at sentence ends where one is near, with tokens of before as context.

Positions are those of a sequence that is learned from, each exactly once: what a chunk repeats of the one before it
only helps to predict the rest.
"""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

_NEAR = 0.25  # a sentence end in this last part of a full chunk is taken
# After . ! ? and quotes before a space, after their full-width forms, and at line ends.
_SENTENCE_END = re.compile(r"[.!?…]+[\"'”’»)\]]*(?=\s)|[。！？]+[”’」』）]*|\n+")


@dataclass(frozen=True)
class Chunk:
    """Positions start..stop, of which those from `learned_from` on are learned and those before are context."""

    start: int
    stop: int
    learned_from: int


@dataclass(frozen=True)
class Sentences:
    """Where a chunk may well stop (before that position) and its context begin, both ascending."""

    stops: np.ndarray
    starts: np.ndarray

    def start_between(self, first: int, last: int) -> int:
        """Return the first start from `first` to `last`, `first` where there is none."""
        at = np.searchsorted(self.starts, first)
        return int(self.starts[at]) if at < len(self.starts) and self.starts[at] <= last else first

    def stop_between(self, first: int, last: int) -> int:
        """Return the last stop after `first` and up to `last`, `last` where there is none."""
        at = np.searchsorted(self.stops, last, side="right") - 1
        return int(self.stops[at]) if at >= 0 and self.stops[at] > first else last


def cut(length: int, max_length: int, *, overlap: int = 0, sentences: Sentences | None = None) -> list[Chunk]:
    """Return chunks of at most `max_length` positions whose learned parts are 0..length, each position once.

    A chunk begins with up to `overlap` positions of before, and less where a sentence begins among them. Raises
    ValueError where the overlap leaves nothing to learn.
    """
    if not 0 <= overlap < max_length:
        raise ValueError(f"chunks of {max_length} positions cannot begin with {overlap} of before")
    chunks: list[Chunk] = []
    learned = 0
    while learned < length:
        start = max(0, learned - overlap)
        if sentences is not None and start:
            start = sentences.start_between(start, learned)
        stop = min(length, start + max_length)
        if sentences is not None and stop < length:
            stop = sentences.stop_between(stop - int(_NEAR * (stop - learned)), stop)
        chunks.append(Chunk(start, stop, learned))
        learned = stop
    return chunks


def last_tokens(text: str, offsets: Any) -> np.ndarray:
    """Return the numbers of the tokens that end a sentence of `text`, ascending.

    `offsets` holds the (start, end) characters of each token; a token without any (of a special kind) ends none.
    """
    spans = np.asarray(offsets, np.int64).reshape(-1, 2)
    real = np.flatnonzero(spans[:, 1] > spans[:, 0])
    ends = np.array([match.end() for match in _SENTENCE_END.finditer(text)], np.int64)
    before = np.searchsorted(spans[real, 0], ends) - 1
    return np.unique(real[before[before >= 0]])


def predicted_at_ends(last: np.ndarray) -> Sentences:
    """Return the sentences where position p predicts token p + 1: a chunk stops once the last token is predicted."""
    return Sentences(stops=last, starts=last + 1)


def standing_at_ends(last: np.ndarray) -> Sentences:
    """Return the sentences where position p is token p."""
    return Sentences(stops=last + 1, starts=last + 1)
