"""A number a text."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from trainer import scores
from trainer.columns import number_of
from trainer.config import Classification, Columns
from trainer.objectives.base import Sums, Totals
from trainer.objectives.problem import Problem


class Regression(Problem):
    name = "regression"
    score = ("mse", "min")

    def __init__(self, section: Classification, columns: Columns, train: Iterable[dict[str, Any]]) -> None:
        self.columns, self.labels = columns, [columns.label]

    def targets(self, row: dict[str, Any], index: int) -> np.ndarray:
        return np.asarray([number_of(row, index, self.columns)], np.float32)

    def count(self, targets: np.ndarray) -> float:
        return 1

    def sums(self, logits: torch.Tensor, targets: torch.Tensor, *, scored: bool) -> Sums:
        answers = logits.float().squeeze(-1)
        loss = torch.nn.functional.mse_loss(answers, targets, reduction="sum")
        sums = {"loss": loss, "count": torch.tensor(len(targets))}
        return sums | {"moments": scores.moments(answers, targets)} if scored else sums

    def summarize(self, totals: Totals) -> dict[str, float]:
        found = scores.regression(totals["moments"], float(totals["loss"]), float(totals["count"]))
        return {"eval_loss": found["mse"], **found}

    def baseline(self, train: np.ndarray, held_out: np.ndarray) -> dict[str, float]:
        """The squared error of always saying the mean of the training rows."""
        return {"mean_mse": float(((held_out.astype(float) - train.astype(float).mean()) ** 2).mean())}
