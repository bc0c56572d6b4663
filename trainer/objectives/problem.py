"""What is answered about a text: one label, several, or a number. Each is a Problem, and knows no texts or tokens."""

import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from trainer.columns import place
from trainer.config import Classification, Columns
from trainer.objectives.base import Sums, Totals
from trainer.packing import Row
from trainer.sources import DataError

_SHOWN = 20


class Problem(ABC):
    """Built once per run from the config and one pass over the training rows."""

    name: str  # problem_type in the config of a transformers model
    score: tuple[str, str]  # the metric that ranks runs, and "min" or "max"
    labels: list[str]  # names of the model's outputs

    @abstractmethod
    def __init__(self, section: Classification, columns: Columns, train: Iterable[dict[str, Any]]) -> None: ...

    @abstractmethod
    def targets(self, row: dict[str, Any], index: int) -> np.ndarray:
        """Return what is to be answered, as an Example holds it. Raises BadRow or DataError."""

    @abstractmethod
    def count(self, targets: np.ndarray) -> float:
        """Return what an example adds to the divisor of the loss."""

    @abstractmethod
    def sums(self, logits: torch.Tensor, targets: torch.Tensor, *, scored: bool) -> Sums:
        """Return the sums of logits [B, C]: `loss` and `count`, and where `scored` what the metrics are made of."""

    @abstractmethod
    def summarize(self, totals: Totals) -> dict[str, float]:
        """Return the metrics of the sums."""

    def details(self, totals: Totals) -> dict[str, Any]:
        """Return what the sums say beside single numbers."""
        return {}

    @abstractmethod
    def baseline(self, train: np.ndarray, held_out: np.ndarray) -> dict[str, float]:
        """Return what knowing only the targets of the training rows, stacked, would score on the held-out ones."""


def stacked_targets(rows: Sequence[Row]) -> np.ndarray:
    """Return the targets of rows with one example each, shape [N, ...]."""
    return np.stack([row[0].targets for row in rows])


def number_of_label(
    label: str, numbers: dict[str, int], row: dict[str, Any], index: int, *, listed: bool, setting: str = "label"
) -> int:
    """Return the number of a label in the column that `data.<setting>` names.

    Raises DataError, naming the row and the known labels, for any other.
    """
    if label not in numbers:
        known = list(numbers)[:_SHOWN]
        more = f" and {len(numbers) - _SHOWN} more" if len(numbers) > _SHOWN else ""
        where = "not in objective.labels" if listed else "in no training row"
        raise DataError(
            f"data.{setting}: {place(row, index)}: {label!r} is {where}; known: {', '.join(known)}{more}; mend the "
            "row, or name every label in objective.labels"
        )
    return numbers[label]


def check_apart(labels: Sequence[str], setting: str = "label") -> None:
    """Raise DataError for two labels that look the same: no one means them to be two classes."""
    seen: dict[str, str] = {}
    for label in labels:
        looks = " ".join(unicodedata.normalize("NFC", label).split())
        if (other := seen.setdefault(looks, label)) is not label:
            raise DataError(
                f"data.{setting}: {other!a} and {label!a} look the same, but for white space or the encoding "
                "of letters; spell them alike, or name every label in objective.labels"
            )


def label_weights(section: Classification, labels: list[str], balanced: np.ndarray) -> torch.Tensor | None:
    """Return the factor of each label, in fp32, or None where none are asked for.

    `balanced` holds those that balance the training rows; infinite for a label that none of them has. Raises DataError
    for such a label, and for a name that is no label.
    """
    asked = section.class_weights
    if asked is None:
        return None
    if asked == "balanced":
        if not np.isfinite(balanced).all():
            missing = labels[int(np.argmin(np.isfinite(balanced)))]
            raise DataError(
                f"objective.class_weights: balanced found, but no training row has the label {missing!r}; "
                "give weights by name, or remove the label from objective.labels"
            )
        return torch.tensor(balanced, dtype=torch.float32)
    if unknown := [name for name in asked if name not in labels]:
        known = ", ".join(labels[:_SHOWN])
        raise DataError(f"objective.class_weights: {unknown[0]!r} is no label of the training rows; known: {known}")
    return torch.tensor([asked.get(label, 1.0) for label in labels], dtype=torch.float32)
