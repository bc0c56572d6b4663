"""The sides of a run's data (train, validation, test): which rows stand on which, by file or by their content."""

import functools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from trainer.columns import TAKES, BadRow, label_of, labels_of, tagged_words_of
from trainer.config import FileSource, HubSource
from trainer.corpus import Row
from trainer.data_files import DataError, shown
from trainer.left_out import UsableRows
from trainer.rows import ChosenRows, KeptRows, Rows, digest, encoded

Source = FileSource | HubSource
Given = Rows | list[Row]
Labels = Sequence[str] | None  # those that the objective lists, if it does

SIDES = ("train", "validation", "test")
_HUB_SPLITS = ("train_split", "validation_split", "test_split")

# The labels of a row, by what is taken from it, where held-out rows may have none that is new.
_LABELS: dict[str, Callable[..., list[str]]] = {
    "classification": lambda row, index, data: [label_of(row, index, data)],
    "multi_label": labels_of,
    "token_classification": lambda row, index, data: tagged_words_of(row, index, data)[1],
}


@dataclass(frozen=True)
class Shared:
    """The usable rows of one file or split, and the sides that they are shared by."""

    rows: Rows
    sides: tuple[str, ...]
    data: Source

    def side_of(self, hashed: bytes) -> str:
        """Return the side of a row by the hash of its content, so that equal rows never stand on two.

        Validation rows come from one end and test rows from the other: neither changes where the other does.
        """
        at = int.from_bytes(hashed[:8])
        if "validation" in self.sides and at < self.data.validation_fraction * 2**64:
            return "validation"
        if "test" in self.sides and self.data.test_fraction and at >= (1 - self.data.test_fraction) * 2**64:
            return "test"
        return self.sides[0]

    def of(self, side: str) -> Rows:
        """Return the rows of a side, chosen while they are read."""

        def change(row: Row) -> Row | None:
            return row if self.side_of(digest(encoded(row))) == side else None

        rows = self.rows.again() if isinstance(self.rows, UsableRows) else self.rows
        return rows if len(self.sides) == 1 else ChosenRows(rows, change)


def shared(
    data: Source, takes: str, train: Given, validation: Given | None, test: Given | None, labels: Labels
) -> list[Shared]:
    """Return the sources of a run's rows, the training rows first, without rows that are left out.

    Those with other than the listed `labels` are, where there is such a list. Raises DataError if a column that rows
    may lack is in none of them.
    """
    _check_context(data, train)
    own = ("train", *(("validation",) * (validation is None)), *(("test",) * (data.test_fraction is not None)))
    given = {own: train, ("validation",): validation, ("test",): test}
    return [
        Shared(_usable(data, takes, rows, labels), sides, data) for sides, rows in given.items() if rows is not None
    ]


def checks_labels(data: Source, takes: str, labels: Labels) -> bool:
    """Whether held-out rows with a label that no training row has are left out: where nobody has listed the labels.

    A listed one is an output of the model. It is right to be judged by it, and to see that it was never learned.
    """
    return data.skip_bad_rows and takes in _LABELS and labels is None


def labels_in(data: Source, takes: str, train: Rows) -> Callable[[], set[str]]:
    """Return what gives the labels of the training rows; it reads them when it is first asked."""
    return functools.cache(
        lambda: {label for index, row in enumerate(train) for label in _LABELS[takes](row, index, data)}
    )


def with_known_labels(data: Source, takes: str, rows: Rows, known: Callable[[], set[str]]) -> UsableRows:
    """Return the rows that have no label but known ones."""

    def check(row: Row, index: int) -> None:
        _check_known(data, takes, row, index, known(), "is in no training row")

    return UsableRows(rows, check)


def _check_known(data: Source, takes: str, row: Row, index: int, known: Collection[str], verdict: str) -> None:
    """Raise BadRow for a label that is none of the known ones."""
    if new := [label for label in _LABELS[takes](row, index, data) if label not in known]:
        raise BadRow(row, index, "label", f": {new[0]!r} {verdict}", f"whose label {verdict}")


def where(data: Source, side: str) -> str:
    """Return what holds the rows of a side, for a message: files, or a split."""
    names = dict(zip(SIDES, SIDES if isinstance(data, FileSource) else _HUB_SPLITS, strict=True))
    source = getattr(data, names[side]) or getattr(data, names["train"])
    return shown(source) if isinstance(data, FileSource) else f"{data.path}, split {source}"


def setting_of(data: Source, side: str) -> str:
    """Return the setting that names the rows of a side."""
    return side if isinstance(data, FileSource) else f"{side}_split"


def _usable(data: Source, takes: str, given: Given, labels: Labels) -> Rows:
    rows = given if isinstance(given, Rows) else KeptRows(given)

    def check(row: Row, index: int) -> None:
        TAKES[takes](row, index, data=data)
        if labels is not None and takes in _LABELS:
            _check_known(data, takes, row, index, labels, "is not in objective.labels")

    return UsableRows(rows, check) if data.skip_bad_rows else rows


def _check_context(data: Source, train: Given) -> None:
    if data.context is None or any(data.context in row for row in train):
        return
    if (first := next(iter(train), None)) is not None:
        raise DataError(f"data.context: no row has {data.context!r}; the first has: {', '.join(first)}; name one")
