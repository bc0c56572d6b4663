"""From a config's data section to what the run reads: rows, tokenizer, examples, and the feed of this rank."""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from trainer import audit, cache, leaks
from trainer.config import (
    EmbeddedData,
    MixtureData,
    NewModel,
    RunConfig,
    TrainedTokenizer,
)
from trainer.corpus import Row as DataRow
from trainer.data_files import DataError
from trainer.distributed import World
from trainer.encoding import fingerprint_of, parts_of, shape_of, stored_examples
from trainer.feed import Feed
from trainer.left_out import left_out_of
from trainer.objectives import OBJECTIVES, Objective
from trainer.packing import Example, Row, pack
from trainer.reading import Reading, RowsReading
from trainer.rows import Rows, WeightedRows
from trainer.sources import read_splits
from trainer.splits import Splits, tell_left_out, tell_left_out_so_far, where
from trainer.stored_rows import StoredRows
from trainer.stream import StreamReading, StreamSource
from trainer.tokenizers import load_for, load_tokenizer, train_for

_PART_ROWS = 1000  # encoded together: tokenizers use much memory around what they return
_CHECKED_ROWS = 1000  # of a stream, where a run is checked before its base model is made


@dataclass
class Data:
    """What a run is about, before there is a model: rows, what is learned from them, how text becomes tokens."""

    splits: Splits
    objective: Objective
    tokenizer: PreTrainedTokenizerBase
    num_without_example: int = 0  # rows that gave nothing to learn, as far as they were encoded
    num_examples: int = 0  # that are trained on; of a stream they are not counted
    longest: int = 0  # of those, in tokens

    def left_out(self, config: RunConfig) -> list[str]:
        """Say which rows are not learned from, and why, a line each; of a stream as far as it was read."""
        said = [tell_left_out(self.splits)] if self.splits.left_out else []
        if self.splits.streaming and (found := left_out_of(self.splits.train)):
            said.append(tell_left_out_so_far(found))
        if self.num_without_example:
            why = self.objective.why_left_out(config.batch.max_length)
            total = "" if self.splits.streaming else f" of {sum(map(len, self.splits.parts().values())):,}"
            said.append(f"left out {self.num_without_example:,}{total} rows: {why}")
        return said

    def cut(self, config: RunConfig) -> list[str]:
        """Say in a line what is lost of examples that are too long, where it is much; of a stream it is not known."""
        length = config.batch.max_length
        if self.splits.streaming or not self.objective.loses_rest or self.longest < length:
            return []
        about = {**shape_of(config), "tokenizer": fingerprint_of(self.tokenizer)}
        return audit.tell_cut(self.objective, self.splits.train, self.tokenizer, length, about)

    def sizes(self, feed: Feed) -> str:
        """Say how much there is to learn from."""
        if self.splits.streaming:
            return f"a stream, of which {len(feed.held_out):,} rows are held out"
        counts = {name: len(rows) for name, rows in self.splits.parts().items()}
        test = f" and {counts['test']:,} test" if "test" in counts else ""
        comma = "," if test else " and"
        return (
            f"{counts['train']:,} training{comma} {counts['validation']:,} held-out{test} rows; training on "
            f"{self.num_examples:,} examples in {len(feed.train):,} rows of a batch"
        )

    def fingerprints(self, config: RunConfig) -> dict[str, str]:
        """Return hashes of what must be the same when the run goes on, by names that an error can use."""
        parts = {f"{name} data{_place(config, name)}": rows for name, rows in self.splits.parts().items()}
        found = {name: rows.fingerprint for name, rows in parts.items()}
        return found | {"data": self.splits.fingerprint, "tokenizer": fingerprint_of(self.tokenizer)}


def prepare_data(config: RunConfig) -> Data:
    """Return the rows, objective and tokenizer of a run. Raises BadInput for those that cannot be learned from."""
    splits, objective = _read_rows(config)
    tokenizer = build_tokenizer(config, objective, splits)
    objective.use(tokenizer)
    return Data(splits, objective, tokenizer)


def check_rows(config: RunConfig) -> None:
    """Raise BadInput for rows, columns and labels that a run cannot learn from; needs neither model nor tokenizer.

    Of a stream only the first rows are looked at.
    """
    splits, objective = _read_rows(config)
    for rows in splits.parts().values():
        objective.check(itertools.islice(rows, _CHECKED_ROWS) if splits.streaming else rows)


def _read_rows(config: RunConfig) -> tuple[Splits, Objective]:
    splits = read_splits(config.data, config.objective.takes, getattr(config.objective, "labels", None))
    splits = leaks.searched(config.data, splits, config.objective.takes)
    return splits, OBJECTIVES[config.objective.type](config.objective, config.data, splits.train)


def build_tokenizer(config: RunConfig, objective: Objective, splits: Splits) -> PreTrainedTokenizerBase:
    """Return the run's tokenizer: trained on its own training text (or found in the cache), or loaded."""
    tokenizer, model = config.tokenizer, config.model
    if isinstance(tokenizer, TrainedTokenizer) and isinstance(model, NewModel):
        section, made_for = tokenizer, {"length": model.context_length, "architecture": model.architecture}

        def build(folder: Path) -> dict[str, int]:
            trained = train_for(section, model, objective.texts(splits.train))
            trained.save_pretrained(folder)
            return {"vocab_size": len(trained)}

        key = cache.key_of(
            rows=splits.train.fingerprint, section=section.model_dump(mode="json"), **made_for, **shape_of(config)
        )
        return load_tokenizer(str(cache.entry("tokenizers", key, build)[0]))
    return load_for(config)


def make_feed(config: RunConfig, data: Data, world: World) -> Feed:
    """Return this rank's feed. Examples come from the cache, or are made now by one process for all of them.

    To be called once the objective has tried the model out: what it packs may depend on that. Raises DataError where
    nothing can be learned from a part.
    """
    splits = data.splits
    test: Sequence[Row] = []
    held_out: Sequence[Row]
    if splits.streaming:
        reading: Reading = _stream(config, data)
        held_out, test = (_first_rows(config, data, rows) for rows in (splits.held_out, splits.test))
    else:
        weighted = _weighted(splits)
        train = [_stored(config, data, each.rows) for each in weighted]
        data.num_examples = sum(len(rows.store) for rows in train)
        data.longest = max(int(rows.store.lengths.max()) for rows in train)
        reading = RowsReading(train, [each.weight for each in weighted], config.run.seed)
        held_out = _stored(config, data, splits.held_out)
        if splits.test is not None:
            test = _stored(config, data, splits.test)
    return Feed(
        config, data.objective, reading, held_out, test,
        pad_id=data.tokenizer.pad_token_id, rank=world.rank, world_size=world.size,
    )  # fmt: skip


def make_rows(
    objective: Objective, rows: list[DataRow], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[Row]:
    """Return the rows of batches made of a few rows of data, in memory. Raises DataError where nothing can be learned
    from."""
    examples = objective.encode(rows, tokenizer, max_length)
    if not examples:
        raise DataError(objective.nothing_left(len(rows), max_length))
    return _rows_of(objective, examples, max_length)


def _rows_of(objective: Objective, examples: list[Example], max_length: int) -> list[Row]:
    return pack(examples, max_length) if objective.packs else [[example] for example in examples]


def _weighted(splits: Splits) -> tuple[WeightedRows, ...]:
    return splits.sources or (WeightedRows(splits.train, 1.0),)


def _stored(config: RunConfig, data: Data, rows: Rows) -> StoredRows:
    store, without = stored_examples(rows, config, data.objective, data.tokenizer)
    data.num_without_example += without
    return StoredRows(store, config.batch.max_length if data.objective.packs else None)


def _stream(config: RunConfig, data: Data) -> StreamReading:
    assert not isinstance(config.data, EmbeddedData), "what is embedded is small, and never a stream"
    window_rows = config.data.window_rows
    length, weighted, objective = config.batch.max_length, _weighted(data.splits), data.objective

    counted = [0] * len(weighted)  # rows of each source, so that none counts again in a later epoch

    def make_window(number: int, rows: list[DataRow], first: int) -> list[Row]:
        parts = parts_of(rows, _PART_ROWS)
        encoded = [objective.encode(part, data.tokenizer, length, first + before) for before, part in parts]
        if first >= counted[number]:
            data.num_without_example += sum(part.left_out for part in encoded)
            counted[number] = first + len(rows)
        return _rows_of(objective, list(itertools.chain(*encoded)), length)

    sources = [
        StreamSource(
            each.rows, functools.partial(make_window, number), window_rows=window_rows, seed=config.run.seed,
            number=number, nothing_left=lambda num_rows: objective.nothing_left(num_rows, length),
        )
        for number, each in enumerate(weighted)
    ]  # fmt: skip
    return StreamReading(sources, [each.weight for each in weighted], config.run.seed)


def _first_rows(config: RunConfig, data: Data, rows: Rows | None) -> list[Row]:
    """The rows of batches made of the first rows of a stream: as many as are evaluated on, and no more are read."""
    if rows is None:
        return []
    examples: list[Example] = []
    made: list[Row] = []
    num_rows, length = 0, config.batch.max_length
    for first, part in parts_of(rows, _PART_ROWS):
        found = data.objective.encode(part, data.tokenizer, length, first)
        examples += found
        data.num_without_example += found.left_out
        made, num_rows = _rows_of(data.objective, examples, length), first + len(part)
        if len(made) > config.evaluation.max_rows:
            break
    if not made:
        raise DataError(data.objective.nothing_left(num_rows, length))
    return made


def _place(config: RunConfig, part: str) -> str:
    """Where the rows of a part come from, for a message; nothing where it is not one place."""
    if isinstance(config.data, EmbeddedData | MixtureData):
        return ""
    return f" ({where(config.data, part)})"
