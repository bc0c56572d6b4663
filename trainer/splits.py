"""The rows of a run: those to train on, those held out, and what was left out, each counted and hashed in one pass."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trainer import cache
from trainer.config import FileSource
from trainer.corpus import Row
from trainer.data_files import DataError
from trainer.left_out import LeftOut, UsableRows, together
from trainer.rows import Facts, KeptRows, Rows, Tally, WeightedRows, digest, encoded, hash_of
from trainer.sides import (
    SIDES,
    Given,
    Labels,
    Shared,
    Source,
    checks_labels,
    labels_in,
    setting_of,
    shared,
    where,
    with_known_labels,
)

__all__ = ["LeftOut", "NothingHeldOut", "Splits", "divide", "of_lists", "stream", "tell_left_out", "where"]

_KEPT_CHARS = 64 * 2**20  # rows with no more text than this stay in memory after the pass that counts them


class NothingHeldOut(DataError):
    """Rows that are so few, or so alike, that their content holds out none or all of them."""


@dataclass(frozen=True)
class Splits:
    """Training and held-out rows, a hash of all of them in order, and what was left out of them.

    `test` is kept for the end of the run. A mixture's `train` is its sources one after the other, and `sources` holds
    each with its weight. A stream's rows are not counted, and what is left out of them is not known.
    """

    train: Rows
    held_out: Rows
    fingerprint: str
    left_out: tuple[LeftOut, ...] = ()
    test: Rows | None = None
    sources: tuple[WeightedRows, ...] = ()
    streaming: bool = False
    leaks: dict[str, Any] | None = None  # what of the held-out rows is trained on too, where somebody has looked

    def parts(self) -> dict[str, Rows]:
        """Return the rows by the name of their part, as a config calls it."""
        parts = {"train": self.train, "validation": self.held_out}
        return parts if self.test is None else parts | {"test": self.test}


def tell_left_out(splits: Splits) -> str:
    """Say in one line what was left out, and why."""
    total = sum(each.count for each in splits.left_out)
    whole = total + sum(map(len, splits.parts().values()))
    return f"left out {total:,} of {whole:,} rows: {_reasons(splits.left_out)}"


def tell_left_out_so_far(found: Sequence[LeftOut]) -> str:
    """Say in one line what was left out of the training rows of a stream, as far as they were read, and why."""
    return f"left out {sum(each.count for each in found):,} rows of the stream: {_reasons(found)}"


def _reasons(found: Sequence[LeftOut]) -> str:
    return ", ".join(f"{each.count:,} {each.reason} (first: {each.places[0]})" for each in found)


def of_lists(train: list[Row], held_out: list[Row]) -> Splits:
    """Return the splits of rows that are in memory and already divided."""
    tallies = {"train": Tally(), "validation": Tally(one_by_one=True)}
    for side, rows in (("train", train), ("validation", held_out)):
        for row in rows:
            tallies[side].add(digest(encoded(row)))
    facts = {side: tally.facts() for side, tally in tallies.items()}
    return Splits(KeptRows(train, facts["train"]), KeptRows(held_out, facts["validation"]), _fingerprint(tallies, None))


def divide(
    data: Source,
    takes: str,
    train: Given,
    validation: Given | None,
    test: Given | None = None,
    *,
    labels: Labels = None,
    key: str | None = None,
) -> Splits:
    """Return the splits of rows: bad ones left out where `data` allows it, parts of the training rows held out where
    there are no others. `labels` are those that the objective lists, if it does.

    What the pass over them finds out is kept in the cache under a `key`, if one is given. Raises DataError if a part
    is empty, or a column that rows may lack is in none of them.
    """
    sources = shared(data, takes, train, validation, test, labels)
    checked = checks_labels(data, takes, labels)
    parts = _read_later(data, takes, sources, checked=checked)
    kept: dict[str, list[Row]] = {}

    def survey() -> dict[str, Any]:
        return _survey(data, takes, sources, kept, checked=checked)

    found = cache.fact(key, survey) if key else survey()
    for side, facts in found["facts"].items():
        parts[side] = KeptRows(kept[side]) if side in kept else parts[side]
        parts[side].facts = Facts(*facts)
    splits = Splits(
        parts["train"],
        parts["validation"],
        found["fingerprint"],
        tuple(LeftOut(*each) for each in found["left_out"]),
        parts.get("test"),
    )
    _check_parts(data, splits, sources[0].sides)
    return splits


def stream(
    data: Source, takes: str, train: Rows, validation: Rows | None, test: Rows | None, *, labels: Labels = None
) -> Splits:
    """Return the splits of rows that are read only when they are asked for. Raises DataError if a part is empty."""
    sources = shared(data, takes, train, validation, test, labels)
    parts = _read_later(data, takes, sources, checked=checks_labels(data, takes, labels))
    for source in sources:
        seen = [source.rows.glance().fingerprint, str(data.validation_fraction), str(data.test_fraction)]
        for side in source.sides:
            parts[side].facts = Facts(None, hash_of([*seen, *source.sides, side]))
    for side, rows in parts.items():
        if not rows:
            if side != "train" and side in sources[0].sides and sources[0].rows:
                raise NothingHeldOut(
                    f"data.{side}_fraction: {getattr(data, f'{side}_fraction')} holds out none of the rows of "
                    f"{where(data, 'train')}; raise it, or name other rows as data.{setting_of(data, side)}"
                )
            raise DataError(f"data.{setting_of(data, side)}: no rows in {where(data, side)}; at least one is needed")
    fingerprint = hash_of([*(parts[side].fingerprint for side in SIDES if side in parts), str(data.system)])
    return Splits(parts["train"], parts["validation"], fingerprint, test=parts.get("test"), streaming=True)


def _read_later(data: Source, takes: str, sources: list[Shared], *, checked: bool) -> dict[str, Rows]:
    """The rows of each side, which nothing has read yet."""
    parts = {side: source.of(side) for source in sources for side in source.sides}
    if checked:
        known = labels_in(data, takes, parts["train"])
        for side in [side for side in parts if side != "train"]:
            parts[side] = with_known_labels(data, takes, parts[side], known)
    return parts


# --- the pass that counts --------------------------------------------------------------------------------------------


def _survey(
    data: Source, takes: str, sources: list[Shared], kept: dict[str, list[Row]], *, checked: bool
) -> dict[str, Any]:
    """What reading all rows finds out, as JSON. The sides of sources with little text are put into `kept`."""
    tallies: dict[str, Tally] = {}
    left_out: list[LeftOut] = []
    for source in sources:
        tallies |= _read(source, kept)
        left_out += source.rows.left_out if isinstance(source.rows, UsableRows) else ()
    if checked:
        parts = {side: source.of(side) for source in sources for side in source.sides}
        parts |= {side: KeptRows(rows) for side, rows in kept.items()}
        known = labels_in(data, takes, parts["train"])
        for side in [side for side in tallies if side != "train"]:
            rows = with_known_labels(data, takes, parts[side], known)
            tallies |= _read(Shared(rows, (side,), data), kept)
            left_out += rows.left_out
    return {
        "facts": {side: dataclasses.astuple(tally.facts()) for side, tally in tallies.items()},
        "fingerprint": _fingerprint(tallies, data.system),
        "left_out": [dataclasses.astuple(each) for each in together(left_out)],
    }


def _read(source: Shared, kept: dict[str, list[Row]]) -> dict[str, Tally]:
    """Read a source once; return what was counted of its sides. The rows of those with little text are kept."""
    tallies = {side: Tally(one_by_one=side != "train") for side in source.sides}
    kept |= {side: [] for side in source.sides}
    chars = dict.fromkeys(source.sides, 0)
    for row in source.rows:
        text = encoded(row)
        side = source.side_of(hashed := digest(text))
        tallies[side].add(hashed)
        chars[side] += len(text)
        if chars[side] <= _KEPT_CHARS:
            kept[side].append(row)
        else:
            kept.pop(side, None)
    return tallies


def _check_parts(data: Source, splits: Splits, shared_by: tuple[str, ...]) -> None:
    """Raise DataError where a part is empty. `shared_by` are the sides that the training rows were divided into."""
    sizes = {side: len(rows) for side, rows in splits.parts().items()}
    empty = next((side for side, size in sizes.items() if not size), None)
    if empty is None:
        return
    if len(shared_by) > 1 and empty in shared_by and (total := sum(sizes[side] for side in shared_by)):
        side = "test" if empty == "test" else "validation"
        setting, what = f"{side}_fraction", "file" if isinstance(data, FileSource) else "split"
        counts = f"{sizes['train']} of the {total} rows of {where(data, 'train')} for training"
        raise NothingHeldOut(
            f"data.{setting}: {getattr(data, setting)} leaves {counts}{' and none to test' if empty == 'test' else ''};"
            f" change it, or name a {what} as data.{setting_of(data, side)}"
        )
    why = f" ({tell_left_out(splits)})" if splits.left_out else ""
    raise DataError(f"data.{setting_of(data, empty)}: no rows in {where(data, empty)}{why}; at least one is needed")


def _fingerprint(tallies: dict[str, Tally], system: str | None) -> str:
    """A hash of the training rows and then the others, in order, with a mark between."""
    total = tallies["train"].hasher()
    for side in SIDES[1:]:
        if side in tallies:
            total.update(digest(encoded({})))
            total.update(tallies[side].digests)
    if system is not None:
        total.update(system.encode())
    return total.hexdigest()
