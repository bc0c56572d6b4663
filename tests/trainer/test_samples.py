"""What the model says during training, against transformers' own greedy search."""

import json

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from trainer import samples
from trainer.packing import IGNORED, Example

ON = {"evaluation": {"every": 2, "samples": 3, "sample_tokens": 5, "max_rows": 4}, "run": {"steps": 4}}


def lines(config) -> list[dict]:
    return [json.loads(line) for line in (config.run.folder / "samples.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("objective", "strategy"), [("causal_lm", "scratch"), ("sft", "lora"), ("sft", "full")])
def test_samples_are_greedy_and_written_at_each_evaluation(make_config, train, parts_of, capfd, objective, strategy):
    config = make_config(objective, strategy, **ON)
    trained = parts_of(config)
    found = lines(config)
    assert [line["step"] for line in found] == [0] * 3 + [2] * 3 + [4] * 3
    assert len({line["prompt"] for line in found}) > 1
    model = AutoModelForCausalLM.from_pretrained(config.run.folder / "model")
    for line in found[-3:]:
        ids = torch.tensor([trained.tokenizer(line["prompt"], add_special_tokens=False)["input_ids"]])
        whole = model.generate(
            ids, max_new_tokens=5, do_sample=False, eos_token_id=trained.tokenizer.eos_token_id,
            pad_token_id=trained.tokenizer.pad_token_id,
        )  # fmt: skip
        assert line["text"] == trained.tokenizer.decode(whole[0, ids.shape[1] :])
    said = capfd.readouterr().err
    assert said.count("\nstep 4: ") == 4, "the held-out metrics, and three samples"
    assert all(f" -> {line['text']!r}\n" in said for line in found[-3:])


def test_samples_change_nothing_that_is_trained_and_are_made_again_after_a_kill(
    make_config, train, monkeypatch, read_lines
):
    class Killed(BaseException):
        pass

    def kill(*args):
        raise Killed

    quiet = make_config(run={"name": "quiet", "steps": 4}, evaluation={"every": 2, "max_rows": 4})
    whole, killed = (make_config(**{**ON, "run": {"name": name, "steps": 4}}) for name in ("whole", "killed"))
    for config in (quiet, whole):
        assert train(config) == 0
    assert read_lines(quiet) == read_lines(whole)
    assert not (quiet.run.folder / "samples.jsonl").exists()
    with monkeypatch.context() as patch:
        patch.setattr("trainer.loop.finish", kill)
        patch.setattr("launch.train.BaseException", (), raising=False)
        with pytest.raises(Killed):
            train(killed)
    assert train(killed) == 0
    assert lines(killed) == lines(whole)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ([IGNORED, IGNORED, 12, 13, IGNORED], [9, 10, 11]),  # a prompt of three tokens: the third foretells the first
        ([10, 11, 12, 13, 14], [9, 10]),  # learned from its start: the first half
        ([10], [9]),
    ],
)
def test_a_prompt_is_what_is_not_learned_or_else_a_beginning(targets, expected):
    ids = np.arange(9, 9 + len(targets))
    assert samples.prompt(Example(ids, np.array(targets))) == expected


def test_what_the_model_says_ends_with_its_end_token_or_its_context(base_model):
    model = AutoModelForCausalLM.from_pretrained(base_model).eval()
    with torch.no_grad():
        first, second = samples.continued(model, [5, 6], 2, None)
        assert samples.continued(model, [5, 6], 9, second)[-1:] == [second]
        assert samples.continued(model, [5, 6], 9, first) == [first]
        full = [5] * model.config.max_position_embeddings
        assert samples.continued(model, full[1:], 9, None) == samples.continued(model, full[1:], 1, None)
        assert samples.continued(model, full, 9, None) == []


def test_an_objective_that_writes_no_text_has_no_samples(make_config):
    with pytest.raises(ValidationError, match=r"evaluation\.samples 2 does not fit objective\.type classification"):
        make_config("classification", "full", evaluation={"samples": 2})
