"""`trivet verify-training` shows what it saw, fails when a class fails, and leaves the run alone."""

import json

import pytest

from launch import config_file, verify_runs, verify_training
from trainer.config import Checkpoint, Partial, RunConfig
from trainer.config.strategy import Stage
from trainer.exactness import Check
from trainer.guards import RunFailed

CONFIG = """
run: {name: mine, steps: 40}
objective: {type: causal_lm}
model: {type: new, hidden_size: 16, intermediate_size: 32, num_layers: 1, num_heads: 2, context_length: 64}
tokenizer: {type: train, vocab_size: 300}
data: {type: files, train: rows.txt, validation_fraction: 0.2}
strategy: {type: scratch}
optim: {lr: 1.0e-2, warmup_steps: 10}
batch: {rows: 4, max_length: 32}
evaluation: {every: 5, patience: 1}
checkpoint: {every: 10}
log: {trackers: [wandb], sample_text: 2}
"""
HOLDS = Check("holds", "this and that", 1e-5, 3e-7)
FAILS = Check("fails", "one and another", 0.0, float("inf"), "step 3 read other tokens, or in another order")
LEAVES_OUT = Check("does not apply", "something", 0.0, note="it packs nothing")


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A folder to stand in, with a config and its data."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(CONFIG)
    (tmp_path / "rows.txt").write_text("\n".join(f"the file {i} returns {i * i} lines" for i in range(60)))
    return tmp_path


@pytest.fixture
def classes(monkeypatch):
    """Return a function that replaces the classes by these results."""
    return lambda *checks: monkeypatch.setattr(
        verify_training, "CLASSES", tuple(lambda runs, check=check: check for check in checks)
    )


@pytest.mark.slow
def test_every_class_holds_for_a_small_config_that_is_killed_for_real(work, trivet):
    code, out, err = trivet("verify-training", "mine.yaml")
    assert code == 0, out + err
    results = {line[:22].strip(): line[42:48].strip() for line in out.splitlines()[1:]}
    assert len(results) == len(verify_training.CLASSES)
    assert {name for name, result in results.items() if result != "ok"} == {"step 0 = base"}
    assert "killed (SIGKILL) after step 3 of 6, gone on from 2" in out
    assert sorted(path.name for path in work.iterdir()) == ["mine.yaml", "rows.txt"], "no run folder was made"


@pytest.mark.parametrize(("checks", "code"), [((HOLDS, LEAVES_OUT), 0), ((HOLDS, FAILS), 1)])
def test_the_exit_code_says_whether_all_hold(work, trivet, classes, checks, code):
    classes(*checks)
    assert trivet("verify-training", "mine.yaml")[0] == code


def test_the_table_has_the_deviation_seen_and_that_allowed(work, trivet, classes):
    classes(HOLDS, FAILS, LEAVES_OUT)
    _, out, _ = trivet("verify-training", "mine.yaml")
    assert [" ".join(line.split()) for line in out.splitlines()] == [
        "class deviation allowed result what was compared",
        "holds 3.0e-07 1.0e-05 ok this and that",
        "fails inf 0 FAIL one and another (step 3 read other tokens, or in another order)",
        "does not apply - 0 n/a something (it packs nothing)",
    ]


def test_json_is_for_programs(work, trivet, classes):
    classes(HOLDS, FAILS, LEAVES_OUT)
    code, out, _ = trivet("verify-training", "mine.yaml", "--json")
    assert code == 1
    found = json.loads(out)
    assert found["ok"] is False
    assert [check["result"] for check in found["checks"]] == ["ok", "FAIL", "n/a"]
    assert [check["deviation"] for check in found["checks"]] == [3e-7, None, None]


def test_a_run_that_would_not_start_is_bad_input(work, trivet):
    code, _, err = trivet("verify-training", "mine.yaml", "data.train=missing.txt")
    assert code == 2
    assert len([line for line in err.splitlines() if line.startswith("error: ")]) == 1


def test_the_short_run_tells_nobody_and_keeps_what_is_learned_as_it_is(work):
    config = config_file.load(work / "mine.yaml", [], RunConfig)
    short = verify_runs.Runs(config, work / "there", 6).config
    assert short.run.folder == work / "there" / "mine"
    assert (short.log.trackers, short.log.sample_text, short.log.tensorboard) == ([], 0, False)
    assert short.evaluation.patience is None
    assert short.checkpoint == Checkpoint(every=2)
    different = config_file.differences(config, short)
    assert {key.partition(".")[0] for key in different} == {"run", "optim", "evaluation", "checkpoint", "log"}
    assert "optim.lr" not in different


@pytest.mark.parametrize(("num_stages", "steps"), [(1, [1]), (2, [1, 3]), (5, [1, 2, 3, 4, 5]), (9, [1, 2, 3, 4, 5])])
def test_stages_are_moved_into_the_few_steps(work, num_stages, steps):
    stages = [Stage(step=100 * (i + 1), train=[f"layer.{i}"]) for i in range(num_stages)]
    config = config_file.load(work / "mine.yaml", [], RunConfig)
    config = config.model_copy(update={"strategy": Partial(type="partial", train=["a"], stages=stages)})
    short = verify_runs.Runs(config, work, 6).config
    assert [stage.step for stage in short.strategy.stages] == steps


@pytest.mark.slow
def test_a_run_is_killed_after_a_step_that_it_skipped_too(work):
    """With such a rate the first step makes every loss of the next ones infinite or none."""
    quiet = ["log.trackers=[]", "log.sample_text=0"]
    bad = ["optim.lr=1e30", "optim.warmup_steps=0", "optim.on_non_finite=skip"]
    config = config_file.load(work / "mine.yaml", [*bad, *quiet], RunConfig)
    verify_runs.kill_after(3, config, work)
    lines = [json.loads(line) for line in (config.run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["step"]) for line in lines][-1] == ("skip", 3)


@pytest.mark.slow
def test_a_run_that_ends_before_it_can_be_killed_is_told(work):
    config = config_file.load(
        work / "mine.yaml", ["data.train=missing.txt", "log.trackers=[]", "log.sample_text=0"], RunConfig
    )
    with pytest.raises(
        RunFailed, match=r"the run that was to be killed ended with 2: error: data: missing\.txt: no such file"
    ):
        verify_runs.kill_after(2, config, work)
