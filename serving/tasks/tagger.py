"""A tag for every word of a text: names of people and places, parts of speech."""

import re
from collections.abc import Sequence

import numpy as np

from serving.tasks.entities import are_entity_tags, spans
from serving.tasks.rows import Row
from serving.tasks.task import Answer, Question, TextTask, softmax

_WORD = re.compile(r"\S+")


class Tagger(TextTask):
    """Answers {words: [{text, start, end, tag, score}]}; `start` and `end` count characters of the text.

    Words are what white space parts, as in training; the tag of a word is that of its first token, and one that the
    tokenizer makes no token of is left out. A text longer than the model reads goes on in further rows. Where the tags
    mark spans (B-PER, I-PER, O ...), `entities` holds those: {type, text, start, end, score}, as sure as their least
    sure word.
    """

    task = "token_classification"

    def encode(self, text: str, pair: str | None = None) -> Question:
        """Return the rows of a text, as many as its tokens need; none for a text without any."""
        if pair is not None:
            return super().encode(text, pair)  # which says why not
        windows = self.text.encode_windows(text, self.manifest["max_length"])
        return Question(text, [Row(ids, False, offsets=offsets) for ids, offsets in windows])

    def answer_of(self, question: Question, logits: Sequence[np.ndarray]) -> Answer:
        labels, words = self.manifest["labels"], []
        for start, end, logits_L in first_tokens(question, logits):
            best = int(logits_L.argmax())
            score = float(softmax(logits_L)[best])
            word = {"text": question.text[start:end], "start": start, "end": end}
            words.append({**word, "tag": labels[best], "score": score})
        if not are_entity_tags(labels):
            return {"words": words}
        entities = []
        for kind, first, last in spans([word["tag"] for word in words]):
            start, end = words[first]["start"], words[last]["end"]
            score = min(word["score"] for word in words[first : last + 1])
            found = {"type": kind, "text": question.text[start:end], "start": start, "end": end}
            entities.append({**found, "score": score})
        return {"words": words, "entities": entities}


def first_tokens(question: Question, logits: Sequence[np.ndarray]) -> list[tuple[int, int, np.ndarray]]:
    """Return where each word begins and ends, and the logits [L] of its first token.

    A token is of the word that its last letter is in: many a token begins with the space before its word.
    """
    word_ends = [match.span() for match in _WORD.finditer(question.text)]
    ends = [end for _, end in word_ends]
    found: list[tuple[int, int, np.ndarray]] = []
    before = -1
    rows = [(row.offsets or [], logits_TL) for row, logits_TL in zip(question.rows, logits, strict=True)]
    for offsets, logits_TL in sorted(rows, key=_last_character):  # cut on the left, the end comes first
        for (first, after), logits_L in zip(offsets, logits_TL, strict=True):
            word = int(np.searchsorted(ends, after - 1, side="right"))
            if after > first and before < word < len(ends) and word_ends[word][0] < after:
                found.append((*word_ends[word], logits_L))
                before = word
    return found


def _last_character(row: tuple[Sequence[tuple[int, int]], np.ndarray]) -> int:
    return max((after for _, after in row[0]), default=0)
