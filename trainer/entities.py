"""Named entities: the spans that a sequence of tags marks, read as conlleval reads them, and counted by type."""

import re
from collections.abc import Iterator, Sequence

import numpy as np

Span = tuple[str, int, int]  # its type, and its first and last word

_TAG = re.compile(r"O|[BIES]-.+", re.DOTALL)


def are_entity_tags(labels: Sequence[str]) -> bool:
    """Whether the labels mark spans: O and names after B-, I-, E- or S- (IOB1, IOB2, IOBES), at least one of these."""
    return all(_TAG.fullmatch(label) for label in labels) and any(label != "O" for label in labels)


def types_of(labels: Sequence[str]) -> list[str]:
    """Return the types of entities that the labels know, sorted."""
    return sorted({label[2:] for label in labels if label != "O"})


def spans(tags: Sequence[str]) -> Iterator[Span]:
    """Yield the entities of one sequence. A tag that should have come after another (I- after O) opens one."""
    start, before, kind = 0, "O", ""
    for index, tag in enumerate([*tags, "O"]):
        mark, kind_here = tag[0], tag[2:]
        goes_on = before not in "OES" and mark in "IE" and kind_here == kind
        if before != "O" and not goes_on:
            yield kind, start, index - 1
        if mark != "O" and not goes_on:
            start = index
        before, kind = mark, kind_here


def count_spans(predicted: Sequence[str], gold: Sequence[str], numbers: dict[str, int]) -> np.ndarray:
    """Return how many entities of each type were right, predicted and gold, shape [3, types]: exact span and type."""
    counts = np.zeros((3, len(numbers)), np.int64)
    answered, wanted = set(spans(predicted)), set(spans(gold))
    for row, found in zip(counts, (answered & wanted, answered, wanted), strict=True):
        np.add.at(row, [numbers[kind] for kind, _, _ in found], 1)
    return counts
