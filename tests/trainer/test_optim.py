"""Learning rates worked by hand, and which weights decay."""

import math

import pytest
import torch

from trainer.config import Optim
from trainer.optim import build_optimizer, learning_rate


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # Peak 1, floor 0.2, two steps of warm-up, then a quarter of the way down at each of the last four.
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.8, 0.6, 0.4]),
        (
            "cosine",
            [0.5, 1.0, 1.0, 0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2, 0.2 + 0.8 / 2, 0.2 + 0.8 * (1 - math.sqrt(0.5)) / 2],
        ),
    ],
)
def test_learning_rates_worked_by_hand(schedule, expected):
    config = Optim(lr=1.0, warmup_steps=2, floor=0.2, schedule=schedule)
    assert [learning_rate(step, config, 6) for step in range(6)] == pytest.approx(expected)


def test_warm_up_over_the_whole_run_only_rises():
    config = Optim(lr=2.0, warmup_steps=4)
    assert [learning_rate(step, config, 4) for step in range(4)] == pytest.approx([0.5, 1.0, 1.5, 2.0])


def test_a_run_shorter_than_its_warm_up_ends_in_the_rise():
    config = Optim(lr=2.0, warmup_steps=4)
    assert [learning_rate(step, config, 2) for step in range(2)] == pytest.approx([0.5, 1.0])


def test_matrices_decay_and_norms_biases_and_frozen_weights_do_not():
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3), torch.nn.Linear(3, 1, bias=False))
    model[2].requires_grad_(False)
    optimizer = build_optimizer(model, Optim(lr=0.1, weight_decay=0.5, betas=(0.8, 0.9), eps=1e-6), fused=False)
    decayed, plain = optimizer.param_groups
    assert [id(p) for p in decayed["params"]] == [id(model[0].weight)]
    assert [id(p) for p in plain["params"]] == [id(model[0].bias), id(model[1].weight), id(model[1].bias)]
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.5, 0.0)
    assert (decayed["betas"], decayed["eps"], decayed["lr"]) == ((0.8, 0.9), 1e-6, 0.1)
    before = model[0].weight.detach().clone()
    for parameter in decayed["params"] + plain["params"]:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(model[0].weight.detach(), before * (1 - 0.1 * 0.5))
    assert torch.equal(model[1].weight.detach(), torch.ones(3))


def test_a_model_without_norms_or_without_matrices_has_one_group():
    assert len(build_optimizer(torch.nn.Linear(2, 2, bias=False), Optim(), fused=False).param_groups) == 1
    assert len(build_optimizer(torch.nn.LayerNorm(2), Optim(), fused=False).param_groups) == 1
