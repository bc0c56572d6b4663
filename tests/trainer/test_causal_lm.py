"""Language modelling: each token predicted once, and the end of each document."""

import math

import numpy as np
import pytest
import torch

from trainer.config import CausalLM, FileData
from trainer.dataset import make_rows
from trainer.objectives import OBJECTIVES
from trainer.packing import Example
from trainer.sources import DataError, read_rows

COLUMNS = FileData(type="files", train="data.jsonl")


@pytest.fixture
def objective():
    return OBJECTIVES["causal_lm"](CausalLM(type="causal_lm"), COLUMNS, [])


def test_every_token_after_the_first_and_the_end_is_a_target_once(objective, tokenizer):
    text = "the quick brown fox returns a list"
    ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    pieces = objective.encode([{"text": text}], tokenizer, 8)
    assert len(pieces) > 1
    assert all(len(piece.input_ids) <= 8 for piece in pieces)
    assert np.concatenate([piece.input_ids for piece in pieces]).tolist() == ids[:-1]
    assert np.concatenate([piece.targets for piece in pieces]).tolist() == ids[1:]


def test_an_empty_text_is_left_out_and_all_empty_is_refused(objective, tokenizer):
    examples = objective.encode([{"text": ""}, {"text": "a b"}, {"text": ""}], tokenizer, 64)
    assert (len(examples), examples.left_out) == (1, 2)
    assert objective.why_left_out(64) == "they are empty"
    with pytest.raises(DataError, match=r"data\.text: all 2 rows are empty"):
        make_rows(objective, [{"text": ""}, {"text": ""}], tokenizer, 64)


def test_a_missing_column_and_a_value_that_is_no_text_name_setting_file_and_line(objective, tmp_path, write_rows):
    path = write_rows(tmp_path / "a.jsonl", [{"text": "a"}, {"body": "b"}, {"text": 5}])
    rows = list(read_rows(path))
    with pytest.raises(DataError, match=rf"data\.text: {path}, line 2 has no 'text'; it has: body"):
        list(objective.texts(rows))
    with pytest.raises(DataError, match=rf"data\.text: {path}, line 3 holds a int"):
        list(objective.texts(rows[2:]))
    other = OBJECTIVES["causal_lm"](CausalLM(type="causal_lm"), FileData(type="files", train=path, text="body"), [])
    assert list(other.texts(rows[1:2])) == ["b"]


def test_the_loss_sum_is_the_model_s_own_mean_times_its_count(objective, tokenizer, base_model):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32)
    objective.try_out(model, 64)
    [example] = objective.encode([{"text": "the file that it has read"}], tokenizer, 64)
    batch = objective.collate([[example]], tokenizer.pad_token_id, [0])
    inputs = torch.tensor([[*example.input_ids.tolist(), int(example.targets[-1])]])
    mean = model(inputs, labels=inputs).loss  # transformers shifts the labels itself
    sums = objective.sums(model, batch)
    assert sums["count"] == len(example.targets) == objective.count([example], 0)
    assert sums["loss"].item() == pytest.approx(mean.item() * len(example.targets), rel=1e-5)


def test_perplexity_and_the_unigram_baseline_worked_by_hand(objective):
    assert objective.summarize({"loss": 2 * math.log(8), "count": 2.0}) == pytest.approx(
        {"eval_loss": math.log(8), "perplexity": 8.0}
    )
    rows = [[[Example(np.array([0, 0, 0]), np.array([1, 1, 2]))]], [[Example(np.array([0, 0]), np.array([1, 3]))]]]
    # Counts of 1 and 2 are 2 and 1; with one more each over a vocabulary of 4: 3/7, 2/7, and 1/7 for what was not seen.
    expected = -(math.log(3 / 7) + math.log(1 / 7)) / 2
    assert objective.baseline(*rows, 4)["unigram_loss"] == pytest.approx(expected)
