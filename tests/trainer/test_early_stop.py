"""When a run ends early, and which of its steps the model is from."""

import json
import math

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from trainer import build, checkpoint, early_stop
from trainer.config import Evaluation
from trainer.evaluate import Metrics, evaluate


@pytest.mark.parametrize(
    ("scores", "mode", "settings", "waited"),
    [
        ([5.0, 4.0, 4.0, 4.1], "min", {"patience": 2}, 2),  # equal is no better
        ([5.0, 4.0, 4.0, 3.9], "min", {"patience": 2}, None),
        ([5.0, 4.0, 4.1], "min", {"patience": 2}, None),
        ([0.5, 0.4, 0.3], "max", {"patience": 2}, 2),
        ([0.5, 0.6, 0.7], "max", {"patience": 2}, None),
        ([5.0, 4.95, 4.91], "min", {"patience": 2, "min_improvement": 0.1}, 2),  # 5.0 stays what must be beaten
        ([5.0, 4.95, 4.89], "min", {"patience": 2, "min_improvement": 0.1}, None),
        ([5.0, 6.0, 6.0, 4.0], "min", {"patience": 2}, None),  # it had waited long enough, and went on: no matter
        ([5.0, 9.0, 9.0, 9.0], "min", {}, None),
        ([], "min", {"patience": 1}, None),
    ],
)
def test_patience_worked_by_hand(scores, mode, settings, waited):
    by_step = {str(10 * (i + 1)): score for i, score in enumerate(scores)}
    reason = early_stop.reason(Evaluation(every=10, **settings), by_step, mode)
    assert (f"{waited} evaluations without" in reason) if waited else reason == ""


def test_the_best_step_is_the_first_of_the_best_scores():
    scores = {"10": 3.0, "9": 2.0, "100": 2.0}
    assert (early_stop.best_step(scores, "min"), early_stop.best_step(scores, "max")) == (9, 10)
    assert early_stop.best_step({}, "min") is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"evaluation": {"patience": 2}}, "patience 2 found, but every is null"),
        ({"evaluation": {"every": 2, "min_improvement": 0.1}}, "min_improvement 0.1 is read only with patience"),
        ({"checkpoint": {"best": True}}, "checkpoint.best: true found, but evaluation.every is null"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(make_config, changes, said):
    with pytest.raises(ValidationError) as caught:
        make_config(**changes)
    assert said in str(caught.value)


@pytest.fixture
def scored(monkeypatch):
    """Return a function that makes the evaluations of a run say these scores, by step, whatever the model is."""

    def say(scores: dict[int, float]) -> None:
        def evaluate(world, model, objective, feed, rows=None):
            steps = {int(state["step"]) for state in _states(model)} or {0}
            metrics = Metrics(eval_loss=scores[max(steps)])
            metrics.details = {}
            return metrics

        def _states(model):
            return parts_by_model[id(model)].optimizer.optimizer.state.values()

        def build(config, *rest):
            parts = build_for_real(config, *rest)
            parts_by_model[id(parts.model)] = parts
            return parts

        parts_by_model: dict[int, object] = {}
        build_for_real = build_module.build
        monkeypatch.setattr("trainer.loop.build", build)
        monkeypatch.setattr("trainer.loop.evaluate", evaluate)
        monkeypatch.setattr("trainer.progress.evaluate", evaluate)

    build_module = build
    return say


SETTINGS = {"evaluation": {"every": 2, "patience": 2}, "run": {"steps": 12}}


def result(config) -> dict:
    return json.loads((config.run.folder / "result.json").read_text())


def status(config) -> dict:
    return json.loads((config.run.folder / "status.json").read_text())


def kinds(lines: list[dict]) -> list[tuple[str, int]]:
    return [(line["kind"], line["step"]) for line in lines]


def test_a_run_without_improvement_ends_early_and_stays_ended(make_config, train, scored, read_lines, capfd):
    scored({0: 1.0, 2: 5.0, 4: 4.0, 6: 4.5, 8: 4.2, 10: 0.0, 12: 0.0})
    config = make_config(**SETTINGS)
    assert train(config) == 0
    assert kinds(read_lines(config))[-2:] == [("train", 8), ("eval", 8)], "the last evaluation is logged once"
    found = status(config)
    assert (found["state"], found["code"], found["step"]) == ("done", 0, 8)
    assert found["reason"] == "stopped early: 2 evaluations without a better score (evaluation.patience); best: step 4"
    assert (result(config)["steps"], result(config)["score"], result(config)["model_step"]) == (8, 4.2, 8)
    assert "stopped early: 2 evaluations" in capfd.readouterr().err
    before = {path: path.stat().st_mtime_ns for path in config.run.folder.rglob("*") if path.is_file()}
    assert train(config) == 0
    assert "already finished" in capfd.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in config.run.folder.rglob("*") if path.is_file()} == before


def test_a_run_that_ended_early_goes_on_with_more_patience(make_config, train, scored, read_lines):
    scored({0: 1.0, 2: 5.0, 4: 4.0, 6: 4.5, 8: 4.2, 10: 3.0, 12: 3.0})
    kept = {**SETTINGS, "checkpoint": {"every": 100}}
    assert train(make_config(**kept)) == 0
    patient = make_config(**{**kept, "evaluation": {"every": 2, "patience": 3}})
    assert train(patient) == 0
    assert (status(patient)["step"], status(patient)["reason"]) == (12, "")
    assert kinds(read_lines(patient)) == [
        ("eval", 0),
        *((kind, step) for step in range(1, 13) for kind in ("train", "eval")[: 1 + (step % 2 == 0)]),
    ]


@pytest.mark.parametrize("place", ["trainer.model_dir.save_model", "trainer.run_folder.write_result"])
def test_a_kill_at_an_early_end_changes_nothing(make_config, train, scored, monkeypatch, read_lines, place):
    scored({0: 1.0, 2: 4.0, 4: 4.5, 6: 4.2, 8: 0.0})

    class Killed(BaseException):
        pass

    def kill(*args, **kwargs):
        raise Killed

    whole, killed = (make_config(**{**SETTINGS, "run": {"name": name, "steps": 8}}) for name in ("whole", "killed"))
    assert train(whole) == 0
    with monkeypatch.context() as patch:
        patch.setattr(place, kill)
        patch.setattr("launch.train.BaseException", (), raising=False)
        with pytest.raises(Killed):
            train(killed)
    monkeypatch.setattr("trainer.loop.learning_rate", lambda *args: pytest.fail("a step was taken"))
    assert train(killed) == 0
    assert read_lines(killed) == read_lines(whole)
    assert {**status(killed)} == {**status(whole)}


BEST = {"checkpoint": {"every": 3, "keep": 1, "best": True}, "evaluation": {"every": 2}, "run": {"steps": 8}}
SCORES = {0: 0.0, 2: 5.0, 4: 3.0, 6: 3.5, 8: 3.2}


def test_the_model_is_the_best_steps_and_the_result_says_which(make_config, train, scored, read_lines):
    scored(SCORES)
    whole = make_config(**{**BEST, "run": {"name": "whole", "steps": 8}})
    assert train(whole) == 0
    names = sorted(path.name for path in (whole.run.folder / "checkpoints").iterdir())
    assert names == ["step-00000004", "step-00000008"], "the best and the newest"
    found = result(whole)
    assert (found["steps"], found["model_step"], found["score"]) == (8, 4, 3.0)
    assert json.loads((whole.run.folder / "model" / "trivet.json").read_text())["step"] == 4
    # The same run, stopped there: its weights. A constant rate, which does not know how long the run is.
    kept = load_file(whole.run.folder / "checkpoints" / "step-00000004" / "rank-00000.safetensors")
    saved = load_file(whole.run.folder / "model" / "model.safetensors")
    for name, weight in saved.items():
        assert torch.equal(weight.flatten(), kept[f"{name}::weight"])
    newest = load_file(whole.run.folder / "checkpoints" / "step-00000008" / "rank-00000.safetensors")
    assert any(not torch.equal(weight.flatten(), newest[f"{name}::weight"]) for name, weight in saved.items())


@pytest.mark.parametrize("step", [3, 5, 8])
def test_the_best_step_survives_a_kill_at_any_step(make_config, train, scored, monkeypatch, read_lines, step):
    scored(SCORES)
    whole, killed = (make_config(**{**BEST, "run": {"name": name, "steps": 8}}) for name in ("whole", "killed"))
    assert train(whole) == 0

    class Killed(BaseException):
        pass

    def log(self, at, **fields):
        if at == step:
            raise Killed
        return log_for_real(self, at, **fields)

    from trainer.metrics import RunLog

    log_for_real = RunLog.train
    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "train", log)
        patch.setattr("launch.train.BaseException", (), raising=False)
        with pytest.raises(Killed):
            train(killed)
    assert train(killed) == 0
    assert read_lines(killed) == read_lines(whole)
    clocked = {"seconds", "tokens_per_s", "peak_memory_bytes", "program_memory_bytes"}
    assert {k: v for k, v in result(killed).items() if k not in clocked} == {
        k: v for k, v in result(whole).items() if k not in clocked
    }
    models = [(each.run.folder / "model" / "model.safetensors").read_bytes() for each in (whole, killed)]
    assert models[0] == models[1]


def test_a_best_checkpoint_that_was_damaged_is_said_and_the_last_step_stands_for_it(
    make_config, train, scored, monkeypatch, capfd
):
    scored(SCORES)

    def damage(config, parts, done):
        file = config.run.folder / "checkpoints" / "step-00000004" / "rank-00000.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"x")
        save_for_real(config, parts, done)

    from trainer import progress

    save_for_real = progress.save
    monkeypatch.setattr(progress, "save", damage)
    assert train(make_config(**BEST)) == 0
    assert "warning: the best checkpoint cannot be used: " in capfd.readouterr().err
    assert result(make_config(**BEST))["model_step"] == 8


def test_without_checkpoints_the_best_one_is_gone_when_the_model_is_there(make_config, train, scored):
    scored(SCORES)
    config = make_config(**{**BEST, "checkpoint": {"best": True}})
    assert train(config) == 0
    assert result(config)["model_step"] == 4
    assert not list(config.run.folder.glob("checkpoints/*"))


def test_the_best_model_scores_what_its_evaluation_said(make_config, train):
    """With real scores: a rate that breaks the model after a good start."""
    config = make_config(**{**BEST, "optim": {"lr": 0.3, "warmup_steps": 6, "schedule": "constant"}})
    assert train(config) == 0
    lines = [json.loads(line) for line in (config.run.folder / "metrics.jsonl").read_text().splitlines()]
    scores = {line["step"]: line["eval_loss"] for line in lines if line["kind"] == "eval" and line["step"]}
    best = min(scores, key=scores.get)
    assert best != 8, "nothing was broken"
    found = result(config)
    assert (found["model_step"], found["score"], found["metrics"]["eval_loss"]) == (best, scores[best], scores[best])
    parts = build.build(config)
    path = checkpoint.step_folder(config.run.folder / "checkpoints", best)
    checkpoint.load(path, parts.world, parts.model, parts.optimizer, fingerprints=parts.fingerprints)
    assert evaluate(parts.world, parts.model, parts.objective, parts.feed)["eval_loss"] == scores[best]
    assert math.isfinite(scores[best])
