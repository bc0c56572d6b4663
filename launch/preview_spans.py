"""What a batch says, row by row: stretches of text, each with what the loss does there."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from transformers import PreTrainedTokenizerBase

from trainer.objectives import Objective
from trainer.packing import IGNORED, Batch, Row

LEGEND = {
    "learned": "carries loss",
    "context": "is read, carries no loss",
    "masked": "is hidden: before the arrow what the model reads, after it what it learns to find",
    "padding": "fills a row up; neither read nor learned",
}
_LABEL_KINDS = {"multi_label_classification": "labels", "regression": "number"}


@dataclass(frozen=True)
class Span:
    """A stretch of one kind, a key of LEGEND."""

    kind: str
    text: str


@dataclass(frozen=True)
class Document:
    """One example of a row; `label` is what a whole text is given by an objective that classifies."""

    spans: list[Span]
    label: str | None = None
    label_kind: str = "label"  # or labels, or number


@dataclass(frozen=True)
class ShownRow:
    documents: list[Document]
    tokens: int
    padding: int

    @property
    def kinds(self) -> set[str]:
        """The keys of LEGEND that say something about this row."""
        found = {span.kind for document in self.documents for span in document.spans}
        labelled = any(document.label is not None for document in self.documents)
        return found | ({"learned"} if labelled else set()) | ({"padding"} if self.padding else set())


def shown_rows(
    batch: Batch, rows: list[Row], objective: Objective, tokenizer: PreTrainedTokenizerBase
) -> Iterator[ShownRow]:
    """Yield the rows that `batch` was made of, as they stand in it: each in a line of its own, or all end to end."""
    ids, targets = batch["input_ids"].numpy(), batch["targets"].numpy()
    end_to_end = len(ids) < len(rows)
    start = 0
    for number, row in enumerate(rows):
        line = 0 if end_to_end else number
        first, documents = start, []
        for example in row:
            stop = start + len(example.input_ids)
            of_tokens = targets.shape == ids.shape
            documents.append(
                _document(
                    ids[line, start:stop], targets[line, start:stop] if of_tokens else targets[line],
                    objective, tokenizer,
                )
            )  # fmt: skip
            start = stop
        tokens = start - first
        yield ShownRow(documents, tokens, padding=0 if end_to_end else ids.shape[1] - tokens)
        start = start if end_to_end else 0


def _document(
    ids: np.ndarray, targets: np.ndarray, objective: Objective, tokenizer: PreTrainedTokenizerBase
) -> Document:
    match objective.head:
        case "AutoModelForCausalLM":
            return Document(_merged(_next_tokens(ids, targets), tokenizer))
        case "AutoModelForMaskedLM":
            return Document(list(_hidden(ids, targets, tokenizer)))
        case "AutoModelForTokenClassification":
            return Document(list(_tagged(ids, targets, objective.labels or [], tokenizer)))
        case _:
            whole = _merged((("context", int(token)) for token in ids), tokenizer)
            kind = _LABEL_KINDS.get(objective.problem_type or "", "label")
            return Document(whole, _label(targets, objective.labels), kind)


def _next_tokens(ids: np.ndarray, targets: np.ndarray) -> Iterator[tuple[str, int]]:
    """Each token with its kind. A target stands one place before its token, so the last one is in no input."""
    yield "context", int(ids[0])
    for read, learned in zip([*ids[1:], IGNORED], targets, strict=True):
        if learned != IGNORED:
            yield "learned", int(learned)
        elif read != IGNORED:
            yield "context", int(read)


def _hidden(ids: np.ndarray, targets: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> Iterator[Span]:
    """Tokens to find are shown one by one; one of them that was left as it is reads like any other."""
    kinds = [
        "context" if t == IGNORED else "learned" if t == i else "masked" for i, t in zip(ids, targets, strict=True)
    ]
    for kind, group in groupby(range(len(ids)), key=lambda i: kinds[i]):
        places = list(group)
        if kind == "masked":
            yield from (Span(kind, f"{_text([ids[i]], tokenizer)} → {_text([targets[i]], tokenizer)}") for i in places)
        else:
            yield Span(kind, _text([ids[i] for i in places], tokenizer))


def _tagged(
    ids: np.ndarray, targets: np.ndarray, tags: list[str], tokenizer: PreTrainedTokenizerBase
) -> Iterator[Span]:
    """Each token that learns a tag with it; the other pieces of words and what the tokenizer adds are context.

    Pieces that learn the tag of their word have its number plus that of the tags: see the objective.
    """
    for learned, group in groupby(range(len(ids)), key=lambda i: targets[i] != IGNORED):
        places = list(group)
        if learned:
            for i in places:
                yield Span("learned", f"{_text([ids[i]], tokenizer)} = {tags[targets[i] % len(tags)]}")
        else:
            yield Span("context", _text([ids[i] for i in places], tokenizer))


def _merged(tokens: Iterable[tuple[str, int]], tokenizer: PreTrainedTokenizerBase) -> list[Span]:
    """Neighbours of one kind are decoded together: a character may have several tokens."""
    return [
        Span(kind, _text([token for _, token in group], tokenizer))
        for kind, group in groupby(tokens, key=lambda token: token[0])
    ]


def _text(ids: Iterable[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return tokenizer.decode([int(token) for token in ids], clean_up_tokenization_spaces=False)


def _label(target: np.ndarray, labels: list[str] | None) -> str:
    """A class by its name, the classes that are on, or the number itself."""
    if labels is None or (np.issubdtype(target.dtype, np.floating) and target.size == 1):
        return f"{float(target.item()):g}"
    if target.size == 1:
        return labels[int(target.item())]
    return ", ".join(label for label, on in zip(labels, target, strict=True) if on) or "none"
