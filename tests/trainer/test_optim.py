"""Learning rates worked by hand and by transformers, what each optimizer does and keeps, and which weights decay."""

import math

import pytest
import torch
from pydantic import ValidationError
from transformers import get_scheduler

from trainer.config import SGD, Adafactor, AdamW
from trainer.optim import build_optimizer, initial_state, learning_rate, state_numel

OPTIMIZERS = {
    "adamw": AdamW(),
    "sgd": SGD(type="sgd"),
    "sgd without momentum": SGD(type="sgd", momentum=0),
    "adafactor": Adafactor(type="adafactor"),
}


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
        # A tenth of six steps: the last one alone, which is where the fall begins.
        ("wsd", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_learning_rates_worked_by_hand(schedule, expected):
    config = AdamW(lr=1.0, warmup_steps=2, floor=0.2, schedule=schedule)
    assert [learning_rate(step, config, 6) for step in range(6)] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        ({"decay_steps": 4}, [0.5, 1.0, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4]),
        ({"decay_fraction": 0.25}, [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.6]),
        ({"decay_steps": 99}, [0.5, 1.0, *(1 - 0.8 * i / 6 for i in range(6))]),  # not before the rise is over
    ],
)
def test_wsd_stays_at_the_peak_and_falls_in_its_last_steps(length, expected):
    config = AdamW(lr=1.0, warmup_steps=2, floor=0.2, schedule="wsd", **length)
    assert [learning_rate(step, config, 8) for step in range(8)] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("ours", "theirs", "specific"),
    [
        ({"schedule": "cosine", "floor": 0.0}, "cosine", None),
        ({"schedule": "cosine", "floor": 0.3}, "cosine_with_min_lr", {"min_lr_rate": 0.3}),
        ({"schedule": "linear", "floor": 0.0}, "linear", None),
        ({"schedule": "constant"}, "constant_with_warmup", None),
        (
            {"schedule": "wsd", "decay_steps": 9, "floor": 0.3},
            "warmup_stable_decay",
            {"num_decay_steps": 9, "decay_type": "linear", "min_lr_ratio": 0.3},
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_after_the_rise_the_schedules_are_those_of_transformers(ours, theirs, specific):
    """In the rise theirs starts from 0 (or the floor) at the first step, ours reaches 1 / warmup_steps there."""
    warmup, total = 5, 30
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.7)
    scheduler = get_scheduler(theirs, optimizer, warmup, total, specific)
    expected = []
    for _ in range(total):
        expected.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    found = [learning_rate(step, AdamW(lr=0.7, warmup_steps=warmup, **ours), total) for step in range(total)]
    assert found[warmup:] == pytest.approx(expected[warmup:])
    assert found[:warmup] == pytest.approx([0.7 * (step + 1) / warmup for step in range(warmup)])


def test_warm_up_over_the_whole_run_only_rises():
    config = AdamW(lr=2.0, warmup_steps=4)
    assert [learning_rate(step, config, 4) for step in range(4)] == pytest.approx([0.5, 1.0, 1.5, 2.0])


def test_a_run_shorter_than_its_warm_up_ends_in_the_rise():
    config = AdamW(lr=2.0, warmup_steps=4)
    assert [learning_rate(step, config, 2) for step in range(2)] == pytest.approx([0.5, 1.0])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"decay_steps": 3}, "decay_steps is not read by schedule cosine"),
        ({"schedule": "linear", "decay_fraction": 0.1}, "decay_fraction is not read by schedule linear"),
        ({"schedule": "wsd", "decay_steps": 3, "decay_fraction": 0.1}, "say the same twice"),
        ({"type": "sgd", "betas": [0.9, 0.95]}, "optim.sgd.betas\n  Extra inputs"),
        ({"type": "sgd", "eps": 1e-8}, "optim.sgd.eps\n  Extra inputs"),
        ({"type": "sgd", "momentum": 0, "nesterov": True}, "nesterov needs a momentum"),
        ({"type": "adafactor", "momentum": 0.9}, "optim.adafactor.momentum\n  Extra inputs"),
        ({"momentum": 0.9}, "optim.adamw.momentum\n  Extra inputs"),
        ({"type": "lion"}, "'adamw', 'sgd', 'adafactor'"),
    ],
)
def test_what_an_optimizer_or_schedule_does_not_read_is_refused(make_config, settings, said):
    with pytest.raises(ValidationError) as caught:
        make_config(optim={"warmup_steps": 0, **settings})
    assert said in str(caught.value)


def test_a_config_that_names_no_optimizer_means_adamw(make_config):
    assert make_config(optim={"lr": 0.5}).optim == AdamW(lr=0.5, warmup_steps=2)
    values = make_config().model_dump(mode="json")
    del values["optim"]
    assert type(make_config()).model_validate(values).optim == AdamW()


def test_an_override_of_the_optimizer_keeps_the_keys_of_a_config_that_names_none(tmp_path, make_config):
    from launch import config_file

    values = make_config().model_dump(mode="json")
    (tmp_path / "c.yaml").write_text(config_file.yaml.safe_dump({**values, "optim": {"lr": 0.25}}))
    assert config_file.load(tmp_path / "c.yaml", ["optim.type=sgd"], type(make_config())).optim.lr == 0.25


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_matrices_decay_and_norms_biases_and_frozen_weights_do_not(name):
    config = OPTIMIZERS[name].model_copy(update={"lr": 0.1, "weight_decay": 0.5})
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3), torch.nn.Linear(3, 1, bias=False))
    model[2].requires_grad_(False)
    optimizer = build_optimizer(model, config, fused=False)
    decayed, plain = optimizer.param_groups
    assert [id(p) for p in decayed["params"]] == [id(model[0].weight)]
    assert [id(p) for p in plain["params"]] == [id(model[0].bias), id(model[1].weight), id(model[1].bias)]
    assert (decayed["weight_decay"], plain["weight_decay"], plain["lr"]) == (0.5, 0.0, 0.1)
    before = model[0].weight.detach().clone()
    for parameter in decayed["params"] + plain["params"]:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(model[0].weight.detach(), before * (1 - 0.1 * 0.5))
    assert torch.equal(model[1].weight.detach(), torch.ones(3))


def test_each_key_of_an_optimizer_reaches_it():
    model = torch.nn.Linear(2, 2)
    adamw = build_optimizer(model, AdamW(betas=(0.8, 0.9), eps=1e-6), fused=True).param_groups[0]
    assert (adamw["betas"], adamw["eps"], adamw["fused"]) == ((0.8, 0.9), 1e-6, True)
    sgd = build_optimizer(model, SGD(type="sgd", momentum=0.5, nesterov=True), fused=False).param_groups[0]
    assert (sgd["momentum"], sgd["nesterov"], sgd["dampening"]) == (0.5, True, 0)
    chosen = Adafactor(type="adafactor", beta2_decay=-0.5, max_update=2.0)
    adafactor = build_optimizer(model, chosen, fused=True).param_groups[0]
    assert (adafactor["beta2_decay"], adafactor["d"]) == (-0.5, 2.0)


def test_a_model_without_norms_or_without_matrices_has_one_group():
    assert len(build_optimizer(torch.nn.Linear(2, 2, bias=False), AdamW(), fused=False).param_groups) == 1
    assert len(build_optimizer(torch.nn.LayerNorm(2), AdamW(), fused=False).param_groups) == 1


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_is_kept_at_first_is_what_the_optimizer_itself_makes(name, fused):
    """So that a change in torch is noticed; and beginning with these zeros is beginning with nothing."""
    config = OPTIMIZERS[name]

    def stepped(prepare) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.Linear(3, 2), torch.nn.LayerNorm(1))
        optimizer = build_optimizer(model, config, fused=fused)
        prepare(model, optimizer)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        return model, optimizer

    def begin(model, optimizer) -> None:
        for parameter in model.parameters():
            if fresh := initial_state(optimizer, parameter):
                optimizer.state[parameter] = fresh

    (model, optimizer), (begun, _) = stepped(lambda *_: None), stepped(begin)
    for parameter in model.parameters():
        made = {key: tensor for key, tensor in optimizer.state[parameter].items() if tensor is not None}
        ours = initial_state(optimizer, parameter)
        assert {key: (t.shape, t.dtype, t.device) for key, t in made.items()} == {
            key: (t.shape, t.dtype, t.device) for key, t in ours.items()
        }
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), begun.parameters(), strict=True))


def test_the_size_of_what_is_kept_is_known_before():
    """A matrix of 4 * 3 and a bias of 4: AdamW keeps two of each, SGD one, Adafactor 4 + 3 and the bias."""
    model = torch.nn.Linear(3, 4)
    sizes = {name: state_numel(model, config) for name, config in OPTIMIZERS.items()}
    assert sizes == {
        "adamw": 2 * (12 + 4), "sgd": 12 + 4, "sgd without momentum": 0, "adafactor": 4 + 3 + 4,
    }  # fmt: skip
