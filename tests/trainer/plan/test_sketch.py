"""A sketch of a model, made of its config alone, needs what the model that is built needs."""

import pytest

from trainer import build
from trainer.dataset import make_feed, prepare_data
from trainer.plan import make_plan
from trainer.plan.of_run import planned
from trainer.plan.sketch import sketch

OBJECTIVES = ("causal_lm", "sft", "classification", "token_classification")
STRATEGIES = ("full", "linear_probe", "partial", "adapter", "lora")
EXTRA = {"partial": {"train": ["model.layers.1.*"]}}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_sketch_needs_what_the_built_model_needs(make_config, objective, strategy):
    config = make_config(objective, strategy, strategy=EXTRA.get(strategy, {}))
    parts = build.build(config)
    built = planned(config, parts, world_size=1)
    assert built is not None

    data = prepare_data(config)
    found = sketch(config, data.objective, data.tokenizer)
    assert found.doubt == ""
    feed = make_feed(config, data, parts.world)
    drawn = make_plan(found, config, feed.longest(), feed.longest(1), "single", world_size=1, on_gpu=False)
    assert drawn.of_mode.by_term == built.of_mode.by_term
    assert drawn.of_mode.most_by_phase == built.of_mode.most_by_phase
    assert drawn.activations_bytes == built.activations_bytes > 0
