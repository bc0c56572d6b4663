"""The interface of an objective. It knows texts, tokens and tensors; not ranks, checkpoints or which weights learn."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from trainer.packing import IGNORED, Batch, Encoded, Row

Sums = dict[str, torch.Tensor]
Totals = dict[str, np.ndarray]


class Objective(ABC):
    """Built once per run from the objective and data sections and one pass over the training rows."""

    head: str  # the AutoModelFor... class of transformers
    score: tuple[str, str]  # the metric that ranks runs, and "min" or "max"
    packs: bool  # a row of a batch holds several examples, up to the longest length; else one
    loses_rest: bool = False  # of what is longer than the longest length, the rest goes on in no other example
    labels: list[str] | None = None
    logits_at_once: int | None = None  # the most rows of logits that the loss holds, where it never holds all
    problem_type: str | None = None  # for the model's config: which loss transformers computes on labels

    def __init__(self, section: Any, data: Any, train: Iterable[dict[str, Any]]) -> None:
        self.section = section
        self.columns = data.columns

    def try_out(self, model: torch.nn.Module, max_length: int) -> list[str]:
        """Find out, before rows are made, how this model can be run; say what the run has to do without, a line each.

        May change `packs` and what `collate` returns, and the model's attention; not its weights.
        """
        return []

    def use(self, tokenizer: PreTrainedTokenizerBase) -> None:  # noqa: B027 (most need nothing)
        """Take from the run's tokenizer what `encode` and `collate` need; called once, before either.

        Raises BadInput for a tokenizer that cannot serve.
        """

    @abstractmethod
    def texts(self, rows: Iterable[dict[str, Any]]) -> Iterator[str]:
        """The plain text in the rows, for training a tokenizer."""

    def check(self, rows: Iterable[dict[str, Any]]) -> None:
        """Read the rows as `encode` will, without a tokenizer. Raises BadInput for the first that it would refuse."""
        for _ in self.texts(rows):
            pass

    @abstractmethod
    def encode(
        self, rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, max_length: int, first: int = 0
    ) -> Encoded:
        """Return the examples of a part of the rows, in order, each of at most `max_length` tokens; maybe none.

        Its `left_out` counts the rows that gave none. `first` is the number of the first row in the whole, for errors
        that say where a row stands.
        """

    @abstractmethod
    def nothing_left(self, num_rows: int, max_length: int) -> str:
        """Return the error for rows that gave no example at all."""

    def why_left_out(self, max_length: int) -> str:
        """Say what is wrong with rows that gave no example; completes "left out 12 of 100 rows: "."""
        return "they are empty"

    @abstractmethod
    def collate(self, rows: list[Row], pad_id: int, draws: list[int]) -> Batch:
        """Return one batch: the model's inputs and `targets`.

        `draws` holds a seed for each row, a function of (run seed, epoch, row): whatever is random comes from it.
        """

    @abstractmethod
    def sums(self, model: torch.nn.Module, batch: Batch) -> Sums:
        """Run the model; return tensors that add up over batches and ranks, of any shape.

        Always `loss` (summed, a scalar, differentiable) and `count` (what the loss is divided by in the end). Of a
        model in evaluation mode also what the metrics are made of.
        """

    @abstractmethod
    def summarize(self, totals: Totals) -> dict[str, float]:
        """Return the metrics of sums over batches and ranks, `eval_loss` among them."""

    def details(self, totals: Totals) -> dict[str, Any]:
        """Return what the sums say beside single numbers, as JSON: the confusion matrix, F1 by label; maybe nothing."""
        return {}

    @abstractmethod
    def baseline(self, train: Sequence[Row], held_out: Sequence[Row], vocab_size: int) -> dict[str, float]:
        """Return what knowing only the frequencies in `train` would score on `held_out`."""

    def count(self, row: Row, draw: int) -> float:
        """Return what the row adds to `count` of `sums`, without running a model: the targets that carry loss."""
        return sum(int((example.targets != IGNORED).sum()) for example in row)


def model_inputs(batch: Batch) -> Batch:
    """Return the batch without its targets."""
    return {name: tensor for name, tensor in batch.items() if name != "targets"}


def no_cache(model: torch.nn.Module) -> dict[str, bool]:
    """Return what the model is called with so that it keeps no keys and values for later tokens: nothing reads them."""
    return {"use_cache": False} if getattr(getattr(model, "config", None), "use_cache", False) else {}
