"""One label of several a text."""

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from trainer import scores
from trainer.columns import label_of, place
from trainer.config import Classification, Columns
from trainer.objectives.base import Sums, Totals
from trainer.objectives.problem import Problem, check_apart, label_weights, number_of_label
from trainer.sources import DataError

# Half stars are classes, prices and scores are not.
_FRACTION = re.compile(r"[+-]?\d*\.\d*[1-9]\d*([eE][+-]?\d+)?")
_MOST_FRACTIONS = 20


class SingleLabel(Problem):
    name = "single_label_classification"
    score = ("accuracy", "max")

    def __init__(self, section: Classification, columns: Columns, train: Iterable[dict[str, Any]]) -> None:
        self.columns, self.listed = columns, section.labels is not None
        found = _counted(train, columns)
        self.labels = list(section.labels) if section.labels is not None else sorted(found)
        if not self.listed:
            _check_found(self.labels)
            check_apart(self.labels)
        self.numbers = {label: number for number, label in enumerate(self.labels)}
        counts = np.array([found[label] for label in self.labels], float)
        with np.errstate(divide="ignore"):
            balanced = counts.sum() / (len(counts) * counts)
        self.weights = label_weights(section, self.labels, balanced)

    def targets(self, row: dict[str, Any], index: int) -> np.ndarray:
        label = label_of(row, index, self.columns)
        return np.asarray([number_of_label(label, self.numbers, row, index, listed=self.listed)], np.int32)

    def count(self, targets: np.ndarray) -> float:
        return 1 if self.weights is None else float(self.weights[targets[0]])

    def sums(self, logits: torch.Tensor, targets: torch.Tensor, *, scored: bool) -> Sums:
        weights = None if self.weights is None else self.weights.to(logits.device)
        count = torch.tensor(len(targets)) if weights is None else weights[targets].double().sum()
        sums = {"loss": F.cross_entropy(logits.float(), targets, weights, reduction="sum"), "count": count}
        if not scored:
            return sums
        num_labels, answers = len(self.labels), logits.argmax(-1)
        sums["labels"] = scores.label_counts(answers, targets, num_labels)
        if num_labels <= scores.MOST_LABELS_IN_DETAIL:
            is_gold = F.one_hot(targets, num_labels)
            sums["confusion"] = scores.confusion(answers, targets, num_labels)
            sums["scores"] = scores.score_histogram(scores.log_odds(logits), is_gold)
        return sums

    def summarize(self, totals: Totals) -> dict[str, float]:
        right, _, gold = totals["labels"].sum(-1)
        found = {
            "eval_loss": float(totals["loss"] / totals["count"]),
            "accuracy": float(right / gold),
            "macro_f1": float(scores.precision_recall_f1(totals["labels"], "macro")[2]),
        }
        area = scores.roc_auc(totals["scores"]) if "scores" in totals else None
        return found if area is None else found | {"roc_auc": area}

    def details(self, totals: Totals) -> dict[str, Any]:
        f1 = scores.precision_recall_f1(totals["labels"], None)[2]
        found: dict[str, Any] = {"labels": self.labels, "f1": f1.tolist()}
        if "confusion" in totals:
            found["confusion"] = totals["confusion"].astype(int).tolist()
        return found

    def baseline(self, train: np.ndarray, held_out: np.ndarray) -> dict[str, float]:
        """The accuracy of always saying the commonest training label."""
        commonest = Counter(train[:, 0].tolist()).most_common(1)[0][0]
        return {"majority_accuracy": float((held_out[:, 0] == commonest).mean())}


def _counted(train: Iterable[dict[str, Any]], columns: Columns) -> Counter[str]:
    """How often each label occurs. Raises DataError where one row has a name and another a number."""
    found: Counter[str] = Counter()
    first: dict[bool, tuple[str, str]] = {}
    for index, row in enumerate(train):
        label = label_of(row, index, columns)
        is_number = not isinstance(row[columns.label], str)
        found[label] += 1
        if is_number not in first and (is_number or not label.lstrip("+-").isdecimal()):
            first[is_number] = (place(row, index), label)
    if len(first) == 2:
        (named_at, name), (numbered_at, number) = first[False], first[True]
        raise DataError(
            f"data.label: {numbered_at}: the number {number} found, but {named_at} has the name {name!r}; "
            "expected one kind: mend the rows"
        )
    return found


def _check_found(labels: list[str]) -> None:
    if len(labels) < 2:
        only = f"every training row has the label {labels[0]!r}" if labels else "no training row found"
        raise DataError(f"data.label: {only}; at least two are needed")
    fractions = [label for label in labels if _FRACTION.fullmatch(label)]
    if len(fractions) > _MOST_FRACTIONS:
        raise DataError(
            f"data.label: {len(fractions):,} different numbers found, such as {fractions[0]}; expected names or "
            "whole numbers of classes: name another column, put the numbers into classes first, or learn the numbers "
            "themselves (objective.problem regression)"
        )
