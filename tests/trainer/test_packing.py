"""Packed rows: nothing lost, nothing doubled, and documents that cannot see each other."""

from random import Random

import numpy as np
import pytest
import torch

from trainer.packing import IGNORED, Example, collate_one_by_one, collate_packed, collate_padded, pack
from trainer.token_model import tried_out

PAD = 0


def examples_of(lengths: list[int], seed: int = 0) -> list[Example]:
    """Examples of random tokens; the targets are the next tokens, some of them ignored."""
    random = np.random.default_rng(seed)
    examples = []
    for length in lengths:
        ids = random.integers(5, 300, length + 1).astype(np.int32)
        targets = np.where(random.random(length) < 0.3, IGNORED, ids[1:])
        examples.append(Example(ids[:-1], targets))
    return examples


@pytest.fixture(scope="module")
def model(base_model):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32).eval()


@pytest.mark.parametrize("seed", range(5))
def test_every_example_stands_in_one_row_and_no_row_is_overfull(seed):
    random = Random(seed)
    examples = examples_of([random.randint(1, 32) for _ in range(random.randint(1, 60))], seed)
    rows = pack(examples, 32)
    assert sorted(id(example) for row in rows for example in row) == sorted(map(id, examples))
    assert all(0 < sum(len(example.input_ids) for example in row) <= 32 for row in rows)


def test_packing_is_deterministic():
    lengths = [7, 3, 3, 9, 1, 12, 7]
    first, second = (pack(examples_of(lengths), 12) for _ in range(2))
    assert [[e.input_ids.tolist() for e in row] for row in first] == [
        [e.input_ids.tolist() for e in row] for row in second
    ]


def test_best_fit_on_a_case_worked_by_hand():
    # Longest first: 8 opens a row of 10 (2 left), 6 another (4 left), 4 fits the second exactly, 2 the first exactly,
    # 1 opens a third.
    rows = pack(examples_of([2, 8, 1, 6, 4]), 10)
    assert [[len(e.input_ids) for e in row] for row in rows] == [[8, 2], [6, 4], [1]]


def test_an_example_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="11 tokens does not fit a row of 10"):
        pack(examples_of([3, 11]), 10)


def test_a_packed_batch_worked_by_hand():
    first, second = Example(np.array([11, 12]), np.array([12, 13])), Example(np.array([21]), np.array([IGNORED]))
    batch = collate_packed([[first, second], [second]], first_position=2)
    assert batch["input_ids"].tolist() == [[11, 12, 21, 21]]
    assert batch["position_ids"].tolist() == [[2, 3, 2, 2]]
    assert batch["targets"].tolist() == [[12, 13, IGNORED, IGNORED]]
    assert batch["attention_mask"].tolist() == [[[[0, 2, 3, 4]]]]
    assert batch["attention_mask"].dtype == torch.int32, "by its type attention tells segments from other masks"


def test_packed_losses_and_gradients_equal_those_of_documents_run_alone(model):
    examples = examples_of([5, 17, 1, 9, 30, 2, 12])
    rows = pack(examples, 32)
    assert len(rows) < len(examples)

    token_model = tried_out(model, 32)
    batch = token_model.collate(rows, PAD)
    inputs = {name: tensor for name, tensor in batch.items() if name != "targets"}
    packed = token_model.loss_sum(model, inputs, batch["targets"])
    packed_gradients = torch.autograd.grad(packed, list(model.parameters()))

    alone = torch.zeros(())
    for example in examples:
        logits = model(torch.from_numpy(example.input_ids.astype(np.int64))[None]).logits[0].double()
        log_probabilities = torch.log_softmax(logits, -1)
        for position, target in enumerate(example.targets):
            if target != IGNORED:
                alone = alone - log_probabilities[position, target]
    alone_gradients = torch.autograd.grad(alone, list(model.parameters()))

    assert packed.item() == pytest.approx(alone.item(), rel=1e-5)
    for ours, reference in zip(packed_gradients, alone_gradients, strict=True):
        assert (ours - reference).norm() <= 1e-5 * reference.norm()


def test_changing_one_document_changes_no_logit_of_another_in_its_row(model):
    examples = examples_of([6, 9, 11])
    changed = [examples[0], Example((examples[1].input_ids + 7) % 300, examples[1].targets), examples[2]]
    before, after = (collate_packed([row], tried_out(model, 32).first_position) for row in (examples, changed))
    with torch.no_grad():
        logits, other = (
            model(**{name: tensor for name, tensor in batch.items() if name != "targets"}, use_cache=False).logits[0]
            for batch in (before, after)
        )
    assert torch.equal(logits[:6], other[:6])
    assert torch.equal(logits[15:], other[15:])
    assert not torch.equal(logits[6:15], other[6:15])


def test_a_batch_of_one_example_a_row_worked_by_hand():
    rows = [[Example(np.array([4, 5, 6]), np.array([5, 6, IGNORED]))], [Example(np.array([7]), np.array([8]))]]
    batch = collate_one_by_one(rows, PAD)
    assert batch["input_ids"].tolist() == [[4, 5, 6], [7, PAD, PAD]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["targets"].tolist() == [[5, 6, IGNORED], [8, IGNORED, IGNORED]]


def test_a_padded_batch_worked_by_hand():
    rows = [[Example(np.array([4, 5, 6]), np.array([1]))], [Example(np.array([7]), np.array([0]))]]
    batch = collate_padded(rows, PAD)
    assert batch["input_ids"].tolist() == [[4, 5, 6], [7, PAD, PAD]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["targets"].tolist() == [1, 0]
