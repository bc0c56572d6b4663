"""Examples -> rows of one length, so that no compute goes to padding, without documents seeing each other.

Inside a row each example is a segment: its positions restart at 0 and attention is causal within it only.
"""

import bisect
from dataclasses import dataclass

import numpy as np
import torch

IGNORED = -100  # a target that carries no loss: torch's cross_entropy default


@dataclass(frozen=True)
class Example:
    """Token ids, shape [T], and what is learned from them: for language models the next token or IGNORED, shape [T];
    for classification one label, shape [1]."""

    input_ids: np.ndarray
    targets: np.ndarray


Batch = dict[str, torch.Tensor]
Row = list[Example]


def pack(examples: list[Example], row_length: int) -> list[Row]:
    """Return rows of at most `row_length` tokens that hold every example once (best fit, longest first).

    Deterministic. Raises ValueError for an example longer than a row.
    """
    rows: list[Row] = []
    spaces: list[tuple[int, int]] = []  # (free tokens, row index), sorted: the tightest fit is one bisection away
    for index in sorted(range(len(examples)), key=lambda i: (-len(examples[i].input_ids), i)):
        length = len(examples[index].input_ids)
        if length > row_length:
            raise ValueError(f"example of {length} tokens does not fit a row of {row_length}")
        at = bisect.bisect_left(spaces, (length, -1))
        if at < len(spaces):
            free, row = spaces.pop(at)
            rows[row].append(examples[index])
        else:
            free, row = row_length, len(rows)
            rows.append([examples[index]])
        bisect.insort(spaces, (free - length, row))
    return rows


def collate_packed(rows: list[Row], pad_id: int) -> Batch:
    """Return input_ids, position_ids, targets [B, T] and the block-diagonal causal mask [B, 1, T, T] (True = may see).

    T is the longest row. Padding is a segment of its own, so no query is without a key.
    """
    length = max(sum(len(example.input_ids) for example in row) for row in rows)
    input_ids = np.full((len(rows), length), pad_id, np.int64)
    position_ids = np.zeros((len(rows), length), np.int64)
    targets = np.full((len(rows), length), IGNORED, np.int64)
    segments = np.full((len(rows), length), -1, np.int64)
    for r, row in enumerate(rows):
        start = 0
        for segment, example in enumerate(row):
            stop = start + len(example.input_ids)
            input_ids[r, start:stop] = example.input_ids
            position_ids[r, start:stop] = np.arange(stop - start)
            targets[r, start:stop] = example.targets
            segments[r, start:stop] = segment
            start = stop
    same_segment = segments[:, None, :, None] == segments[:, None, None, :]
    mask = same_segment & np.tri(length, dtype=bool)
    arrays = {"input_ids": input_ids, "position_ids": position_ids, "attention_mask": mask, "targets": targets}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def collate_padded(rows: list[Row], pad_id: int) -> Batch:
    """Return right-padded input_ids and attention_mask [B, T] and targets [B] of rows with one example each."""
    length = max(len(row[0].input_ids) for row in rows)
    input_ids = torch.full((len(rows), length), pad_id, dtype=torch.long)
    attention_mask = torch.zeros((len(rows), length), dtype=torch.long)
    for r, [example] in enumerate(rows):
        input_ids[r, : len(example.input_ids)] = torch.from_numpy(example.input_ids.astype(np.int64))
        attention_mask[r, : len(example.input_ids)] = 1
    targets = torch.tensor([int(row[0].targets[0]) for row in rows])
    return {"input_ids": input_ids, "attention_mask": attention_mask, "targets": targets}
