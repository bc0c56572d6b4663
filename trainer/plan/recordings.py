"""The passes of one run's rows through one model, each recorded once, in the way that each mode runs them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from trainer import modes
from trainer.config import RunConfig
from trainer.feed import Feed
from trainer.packing import Batch, repeated
from trainer.plan.passes import Passes, record
from trainer.plan.sketch import Sketch

_MOST_TOKENS = 2**13  # of a pass that is recorded as it is: attention within short documents takes many operations


class Recordings:
    """Larger passes are recorded of fewer rows: what the others add is that of as many more of the longest row."""

    def __init__(self, sketch: Sketch, config: RunConfig, feed: Feed, *, world_size: int, on_gpu: bool) -> None:
        self.sketch, self.config, self.world_size, self.on_gpu = sketch, config, world_size, on_gpu
        self.micro_rows = modes.micro_rows(config, world_size)
        self.accumulation = config.batch.rows // (self.micro_rows * world_size)
        self._row = feed.longest(1)
        self.length = int(self._row["input_ids"].shape[1])
        self._batch = feed.longest(_rows_run(self.micro_rows, self.length))
        self._passes: dict[str, Passes] = {}
        self._most: dict[tuple[str, int, int], int] = {}

    @property
    def batch_bytes(self) -> int:
        """The tensors of one forward pass: those of the next are made when it is done."""
        size = sum(tensor.nbytes for tensor in self._batch.values())
        return size * self.micro_rows // _rows_run(self.micro_rows, self.length)

    def passes(self, mode: str) -> Passes:
        """Return what the passes of a micro-batch do, or of the first rows of it."""
        key = self._computes(mode)
        if key not in self._passes:
            self._passes[key] = self._record(mode, self._batch, only_learning=False)
        return self._passes[key]

    def pass_bytes(self, mode: str, rows: int, length: int) -> int:
        """Return the most bytes at once of a pass over so many of the longest row: what it makes, without gradients."""
        run = _rows_run(rows, length)
        most = self._recorded_bytes(mode, run, length)
        if run == rows:
            return most
        fewer = run // 2
        return most + (rows - run) * (most - self._recorded_bytes(mode, fewer, length)) // (run - fewer)

    @property
    def is_whole(self) -> bool:
        """Whether all rows of a pass are in what is recorded."""
        return _rows_run(self.micro_rows, self.length) == self.micro_rows

    def beyond_bytes(self, mode: str) -> int:
        """Return what the rows add that are not recorded."""
        if self.is_whole:
            return 0
        recorded = self.pass_bytes(mode, _rows_run(self.micro_rows, self.length), self.length)
        return self.pass_bytes(mode, self.micro_rows, self.length) - recorded

    @contextmanager
    def model_of(self, mode: str) -> Iterator[torch.nn.Module]:
        """Yield the model as the mode computes with it."""
        try:
            yield self.sketch.model.to(torch.bfloat16) if self._computes(mode) == "own bf16" else self.sketch.model
        finally:
            self.sketch.model.to(torch.float32)

    def _recorded_bytes(self, mode: str, rows: int, length: int) -> int:
        key = (self._computes(mode), rows, length)
        if key not in self._most:
            batch = repeated(self._row, length, rows)
            self._most[key] = self._record(mode, batch, only_learning=True).learning.most_bytes
        return self._most[key]

    def _record(self, mode: str, batch: Batch, *, only_learning: bool) -> Passes:
        precision = self._computes(mode).replace("own bf16", "fp32")
        again = self.accumulation > 1 and not only_learning
        with self.model_of(mode) as model:
            return record(
                model, self.sketch.objective, batch, precision=precision, on_gpu=self.on_gpu,
                again=again, evaluates=not only_learning,
            )  # fmt: skip

    def _computes(self, mode: str) -> str:
        """The precision; DeepSpeed's weights are bf16 themselves."""
        precision = self.config.precision.type
        return "own bf16" if mode.startswith("zero") and precision == "bf16" else precision


def _rows_run(rows: int, length: int) -> int:
    return min(rows, max(2, _MOST_TOKENS // length))
