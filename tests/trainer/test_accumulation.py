"""However a step is cut into forward passes, it is the same step; and the loss that is logged is the true mean.

transformers#34242, #34191, #35438, #37766; trl PR#6006; ms-swift PR#10084: means of means, losses twice too large.
"""

import math

import pytest
import torch

from trainer import build
from trainer.evaluate import to_device

ENCODER = {"model": {"architecture": "encoder", "num_kv_heads": 4}}
CASES = {
    "causal_lm": ("causal_lm", "scratch", {}),
    "masked_lm": ("masked_lm", "scratch", ENCODER),
    "sft": ("sft", "full", {}),
    "sft, lora": ("sft", "lora", {}),
    "classification": ("classification", "full", {}),
    "class weights": ("classification", "full", {"objective": {"class_weights": {"noun": 5.0, "verb": 0.2}}}),
    "token_classification": ("token_classification", "scratch", ENCODER),
}


def steps_of(config, parts_of, read_lines) -> tuple[list[float], list[float], torch.Tensor]:
    """Losses, gradient norms, and the weights that were learned."""
    parts = parts_of(config)
    lines = [line for line in read_lines(config) if line["kind"] == "train"]
    learned = [weight.detach().flatten() for weight in parts.optimizer.param_groups[0]["params"]]
    return [line["loss"] for line in lines], [line["grad_norm"] for line in lines], torch.cat(learned)


SELDOM = ("sft, lora", "class weights")  # the same loop and loss as another case


@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.slow] * (c in SELDOM)) for c in CASES])
def test_one_by_four_two_by_two_and_four_by_one_are_the_same_steps(make_config, parts_of, read_lines, case):
    objective, strategy, changes = CASES[case]
    found = []
    for micro_rows in (1, 2, 4):
        batch = {"rows": 4, "micro_rows": micro_rows, "max_length": 24}
        run = {"name": f"micro{micro_rows}", "steps": 3}
        config = make_config(objective, strategy, run=run, batch=batch, evaluation={"max_rows": 2}, **changes)
        found.append(steps_of(config, parts_of, read_lines))
    feed = build.build(config).feed
    sizes = {sum(len(example.input_ids) for example in row) for row in feed.train}
    assert len(sizes) > 1, "rows of one length prove nothing"
    for losses, norms, weights in found[1:]:
        assert losses == pytest.approx(found[0][0], rel=1e-5)
        assert norms == pytest.approx(found[0][1], rel=1e-4)
        torch.testing.assert_close(weights, found[0][2], rtol=0, atol=2e-4)


@pytest.mark.parametrize("case", CASES)
def test_the_loss_of_a_step_is_the_mean_over_all_that_is_learned_in_it(make_config, train, read_lines, case):
    """Each row alone, its sum in fp64, divided once; in an epoch whose last step takes rows of the next."""
    objective, strategy, changes = CASES[case]
    batch = {"rows": 6, "micro_rows": 2, "max_length": 24}
    config = make_config(
        objective,
        strategy,
        run={"steps": 1},
        batch=batch,
        optim={"warmup_steps": 0},
        evaluation={"max_rows": 2},
        **changes,
    )
    parts = build.build(config)
    total, count = 0.0, 0.0
    with torch.no_grad():
        for each in parts.feed._drawn_at(0):
            batch = to_device(parts.world, parts.objective.collate([each.row], parts.feed.pad_id, [each.draw]))
            sums = parts.objective.sums(parts.model, batch)
            total, count = total + sums["loss"].double().item(), count + float(sums["count"])
    assert count == pytest.approx(parts.feed.count_at(0))
    assert train(config) == 0
    [line] = [line for line in read_lines(config) if line["kind"] == "train"]
    assert line["loss"] == pytest.approx(total / count, rel=1e-5)
    assert math.isfinite(line["loss"])


def test_a_step_of_more_rows_than_there_are_takes_them_again_and_divides_by_all(make_config, parts_of, read_lines):
    """No step is short, and none is divided as if it were."""
    found = []
    for micro_rows in (1, 8):
        batch = {"rows": 64, "micro_rows": micro_rows, "max_length": 48}
        config = make_config("sft", "full", run={"name": f"m{micro_rows}", "steps": 2}, batch=batch)
        assert len(build.build(config).feed.train) < 64
        found.append(steps_of(config, parts_of, read_lines))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    feed = build.build(config).feed
    assert feed.count_at(0) > sum(feed.objective.count(row, 0) for row in feed.train)
