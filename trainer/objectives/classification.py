"""A text, or a pair of texts, and what is answered about it: one label, several, or a number."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from trainer.columns import pair_of
from trainer.objectives.base import Objective, Sums, Totals, model_inputs, no_cache
from trainer.objectives.multi_label import MultiLabel
from trainer.objectives.problem import Problem, stacked_targets
from trainer.objectives.regression import Regression
from trainer.objectives.single_label import SingleLabel
from trainer.packing import Batch, Encoded, Example, Row, collate_padded
from trainer.tokenizers import keeps_pairs_apart

PROBLEMS: dict[str, type[Problem]] = {
    "single_label": SingleLabel,
    "multi_label": MultiLabel,
    "regression": Regression,
}


class ClassificationObjective(Objective):
    head = "AutoModelForSequenceClassification"
    packs = False
    loses_rest = True

    def __init__(self, section: Any, data: Any, train: Iterable[dict[str, Any]]) -> None:
        super().__init__(section, data, train)
        self.problem = PROBLEMS[section.problem](section, self.columns, train)
        self.labels, self.problem_type, self.score = self.problem.labels, self.problem.name, self.problem.score
        self.call: dict[str, bool] = {}

    def try_out(self, model: torch.nn.Module, max_length: int) -> list[str]:
        self.call = no_cache(model)
        return []

    def texts(self, rows: Iterable[dict[str, Any]]) -> Iterator[str]:
        for index, row in enumerate(rows):
            yield from (text for text in pair_of(row, index, self.columns) if text is not None)

    def check(self, rows: Iterable[dict[str, Any]]) -> None:
        for index, row in enumerate(rows):
            pair_of(row, index, self.columns)
            self.problem.targets(row, index)

    def encode(
        self, rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, max_length: int, first: int = 0
    ) -> Encoded:
        pairs = [pair_of(row, index, self.columns) for index, row in enumerate(rows, first)]
        encoded = _tokens(pairs, tokenizer, max_length) if pairs else []
        return Encoded(
            Example(ids, self.problem.targets(row, index), types)
            for index, (row, (ids, types)) in enumerate(zip(rows, encoded, strict=True), first)
        )

    def nothing_left(self, num_rows: int, max_length: int) -> str:
        return f"data.text: {num_rows} rows found, none of which can be learned from"

    def collate(self, rows: list[Row], pad_id: int, draws: list[int]) -> Batch:
        return collate_padded(rows, pad_id)

    def sums(self, model: torch.nn.Module, batch: Batch) -> Sums:
        logits = model(**model_inputs(batch), **self.call).logits
        return self.problem.sums(logits, batch["targets"], scored=not model.training)

    def summarize(self, totals: Totals) -> dict[str, float]:
        return self.problem.summarize(totals)

    def details(self, totals: Totals) -> dict[str, Any]:
        return self.problem.details(totals)

    def baseline(self, train: Sequence[Row], held_out: Sequence[Row], vocab_size: int) -> dict[str, float]:
        return self.problem.baseline(stacked_targets(train), stacked_targets(held_out))

    def count(self, row: Row, draw: int) -> float:
        return sum(self.problem.count(example.targets) for example in row)


def _tokens(
    pairs: list[tuple[str, str | None]], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """The token ids of each text or pair, and which text each token is of where the tokenizer says so.

    An empty text still is one token, so that something is pooled.
    """
    texts = [text for text, _ in pairs]
    others = [other for _, other in pairs if other is not None]
    if others and not keeps_pairs_apart(tokenizer):
        yield from ((ids, None) for ids in _joined(texts, others, tokenizer, max_length))
        return
    encoded = tokenizer(texts, others or None, truncation=True, max_length=max_length)
    types = encoded.get("token_type_ids") if others else None
    for i, ids in enumerate(encoded["input_ids"]):
        yield (
            np.asarray(ids or [tokenizer.eos_token_id], np.int32),
            np.asarray(types[i], np.int32) if types is not None else None,
        )


def _joined(
    texts: list[str], others: list[str], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Iterator[np.ndarray]:
    """Pairs with the end token between; what is too long loses the end of its longer text."""
    firsts, seconds = (
        tokenizer(each, add_special_tokens=False, verbose=False)["input_ids"] for each in (texts, others)
    )
    room = max_length - 1
    for first, second in zip(firsts, seconds, strict=True):
        first = first[: max(room - room // 2, room - len(second))]
        second = second[: room - len(first)]
        yield np.asarray([*first, tokenizer.eos_token_id, *second], np.int32)
