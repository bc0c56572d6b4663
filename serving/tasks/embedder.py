"""A vector for a text: its tokens' hidden states pooled, and of length 1 where the model was made so."""

from collections.abc import Sequence

import numpy as np

from serving.tasks.task import Answer, Question, TextTask


class Embedder(TextTask):
    """Answers {embedding, truncated}."""

    task = "embedding"

    def encode(self, text: str, pair: str | None = None) -> Question:
        """Return the row of a text without the spaces around it, which sentence-transformers takes away too."""
        return super().encode(text.strip(), pair)

    def answer_of(self, question: Question, logits: Sequence[np.ndarray]) -> Answer:
        [[vector_L]], [row] = logits, question.rows
        return {"embedding": vector_L.tolist(), "truncated": row.truncated}
