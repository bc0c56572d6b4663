"""What the tasks over texts share: opened once verified, a text becomes rows, and the graph's numbers an answer."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from serving.manifest import Manifest, proven_manifest
from serving.session import Session
from serving.tasks.rows import Row, encode_row, run_rows
from serving.text import Text

Answer = dict[str, Any]


@dataclass(frozen=True)
class Question:
    """A text and the rows that are run for it: one, but for a long text whose every word is asked about."""

    text: str
    rows: list[Row]


class TextTask(ABC):
    """A verified ONNX directory, ready to answer. Safe to use from one thread at a time.

    Texts run one by one: no text's answer can depend on its neighbours, and on CPU that is faster than padded batches.
    """

    task: ClassVar[str]

    def __init__(self, manifest: Manifest, session: Session, text: Text) -> None:
        self.manifest, self.text = manifest, text
        self._session = session

    @classmethod
    def open(cls, folder: str | Path, *, provider: str = "cpu", threads: int | None = None) -> Self:
        """Open an ONNX directory for serving.

        Raises BadInput when the directory is of another task, is altered, or has no passed verification for this
        provider and this onnxruntime, and when the provider is not there.
        """
        folder = Path(folder)
        manifest = proven_manifest(folder, provider, cls.task)
        return cls(manifest, Session.open(folder, provider=provider, threads=threads), Text.open(folder))

    def encode(self, text: str, pair: str | None = None) -> Question:
        """Return what is run for a text or a pair. Raises BadInput for one that cannot be answered."""
        return Question(text, [encode_row(self.text, self.manifest, text, pair)])

    def answer(self, question: Question) -> Answer:
        """Return the answer, as JSON. Raises FloatingPointError when the model's numbers are not finite."""
        return self.answer_of(question, [self.run(row) for row in question.rows])

    def run(self, row: Row) -> np.ndarray:
        """Return the graph's numbers [R, L] for one row. Raises FloatingPointError when they are not finite."""
        [logits_RL] = run_rows(self._session, self.manifest, [row])
        if not np.isfinite(logits_RL).all():
            raise FloatingPointError("the model's logits are not finite")
        return logits_RL

    @abstractmethod
    def answer_of(self, question: Question, logits: Sequence[np.ndarray]) -> Answer:
        """Return the answer, as JSON, that the numbers of the question's rows make."""


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return the probabilities along the last axis, in fp64."""
    weights = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)
