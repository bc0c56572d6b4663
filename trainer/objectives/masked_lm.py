"""Masked language modelling: hidden tokens are predicted from those on both sides (BERT, arXiv:1810.04805)."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerBase

from serving.directory import BadInput
from trainer import chunks
from trainer.columns import text_of
from trainer.objectives.base import Objective, Sums, Totals, model_inputs
from trainer.packing import IGNORED, Batch, Encoded, Example, Row
from trainer.token_model import TokenModel, tried_out

# Of the tokens to predict: hidden, replaced by another, or left as they are; only the first two are named.
_HIDDEN, _REPLACED = 0.8, 0.1
_CHUNK = 512  # tokens whose logits are in memory at once while evaluating


class MaskedLMObjective(Objective):
    """The targets of an example are all tokens that may be masked; which of them are, its row's draw says."""

    head = "AutoModelForMaskedLM"
    score = ("eval_loss", "min")
    packs = True
    token_model = TokenModel()
    mask_id: int
    entries: np.ndarray  # ids that may replace a token

    def use(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if tokenizer.mask_token_id is None:
            raise BadInput("tokenizer: has no mask token, which masked_lm needs; use the tokenizer of a masked model")
        self.mask_id = tokenizer.mask_token_id
        self.entries = np.setdiff1d(np.arange(len(tokenizer)), tokenizer.all_special_ids)

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
        """Texts longer than `max_length` go on in further examples; one without a token to mask is left out.

        What an example repeats of the one before it is never masked.
        """
        self.use(tokenizer)
        texts = [text_of(row, index, self.columns) for index, row in enumerate(rows, first)]
        if not texts:
            return Encoded()
        examples, learned = Encoded(), set()
        for text, input_ids, num_repeated in self._pieces(texts, tokenizer, max_length):
            targets = np.where(np.isin(input_ids, tokenizer.all_special_ids), IGNORED, input_ids).astype(np.int32)
            targets[:num_repeated] = IGNORED
            if (targets != IGNORED).any():
                examples.append(Example(input_ids, targets))
                learned.add(text)
        examples.left_out = len(texts) - len(learned)
        return examples

    def _pieces(
        self, texts: list[str], tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> Iterator[tuple[int, np.ndarray, int]]:
        """Each piece of the texts between the tokens that open and close one: the text's number, the ids, and how many
        of them, from the first, only repeat."""
        by_sentence = self.section.split_at == "sentences"
        found = tokenizer(texts, add_special_tokens=False, verbose=False, return_offsets_mapping=by_sentence)
        opening, closing = _frame(tokenizer)
        room = max_length - len(opening) - len(closing)
        for text, ids in enumerate(found["input_ids"]):
            last = chunks.last_tokens(texts[text], found["offset_mapping"][text]) if by_sentence else None
            sentences = None if last is None else chunks.standing_at_ends(last)
            for chunk in chunks.cut(len(ids), room, overlap=self.section.overlap_tokens, sentences=sentences):
                framed = np.asarray([*opening, *ids[chunk.start : chunk.stop], *closing], np.int32)
                yield text, framed, len(opening) + chunk.learned_from - chunk.start

    def nothing_left(self, num_rows: int, max_length: int) -> str:
        return f"data.text: all {num_rows} rows are empty; at least one must hold text"

    def collate(self, rows: list[Row], pad_id: int, draws: list[int]) -> Batch:
        """Return one batch. The masks of a row depend on its draw alone."""
        masked = [self._masked(row, draw) for row, draw in zip(rows, draws, strict=True)]
        return self.token_model.collate(masked, pad_id)

    def sums(self, model: torch.nn.Module, batch: Batch) -> Sums:
        targets, inputs = batch["targets"], model_inputs(batch)
        count = (targets != IGNORED).sum()
        if model.training:
            return {"loss": self.token_model.loss_sum(model, inputs, targets), "count": count}
        head = self.token_model.head
        if head is None:
            loss, right = _scored(model(**inputs).logits, targets)
        else:
            with head.doing(lambda hidden: _scored(hidden, targets, head.logits)):
                loss, right = model(**inputs).logits
        return {"loss": loss, "count": count, "right": right}

    def summarize(self, totals: Totals) -> dict[str, float]:
        loss, accuracy = (float(totals[name] / totals["count"]) for name in ("loss", "right"))
        return {"eval_loss": loss, "perplexity": math.exp(min(loss, 700.0)), "accuracy": accuracy}

    def baseline(self, train: Sequence[Row], held_out: Sequence[Row], vocab_size: int) -> dict[str, float]:
        """The unigram model's loss in nats per token, each count raised by one."""
        learned, asked = (
            np.concatenate([example.targets[example.targets != IGNORED] for row in rows for example in row])
            for rows in (train, held_out)
        )
        counts = np.bincount(learned, minlength=vocab_size) + 1
        return {"unigram_loss": float(-np.log(counts / counts.sum())[asked].mean())}

    def count(self, row: Row, draw: int) -> float:
        return int(self._chosen(row, np.random.default_rng(draw)).sum())

    def _chosen(self, row: Row, random: np.random.Generator) -> np.ndarray:
        """Which tokens of the row, end to end, are predicted: each by chance, and at least one of every example."""
        may_be = np.concatenate([example.targets for example in row]) != IGNORED
        drawn = np.where(may_be, random.random(len(may_be)), np.inf)
        starts = np.cumsum([0, *(len(example.input_ids) for example in row[:-1])])
        lowest = np.repeat(np.minimum.reduceat(drawn, starts), [len(example.input_ids) for example in row])
        return may_be & ((drawn < self.section.mask_probability) | (drawn == lowest))

    def _masked(self, row: Row, draw: int) -> Row:
        random = np.random.default_rng(draw)
        chosen = self._chosen(row, random)
        input_ids = np.concatenate([example.input_ids for example in row])
        fate, others = random.random(len(chosen)), random.choice(self.entries, len(chosen))
        hidden = chosen & (fate < _HIDDEN)
        replaced = chosen & ~hidden & (fate < _HIDDEN + _REPLACED)
        targets = np.where(chosen, input_ids, IGNORED)
        input_ids = np.where(hidden, self.mask_id, np.where(replaced, others, input_ids))
        ends = np.cumsum([len(example.input_ids) for example in row])[:-1]
        pieces = zip(np.split(input_ids, ends), np.split(targets, ends), strict=True)
        return [Example(ids, wanted) for ids, wanted in pieces]


def _scored(
    outputs: torch.Tensor, targets: torch.Tensor, to_logits: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> torch.Tensor:
    """Return the summed loss of the masked tokens and how many answers are right, from logits or what gives them."""
    masked = targets != IGNORED
    loss, right = torch.zeros((), device=targets.device), torch.zeros((), device=targets.device)
    for chunk, gold in zip(outputs[masked].split(_CHUNK), targets[masked].split(_CHUNK), strict=True):
        logits = chunk if to_logits is None else to_logits(chunk)
        loss = loss + F.cross_entropy(logits.float(), gold, reduction="sum")
        right += (logits.argmax(-1) == gold).sum()
    return torch.stack([loss, right])


def _frame(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The tokens that the tokenizer puts before and after every text."""
    framed, bare = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    first = next(at for at in range(len(framed)) if framed[at : at + len(bare)] == bare)
    return framed[:first], framed[first + len(bare) :]
