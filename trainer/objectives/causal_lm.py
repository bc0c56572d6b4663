"""Language modelling: every token of a document, and its end, is predicted from those before it."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from trainer.columns import text_of
from trainer.losses import cross_entropy_sum
from trainer.objectives.base import Objective, Sums, Totals, model_inputs
from trainer.packing import IGNORED, Batch, Example, Row, collate_packed


class CausalLMObjective(Objective):
    head = "AutoModelForCausalLM"
    score = ("eval_loss", "min")
    packs = True

    def texts(self, rows: Iterable[dict[str, Any]]) -> Iterator[str]:
        yield from (text_of(row, index, self.columns) for index, row in enumerate(rows))

    def encode(
        self, rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, max_length: int, first: int = 0
    ) -> list[Example]:
        """Documents longer than `max_length` are cut into pieces; each token is still predicted once."""
        texts = [text_of(row, index, self.columns) for index, row in enumerate(rows, first)]
        documents = tokenizer(texts, verbose=False)["input_ids"]
        return [piece for ids in documents for piece in _pieces(ids, tokenizer.eos_token_id, max_length)]

    def nothing_left(self, num_rows: int, max_length: int) -> str:
        return f"data.text: all {num_rows} rows are empty; at least one must hold text"

    def collate(self, rows: list[Row], pad_id: int, draws: list[int]) -> Batch:
        return collate_packed(rows, pad_id)

    def sums(self, model: torch.nn.Module, batch: Batch) -> Sums:
        logits = model(**model_inputs(batch), use_cache=False).logits
        return {"loss": cross_entropy_sum(logits, batch["targets"]), "count": (batch["targets"] != IGNORED).sum()}

    def summarize(self, totals: Totals) -> dict[str, float]:
        loss = float(totals["loss"] / totals["count"])
        return {"eval_loss": loss, "perplexity": math.exp(min(loss, 700.0))}

    def baseline(self, train: Sequence[Row], held_out: Sequence[Row], vocab_size: int) -> dict[str, float]:
        """The unigram model's loss in nats per token, each count raised by one."""
        counts = np.bincount(_targets(train), minlength=vocab_size) + 1
        return {"unigram_loss": float(-np.log(counts / counts.sum())[_targets(held_out)].mean())}


def _targets(rows: Sequence[Row]) -> np.ndarray:
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
