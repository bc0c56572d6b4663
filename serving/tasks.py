"""Whole texts in, answers out: `Classifier`. Tokens are those of training, and a text's answer never depends on others.

Shape letters: N rows, L labels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from serving.directory import BadInput
from serving.manifest import Manifest, proven_manifest
from serving.session import Session
from serving.text import Text


@dataclass(frozen=True)
class Prediction:
    """The likeliest label, its score, and the scores of all labels, which add up to 1.

    `truncated`: the text had more tokens than the model was trained on (`max_length`), and the rest was not read.
    """

    label: str
    score: float
    scores: dict[str, float]
    truncated: bool = False

    @classmethod
    def of(cls, logits_L: np.ndarray, labels: Sequence[str]) -> "Prediction":
        """Return the softmax of one row's logits, by label."""
        weights_L = np.exp(logits_L.astype(np.float64) - logits_L.max())
        scores = dict(zip(labels, (weights_L / weights_L.sum()).tolist(), strict=True))
        label = labels[int(logits_L.argmax())]  # as in training: of equal ones the first
        return cls(label, scores[label], scores)


@dataclass(frozen=True)
class Row:
    """The token ids of one text, and whether it was cut."""

    ids: list[int]
    truncated: bool


def encode_row(text: Text, manifest: Mapping[str, Any], content: str) -> Row:
    """Return the tokens of a text as in training: cut at `max_length`, an empty one as its stand-in. Raises BadInput.

    It is cut, not refused, because training and evaluation cut it: the reported accuracy is of cut texts.
    """
    ids, is_cut = text.encode_cut(content, manifest["max_length"])
    if not ids and not manifest["empty_text_ids"]:
        raise BadInput("text: is empty, and this model's tokenizer has no end token to stand for it; leave it out")
    return Row(ids or list(manifest["empty_text_ids"]), is_cut)


def padded_logits(session: Session, manifest: Mapping[str, Any], rows: Sequence[Sequence[int]]) -> np.ndarray:
    """Return the logits [N, L] of several rows in one run, the shorter ones padded right."""
    shape = (len(rows), max(map(len, rows)))
    input_ids, attention_mask = np.full(shape, manifest["pad_token_id"], np.int64), np.zeros(shape, np.int64)
    for index, ids in enumerate(rows):
        input_ids[index, : len(ids)] = ids
        attention_mask[index, : len(ids)] = 1
    logits_NL = np.empty((len(rows), len(manifest["labels"])), np.float32)
    feeds = {"input_ids": input_ids, "attention_mask": attention_mask}
    session.run(session.bind(feeds, logits_NL, {}, first_slot=0))
    return logits_NL


class Classifier:
    """A verified ONNX directory, ready to tell the label of a text. Safe to use from one thread at a time.

    Texts run one by one: no text's answer can depend on its neighbours, and on CPU that is faster than padded batches.
    """

    def __init__(self, manifest: Manifest, session: Session, text: Text) -> None:
        self.manifest, self.text = manifest, text
        self.labels: list[str] = manifest["labels"]
        self._session = session

    @classmethod
    def open(cls, folder: str | Path, *, provider: str = "cpu", threads: int | None = None) -> "Classifier":
        """Open an ONNX directory for serving.

        Raises BadInput when the directory is no classifier, is altered, or has no passed verification for this
        provider and this onnxruntime, and when the provider is not there.
        """
        folder = Path(folder)
        manifest = proven_manifest(folder, provider, "classification")
        return cls(manifest, Session.open(folder, provider=provider, threads=threads), Text.open(folder))

    def classify(self, texts: Sequence[str]) -> list[Prediction]:
        """Return the prediction for each text. Raises BadInput, before any work, for one that is no valid text."""
        rows = [self.encode(text) for text in texts]
        return [self.answer(row) for row in rows]

    def encode(self, text: str) -> Row:
        """Return the tokens of a text; see `encode_row`."""
        return encode_row(self.text, self.manifest, text)

    def answer(self, row: Row) -> Prediction:
        """Return the prediction for one row. Raises FloatingPointError when its logits are not finite."""
        return replace(Prediction.of(self.logits(row.ids), self.labels), truncated=row.truncated)

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Return the logits [L] of one row. Raises FloatingPointError when they are not finite."""
        [logits_L] = padded_logits(self._session, self.manifest, [ids])
        if not np.isfinite(logits_L).all():
            raise FloatingPointError("the model's logits are not finite")
        return logits_L
