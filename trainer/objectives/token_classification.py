"""A tag for every word of a text: names of people and places, parts of speech."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from serving.directory import BadInput
from trainer import entities, scores
from trainer.columns import tagged_words_of
from trainer.losses import cross_entropy_sum
from trainer.objectives.base import Objective, Sums, Totals, model_inputs, no_cache
from trainer.objectives.problem import check_apart, number_of_label
from trainer.packing import IGNORED, Batch, Encoded, Example, Row
from trainer.sources import DataError
from trainer.token_model import TokenModel, tried_out


class TokenClassificationObjective(Objective):
    """The target of a word's first token is the number of its tag. That of its further tokens, where they learn too, is
    that number plus the number of tags: only first tokens answer for their word.
    """

    head = "AutoModelForTokenClassification"
    packs = True
    token_model = TokenModel()
    labels: list[str]

    def __init__(self, section: Any, data: Any, train: Iterable[dict[str, Any]]) -> None:
        super().__init__(section, data, train)
        self.call: dict[str, bool] = {}
        rows = enumerate(train) if section.labels is None else ()
        found = {tag for index, row in rows for tag in tagged_words_of(row, index, self.columns)[1]}
        self.labels = sorted(found) if section.labels is None else list(section.labels)
        if len(self.labels) < 2:
            raise DataError(f"data.tags: every training word has the tag {self.labels[0]!r}; at least two are needed")
        if section.labels is None:
            check_apart(self.labels, "tags")
        self.numbers = {label: number for number, label in enumerate(self.labels)}
        self.types = entities.types_of(self.labels) if entities.are_entity_tags(self.labels) else []
        self.score = ("f1", "max") if self.types else ("accuracy", "max")

    def use(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.is_fast:
            raise BadInput(
                f"tokenizer: {type(tokenizer).__name__} cannot say which letters a token is of; use a fast one"
            )

    def try_out(self, model: torch.nn.Module, max_length: int) -> list[str]:
        self.token_model = TokenModel(tried_out(model, max_length).first_position)
        self.packs, self.call = self.token_model.first_position is not None, no_cache(model)
        return [] if self.packs else self.token_model.without()[:1]

    def texts(self, rows: Iterable[dict[str, Any]]) -> Iterator[str]:
        yield from (" ".join(tagged_words_of(row, index, self.columns)[0]) for index, row in enumerate(rows))

    def check(self, rows: Iterable[dict[str, Any]]) -> None:
        for index, row in enumerate(rows):
            for tag in tagged_words_of(row, index, self.columns)[1]:
                self._number(tag, row, index)

    def encode(
        self, rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, max_length: int, first: int = 0
    ) -> Encoded:
        """Words are joined by spaces and tokenized as one text, as a text is that a model is asked about later.

        Rows longer than `max_length` go on in further examples. A word that gives no token is neither learned nor
        scored; a row of only such is left out.
        """
        self.use(tokenizer)
        tagged = [tagged_words_of(row, index, self.columns) for index, row in enumerate(rows, first)]
        if not tagged:
            return Encoded()
        numbers = [
            np.asarray([self._number(tag, row, index) for tag in tags])
            for index, (row, (_, tags)) in enumerate(zip(rows, tagged, strict=True), first)
        ]
        pieces = tokenizer(
            [" ".join(words) for words, _ in tagged], truncation=True, max_length=max_length,
            return_overflowing_tokens=True, return_offsets_mapping=True,
        )  # fmt: skip
        examples, learned, before = Encoded(), set(), (-1, -1)
        for ids, offsets, text in zip(
            pieces["input_ids"], pieces["offset_mapping"], pieces["overflow_to_sample_mapping"], strict=True
        ):
            word_of = _words(np.asarray(offsets), tagged[text][0])
            last_word = before[1] if before[0] == text else -1
            targets, last_word = self._targets(word_of, numbers[text], last_word)
            before = text, last_word
            if (targets != IGNORED).any():
                examples.append(Example(np.asarray(ids, np.int32), targets))
                learned.add(text)
        examples.left_out = len(tagged) - len(learned)
        return examples

    def nothing_left(self, num_rows: int, max_length: int) -> str:
        return f"data.tokens: none of {num_rows} rows has a word that the tokenizer makes a token of"

    def why_left_out(self, max_length: int) -> str:
        return "the tokenizer makes no token of their words"

    def collate(self, rows: list[Row], pad_id: int, draws: list[int]) -> Batch:
        return self.token_model.collate(rows, pad_id)

    def sums(self, model: torch.nn.Module, batch: Batch) -> Sums:
        targets, num_labels = batch["targets"], len(self.labels)
        logits = model(**model_inputs(batch), **self.call).logits
        learned = torch.where(targets >= num_labels, targets - num_labels, targets)
        sums = {"loss": cross_entropy_sum(logits, learned), "count": (targets != IGNORED).sum()}
        if model.training:
            return sums
        asked = (targets != IGNORED) & (targets < num_labels)
        answers, gold = logits.argmax(-1)[asked], targets[asked]
        sums["labels"] = scores.label_counts(answers, gold, num_labels)
        if self.types:
            sums["entities"] = self._count_entities(answers, gold, _example_of_token(batch)[asked])
        return sums

    def summarize(self, totals: Totals) -> dict[str, float]:
        right, _, gold = totals["labels"].sum(-1)
        found = {"eval_loss": float(totals["loss"] / totals["count"]), "accuracy": float(right / gold)}
        if not self.types:
            return found | {"macro_f1": float(scores.precision_recall_f1(totals["labels"], "macro")[2])}
        values = scores.precision_recall_f1(totals["entities"], "micro")
        return found | {name: float(value) for name, value in zip(("precision", "recall", "f1"), values, strict=True)}

    def details(self, totals: Totals) -> dict[str, Any]:
        labels, counts = (self.types, totals["entities"]) if self.types else (self.labels, totals["labels"])
        return {"labels": labels, "f1": scores.precision_recall_f1(counts, None)[2].tolist()}

    def baseline(self, train: Sequence[Row], held_out: Sequence[Row], vocab_size: int) -> dict[str, float]:
        """What always giving the commonest tag scores, and giving each word the tag that its first token mostly has."""
        seen: dict[int, Counter[int]] = defaultdict(Counter)
        for token, tag in self._first_tokens(train):
            seen[token][tag] += 1
        commonest = sum(seen.values(), Counter[int]()).most_common(1)[0][0]
        usual = {token: tags.most_common(1)[0][0] for token, tags in seen.items()}
        right, guessed, words, counts = 0, 0, 0, np.zeros((3, len(self.types)), np.int64)
        for row in held_out:
            for example in row:
                asked = list(self._first_tokens([[example]]))
                gold, answers = [tag for _, tag in asked], [usual.get(token, commonest) for token, _ in asked]
                words += len(gold)
                right += sum(tag == commonest for tag in gold)
                guessed += sum(a == b for a, b in zip(answers, gold, strict=True))
                if self.types:
                    counts += self._count(answers, gold)
        found = {"majority_accuracy": right / words, "unigram_accuracy": guessed / words}
        if self.types:
            found["unigram_f1"] = float(scores.precision_recall_f1(counts, "micro")[2])
        return found

    def _number(self, tag: str, row: dict[str, Any], index: int) -> int:
        listed = self.section.labels is not None
        return number_of_label(tag, self.numbers, row, index, listed=listed, setting="tags")

    def _targets(self, word_of: np.ndarray, numbers: np.ndarray, last_word: int) -> tuple[np.ndarray, int]:
        """The targets of tokens of these words (-1: of none), and the last word of them or of the tokens before."""
        highest = np.maximum.accumulate([last_word, *word_of])
        is_first = word_of > highest[:-1]
        further = numbers[word_of] + len(self.labels) if self.section.tag_all_pieces else IGNORED
        targets = np.where(is_first, numbers[word_of], np.where(word_of >= 0, further, IGNORED))
        return targets.astype(np.int32), int(highest[-1])

    def _first_tokens(self, rows: Sequence[Row]) -> Iterator[tuple[int, int]]:
        """The first token of every word, and the number of its tag."""
        for row in rows:
            for example in row:
                asked = (example.targets != IGNORED) & (example.targets < len(self.labels))
                yield from zip(example.input_ids[asked].tolist(), example.targets[asked].tolist(), strict=True)

    def _count_entities(self, answers: torch.Tensor, gold: torch.Tensor, examples: torch.Tensor) -> torch.Tensor:
        borders = (np.flatnonzero(np.diff(examples.cpu().numpy())) + 1).tolist()
        parts = [np.split(each.cpu().numpy(), borders) for each in (answers, gold)]
        counts = [self._count(answered.tolist(), wanted.tolist()) for answered, wanted in zip(*parts, strict=True)]
        return torch.from_numpy(sum(counts, np.zeros((3, len(self.types)), np.int64)))

    def _count(self, answers: list[int], gold: list[int]) -> np.ndarray:
        numbers = {kind: number for number, kind in enumerate(self.types)}
        answered, wanted = ([self.labels[number] for number in each] for each in (answers, gold))
        return entities.count_spans(answered, wanted, numbers)


def _words(offsets: np.ndarray, words: list[str]) -> np.ndarray:
    """The word in which each token ends, shape [T]; -1 for a token of no letter (special ones, or white space alone).

    By its end, since many a token begins with the space before its word.
    """
    lengths = np.asarray([len(word) for word in words])
    ends = np.cumsum(lengths + 1) - 1
    last_letter = offsets[:, 1] - 1
    word_of = np.minimum(np.searchsorted(ends, last_letter, side="left"), len(words) - 1)
    inside = (last_letter >= ends[word_of] - lengths[word_of]) & (last_letter < ends[word_of])
    return np.where(inside & (offsets[:, 1] > offsets[:, 0]), word_of, -1)


def _example_of_token(batch: Batch) -> torch.Tensor:
    """The number of the example that each token is of, in the shape of the targets."""
    targets, mask = batch["targets"], batch["attention_mask"]
    if mask.dtype == torch.int32:  # packed: where examples end
        at = torch.arange(targets.shape[1], device=targets.device)
        return torch.searchsorted(mask.flatten().long()[1:].contiguous(), at, right=True)[None]
    return torch.arange(len(targets), device=targets.device)[:, None].expand_as(targets)
