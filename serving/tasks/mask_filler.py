"""The likeliest tokens in the place of each mask of a text."""

from collections.abc import Sequence

import numpy as np

from serving.directory import BadInput
from serving.tasks.rows import masks
from serving.tasks.task import Answer, Question, TextTask, softmax

TOP_K = 5


class MaskFiller(TextTask):
    """Answers {masks: [[{token, token_id, score}, ...], ...], text}: `top_k` tokens for each mask, the likeliest first,
    and the text with the likeliest in every place, each chosen alone.
    """

    task = "masked_lm"
    top_k = TOP_K

    def encode(self, text: str, pair: str | None = None) -> Question:
        """Return the row of a text with masks. Raises BadInput for one that has none, or one past what is read."""
        question = super().encode(text, pair)
        mask, [row] = self.manifest["mask_token"], question.rows
        if row.truncated:
            raise BadInput(f"text: is longer than the {self.manifest['max_length']} tokens that are read; shorten it")
        if not masks(self.manifest, row):
            raise BadInput(f"text: has no {mask}; put {mask} where a word is wanted")
        return question

    def answer_of(self, question: Question, logits: Sequence[np.ndarray]) -> Answer:
        [logits_RV], [row] = logits, question.rows
        ids, answers = list(row.ids), []
        for place, logits_V in zip(masks(self.manifest, row), logits_RV, strict=True):
            best = np.argsort(-logits_V, kind="stable")[: self.top_k].tolist()
            scores_V = softmax(logits_V)
            answers.append([
                {"token": self.text.decode([token], skip_special_tokens=False), "token_id": token,
                 "score": float(scores_V[token])}
                for token in best
            ])  # fmt: skip
            ids[place] = best[0]
        return {"masks": answers, "text": self.text.decode(ids)}
