"""Spans of tags, as conlleval reads them: IOB1, IOB2 and IOBES."""

from collections.abc import Iterator, Sequence

_MARKS = ("B-", "I-", "E-", "S-")


def are_entity_tags(labels: Sequence[str]) -> bool:
    """Whether the labels mark spans: O, and at least one name after B-, I-, E- or S-, and nothing else."""
    named = [label for label in labels if label != "O"]
    return bool(named) and all(label.startswith(_MARKS) and len(label) > 2 for label in named)


def spans(tags: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """Yield (type, first word, last word) of each span. A tag that should follow another (I- after O) begins one."""
    first = 0
    for place, tag in enumerate(tags):
        if tag == "O":
            continue
        if not place or not _goes_on(tags[place - 1], tag):
            first = place
        if place + 1 == len(tags) or not _goes_on(tag, tags[place + 1]):
            yield tag[2:], first, place


def _goes_on(tag: str, following: str) -> bool:
    """Whether the span that `tag` is in takes in the next word too."""
    return tag[0] in "BI" and following[0] in "IE" and tag[2:] == following[2:]
