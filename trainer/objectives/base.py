"""The interface of an objective. It knows texts, tokens and tensors; not ranks, checkpoints or which weights learn."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from trainer.config import EmbeddedData, FileData
from trainer.packing import IGNORED, Batch, Example, Row

Sums = dict[str, torch.Tensor]


class Objective(ABC):
    """Built once per run from the data section and the training rows."""

    head: str  # the AutoModelFor... class of transformers
    score: tuple[str, str]  # the metric that ranks runs, and "min" or "max"
    sum_names: tuple[str, ...] = ("loss",)  # the keys of `sums`
    labels: list[str] | None = None

    def __init__(self, data: EmbeddedData | FileData, train: list[dict[str, Any]]) -> None:
        self.columns = FileData(type="files", train="embedded") if isinstance(data, EmbeddedData) else data

    @abstractmethod
    def texts(self, rows: list[dict[str, Any]]) -> Iterator[str]:
        """The plain text in the rows, for training a tokenizer."""

    @abstractmethod
    def encode(self, rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Example]:
        """Return the examples of the rows, in order, each of at most `max_length` tokens."""

    @abstractmethod
    def to_rows(self, examples: list[Example], max_length: int) -> list[Row]:
        """Return the rows that batches are made of."""

    @abstractmethod
    def collate(self, rows: list[Row], pad_id: int) -> Batch:
        """Return one batch: the model's inputs and `targets`."""

    @abstractmethod
    def sums(self, model: torch.nn.Module, batch: Batch) -> Sums:
        """Run the model; return `loss` (summed, differentiable) and whatever else `summarize` needs, as sums."""

    @abstractmethod
    def summarize(self, sums: dict[str, float], count: float) -> dict[str, float]:
        """Return the metrics of sums over batches and ranks, `count` being the number of targets."""

    @abstractmethod
    def baseline(self, train: list[Row], held_out: list[Row], vocab_size: int) -> dict[str, float]:
        """Return what knowing only the frequencies in `train` would score on `held_out`."""

    def count(self, batch: Batch) -> int:
        """Return the number of targets that carry loss."""
        return int((batch["targets"] != IGNORED).sum())


def model_inputs(batch: Batch) -> Batch:
    """Return the batch without its targets."""
    return {name: tensor for name, tensor in batch.items() if name != "targets"}
