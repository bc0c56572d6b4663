"""One label per text."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from trainer.columns import label_of, place, text_of
from trainer.config import Columns, EmbeddedData
from trainer.losses import cross_entropy_sum
from trainer.objectives.base import Objective, Sums, Totals, model_inputs
from trainer.packing import Batch, Example, Row, collate_padded
from trainer.sources import DataError

# Half stars are classes, prices and scores are not.
_FRACTION = re.compile(r"[+-]?\d*\.\d*[1-9]\d*([eE][+-]?\d+)?")
_MOST_FRACTIONS = 20


class ClassificationObjective(Objective):
    head = "AutoModelForSequenceClassification"
    score = ("accuracy", "max")
    packs = False

    def __init__(self, section: Any, data: Columns | EmbeddedData, train: Iterable[dict[str, Any]]) -> None:
        super().__init__(section, data, train)
        self.labels = sorted({label_of(row, index, self.columns) for index, row in enumerate(train)})
        if len(self.labels) < 2:
            raise DataError(f"data.label: every training row has the label {self.labels[0]!r}; at least two are needed")
        fractions = [label for label in self.labels if _FRACTION.fullmatch(label)]
        if len(fractions) > _MOST_FRACTIONS:
            raise DataError(
                f"data.label: {len(fractions):,} different numbers found, such as {fractions[0]}; expected names or "
                "whole numbers of classes: name another column, or put the numbers into classes first"
            )

    def texts(self, rows: Iterable[dict[str, Any]]) -> Iterator[str]:
        yield from (text_of(row, index, self.columns) for index, row in enumerate(rows))

    def encode(
        self, rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, max_length: int, first: int = 0
    ) -> list[Example]:
        assert self.labels is not None
        numbers = {label: number for number, label in enumerate(self.labels)}
        texts = [text_of(row, index, self.columns) for index, row in enumerate(rows, first)]
        encoded = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
        examples = []
        for index, (row, ids) in enumerate(zip(rows, encoded, strict=True), first):
            label = label_of(row, index, self.columns)
            if label not in numbers:
                known = ", ".join(self.labels[:20])
                raise DataError(f"data.label: {place(row, index)}: {label!r} is in no training row; known: {known}")
            ids = ids or [tokenizer.eos_token_id]  # an empty text still is one token, so that something is pooled
            examples.append(Example(np.asarray(ids, np.int32), np.asarray([numbers[label]], np.int32)))
        return examples

    def nothing_left(self, num_rows: int, max_length: int) -> str:
        return f"data.text: {num_rows} rows found, none of which can be learned from"

    def collate(self, rows: list[Row], pad_id: int, draws: list[int]) -> Batch:
        return collate_padded(rows, pad_id)

    def sums(self, model: torch.nn.Module, batch: Batch) -> Sums:
        logits = model(**model_inputs(batch)).logits
        correct = (logits.argmax(-1) == batch["targets"]).sum()
        count = torch.tensor(len(batch["targets"]))
        return {"loss": cross_entropy_sum(logits, batch["targets"]), "count": count, "correct": correct}

    def summarize(self, totals: Totals) -> dict[str, float]:
        loss, accuracy = (float(totals[name] / totals["count"]) for name in ("loss", "correct"))
        return {"eval_loss": loss, "accuracy": accuracy}

    def baseline(self, train: Sequence[Row], held_out: Sequence[Row], vocab_size: int) -> dict[str, float]:
        """The accuracy of always saying the commonest training label."""
        commonest = Counter(int(row[0].targets[0]) for row in train).most_common(1)[0][0]
        return {"majority_accuracy": sum(int(row[0].targets[0]) == commonest for row in held_out) / len(held_out)}
