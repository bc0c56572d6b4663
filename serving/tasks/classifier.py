"""What is said about a text, or about a pair of texts: one label, several of them, or a number."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from serving.manifest import NUMBER, SEVERAL, SINGLE, Manifest
from serving.session import Session
from serving.tasks.rows import Row
from serving.tasks.task import Answer, Question, TextTask, softmax
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
        scores = dict(zip(labels, softmax(logits_L).tolist(), strict=True))
        label = labels[int(logits_L.argmax())]  # as in training: of equal ones the first
        return cls(label, scores[label], scores)


class Classifier(TextTask):
    """Answers {label, score, scores, truncated}.

    Of a model that gives several labels {labels, scores, truncated}: `labels` are those more likely than not, each
    score is of its own. Of one that gives a number {label, score, truncated}: what the number is called, and itself.
    """

    task = "classification"

    def __init__(self, manifest: Manifest, session: Session, text: Text) -> None:
        super().__init__(manifest, session, text)
        self.labels: list[str] = manifest["labels"]
        self.problem: str = manifest.get("problem_type", SINGLE)

    def classify(self, texts: Sequence[str]) -> list[Prediction]:
        """Return the one label of each text. Raises BadInput, before any work, for one that is no valid text."""
        rows = [self.encode(text).rows[0] for text in texts]
        return [replace(Prediction.of(self.logits(row.ids), self.labels), truncated=row.truncated) for row in rows]

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Return the logits [L] of one single text. Raises FloatingPointError when they are not finite."""
        return self.run(Row(list(ids), False))[0]

    def answer_of(self, question: Question, logits: Sequence[np.ndarray]) -> Answer:
        [[logits_L]], [row] = logits, question.rows
        if self.problem == SEVERAL:
            answer = self._several(logits_L)
        elif self.problem == NUMBER:
            answer = {"label": self.labels[0], "score": float(logits_L[0])}
        else:
            answer = asdict(Prediction.of(logits_L, self.labels))
        return {**answer, "truncated": row.truncated}

    def _several(self, logits_L: np.ndarray) -> dict[str, Any]:
        with np.errstate(over="ignore"):
            scores = dict(zip(self.labels, (1 / (1 + np.exp(-logits_L.astype(np.float64)))).tolist(), strict=True))
        return {"labels": [label for label, logit in zip(self.labels, logits_L, strict=True) if logit > 0],
                "scores": scores}  # fmt: skip
