"""Texts that the source is asked about, as transformers' tokenizer makes rows of them, and the answers it was taught.

Written with transformers and torch alone: what serves does the same by other means, and is compared with this.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from serving.export.heads import Inputs
from serving.export.reference import TEXTS
from serving.export.source import Source
from serving.manifest import NUMBER, SEVERAL
from serving.verify_rows import LONGEST_PADDED

FAR_SCORES_BYTES = 256 << 20  # of one layer's attention to the one text that is longer
FAR_SLACK = 8  # tokens that a text may have more of when its end is cut off, or a mask is put into it
WORD_COUNTS = (1, 2, 5, 12, 40)
TOP_K = 5

Settings = dict[str, Any]


@dataclass(frozen=True)
class Question:
    """A text, maybe a second one, cut at `max_length` tokens, and the rows that the model is given for it.

    `offsets` are, for each row, the characters of each token, where words are asked about.
    """

    text: str
    pair: str | None
    max_length: int
    rows: list[Inputs]
    is_cut: bool
    offsets: list[list[tuple[int, int]]]

    def answered(self, outputs: list[torch.Tensor], tokenizer: PreTrainedTokenizerBase, source: Source) -> dict:
        """Return the question with the answer that `outputs` make, as JSON.

        `margin` is how near the answer was to another one: the smallest difference of two logits that decided.
        """
        answer, margin = ANSWERS[source.task](self, outputs, tokenizer, source)
        rows = [{name: row[name][0].tolist() for name in row if name.endswith("_ids")} for row in self.rows]
        counts = [len(each) for each in outputs]
        facts = {"text": self.text, "pair": self.pair, "max_length": self.max_length, "is_cut": self.is_cut}
        return {**facts, "rows": rows, "counts": counts, "answer": answer, "margin": margin}


def questions(tokenizer: PreTrainedTokenizerBase, source: Source, settings: Settings) -> list[Question]:
    """Return texts of ragged lengths: none, a word, sentences, special tokens at both ends, one that is cut.

    Before them, where rows may be longer than theirs, one as long as they may be: far positions, windows and attention
    that is another for long texts show there alone. It is asked first, since a short text may change a model (BigBird).
    """
    return [*_far_question(tokenizer, source, settings), *_near_questions(tokenizer, source, settings)]


def _far_question(tokenizer: PreTrainedTokenizerBase, source: Source, settings: Settings) -> list[Question]:
    num_heads = getattr(source.config, "num_attention_heads", None) or 1
    length = min(settings["max_length"], math.isqrt(FAR_SCORES_BYTES // (4 * num_heads)))
    if length <= LONGEST_PADDED:
        return []
    words = " ".join(" ".join(TEXTS).split() * (1 + length // 20))
    offsets = tokenizer(words, truncation=True, max_length=length - FAR_SLACK, return_offsets_mapping=True)
    text = words[: max(end for _, end in offsets["offset_mapping"])].rpartition(" ")[0]
    if source.task == "masked_lm":
        text = _masked([text], settings["mask_token"])[-1]
    if source.task == "token_classification":
        return [_in_windows(tokenizer, text, length)]
    half = text.index(" ", len(text) // 2)
    first, second = (text[:half], text[half + 1 :]) if settings.get("text_pair") == "always" else (text, None)
    return [question_of(tokenizer, settings, first, second, length)]


def _near_questions(tokenizer: PreTrainedTokenizerBase, source: Source, settings: Settings) -> list[Question]:
    length = min(settings["max_length"], LONGEST_PADDED)
    texts = _texts(tokenizer, length)
    if source.task == "masked_lm":
        asked = (
            question_of(tokenizer, settings, text, None, length) for text in _masked(texts, settings["mask_token"])
        )
        return [each for each in asked if not each.is_cut]
    if source.task == "token_classification":
        return [_in_windows(tokenizer, text, length) for text in texts]
    pairs = settings.get("text_pair", "never")
    singles = [(text, None) for text in texts if pairs != "always"]
    both = [*zip(texts, [*texts[3:], *texts[:3]], strict=True), (texts[-1], texts[-1])] if pairs != "never" else []
    found = [question_of(tokenizer, settings, *each, length) for each in (*singles, *both)]
    return [each for each in found if each.rows]


def _texts(tokenizer: PreTrainedTokenizerBase, length: int) -> list[str]:
    words = " ".join(TEXTS).split()
    specials = tokenizer.all_special_tokens
    ends = [f"{token} The list {token}" for token in specials[:4]]
    starts = [" ".join(words[:count]) for count in WORD_COUNTS]
    return ["", *starts, *TEXTS, *ends, "".join(specials), " ".join(words * (1 + length // len(words)))]


def _masked(texts: list[str], mask: str) -> list[str]:
    """Return the texts with a word in the middle replaced by the mask, and two that hold several."""
    found = [mask, f"{mask} {mask} reads the {mask}."]
    for text in texts:
        words = text.replace(mask, "").split(" ")
        found.append(" ".join([*words[: len(words) // 2], mask, *words[len(words) // 2 + 1 :]]))
    return found


def question_of(
    tokenizer: PreTrainedTokenizerBase, settings: Settings, text: str, pair: str | None, length: int
) -> Question:
    """Return a text or a pair as one row, cut as in training; without a row where nothing stands for it."""
    if pair is not None and settings["pair_separator_id"] is not None:
        return _joined(tokenizer, text, pair, length)
    # In lists, as in training: an empty second text counts there, and alone it would not.
    texts = [[text.strip() if "pooling" in settings else text]] if pair is None else [[text], [pair]]
    encoded = tokenizer(*texts, truncation=True, max_length=length, return_token_type_ids=True)
    [ids], [types] = encoded["input_ids"], encoded["token_type_ids"]
    is_cut = len(tokenizer(*texts, verbose=False)["input_ids"][0]) > length
    ids = ids or settings["empty_text_ids"]
    row = {"input_ids": ids, "attention_mask": [1] * len(ids)}
    if settings["token_types"]:
        row["token_type_ids"] = types or [0] * len(ids)
    if "mask_token_id" in settings:
        row["keep"] = [place for place, token in enumerate(ids) if token == settings["mask_token_id"]]
    return Question(text, pair, length, [_tensors(row)] if ids else [], is_cut, [])


def _joined(tokenizer: PreTrainedTokenizerBase, text: str, pair: str, length: int) -> Question:
    """Return a pair with the end token between, which a tokenizer of decoders does not put there."""
    first, second = (tokenizer(each, add_special_tokens=False, verbose=False)["input_ids"] for each in (text, pair))
    whole = len(first) + len(second)
    while len(first) + len(second) > length - 1:  # of two as long, the second
        (first if len(first) > len(second) else second).pop()
    ids = [*first, tokenizer.eos_token_id, *second]
    row = {"input_ids": ids, "attention_mask": [1] * len(ids)}
    return Question(text, pair, length, [_tensors(row)], len(ids) - 1 < whole, [])


def _in_windows(tokenizer: PreTrainedTokenizerBase, text: str, length: int) -> Question:
    """Return a text of whose every word a tag is wanted: it goes on in further rows."""
    windows = tokenizer(
        text, truncation=True, max_length=length, return_overflowing_tokens=True, return_offsets_mapping=True
    )
    pairs = [
        (ids, offsets) for ids, offsets in zip(windows["input_ids"], windows["offset_mapping"], strict=True) if ids
    ]
    rows = [_tensors({"input_ids": ids, "attention_mask": [1] * len(ids)}) for ids, _ in pairs]
    return Question(text, None, length, rows, False, [offsets for _, offsets in pairs])


def _tensors(row: dict[str, list[int]]) -> Inputs:
    return {name: torch.tensor(values) if name == "keep" else torch.tensor([values]) for name, values in row.items()}


# --- what the outputs mean -------------------------------------------------------------------------------------------


def _of_text(
    question: Question, outputs: list[torch.Tensor], tokenizer: PreTrainedTokenizerBase, source: Source
) -> tuple[dict[str, Any], float]:
    [[logits]] = outputs
    names = source.labels
    if source.problem == NUMBER:
        return {"label": names[0], "score": float(logits)}, float("inf")
    if source.problem == SEVERAL:
        scores = torch.sigmoid(logits.double()).tolist()
        found = [name for name, score in zip(names, scores, strict=True) if score > 0.5]
        return {"labels": found, "scores": dict(zip(names, scores, strict=True))}, float(logits.abs().min())
    scores = torch.softmax(logits.double(), -1).tolist()
    first, second = logits.topk(2).values.tolist()
    label = names[int(logits.argmax())]
    return {"label": label, "score": max(scores), "scores": dict(zip(names, scores, strict=True))}, first - second


def _of_words(
    question: Question, outputs: list[torch.Tensor], tokenizer: PreTrainedTokenizerBase, source: Source
) -> tuple[dict[str, Any], float]:
    """The tag of each word: that of the first token that holds a character of it, its first ones before others."""
    by_character: dict[int, torch.Tensor] = {}
    for logits, offsets in zip(outputs, question.offsets, strict=True):
        for token, (start, end) in enumerate(offsets):
            for character in range(start, end):
                by_character.setdefault(character, logits[token])
    words, margin, at = [], float("inf"), 0
    for word in question.text.split():
        start = question.text.index(word, at)
        at = start + len(word)
        tokens = [by_character[each] for each in range(start, at) if each in by_character]
        if tokens:
            first, second = tokens[0].topk(2).values.tolist()
            margin = min(margin, first - second)
            words.append({"text": word, "start": start, "tag": source.labels[int(tokens[0].argmax())]})
    return {"words": words}, margin


def _of_masks(
    question: Question, outputs: list[torch.Tensor], tokenizer: PreTrainedTokenizerBase, source: Source
) -> tuple[dict[str, Any], float]:
    [logits] = outputs
    values, ids = logits.topk(min(TOP_K + 1, logits.shape[-1]))
    scores = torch.softmax(logits.double(), -1)
    masks = [
        [{"token": tokenizer.decode([token]), "token_id": token, "score": float(scores[place, token])} for token in row]
        for place, row in enumerate(ids[:, :TOP_K].tolist())
    ]
    return {"masks": masks}, float((values[:, :-1] - values[:, 1:]).min())


def _vector(
    question: Question, outputs: list[torch.Tensor], tokenizer: PreTrainedTokenizerBase, source: Source
) -> tuple[dict[str, Any], float]:
    return {"embedding": outputs[0][0].tolist()}, float("inf")


ANSWERS = {
    "classification": _of_text,
    "token_classification": _of_words,
    "masked_lm": _of_masks,
    "embedding": _vector,
}
