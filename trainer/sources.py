"""Where a run's rows come from, the embedded corpus or the user's files, and which of them train or are held out."""

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from trainer import corpus
from trainer.columns import TAKES, BadRow, label_of
from trainer.config import EmbeddedData, FileData
from trainer.corpus import Row
from trainer.data_files import DataError, read_rows

__all__ = ["DataError", "LeftOut", "NothingHeldOut", "Splits", "divide", "read_rows", "read_splits", "tell_left_out"]

_PLACES_KEPT = 3


class NothingHeldOut(DataError):
    """Rows that are so few, or so alike, that their content holds out none or all of them."""


@dataclass(frozen=True)
class LeftOut:
    """Rows that are not trained or evaluated on: how many, why ("without 'label'"), and where the first ones stand."""

    reason: str
    count: int
    places: list[str]


@dataclass(frozen=True)
class Splits:
    """Training and held-out rows, a hash of both in order, and what was left out of them."""

    train: list[Row]
    held_out: list[Row]
    fingerprint: str
    left_out: tuple[LeftOut, ...] = ()


def read_splits(data: EmbeddedData | FileData, objective: str) -> Splits:
    """Return the rows of a run. Raises DataError for missing or empty files and rows that cannot be read."""
    if isinstance(data, EmbeddedData):
        train, held_out = corpus.split(corpus.VIEWS[objective](corpus.read_items()))
        return Splits(train[: data.max_rows], held_out, _fingerprint(train[: data.max_rows], held_out))
    train = list(read_rows(data.train, data.split_txt))
    validation = list(read_rows(data.validation, data.split_txt)) if data.validation is not None else None
    return divide(data, objective, train, validation)


def divide(data: FileData, objective: str, train: list[Row], validation: list[Row] | None) -> Splits:
    """Return the splits of rows that were read: bad ones left out where `data` allows it, a part held out where there
    is no validation file. Raises DataError if either side is empty, or a column that rows may lack is in none."""
    if data.context is not None and train and not any(data.context in row for row in train):
        raise DataError(f"data.context: no row has {data.context!r}; the first has: {', '.join(train[0])}; name one")
    dropped: list[BadRow] = []
    if data.skip_bad_rows:
        check = functools.partial(TAKES[objective], data=data)
        train = _usable(train, check, dropped)
        validation = _usable(validation, check, dropped) if validation is not None else None
    if validation is None:
        train, validation = _hold_out(data, train)
    if data.skip_bad_rows and objective == "classification":
        known = {label_of(row, index, data) for index, row in enumerate(train)}
        validation = _usable(validation, functools.partial(_check_label, known=known, data=data), dropped)
    splits = Splits(train, validation, _fingerprint(train, validation, data.system), _count(dropped))
    for name, rows in (("train", train), ("validation", validation)):
        if not rows:
            file = data.validation if name == "validation" and data.validation else data.train
            why = f" ({tell_left_out(splits)})" if dropped else ""
            raise DataError(f"data.{name}: no rows in {file}{why}; at least one is needed")
    return splits


def tell_left_out(splits: Splits) -> str:
    """Say in one line what was left out, and why."""
    total = sum(each.count for each in splits.left_out)
    reasons = ", ".join(f"{each.count:,} {each.reason} (first: {each.places[0]})" for each in splits.left_out)
    return f"left out {total:,} of {total + len(splits.train) + len(splits.held_out):,} rows: {reasons}"


def _usable(rows: list[Row], check: Callable[[Row, int], object], dropped: list[BadRow]) -> list[Row]:
    """The rows that pass the check; what was wrong with the others goes into `dropped`."""
    kept = []
    for index, row in enumerate(rows):
        try:
            check(row, index)
        except BadRow as error:
            dropped.append(error)
        else:
            kept.append(row)
    return kept


def _check_label(row: Row, index: int, *, known: set[str], data: FileData) -> None:
    if (label := label_of(row, index, data)) not in known:
        raise BadRow(row, index, "label", f": {label!r} is in no training row", "whose label is in no training row")


def _count(dropped: list[BadRow]) -> tuple[LeftOut, ...]:
    """What was dropped, by reason, the commonest first."""
    return tuple(
        LeftOut(reason, count, [error.place for error in dropped if error.reason == reason][:_PLACES_KEPT])
        for reason, count in Counter(error.reason for error in dropped).most_common()
    )


def _hold_out(data: FileData, rows: list[Row]) -> tuple[list[Row], list[Row]]:
    train, held_out = _split_by_content(rows, data.validation_fraction)
    if rows and not (train and held_out):
        raise NothingHeldOut(
            f"data.validation_fraction: {data.validation_fraction} leaves {len(train)} of the {len(rows)} rows of "
            f"{data.train} for training; change it, or name a file as data.validation"
        )
    return train, held_out


def _split_by_content(rows: list[Row], fraction: float) -> tuple[list[Row], list[Row]]:
    """Hold out rows by the hash of their content, so that equal rows never stand on both sides."""
    held = [int.from_bytes(_digest(row)[:8]) < fraction * 2**64 for row in rows]
    return (
        [row for row, out in zip(rows, held, strict=True) if not out],
        [row for row, out in zip(rows, held, strict=True) if out],
    )


def _digest(row: Row) -> bytes:
    return hashlib.sha256(json.dumps(row, sort_keys=True, ensure_ascii=False).encode()).digest()


def _fingerprint(train: list[Row], held_out: list[Row], system: str | None = None) -> str:
    total = hashlib.sha256()
    for row in (*train, {}, *held_out):
        total.update(_digest(row))
    if system is not None:
        total.update(system.encode())
    return total.hexdigest()
