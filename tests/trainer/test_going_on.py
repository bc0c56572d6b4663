"""A run that goes on: with every optimizer, with weights that joined late, with other settings."""

import json
import shutil

import pytest
import torch

from launch.config_file import ConfigError
from serving.directory import DirectoryError
from trainer import build, checkpoint, loop
from trainer.checkpoint import Counters

STAGES = {
    "train": ["model.layers.1*"],
    "stages": [{"step": 2, "train": ["model.layers.0*"]}, {"step": 4, "train": ["*norm*"]}],
}


class Killed(BaseException):
    """Stands for a kill in this process: nothing of the run catches it."""


@pytest.fixture
def killed_at(train, monkeypatch):
    """Return a function that trains a config up to a kill in the given 0-based step."""

    def run(config, step: int) -> None:
        def rate(at, *rest):
            if at == step:
                raise Killed
            return rate_for_real(at, *rest)

        rate_for_real = loop.learning_rate
        with monkeypatch.context() as patch:
            patch.setattr(loop, "learning_rate", rate)
            patch.setattr("launch.train.BaseException", (), raising=False)
            with pytest.raises(Killed):
                train(config)

    return run


def model_of(config) -> bytes:
    return (config.run.folder / "model" / "model.safetensors").read_bytes()


def result(config) -> dict:
    clocked = {"seconds", "tokens_per_s", "peak_memory_bytes", "program_memory_bytes"}
    values = json.loads((config.run.folder / "result.json").read_text())
    return {name: value for name, value in values.items() if name not in clocked}


OPTIMIZERS = {
    "sgd": {"type": "sgd", "lr": 0.05, "nesterov": True},
    "no momentum": {"type": "sgd", "lr": 0.05, "momentum": 0},
    "adafactor": {"type": "adafactor", "lr": 0.05},
}


@pytest.mark.parametrize(
    ("strategy", "optim"),
    [
        *(
            pytest.param({"type": "full"}, optim, id=name, marks=[pytest.mark.slow] * (name != "adafactor"))
            for name, optim in OPTIMIZERS.items()
        ),
        *(
            pytest.param(
                {"type": "partial", **STAGES}, optim, id=f"stages, {name}", marks=[pytest.mark.slow] * (name != "sgd")
            )
            for name, optim in {"adamw": {}, **OPTIMIZERS}.items()
        ),
    ],
)
def test_after_a_kill_the_run_goes_on_bit_for_bit_with_every_optimizer(
    make_config, train, killed_at, read_lines, strategy, optim
):
    """With stages: one weight has joined when step 3 is saved, and one joins after that."""
    settings = {"checkpoint": {"every": 3}, "optim": optim, "strategy": strategy}
    whole, killed = (
        make_config("sft", strategy["type"], run={"name": name}, **settings) for name in ("whole", "killed")
    )
    assert train(whole) == 0
    killed_at(killed, 4)
    assert train(killed) == 0
    assert read_lines(killed) == read_lines(whole)
    assert result(killed) == result(whole)
    assert model_of(killed) == model_of(whole)
    assert result(whole)["score"] < result(whole)["initial_metrics"]["eval_loss"], "nothing was learned"


def test_a_weight_that_joins_late_has_steps_of_its_own_and_no_state_before(make_config, parts_of):
    config = make_config("sft", "partial", strategy=STAGES, checkpoint={"every": 1, "keep": 9})
    trained = parts_of(config)
    early, late, last = (
        f"model.layers.{name}.weight" for name in ("1.mlp.up_proj", "0.mlp.up_proj", "0.input_layernorm")
    )
    for step, expected in (
        (1, {early: 1}),
        (2, {early: 2}),
        (3, {early: 3, late: 1, last: 1}),  # of a layer as a whole
        (6, {early: 6, late: 4, last: 4, "model.norm.weight": 2}),
    ):
        path = checkpoint.step_folder(config.run.folder / "checkpoints", step)
        manifest = json.loads((path / "trivet.json").read_text())
        steps, tensors = manifest["optimizer_steps"], manifest["tensors"]
        names = (early, late, last, "model.norm.weight")
        assert {name: steps[name] for name in names if name in steps} == expected
        assert {name for name in names if tensors[name]["roles"] != ["weight"]} == set(expected)
    assert "lm_head.weight" not in tensors
    assert trained.optimizer.param_groups


@pytest.mark.parametrize("optim", [*OPTIMIZERS.values(), {}], ids=[*OPTIMIZERS, "adamw"])
def test_a_checkpoint_gives_back_every_bit_of_the_optimizer(make_config, parts_of, optim):
    config = make_config(run={"steps": 2}, checkpoint={"every": 2}, optim=optim)
    trained, fresh = parts_of(config), build.build(config)
    path = checkpoint.step_folder(config.run.folder / "checkpoints", 2)
    done = checkpoint.load(path, fresh.world, fresh.model, fresh.optimizer, fingerprints=fresh.fingerprints)
    assert isinstance(done, Counters)
    states = [part.optimizer.optimizer.state_dict()["state"] for part in (trained, fresh)]
    assert states[0].keys() == states[1].keys()
    for index, state in states[0].items():
        assert state.keys() == states[1][index].keys()
        for key, tensor in state.items():
            assert torch.equal(tensor, states[1][index][key]), (index, key)
            assert tensor.shape == states[1][index][key].shape


def test_a_checkpoint_of_another_optimizer_is_refused_and_changes_nothing(make_config, train):
    config = make_config(run={"steps": 2}, checkpoint={"every": 2})
    assert train(config) == 0
    path = checkpoint.step_folder(config.run.folder / "checkpoints", 2)
    for optim, said in (
        (
            {"type": "sgd"},
            r"holds exp_avg, exp_avg_sq, weight, this run's optimizer needs momentum_buffer, weight; start",
        ),
        ({"type": "adafactor"}, r"holds exp_avg, exp_avg_sq, weight, this run's optimizer needs (variance, )?weight"),
    ):
        other = build.build(make_config(optim=optim))
        before = [weight.detach().clone() for weight in other.model.parameters()]
        with pytest.raises(DirectoryError, match=said):
            checkpoint.load(path, other.world, other.model, other.optimizer, fingerprints=other.fingerprints)
        assert all(map(torch.equal, before, other.model.parameters()))
        assert not other.optimizer.optimizer.state


def as_saved_before_steps_were_by_weight(path) -> None:
    manifest = json.loads((path / "trivet.json").read_text())
    for name in ("optimizer_steps", "loss_scale", "skipped_steps", "skipped_in_a_row", "last_norm", "scores", "feed"):
        manifest.pop(name)
    fields = {k: v for k, v in manifest.items() if k not in ("format_version", "trivet", "kind", "files", "digest")}
    (path / "trivet.json").write_text(json.dumps({**manifest, "digest": checkpoint._digest(fields)}))


def test_a_checkpoint_without_steps_by_weight_goes_on_bit_for_bit(make_config, train, killed_at, read_lines):
    whole, killed = (make_config(run={"name": name}, checkpoint={"every": 3}) for name in ("whole", "killed"))
    assert train(whole) == 0
    killed_at(killed, 4)
    as_saved_before_steps_were_by_weight(checkpoint.step_folder(killed.run.folder / "checkpoints", 3))
    assert train(killed) == 0
    assert read_lines(killed) == read_lines(whole)
    assert model_of(killed) == model_of(whole)


MAY_DIFFER = {
    "checkpoint.every": {"checkpoint": {"every": 1}},
    "checkpoint.keep": {"checkpoint": {"every": 3, "keep": 1}},
    "evaluation.every": {"evaluation": {"every": 1}},
    "evaluation.samples": {"evaluation": {"samples": 1}},
    "log.every": {"log": {"every": 2}},
    "batch.activation_checkpointing": {"batch": {"activation_checkpointing": True}},
    "optim.on_non_finite": {"optim": {"on_non_finite": "skip"}},
    "optim.max_skipped_steps": {"optim": {"max_skipped_steps": 3}},
}


def test_what_changes_no_step_may_differ_when_a_run_goes_on(make_config, train, killed_at, read_lines, tmp_path):
    settings = {"checkpoint": {"every": 4}}
    whole, killed = (make_config(run={"name": name}, **settings) for name in ("whole", "killed"))
    assert train(whole) == 0
    killed_at(killed, 5)
    losses = {line["step"]: line["loss"] for line in read_lines(whole) if line["kind"] == "train"}
    for key, change in MAY_DIFFER.items():
        place = tmp_path / key
        shutil.copytree(killed.run.folder, place / "killed")
        changed = make_config(run={"name": "killed", "dir": str(place)}, **{**settings, **change})
        assert train(changed) == 0, key
        found = {line["step"]: line["loss"] for line in read_lines(changed) if line["kind"] == "train"}
        assert found.items() <= losses.items(), key
        assert model_of(changed) == model_of(whole), key


MUST_NOT = {
    "run.seed": {"run": {"name": "killed", "seed": 1}},
    "objective.type": {"objective": {"type": "sft"}},
    "model.hidden_size": {"model": {"hidden_size": 16}},
    "tokenizer.vocab_size": {"tokenizer": {"vocab_size": 301}},
    "data.type": {"type": "embedded"},
    "optim.type": {"optim": {"type": "sgd"}},
    "optim.lr": {"optim": {"lr": 0.5}},
    "optim.schedule": {"optim": {"schedule": "wsd"}},
    "batch.rows": {"batch": {"rows": 2}},
    "batch.max_length": {"batch": {"max_length": 24}},
    "precision.type": {"precision": {"type": "bf16"}},
}


def test_what_changes_a_step_is_refused_by_its_key_with_the_keys_that_may_differ(make_config, train, killed_at):
    settings = {"run": {"name": "killed"}, "checkpoint": {"every": 3}}
    killed = make_config(**settings)
    killed_at(killed, 4)
    before = {path: path.read_bytes() for path in killed.run.folder.rglob("*") if path.is_file()}
    values = killed.model_dump(mode="json")
    for key, change in MUST_NOT.items():
        config = type(killed).model_validate({**values, "data": change}) if key == "data.type" else None
        with pytest.raises(ConfigError) as refused:
            train(config or make_config(**{**settings, **change}))
        message = str(refused.value)
        assert message.startswith(f"run.name: {killed.run.folder} holds a different run ("), key
        assert key in message
        assert "may differ: run.steps, checkpoint.*, evaluation.*, log.*, batch.micro_rows" in message
    assert {path: path.read_bytes() for path in before} == before


def test_an_evaluation_is_not_made_again_where_a_run_goes_on(make_config, train, killed_at, monkeypatch, read_lines):
    config = make_config(evaluation={"every": 2, "max_rows": 4}, checkpoint={"every": 2})
    killed_at(config, 4)  # right after the evaluation and the checkpoint of step 4
    made, evaluate = [], loop.evaluate
    monkeypatch.setattr(loop, "evaluate", lambda *args: made.append(1) or evaluate(*args))
    assert train(config) == 0
    assert len(made) == 1, "that of the end"
    assert [line["step"] for line in read_lines(config) if line["kind"] == "eval"] == [0, 2, 4, 6]


def test_no_batch_is_made_for_the_steps_that_a_run_goes_on_behind(make_config, train, killed_at, monkeypatch):
    config = make_config(checkpoint={"every": 4})
    killed_at(config, 5)
    asked, batches = [], build.Feed.micro_batches
    monkeypatch.setattr(build.Feed, "micro_batches", lambda feed, step: asked.append(step) or batches(feed, step))
    assert train(config) == 0
    assert asked == [4, 5]


def test_speed_and_seconds_after_a_resume_are_those_of_the_steps(make_config, train, killed_at):
    """Not the tokens of the whole run over the seconds since it went on."""
    config = make_config(checkpoint={"every": 4})
    killed_at(config, 5)
    manifest_path = checkpoint.step_folder(config.run.folder / "checkpoints", 4) / "trivet.json"
    before = json.loads(manifest_path.read_text())["elapsed_s"]
    assert train(config) == 0
    text = (config.run.folder / "metrics.jsonl").read_text().splitlines()
    lines = [line for line in map(json.loads, text) if line["kind"] == "train"]
    elapsed = [line["elapsed_s"] for line in lines]
    assert elapsed == sorted(elapsed)
    assert elapsed[4] > before
    for line in lines:
        seconds = line["tokens"] / line["tokens_per_s"]
        assert seconds <= line["elapsed_s"]
    made = json.loads((config.run.folder / "result.json").read_text())
    assert made["tokens_per_s"] == pytest.approx(made["tokens"] / made["seconds"])
    assert made["seconds"] == elapsed[-1]


def test_a_longer_run_goes_on_from_the_end_of_the_shorter_one(make_config, train, read_lines):
    """With a constant rate it is the run that so many steps at once give, bit for bit."""
    settings = {"checkpoint": {"every": 2}, "optim": {"schedule": "constant"}}
    long, short = (make_config(run={"name": n, "steps": s}, **settings) for n, s in (("long", 6), ("short", 4)))
    for config in (long, short):
        assert train(config) == 0
    shutil.rmtree(short.run.folder / "checkpoints" / "step-00000002")
    assert train(make_config(run={"name": "short", "steps": 6}, **settings)) == 0
    assert [line for line in read_lines(short) if line["kind"] == "train"] == [
        line for line in read_lines(long) if line["kind"] == "train"
    ]
    assert model_of(short) == model_of(long)
