"""Sections that do not fit together are refused before anything loads."""

import pytest
from pydantic import ValidationError

from trainer.config import NewModel


@pytest.mark.parametrize(
    ("objective", "strategy", "changes", "said"),
    [
        (
            "sft",
            "scratch",
            {"strategy": {"type": "lora"}},
            "strategy.type lora does not fit model.type new: use scratch",
        ),
        ("sft", "full", {"strategy": {"type": "scratch"}}, "does not fit model.type pretrained: use full, linear"),
        ("sft", "full", {"tokenizer": {"type": "train"}}, "tokenizer.type train does not fit model.type pretrained"),
        ("sft", "scratch", {"tokenizer": {"type": "pretrained", "vocab_size": 300}}, "vocab_size"),
        ("sft", "scratch", {"batch": {"max_length": 65}}, "batch.max_length 65 is longer than model.context_length 64"),
        ("sft", "full", {"run": {"name": "../up"}}, "name"),
        ("sft", "full", {"optim": {"lr": float("nan")}}, "lr"),
        ("sft", "full", {"optim": {"betas": [0.9, 1.0]}}, "optim.adamw.betas.1"),
        ("sft", "full", {"optim": {"betas": [-0.1, 0.9]}}, "optim.adamw.betas.0"),
        ("sft", "full", {"batch": {"rows": 0}}, "rows"),
    ],
)
def test_what_does_not_fit_is_refused(make_config, objective, strategy, changes, said):
    with pytest.raises(ValidationError) as caught:
        make_config(objective, strategy, **changes)
    assert said in str(caught.value)


def test_a_new_model_needs_a_tokenizer(make_config):
    config = make_config().model_dump(mode="json")
    config["tokenizer"] = {"type": "pretrained"}
    with pytest.raises(ValidationError, match=r"tokenizer\.path is missing"):
        type(make_config()).model_validate(config)


@pytest.mark.parametrize(
    ("heads", "said"),
    [((64, 3, 1), "must be an even whole number"), ((12, 4, 2), "even whole number"), ((64, 4, 3), "must divide")],
)
def test_heads_must_divide(heads, said):
    hidden_size, num_heads, num_kv_heads = heads
    with pytest.raises(ValidationError, match=said):
        NewModel(type="new", hidden_size=hidden_size, num_heads=num_heads, num_kv_heads=num_kv_heads)


def test_a_config_is_frozen(make_config):
    with pytest.raises(ValidationError):
        make_config().run.steps = 7
