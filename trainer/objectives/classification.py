"""One label per text."""

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from trainer.columns import label_of, place, text_of
from trainer.config import EmbeddedData, FileData
from trainer.losses import cross_entropy_sum
from trainer.objectives.base import Objective, Sums, model_inputs
from trainer.packing import Batch, Example, Row, collate_padded
from trainer.sources import DataError

# Half stars are classes, prices and scores are not.
_FRACTION = re.compile(r"[+-]?\d*\.\d*[1-9]\d*([eE][+-]?\d+)?")
_MOST_FRACTIONS = 20


class ClassificationObjective(Objective):
    head = "AutoModelForSequenceClassification"
    score = ("accuracy", "max")
    sum_names = ("loss", "correct")

    def __init__(self, data: EmbeddedData | FileData, train: list[dict[str, Any]]) -> None:
        super().__init__(data, train)
        self.labels = sorted({label_of(row, index, self.columns) for index, row in enumerate(train)})
        if len(self.labels) < 2:
            raise DataError(f"data.label: every training row has the label {self.labels[0]!r}; at least two are needed")
        fractions = [label for label in self.labels if _FRACTION.fullmatch(label)]
        if len(fractions) > _MOST_FRACTIONS:
            raise DataError(
                f"data.label: {len(fractions):,} different numbers found, such as {fractions[0]}; expected names or "
                "whole numbers of classes: name another column, or put the numbers into classes first"
            )

    def texts(self, rows: list[dict[str, Any]]) -> Iterator[str]:
        yield from (text_of(row, index, self.columns) for index, row in enumerate(rows))

    def encode(self, rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Example]:
        assert self.labels is not None
        numbers = {label: number for number, label in enumerate(self.labels)}
        encoded = tokenizer(list(self.texts(rows)), truncation=True, max_length=max_length)["input_ids"]
        examples = []
        for index, (row, ids) in enumerate(zip(rows, encoded, strict=True)):
            label = label_of(row, index, self.columns)
            if label not in numbers:
                known = ", ".join(self.labels[:20])
                raise DataError(f"data.label: {place(row, index)}: {label!r} is in no training row; known: {known}")
            ids = ids or [tokenizer.eos_token_id]  # an empty text still is one token, so that something is pooled
            examples.append(Example(np.asarray(ids, np.int32), np.asarray([numbers[label]], np.int32)))
        return examples

    def to_rows(self, examples: list[Example], max_length: int) -> list[Row]:
        return [[example] for example in examples]

    def collate(self, rows: list[Row], pad_id: int) -> Batch:
        return collate_padded(rows, pad_id)

    def sums(self, model: torch.nn.Module, batch: Batch) -> Sums:
        logits = model(**model_inputs(batch)).logits
        correct = (logits.argmax(-1) == batch["targets"]).sum()
        return {"loss": cross_entropy_sum(logits, batch["targets"]), "correct": correct}

    def summarize(self, sums: dict[str, float], count: float) -> dict[str, float]:
        return {"eval_loss": sums["loss"] / count, "accuracy": sums["correct"] / count}

    def baseline(self, train: list[Row], held_out: list[Row], vocab_size: int) -> dict[str, float]:
        """The accuracy of always saying the commonest training label."""
        commonest = Counter(int(row[0].targets[0]) for row in train).most_common(1)[0][0]
        return {"majority_accuracy": sum(int(row[0].targets[0]) == commonest for row in held_out) / len(held_out)}
