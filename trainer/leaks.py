"""Whether rows that a model is judged by are also trained on, word for word or nearly: counts, and where some stand."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from serving import directory
from serving.directory import BadInput
from trainer import cache
from trainer.columns import chat_of, pair_of, place, tagged_words_of
from trainer.config import Columns, Whole
from trainer.corpus import Row
from trainer.sketches import FEWEST_RUNS, NONE, RUN_WORDS, Sketches, joined, shares, sketch
from trainer.splits import Splits

NEARLY = 0.7  # share of the runs of words from which on two texts are nearly equal
MOST_ROWS = 100_000  # of each held-out part: their sketches are in memory, 0.6 KB each
_STREAMED_ROWS = 1_000  # of each held-out part of a stream, which is read for them
_VERSION = 1  # of what is found; kept results of another are not used

_EXAMPLES = 10  # of each pair of parts
_CHUNK_ROWS, _CHUNK_CHARS = 4096, 2**19
_LOOKED_UP = 16  # of a text's hashes: two that are nearly equal share about eleven of so many
_FEWEST_SHARED = 4
_MOST_FOUND = 64  # held-out texts that one hash leads to

Report = dict[str, Any]


def searched(data: Any, splits: Splits, takes: str) -> Splits:
    """Return the splits with what stands in two parts of them as `leaks`; as they are where nobody is to look.

    Kept in the cache, so that every process and later run of the same data has it at once. Raises BadInput where
    `data.leaks` is `refuse` and there are any.
    """
    if not isinstance(data, Whole) or data.leaks == "off":
        return splits
    if splits.streaming:
        report = _look(data, splits, takes)
    else:
        about = data.model_dump(mode="json", exclude={"leaks"})
        key = cache.key_of(leaks=_VERSION, data=about, takes=takes, fingerprint=splits.fingerprint)
        report = cache.fact(key, lambda: _look(data, splits, takes))
    if data.leaks == "refuse" and any(pair["exact"] + pair["near"] for pair in report["pairs"]):
        raise BadInput(f"data.leaks: refuse, and {tell(report)}; remove those rows, or set data.leaks: report")
    return dataclasses.replace(splits, leaks=report)


def tell(report: Report) -> str:
    """Say in one line what was found."""
    looked = "; ".join(_tell_pair(pair) for pair in report["pairs"])
    return f"{looked} (looked at {report['looked_at']})" if report["looked_at"] else looked


def write(folder: Path, report: Report) -> None:
    """Write leaks.json into a run folder."""
    directory.write_json(folder / "leaks.json", {**directory.stamp(), **report})


def _tell_pair(pair: Report) -> str:
    rows, of = f"{pair['rows']:,} {pair['of']} rows", "trained on" if pair["in"] == "train" else f"{pair['in']} rows"
    found = pair["exact"] + pair["near"]
    if not found:
        return f"none of {rows} are {of} too"
    first = pair["examples"][0]
    return (
        f"{found:,} of {rows} are {of} too, {pair['exact']:,} word for word, {pair['near']:,} nearly "
        f"(first: {first['row']} and {first['like']})"
    )


# --- looking ---------------------------------------------------------------------------------------------------------


class _HeldOut:
    """The sketches of one part, by which rows of others are found in it, and what was found so far."""

    def __init__(self, part: str, chunks: Iterable[tuple[Sketches, list[str]]]) -> None:
        self.part, self.places = part, list[str]()
        parts = [sketch([])]
        for found, places in chunks:
            parts.append(found)
            self.places += places
        self.sketches = joined(parts)
        self._by_whole = np.argsort(self.sketches.whole, kind="stable")
        self._whole = self.sketches.whole[self._by_whole]
        rows, columns = np.nonzero(_looked_up(self.sketches) != NONE)
        hashes = self.sketches.smallest[rows, columns]
        order = np.argsort(hashes, kind="stable")
        self._hashes, self._rows = hashes[order], rows[order]

    def same(self, others: Sketches) -> tuple[np.ndarray, np.ndarray]:
        """Return the pairs (row of others, row here) with the same words; of a row of others all, up to a number."""
        return _pairs(self._whole, self._by_whole, others.whole, np.flatnonzero(others.whole))

    def alike(self, others: Sketches) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the pairs that are nearly equal, and about how much they share."""
        rows, columns = np.nonzero(_looked_up(others) != NONE)
        at, here = _pairs(self._hashes, self._rows, others.smallest[rows, columns], np.arange(len(rows)))
        keys, counts = np.unique(rows[at] * len(self.places) + here, return_counts=True)
        keys = keys[counts >= _FEWEST_SHARED]
        pairs = (keys // max(len(self.places), 1), keys % max(len(self.places), 1))
        share = np.concatenate([shares(others, self.sketches, (a, b)) for a, b in _pieces(pairs)] or [np.zeros(0)])
        near = share >= NEARLY
        return pairs[0][near], pairs[1][near], share[near]


class _Found:
    """What of one held-out part stands in another part."""

    def __init__(self, held_out: _HeldOut, other: str) -> None:
        self.held_out, self.other = held_out, other
        self.best = np.zeros(len(held_out.places))  # 2 where word for word, else the largest share
        self.like: dict[int, str] = {}

    def add(self, sketches: Sketches, places: list[str]) -> None:
        at, here = self.held_out.same(sketches)
        near = self.held_out.alike(sketches)
        for others, rows, values in ((at, here, np.full(len(at), 2.0)), near):
            for other, row, value in zip(others.tolist(), rows.tolist(), values.tolist(), strict=True):
                if value > self.best[row]:
                    self.best[row] = value
                    if row in self.like or len(self.like) < _EXAMPLES:
                        self.like[row] = places[other]

    def report(self) -> Report:
        rows = sorted(self.like, key=lambda row: (-self.best[row], row))
        return {
            "of": self.held_out.part,
            "in": self.other,
            "rows": len(self.best),
            "exact": int((self.best == 2).sum()),
            "near": int(((self.best > 0) & (self.best < 2)).sum()),
            "examples": [
                {
                    "row": self.held_out.places[row],
                    "like": self.like[row],
                    "share": round(min(float(self.best[row]), 1.0), 2),
                }
                for row in rows
            ],
        }


def _look(data: Any, splits: Splits, takes: str) -> Report:
    most = _STREAMED_ROWS if splits.streaming else MOST_ROWS
    parts = splits.parts()
    train = parts.pop("train")
    held_out = [
        _HeldOut(name, _chunks(itertools.islice(rows, most), data.columns, takes)) for name, rows in parts.items()
    ]
    found = [_Found(each, "train") for each in held_out]
    for sketches, places in _chunks(
        itertools.islice(train, data.window_rows if splits.streaming else None), data.columns, takes
    ):
        for each in found:
            each.add(sketches, places)
    if len(held_out) == 2:
        between = _Found(held_out[1], held_out[0].part)
        between.add(held_out[0].sketches, held_out[0].places)
        found.append(between)
    limits = {
        "the first window of the stream": splits.streaming,
        f"the first {most:,} of each": any(len(each.places) == most for each in held_out),
    }
    return {
        "nearly": f"{NEARLY} of the runs of {RUN_WORDS} words; texts of at least {FEWEST_RUNS + RUN_WORDS - 1} words",
        "looked_at": ", ".join(limit for limit, holds in limits.items() if holds),
        "pairs": [each.report() for each in found],
    }


def _chunks(rows: Iterable[Row], columns: Columns, takes: str) -> Iterator[tuple[Sketches, list[str]]]:
    """The sketches of rows, some thousands at a time, and where the rows stand."""
    texts: list[str] = []
    places: list[str] = []
    chars = 0
    for index, row in enumerate(rows):
        texts.append(_text(row, index, columns, takes))
        places.append(place(row, index))
        chars += len(texts[-1])
        if len(texts) == _CHUNK_ROWS or chars > _CHUNK_CHARS:
            yield sketch(texts), places
            texts, places, chars = [], [], 0
    if texts:
        yield sketch(texts), places


def _text(row: Row, index: int, columns: Columns, takes: str) -> str:
    """What a model would be given of a row and, of a chat, learn to say: all but labels and system turns."""
    if takes == "sft":
        return "\n".join(turn["content"] for turn in chat_of(row, index, columns) if turn["role"] != "system")
    if takes == "token_classification":
        return "\n".join(tagged_words_of(row, index, columns)[0])
    return "\n".join(part for part in pair_of(row, index, columns) if part is not None)


def _looked_up(sketches: Sketches) -> np.ndarray:
    """The first hashes of each text, none where it has too few to be nearly equal to anything."""
    enough = sketches.smallest[:, FEWEST_RUNS - 1] != NONE
    return np.where(enough[:, None], sketches.smallest[:, :_LOOKED_UP], NONE)


def _pairs(keys: np.ndarray, rows: np.ndarray, wanted: np.ndarray, which: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The pairs (each of `which`, a row) whose keys are equal. `keys` are sorted, and `rows` are theirs."""
    first = np.searchsorted(keys, wanted[which], side="left")
    counts = np.minimum(np.searchsorted(keys, wanted[which], side="right") - first, _MOST_FOUND)
    offset = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.repeat(which, counts), rows[np.repeat(first, counts) + offset]


def _pieces(pairs: tuple[np.ndarray, np.ndarray], size: int = 2**14) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for start in range(0, len(pairs[0]), size):
        yield pairs[0][start : start + size], pairs[1][start : start + size]
