"""Rows -> examples on disk, once: later runs on the same content, settings and tokenizer find them in the cache."""

import functools
import hashlib
import importlib.metadata
import itertools
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from trainer import cache
from trainer.config import RunConfig
from trainer.corpus import Row
from trainer.data_files import DataError
from trainer.example_store import ExampleStore, write_examples
from trainer.metrics import Terminal
from trainer.objectives import Objective
from trainer.packing import Encoded, Example
from trainer.rows import Rows

_PART_ROWS = 1000  # encoded together
_FIRST_WORD_S, _EVERY_S = 5, 30  # of progress
_WORTH_SAYING_BYTES = 10**8

# Where rows come from and how they are drawn; what they hold is in their own hash.
_NO_SHAPE = {"train", "validation", "test", "path", "revision", "weight", "streaming", "window_rows", "leaks"}

# The code that says what an example is, and how it lies on disk.
_CODE = (
    "objectives/*.py",
    "chunks.py",
    "columns.py",
    "packing.py",
    "example_store.py",
    "tokenizers.py",
    "vocabularies.py",
    "rows.py",
    "mixture.py",
)


def stored_examples(
    rows: Rows, config: RunConfig, objective: Objective, tokenizer: PreTrainedTokenizerBase
) -> tuple[ExampleStore, int]:
    """Return the examples of all rows, from the cache or encoded into it now, and how many rows gave none.

    Raises DataError where none gave any.
    """
    key = cache.key_of(
        **shape_of(config), rows=rows.fingerprint, labels=objective.labels, tokenizer=fingerprint_of(tokenizer),
        max_length=config.batch.max_length,
    )  # fmt: skip

    def build(folder: Path) -> dict[str, Any]:
        counts = Counts()
        counts.examples = write_examples(folder, encoded(rows, objective, tokenizer, config.batch.max_length, counts))
        counts.say_end(folder)
        return {"rows": counts.rows, "examples": counts.examples, "left_out": counts.left_out}

    folder, about = cache.entry("examples", key, build)
    if not about["examples"]:
        raise DataError(objective.nothing_left(about["rows"], config.batch.max_length))
    return ExampleStore(folder), about["left_out"]


class Counts:
    """What became of the rows so far; said now and then where it takes long."""

    def __init__(self) -> None:
        self.rows = self.examples = self.left_out = 0
        self._started = time.monotonic()
        self._next_word = self._started + _FIRST_WORD_S

    def add(self, num_rows: int, examples: list[Example]) -> None:
        self.rows += num_rows
        self.examples += len(examples)
        self.left_out += examples.left_out if isinstance(examples, Encoded) else 0
        if (now := time.monotonic()) > self._next_word:
            Terminal.say_once(f"data: {self.rows:,} rows are {self.examples:,} examples ({now - self._started:.0f} s)")
            self._next_word = now + _EVERY_S

    def say_end(self, folder: Path) -> None:
        size = sum(path.stat().st_size for path in folder.iterdir())
        if size > _WORTH_SAYING_BYTES:
            Terminal.say_once(
                f"data: {size / 1e9:.1f} GB of examples are kept for later runs; {cache.root()} now holds "
                f"{cache.size_bytes() / 1e9:.1f} GB, and may be removed"
            )


def encoded(
    rows: Rows, objective: Objective, tokenizer: PreTrainedTokenizerBase, max_length: int, counts: Counts
) -> Iterator[list[Example]]:
    """Yield the examples of the rows, a part at a time."""
    for first, part in parts_of(rows, _PART_ROWS):
        examples = objective.encode(part, tokenizer, max_length, first)
        counts.add(len(part), examples)
        yield examples


def parts_of(rows: Iterable[Row], size: int) -> Iterator[tuple[int, list[Row]]]:
    """Yield the rows in parts of `size`, each with the number of its first row."""
    left, first = iter(rows), 0
    while part := list(itertools.islice(left, size)):
        yield first, part
        first += len(part)


def shape_of(config: RunConfig) -> dict[str, Any]:
    """Return what shapes the examples of any rows, besides the tokenizer and their longest length."""
    return {
        "objective": config.objective.model_dump(mode="json"),
        "data": _without_places(config.data.model_dump(mode="json")),
        "code": _code_version(),
    }


def fingerprint_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of what the tokenizer does."""
    backend = tokenizer.backend_tokenizer
    # What its last call asked for stays in it: that is no part of what it is, and differs where the cache answered.
    backend.no_truncation()
    backend.no_padding()
    described = backend.to_str() + str(tokenizer.chat_template)
    return hashlib.sha256(described.encode()).hexdigest()


def _without_places(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_places(each) for name, each in value.items() if name not in _NO_SHAPE}
    return [_without_places(each) for each in value] if isinstance(value, list) else value


@functools.cache
def _code_version() -> str:
    """A hash of the code that makes examples, and the versions of the libraries below it."""
    here, total = Path(__file__).parent, hashlib.sha256()
    for pattern in _CODE:
        for path in sorted(here.glob(pattern)):
            total.update(path.read_bytes())
    versions = [importlib.metadata.version(name) for name in ("transformers", "tokenizers")]
    return f"{total.hexdigest()} {' '.join(versions)}"
