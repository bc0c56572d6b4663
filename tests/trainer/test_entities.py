"""Entities: the spans and counts that seqeval (conlleval's rules) finds."""

from random import Random

import numpy as np
import pytest
from seqeval.metrics.sequence_labeling import get_entities

from trainer.entities import are_entity_tags, count_spans, spans, types_of


def test_iob2_worked_by_hand():
    assert list(spans(["B-PER", "I-PER", "O", "B-LOC", "B-LOC"])) == [("PER", 0, 1), ("LOC", 3, 3), ("LOC", 4, 4)]


def test_iob1_worked_by_hand():
    """B- only parts an entity from one of its type that stands before it."""
    assert list(spans(["I-PER", "I-PER", "B-PER", "I-LOC", "O"])) == [("PER", 0, 1), ("PER", 2, 2), ("LOC", 3, 3)]


def test_an_i_tag_that_follows_nothing_of_its_type_opens_an_entity():
    assert list(spans(["O", "I-PER", "I-LOC", "I-LOC"])) == [("PER", 1, 1), ("LOC", 2, 3)]


@pytest.mark.parametrize("marks", ["BI", "I", "BIES"])
@pytest.mark.filterwarnings("ignore")
def test_any_sequence_gives_the_entities_of_seqeval(marks):
    random = Random(0)
    labels = ["O"] + [f"{mark}-{kind}" for mark in marks for kind in ("PER", "LOC", "MISC-X")]
    for _ in range(2000):
        tags = random.choices(labels, k=random.randint(1, 9))
        assert sorted(spans(tags)) == sorted(get_entities(tags))


def test_right_predicted_and_gold_entities_are_counted_by_type():
    gold, predicted = ["B-PER", "I-PER", "O", "B-LOC"], ["B-PER", "O", "O", "B-LOC"]
    counts = count_spans(predicted, gold, {"LOC": 0, "PER": 1})
    assert np.array_equal(counts, [[1, 0], [1, 1], [1, 1]])


def test_only_o_and_marked_types_are_entity_tags():
    assert are_entity_tags(["O", "B-PER", "I-PER"])
    assert are_entity_tags(["B-PER", "I-PER"])
    assert not any(
        map(are_entity_tags, [["NOUN", "VERB"], ["O", "B-PER", "X-PER"], ["O"], ["0", "1"], ["B", "I", "O"]])
    )
    assert types_of(["B-PER", "I-MISC-X", "I-PER", "O"]) == ["MISC-X", "PER"]
