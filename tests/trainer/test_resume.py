"""Stopped, killed, resumed: the same losses bit for bit, and a folder that never lies."""

import json
import os
import shutil
import signal

import pytest
from safetensors.torch import load_file, save_file

from launch.config_file import ConfigError
from serving import directory
from serving.directory import BadInput
from trainer import run_folder
from trainer.optim import learning_rate

KILL = "os.kill(os.getpid(), signal.SIGKILL)"
README_CONFIGS = [
    ("causal_lm", "scratch", {}),
    ("sft", "lora", {"strategy": {"dropout": 0.3}, "batch": {"micro_rows": 2}}),
    ("classification", "full", {}),
]


def status(config) -> dict:
    return json.loads((config.run.folder / "status.json").read_text())


def results(config) -> dict:
    """result.json without what depends on the clock."""
    clocked = {"seconds", "tokens_per_s", "peak_memory_bytes", "program_memory_bytes"}
    values = json.loads((config.run.folder / "result.json").read_text())
    return {name: value for name, value in values.items() if name not in clocked}


def weights(config) -> bytes:
    return (config.run.folder / "model" / "model.safetensors").read_bytes()


@pytest.fixture
def go_on(train, capfd, monkeypatch):
    """Return a function that starts a run again, and checks that it took only the steps after `step`."""

    def run(config, *, step: int) -> None:
        taken = []
        capfd.readouterr()
        with monkeypatch.context() as patch:
            patch.setattr(
                "trainer.loop.learning_rate", lambda at, *rest: (taken.append(at), learning_rate(at, *rest))[1]
            )
            assert train(config) == 0
        said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("going on from")]
        checkpoint = config.run.folder / "checkpoints" / f"step-{step:08d}"
        assert said == ([f"going on from {checkpoint}"] if step else [])
        assert taken == list(range(step, config.run.steps))

    return run


@pytest.mark.parametrize(
    ("objective", "strategy", "changes"), README_CONFIGS, ids=["scratch", "lora", "classification"]
)
def test_after_kill_9_the_run_goes_on_bit_for_bit(
    make_config, train, train_child, go_on, read_lines, objective, strategy, changes
):
    settings = {"checkpoint": {"every": 3}, "evaluation": {"every": 2, "max_rows": 4}, **changes}
    undisturbed = make_config(objective, strategy, run={"name": "undisturbed", "steps": 8}, **settings)
    assert train(undisturbed) == 0

    killed = make_config(objective, strategy, run={"name": "killed", "steps": 8}, **settings)
    code, output = train_child(killed, step=5, act=KILL)
    assert code == -signal.SIGKILL, output
    assert status(killed)["state"] == "running"
    assert {line["step"] for line in read_lines(killed)} == {0, 1, 2, 3, 4, 5}  # 4 and 5 come again: dropped first

    go_on(killed, step=3)
    assert read_lines(killed) == read_lines(undisturbed)
    assert results(killed) == results(undisturbed)
    assert weights(killed) == weights(undisturbed)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT], ids=lambda number: number.name)
def test_a_stop_signal_saves_exits_75_and_the_run_goes_on_bit_for_bit(
    make_config, train, train_child, go_on, read_lines, number
):
    settings = {"evaluation": {"every": 2, "max_rows": 4}}
    undisturbed = make_config(run={"name": "undisturbed"}, **settings)
    assert train(undisturbed) == 0
    stopped = make_config(run={"name": "stopped"}, **settings)
    code, output = train_child(stopped, step=2, act=f"os.kill(os.getpid(), {int(number)})")
    assert code == 75, output
    assert output.count("stopping: saving at the end of this step; Ctrl-C again ends without saving\n") == 1
    assert output.endswith("stopped at step 3; start it again to go on\n")
    # The signal came after step 2 was done, so step 3 is the next boundary.
    assert status(stopped) == {
        **directory.stamp(), "state": "stopped", "code": 75, "step": 3, "reason": f"stopped by {number.name}",
    }  # fmt: skip
    assert [path.name for path in (stopped.run.folder / "checkpoints").iterdir()] == ["step-00000003"]
    go_on(stopped, step=3)
    assert read_lines(stopped) == read_lines(undisturbed)
    assert weights(stopped) == weights(undisturbed)


def test_a_second_ctrl_c_ends_at_once_with_130(make_config, train_child):
    interrupt = f"os.kill(os.getpid(), {int(signal.SIGINT)})"
    config = make_config()
    code, output = train_child(config, step=2, act=f"{interrupt}; {interrupt}")
    assert code == 130, output
    assert (status(config)["state"], status(config)["code"]) == ("failed", 130)


def at(monkeypatch, place: str, act, *, call: int = 1) -> None:
    """Do `act` at the given call of the function at `place`, before it runs."""
    module, _, name = place.rpartition(".")
    real, calls = getattr(__import__(module, fromlist=[name]), name), []

    def wrapped(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            act()
        return real(*args, **kwargs)

    monkeypatch.setattr(place, wrapped)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


class Killed(BaseException):
    """Stands for a kill in this process: nothing of the run catches it."""


def kill() -> None:
    raise Killed


@pytest.mark.parametrize(
    ("place", "call", "step"),
    [
        ("trainer.dataset.read_splits", 1, 0),  # while the run is being built
        ("trainer.loop.rehearse", 1, 0),
        ("trainer.loop.evaluate", 1, 1),  # the evaluation before step 0: one step is taken
        ("trainer.loop.evaluate", 2, 3),  # after step 2
        ("trainer.checkpoint.save", 1, 4),  # during a save
    ],
)
def test_a_stop_signal_at_any_other_time_is_heard_too(
    make_config, train, go_on, monkeypatch, read_lines, place, call, step
):
    settings = {"evaluation": {"every": 2, "max_rows": 4}, "checkpoint": {"every": 3}}
    undisturbed, stopped = (make_config(run={"name": name}, **settings) for name in ("undisturbed", "stopped"))
    assert train(undisturbed) == 0
    with monkeypatch.context() as patch:
        at(patch, place, terminate, call=call)
        assert train(stopped) == 75
    assert (status(stopped)["state"], status(stopped)["step"]) == ("stopped", step)
    go_on(stopped, step=step)
    assert read_lines(stopped) == read_lines(undisturbed)


@pytest.mark.parametrize(
    ("place", "call"),
    [
        ("trainer.order.dropout_seed", 6),
        ("trainer.loop.evaluate", 2),
        ("trainer.model_dir.save_model", 1),
        ("trainer.run_folder.write_result", 1),
    ],
    ids=["last step", "last evaluation", "saving the model", "writing the result"],
)
def test_a_stop_signal_in_or_after_the_last_step_lets_the_run_finish(make_config, train, monkeypatch, place, call):
    config = make_config()
    at(monkeypatch, place, terminate, call=call)
    assert train(config) == 0
    assert status(config)["state"] == "done"


@pytest.mark.parametrize(
    ("place", "call", "step"),
    [
        ("trainer.loop.evaluate", 1, 0),  # before step 0
        ("trainer.loop.evaluate", 3, 6),  # after the last step
        ("trainer.model_dir.save_model", 1, 6),
        ("trainer.run_folder.write_result", 1, 6),
        ("trainer.run_folder.write_status", 1, 0),
        ("trainer.run_folder.write_status", 2, 3),
        ("trainer.run_folder.write_status", 4, 6),  # the one that says done
    ],
)
def test_a_kill_before_or_after_the_steps_costs_nothing_and_repeats_no_line(
    make_config, train, go_on, monkeypatch, read_lines, place, call, step
):
    settings = {"evaluation": {"every": 3, "max_rows": 4}, "checkpoint": {"every": 3}, "log": {"every": 2}}
    undisturbed, killed = (make_config(run={"name": name}, **settings) for name in ("undisturbed", "killed"))
    assert train(undisturbed) == 0
    with monkeypatch.context() as patch:
        at(patch, place, kill, call=call)
        patch.setattr("launch.train.BaseException", (), raising=False)  # a killed process catches nothing
        with pytest.raises(Killed):
            train(killed)
    go_on(killed, step=step)
    assert read_lines(killed) == read_lines(undisturbed)
    assert results(killed) == results(undisturbed)
    assert weights(killed) == weights(undisturbed)


def test_metrics_with_gaps_are_whole_after_a_resume(make_config, train, train_child, go_on, read_lines):
    settings = {"log": {"every": 3}, "checkpoint": {"every": 5}, "batch": {"rows": 2}}
    undisturbed = make_config(run={"name": "undisturbed", "steps": 11}, **settings)
    assert train(undisturbed) == 0
    killed = make_config(run={"name": "killed", "steps": 11}, **settings)
    assert train_child(killed, step=7, act=KILL)[0] == -signal.SIGKILL
    go_on(killed, step=5)
    assert read_lines(killed) == read_lines(undisturbed)
    assert [line["step"] for line in read_lines(killed)] == [0, 1, 3, 6, 9, 11, 11]


def test_a_torn_last_line_of_metrics_is_mended(make_config, train, go_on, monkeypatch, read_lines):
    settings = {"checkpoint": {"every": 2}}
    undisturbed, torn = (make_config(run={"name": name}, **settings) for name in ("undisturbed", "torn"))
    assert train(undisturbed) == 0
    with monkeypatch.context() as patch:
        at(patch, "trainer.loop.learning_rate", kill, call=4)
        with pytest.raises(Killed):
            train(torn)
    with (torn.run.folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 4, "lo')
    go_on(torn, step=2)
    assert read_lines(torn) == read_lines(undisturbed)


def test_a_run_resumes_with_another_micro_batch(make_config, train, go_on, monkeypatch, read_lines):
    def config(name: str, micro_rows: int):
        return make_config("sft", "full", run={"name": name}, batch={"micro_rows": micro_rows}, checkpoint={"every": 3})

    assert train(config("whole", 4)) == 0
    with monkeypatch.context() as patch:
        at(patch, "trainer.loop.learning_rate", kill, call=5)
        with pytest.raises(Killed):
            train(config("changed", 4))
    go_on(config("changed", 1), step=3)
    expected, found = (
        [line["loss"] for line in read_lines(config(name, 1)) if line["kind"] == "train"]
        for name in ("whole", "changed")
    )
    assert found[:3] == expected[:3]
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_damaged_newest_checkpoint_costs_only_its_steps(make_config, train, go_on, monkeypatch, read_lines):
    settings = {"checkpoint": {"every": 2}}
    undisturbed, killed = (make_config(run={"name": name}, **settings) for name in ("undisturbed", "killed"))
    assert train(undisturbed) == 0
    with monkeypatch.context() as patch:
        at(patch, "trainer.loop.learning_rate", kill, call=6)
        with pytest.raises(Killed):
            train(killed)
    newest = killed.run.folder / "checkpoints" / "step-00000004" / "rank-00000.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    go_on(killed, step=2)
    assert read_lines(killed) == read_lines(undisturbed)
    assert weights(killed) == weights(undisturbed)


def test_a_finished_run_started_again_changes_nothing(make_config, train):
    config = make_config(checkpoint={"every": 3})
    assert train(config) == 0
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files(config)}
    assert train(config) == 0
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files(config)} == before


@pytest.mark.parametrize("status", ["{", "[]", '{"state": "running"}'])
def test_a_broken_status_and_broken_metrics_never_keep_a_run_from_going_on(
    make_config, train, go_on, monkeypatch, read_lines, status
):
    settings = {"checkpoint": {"every": 2}}
    undisturbed, broken = (make_config(run={"name": name}, **settings) for name in ("undisturbed", "broken"))
    assert train(undisturbed) == 0
    with monkeypatch.context() as patch:
        at(patch, "trainer.loop.learning_rate", kill, call=4)
        with pytest.raises(Killed):
            train(broken)
    (broken.run.folder / "status.json").write_text(status)
    metrics = broken.run.folder / "metrics.jsonl"
    metrics.write_text("null\n[]\n{}\n" + metrics.read_text())
    go_on(broken, step=2)
    assert read_lines(broken) == read_lines(undisturbed)


def test_a_folder_that_cannot_be_written_is_refused_by_its_setting(make_config, train, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match=r"run\.dir: .*/file/run cannot be written \(Not a directory\)"):
        train(make_config(run={"dir": str(tmp_path / "file")}))


def test_a_base_model_that_changed_is_refused_by_a_run_that_goes_on(make_config, train, base_model, tmp_path):
    shutil.copytree(base_model, tmp_path / "base")

    def config(steps: int):
        model = {"path": str(tmp_path / "base")}
        return make_config("sft", "lora", run={"steps": steps}, model=model, checkpoint={"every": 2})

    assert train(config(2)) == 0
    path = tmp_path / "base" / "model.safetensors"
    save_file({name: value + 0.01 for name, value in load_file(path).items()}, path, metadata={"format": "pt"})
    with pytest.raises(BadInput, match="the base model changed"):
        train(config(4))


def files(config):
    return [path for path in config.run.folder.rglob("*") if path.is_file()]


def test_another_run_in_the_same_folder_is_refused_by_its_keys(make_config, train):
    assert train(make_config()) == 0
    with pytest.raises(
        ConfigError, match=r"holds a different run \(batch\.rows 4 there, 2 here; optim\.lr 0\.01 there"
    ):
        train(make_config(optim={"lr": 0.5}, batch={"rows": 2}))


def test_two_processes_never_train_in_one_folder(make_config, train, train_child, read_lines):
    config = make_config()
    with run_folder.claimed(config.run.folder):
        code, output = train_child(config)
    assert code == 2
    assert "another process is training in" in output
    assert not config.run.folder.exists()  # it held the lock, nothing was written by the other
    assert train(config) == 0  # the lock went with its holder


def test_a_folder_is_free_again_after_a_refusal(tmp_path):
    claimed_twice = [run_folder.claimed(tmp_path / "run") for _ in range(2)]
    with claimed_twice[0], pytest.raises(BadInput, match=r"run\.name: another process"), claimed_twice[1]:
        pytest.fail("claimed twice")
    with run_folder.claimed(tmp_path / "run"):
        pass
