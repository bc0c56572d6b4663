"""Language modelling: every token of a document, and its end, is predicted from those before it."""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from trainer import chunks
from trainer.columns import text_of
from trainer.objectives.base import Objective, Sums, Totals, model_inputs
from trainer.packing import IGNORED, Batch, Encoded, Example, Row
from trainer.token_model import TokenModel, tried_out


class CausalLMObjective(Objective):
    head = "AutoModelForCausalLM"
    score = ("eval_loss", "min")
    packs = True
    token_model = TokenModel()

    def try_out(self, model: torch.nn.Module, max_length: int) -> list[str]:
        self.token_model = tried_out(model, max_length)
        self.packs = self.token_model.first_position is not None
        self.logits_at_once = self.token_model.logits_at_once
        return self.token_model.without()

    def texts(self, rows: Iterable[dict[str, Any]]) -> Iterator[str]:
        yield from (text_of(row, index, self.columns) for index, row in enumerate(rows))

    def encode(
        self, rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, max_length: int, first: int = 0
    ) -> Encoded:
        """Documents longer than `max_length` are cut into chunks; each token is still predicted once."""
        texts = [text_of(row, index, self.columns) for index, row in enumerate(rows, first)]
        by_sentence = self.section.split_at == "sentences"
        found = tokenizer(texts, verbose=False, return_offsets_mapping=by_sentence) if texts else {"input_ids": []}
        pieces = []
        for number, ids in enumerate(found["input_ids"]):
            last = chunks.last_tokens(texts[number], found["offset_mapping"][number]) if by_sentence else None
            sentences = None if last is None else chunks.predicted_at_ends(last)
            cut = functools.partial(
                chunks.cut, max_length=max_length, overlap=self.section.overlap_tokens, sentences=sentences
            )
            pieces.append(_pieces(ids, tokenizer.eos_token_id, cut))
        return Encoded(itertools.chain.from_iterable(pieces), left_out=pieces.count([]))

    def nothing_left(self, num_rows: int, max_length: int) -> str:
        return f"data.text: all {num_rows} rows are empty; at least one must hold text"

    def collate(self, rows: list[Row], pad_id: int, draws: list[int]) -> Batch:
        return self.token_model.collate(rows, pad_id)

    def sums(self, model: torch.nn.Module, batch: Batch) -> Sums:
        inputs = {**model_inputs(batch), "use_cache": False}
        loss = self.token_model.loss_sum(model, inputs, batch["targets"])
        return {"loss": loss, "count": (batch["targets"] != IGNORED).sum()}

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


def _pieces(ids: list[int], end_id: int, cut: Callable[[int], list[chunks.Chunk]]) -> list[Example]:
    closed = ids if ids and ids[-1] == end_id else [*ids, end_id]
    tokens = np.asarray(closed, np.int32)
    inputs, targets = tokens[:-1], tokens[1:]
    pieces = []
    for chunk in cut(len(inputs)):
        wanted = targets[chunk.start : chunk.stop].copy()
        wanted[: chunk.learned_from - chunk.start] = IGNORED
        pieces.append(Example(inputs[chunk.start : chunk.stop], wanted))
    return pieces
