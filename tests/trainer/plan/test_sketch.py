"""A sketch of a model, made of its config alone, needs what the model that is built needs."""

import pytest

from trainer import build
from trainer.dataset import make_feed, prepare_data
from trainer.plan.modes import make_plan
from trainer.plan.of_run import planned
from trainer.plan.recordings import Recordings
from trainer.plan.sketch import sketch


@pytest.mark.parametrize(
    ("objective", "strategy", "settings"),
    [
        ("causal_lm", "full", {}),
        ("causal_lm", "adapter", {}),
        ("sft", "lora", {}),
        ("classification", "linear_probe", {}),
        ("token_classification", "partial", {"train": ["model.layers.1.*"]}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_sketch_needs_what_the_built_model_needs(make_config, objective, strategy, settings):
    config = make_config(objective, strategy, strategy=settings)
    parts = build.build(config)
    built = planned(config, parts, mode="single", world_size=1)
    assert built is not None

    data = prepare_data(config)
    found = sketch(config, data.objective, data.tokenizer)
    assert found.doubt == ""
    assert {parameter.device.type for parameter in found.model.parameters()} == {"meta"}
    feed = make_feed(config, data, parts.world)
    drawn = make_plan(Recordings(found, config, feed, world_size=1, on_gpu=False), "single")
    assert drawn.by_term == built.by_term
    assert drawn.most_by_phase == built.most_by_phase
    assert drawn.activations_bytes > 0
