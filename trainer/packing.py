"""Examples -> rows of one length, so that no compute goes to padding, without documents seeing each other.

Inside a row each example is a segment: its positions restart and attention stays within it.
"""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from trainer.best_fit import best_fit

IGNORED = -100  # a target that carries no loss: torch's cross_entropy default


@dataclass(frozen=True)
class Example:
    """Token ids, shape [T], and what is learned from them: for language models and tags something for each token, or
    IGNORED, shape [T]; for classification the number of the label, a 0 or 1 for each label, or a number (fp32).

    `token_type_ids`, shape [T], tell the first text of a pair from the second, for models that take them.
    """

    input_ids: np.ndarray
    targets: np.ndarray
    token_type_ids: np.ndarray | None = None


class Encoded(list[Example]):
    """The examples that some rows gave, in order, and how many of the rows gave none."""

    def __init__(self, examples: Iterable[Example] = (), left_out: int = 0) -> None:
        super().__init__(examples)
        self.left_out = left_out


Batch = dict[str, torch.Tensor]
Row = list[Example]


def pack(examples: list[Example], row_length: int) -> list[Row]:
    """Return rows of at most `row_length` tokens that hold every example once: see best_fit.

    Deterministic. Raises ValueError for an example longer than a row.
    """
    members, starts = best_fit(np.array([len(example.input_ids) for example in examples], np.int64), row_length)
    return [[examples[i] for i in members[start:stop]] for start, stop in itertools.pairwise(starts)]


def collate_packed(rows: list[Row], first_position: int = 0) -> Batch:
    """Return every example of the rows end to end as one row: input_ids, position_ids and targets [1, N].

    Positions restart at `first_position`. attention_mask, int32 [1, 1, 1, S + 1], holds where each of the S examples
    ends, 0 first: see trainer/attention.py. There is no padding.
    """
    examples = [example for row in rows for example in row]
    lengths = [len(example.input_ids) for example in examples]
    arrays = {
        "input_ids": np.concatenate([example.input_ids for example in examples], dtype=np.int64),
        "position_ids": np.concatenate([np.arange(first_position, first_position + length) for length in lengths]),
        "targets": np.concatenate([example.targets for example in examples], dtype=np.int64),
        "attention_mask": np.cumsum([0, *lengths], dtype=np.int32)[None, None],
    }
    return {name: torch.from_numpy(array)[None] for name, array in arrays.items()}


def repeated(batch: Batch, length: int, times: int) -> Batch:
    """Return the first `length` tokens of a batch's first row, `times` times: documents of one row where it is packed.

    Other batches, one example a row, get as many rows.
    """
    pieces = {n: torch.cat([t[:1, :length] if t.dim() > 1 else t[:1]] * times) for n, t in batch.items()}
    if batch["attention_mask"].dim() != 4:
        return pieces
    device = batch["input_ids"].device
    position_ids = batch["position_ids"][:, :1] + torch.arange(length, device=device).repeat(times)
    ends = torch.arange(times + 1, dtype=torch.int32, device=device)[None, None, None] * length
    flat = {name: pieces[name].view(1, -1) for name in ("input_ids", "targets")}
    return {**flat, "position_ids": position_ids, "attention_mask": ends}


def collate_one_by_one(rows: list[Row], pad_id: int) -> Batch:
    """Return right-padded input_ids, attention_mask and targets [B, T] of B examples, each a row of its own."""
    examples = [example for row in rows for example in row]
    length = max(len(example.input_ids) for example in examples)
    fills = {"input_ids": pad_id, "attention_mask": 0, "targets": IGNORED}
    batch = {name: torch.full((len(examples), length), fill) for name, fill in fills.items()}
    for r, example in enumerate(examples):
        batch["input_ids"][r, : len(example.input_ids)] = torch.from_numpy(example.input_ids.astype(np.int64))
        batch["targets"][r, : len(example.targets)] = torch.from_numpy(example.targets.astype(np.int64))
        batch["attention_mask"][r, : len(example.input_ids)] = 1
    return batch


def collate_padded(rows: list[Row], pad_id: int) -> Batch:
    """Return right-padded input_ids and attention_mask [B, T] (token_type_ids too, where an example has them) of rows
    with one example each; and their targets: [B], or [B, C] where an example has several.
    """
    examples = [example for [example] in rows]
    length = max(len(example.input_ids) for example in examples)

    def padded(arrays: Iterable[np.ndarray], fill: int) -> torch.Tensor:
        whole = np.full((len(rows), length), fill, np.int64)
        for r, array in enumerate(arrays):
            whole[r, : len(array)] = array
        return torch.from_numpy(whole)

    batch = {"input_ids": padded((example.input_ids for example in examples), pad_id)}
    batch["attention_mask"] = padded((np.ones_like(example.input_ids) for example in examples), 0)
    if any(example.token_type_ids is not None for example in examples):
        batch["token_type_ids"] = padded((_token_types(example) for example in examples), 0)
    targets = torch.from_numpy(np.stack([example.targets for example in examples]))
    targets = targets if targets.is_floating_point() else targets.long()
    return batch | {"targets": targets.squeeze(1) if targets.shape[1] == 1 else targets}


def _token_types(example: Example) -> np.ndarray:
    return np.zeros_like(example.input_ids) if example.token_type_ids is None else example.token_type_ids
