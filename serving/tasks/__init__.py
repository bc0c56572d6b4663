"""Whole texts in, answers out. Tokens are those of training, and a text's answer never depends on others.

One file a task: labels of texts (classifier.py), tags of words (tagger.py), words for masks (mask_filler.py), vectors
(embedder.py). What they share is in task.py and rows.py.
"""

from pathlib import Path
from typing import Any

from serving.directory import read_manifest
from serving.tasks.classifier import Classifier, Prediction
from serving.tasks.embedder import Embedder
from serving.tasks.mask_filler import MaskFiller
from serving.tasks.rows import Row, encode_row, run_rows
from serving.tasks.tagger import Tagger
from serving.tasks.task import Question, TextTask

__all__ = [
    "TASKS", "Classifier", "Embedder", "MaskFiller", "Prediction", "Question", "Row", "Tagger", "TextTask",
    "encode_row", "open_task", "run_rows",
]  # fmt: skip

TASKS: dict[str, type[TextTask]] = {
    "classification": Classifier,
    "token_classification": Tagger,
    "masked_lm": MaskFiller,
    "embedding": Embedder,
}


def open_task(folder: str | Path, **settings: Any) -> TextTask:
    """Open an ONNX directory by its own task; `settings` are those of `TextTask.open`.

    Raises BadInput for one that answers no texts, is altered, or has no passed verification.
    """
    task = read_manifest(Path(folder), "onnx").get("task")
    return TASKS.get(task or "", Classifier).open(folder, **settings)
