"""Language modelling: every token of a document, and its end, is predicted from those before it."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from trainer.columns import text_of
from trainer.losses import cross_entropy_sum
from trainer.objectives.base import Objective, Sums, model_inputs
from trainer.packing import IGNORED, Batch, Example, Row, collate_packed, pack
from trainer.sources import DataError


class CausalLMObjective(Objective):
    head = "AutoModelForCausalLM"
    score = ("eval_loss", "min")

    def texts(self, rows: list[dict[str, Any]]) -> Iterator[str]:
        yield from (text_of(row, index, self.columns) for index, row in enumerate(rows))

    def encode(self, rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Example]:
        """Documents longer than `max_length` are cut into pieces; each token is still predicted once."""
        documents = tokenizer(list(self.texts(rows)), verbose=False)["input_ids"]
        examples = [piece for ids in documents for piece in _pieces(ids, tokenizer.eos_token_id, max_length)]
        if not examples:
            raise DataError(f"data.text: all {len(rows)} rows are empty; at least one must hold text")
        return examples

    def to_rows(self, examples: list[Example], max_length: int) -> list[Row]:
        return pack(examples, max_length)

    def collate(self, rows: list[Row], pad_id: int) -> Batch:
        return collate_packed(rows, pad_id)

    def sums(self, model: torch.nn.Module, batch: Batch) -> Sums:
        logits = model(**model_inputs(batch), use_cache=False).logits
        return {"loss": cross_entropy_sum(logits, batch["targets"])}

    def summarize(self, sums: dict[str, float], count: float) -> dict[str, float]:
        loss = sums["loss"] / count
        return {"eval_loss": loss, "perplexity": math.exp(min(loss, 700.0))}

    def baseline(self, train: list[Row], held_out: list[Row], vocab_size: int) -> dict[str, float]:
        """The unigram model's loss in nats per token, each count raised by one."""
        counts = np.bincount(_targets(train), minlength=vocab_size) + 1
        return {"unigram_loss": float(-np.log(counts / counts.sum())[_targets(held_out)].mean())}


def _targets(rows: list[Row]) -> np.ndarray:
    targets = np.concatenate([example.targets for row in rows for example in row])
    return targets[targets != IGNORED]


def _pieces(ids: list[int], end_id: int, max_length: int) -> list[Example]:
    closed = ids if ids and ids[-1] == end_id else [*ids, end_id]
    tokens = np.asarray(closed, np.int32)
    inputs, targets = tokens[:-1], tokens[1:]
    return [
        Example(inputs[start : start + max_length], targets[start : start + max_length])
        for start in range(0, len(inputs), max_length)
    ]
