"""One label per text."""

import numpy as np
import pytest
import torch

from trainer.config import Classification, FileData
from trainer.objectives import OBJECTIVES
from trainer.packing import Example
from trainer.sources import DataError, read_rows

COLUMNS = FileData(type="files", train="data.jsonl")
ROWS = [
    {"text": "a list of lines", "label": "noun"},
    {"text": "returns", "label": "verb"},
    {"text": "", "label": "noun"},
]


@pytest.fixture
def objective():
    return OBJECTIVES["classification"](Classification(type="classification"), COLUMNS, ROWS)


def test_labels_are_sorted_and_numbers_become_text():
    rows = [{"text": "a", "label": 10}, {"text": "b", "label": 9}, {"text": "c", "label": 10}]
    assert OBJECTIVES["classification"](Classification(type="classification"), COLUMNS, rows).labels == ["10", "9"]


def test_examples_are_the_tokens_and_the_number_of_the_label(objective, tokenizer):
    examples = objective.encode(ROWS, tokenizer, 4)
    assert objective.labels == ["noun", "verb"]
    assert [example.targets.tolist() for example in examples] == [[0], [1], [0]]
    assert examples[0].input_ids.tolist() == tokenizer("a list of lines")["input_ids"][:4]
    assert examples[2].input_ids.tolist() == [tokenizer.eos_token_id]


def test_a_held_out_label_that_training_never_saw_is_refused(objective, tokenizer, tmp_path, write_rows):
    [row] = read_rows(write_rows(tmp_path / "a.jsonl", [{"text": "x", "label": "article"}]))
    with pytest.raises(
        DataError, match=rf"data\.label: {row.place}: 'article' is in no training row; known: noun, verb"
    ):
        objective.encode([row], tokenizer, 64)


@pytest.mark.parametrize("label", ["", ["noun"], {"a": 1}, 1.5])
def test_a_label_that_names_no_class_is_refused(label):
    with pytest.raises(DataError, match=r"data\.label: row 3: .* found; expected a name or a whole number"):
        OBJECTIVES["classification"](
            Classification(type="classification"), COLUMNS, [*ROWS[:2], {"text": "x", "label": label}]
        )


def test_one_label_alone_is_refused():
    with pytest.raises(DataError, match="every training row has the label 'noun'"):
        OBJECTIVES["classification"](Classification(type="classification"), COLUMNS, ROWS[:1])


def test_a_row_without_a_label_names_the_columns_it_has():
    with pytest.raises(DataError, match=r"data\.label: row 1 has no 'label'; it has: text"):
        OBJECTIVES["classification"](Classification(type="classification"), COLUMNS, [{"text": "a"}])


@pytest.mark.parametrize("strategy", ["full", "lora"])
def test_the_loss_equals_transformers_own_and_padding_changes_no_logit(objective, tokenizer, base_model, strategy):
    from transformers import AutoModelForSequenceClassification

    from trainer.config import Full, Lora
    from trainer.strategies import STRATEGIES

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(
        base_model, num_labels=2, pad_token_id=tokenizer.pad_token_id, dtype=torch.float32
    )
    model = STRATEGIES[strategy](model, {"full": Full, "lora": Lora}[strategy](type=strategy)).eval()
    examples = objective.encode(ROWS, tokenizer, 64)
    batch = objective.collate([[each] for each in examples], tokenizer.pad_token_id, [0] * len(examples))
    alone = [torch.from_numpy(example.input_ids.astype(np.int64))[None] for example in examples]
    with torch.no_grad():
        sums = objective.sums(model, batch)
        single = [model(ids, labels=torch.tensor(e.targets.tolist())) for ids, e in zip(alone, examples, strict=True)]
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert sums["loss"].item() == pytest.approx(sum(output.loss.item() for output in single), rel=1e-5)
    torch.testing.assert_close(logits, torch.cat([output.logits for output in single]), rtol=1e-5, atol=1e-6)
    right = sum(output.logits.argmax().item() == e.targets[0] for output, e in zip(single, examples, strict=True))
    assert sums["correct"].item() == right
    assert sums["count"] == sum(objective.count([example], 0) for example in examples) == 3


def test_accuracy_and_the_majority_baseline_worked_by_hand(objective):
    assert objective.summarize({"loss": 6.0, "correct": 3.0, "count": 4.0}) == {"eval_loss": 1.5, "accuracy": 0.75}
    rows = [[[Example(np.array([1]), np.array([label]))] for label in labels] for labels in ([0, 1, 1], [1, 0, 1, 1])]
    assert objective.baseline(*rows, 300) == {"majority_accuracy": 0.75}
