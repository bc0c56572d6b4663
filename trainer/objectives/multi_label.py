"""Any number of labels a text, also none: each is a question of its own."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from trainer import scores
from trainer.columns import labels_of
from trainer.config import Classification, Columns
from trainer.objectives.base import Sums, Totals
from trainer.objectives.problem import Problem, check_apart, label_weights, number_of_label
from trainer.sources import DataError


class MultiLabel(Problem):
    name = "multi_label_classification"
    score = ("macro_f1", "max")

    def __init__(self, section: Classification, columns: Columns, train: Iterable[dict[str, Any]]) -> None:
        self.columns, self.listed = columns, section.labels is not None
        found: Counter[str] = Counter()
        num_rows = 0
        for index, row in enumerate(train):
            num_rows += 1
            found.update(labels_of(row, index, columns))
        self.labels = list(section.labels) if section.labels is not None else sorted(found)
        if not self.labels:
            raise DataError("data.label: no training row has a label; at least one is needed")
        if not self.listed:
            check_apart(self.labels)
        self.numbers = {label: number for number, label in enumerate(self.labels)}
        counts = np.array([found[label] for label in self.labels], float)
        with np.errstate(divide="ignore"):
            # A label of every row has no others to be balanced with.
            balanced = np.where(counts == num_rows, 1.0, (num_rows - counts) / counts)
        self.positive_weights = label_weights(section, self.labels, balanced)

    def targets(self, row: dict[str, Any], index: int) -> np.ndarray:
        targets = np.zeros(len(self.labels), np.int32)
        for label in labels_of(row, index, self.columns):
            targets[number_of_label(label, self.numbers, row, index, listed=self.listed)] = 1
        return targets

    def count(self, targets: np.ndarray) -> float:
        return len(targets)

    def sums(self, logits: torch.Tensor, targets: torch.Tensor, *, scored: bool) -> Sums:
        targets = targets.view(logits.shape)
        weights = None if self.positive_weights is None else self.positive_weights.to(logits.device)
        loss = F.binary_cross_entropy_with_logits(logits.float(), targets.float(), pos_weight=weights, reduction="sum")
        sums = {"loss": loss, "count": torch.tensor(targets.numel())}
        if not scored:
            return sums
        answers = (logits > 0).long()
        sums["labels"] = torch.stack([(part > 0).sum(0) for part in (answers * targets, answers, targets)])
        sums["rows"] = torch.tensor([len(targets), int((answers == targets).all(-1).sum())])
        if len(self.labels) <= scores.MOST_LABELS_IN_DETAIL:
            sums["scores"] = scores.score_histogram(logits, targets)
        return sums

    def summarize(self, totals: Totals) -> dict[str, float]:
        num_rows, exact = totals["rows"]
        found = {
            "eval_loss": float(totals["loss"] / totals["count"]),
            "accuracy": float(exact / num_rows),
            "macro_f1": float(scores.precision_recall_f1(totals["labels"], "macro")[2]),
            "micro_f1": float(scores.precision_recall_f1(totals["labels"], "micro")[2]),
        }
        area = scores.roc_auc(totals["scores"]) if "scores" in totals else None
        return found if area is None else found | {"roc_auc": area}

    def details(self, totals: Totals) -> dict[str, Any]:
        return {"labels": self.labels, "f1": scores.precision_recall_f1(totals["labels"], None)[2].tolist()}

    def baseline(self, train: np.ndarray, held_out: np.ndarray) -> dict[str, float]:
        """The macro F1 of giving every row every label, and the accuracy of always giving the commonest set of them."""
        gold = held_out.sum(0)
        counts = np.stack([gold, np.full(len(gold), len(held_out)), gold])
        commonest = Counter(map(bytes, train.astype(np.int8))).most_common(1)[0][0]
        right = [bytes(row) == commonest for row in held_out.astype(np.int8)]
        return {
            "all_labels_macro_f1": float(scores.precision_recall_f1(counts, "macro")[2]),
            "majority_accuracy": float(np.mean(right)),
        }
