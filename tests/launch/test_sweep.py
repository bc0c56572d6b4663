"""Sweeps: what trials a file stands for, how they are ranked, and a real Ray with made-up training programs."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from launch import config_file, process_marks, processes, sweep
from launch.sweep_config import SweepConfig, trials
from serving.directory import BadInput

ROOT = Path(__file__).resolve().parents[2]

SWEEP = """
sweep: {name: compare}
base: base.yaml
overrides: {run: {steps: 3}}
strategies:
  full: {strategy: {type: full}, optim: {lr: [1.0e-3, 1.0e-2]}}
  lora: {optim: {lr: 5.0e-3}}
"""

# Trains as `launch.train` does, as far as a sweep can see. A learning rate of 0.01 fails; `slow` waits to be stopped.
TRAIN = """
import json, os, pathlib, signal, sys, time
from launch import config_file
from trainer.status import report_exit
from trainer.config import RunConfig
config = config_file.load(pathlib.Path(sys.argv[1]), sys.argv[2:], RunConfig)
folder, lr, strategy = config.run.folder, config.optim.lr, config.strategy.type
folder.mkdir(parents=True)
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
def status(state, code, reason=""):
    step = config.run.steps
    fields = {"format_version": 2, "state": state, "code": code, "step": step, "reason": reason}
    (folder / "status.json").write_text(json.dumps(fields))
status("running", None)
for step in range(1, config.run.steps + 1):
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "train", "step": step, "loss": 3.0 - step * lr}) + chr(10))
    while "slow" in os.environ.get("TRAINER", "") and not stop:
        time.sleep(0.02)
    if stop:
        status("stopped", 75)
        report_exit(75)
        sys.exit(75)
if lr == 0.01:
    print("error: it blew up")
    sys.exit(1)
(folder / "result.json").write_text(json.dumps({
    "format_version": 2, "score": 1.0 + lr, "score_name": "eval_loss", "score_mode": "min", "strategy": strategy,
    "trainable_parameters": 10 if strategy == "lora" else 1000, "seconds": 1.0,
    "threads": os.environ["OMP_NUM_THREADS"],
}))
status("done", 0)
report_exit(0)
"""

DRIVER = """
import os, pathlib, sys
from launch import config_file, sweep
from launch.sweep_config import SweepConfig
path = pathlib.Path(sys.argv[1])
command = lambda trial: [sys.executable, sys.argv[2], str(trial.base), *trial.arguments]
sys.exit(sweep.sweep(config_file.load(path, sys.argv[3:], SweepConfig), path, command=command))
"""


# Asks the Ray of a sweep, with its token and without, which nodes it has.
BURGLAR = """
import os, subprocess, sys
from launch import sweep
sweep._import_ray()
from launch import sweep_ray
import ray
ask = "import ray, sys; ray.init(address=sys.argv[1], log_to_driver=False); ray.nodes()"
with sweep_ray._ray(1):
    address = ray.get_runtime_context().gcs_address
    for name, env in {"with": {}, "without": {"RAY_AUTH_MODE": "disabled"}}.items():
        done = subprocess.run([sys.executable, "-c", ask, address], env=os.environ | env, stderr=subprocess.DEVNULL)
        print(f"{name}: {'out' if done.returncode else 'in'}")
ray.shutdown()
"""


@pytest.fixture
def sweep_file(tmp_path, base_config):
    path = tmp_path / "sweep.yaml"
    path.write_text(SWEEP)
    return path


@pytest.fixture
def driver(script, sweep_file, tmp_path, on_path, monkeypatch):
    """The command of a sweep whose trials are TRAIN; it runs in the test's folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    return [*script(DRIVER, "driver.py"), str(sweep_file), script(TRAIN, "train.py")[1]]


def load(path, *overrides) -> SweepConfig:
    return config_file.load(path, list(overrides), SweepConfig)


def test_a_list_stands_for_one_trial_with_each_value(sweep_file):
    planned = trials(load(sweep_file))
    assert [trial.name for trial in planned] == ["full-1", "full-2", "lora"]
    assert [trial.config.optim.lr for trial in planned] == [1e-3, 1e-2, 5e-3]
    assert [trial.config.strategy.type for trial in planned] == ["full", "full", "lora"]
    assert {trial.config.run.steps for trial in planned} == {3}
    assert planned[2].folder == Path("runs/compare/trials/lora")


def test_lists_of_one_entry_are_combined_each_with_each(sweep_file):
    planned = trials(load(sweep_file, "strategies.lora.strategy.rank=[2, 4]", "strategies.lora.optim.lr=[1.0, 2.0]"))
    settings = [(t.config.strategy.rank, t.config.optim.lr) for t in planned if t.config.strategy.type == "lora"]
    assert sorted(settings) == [(2, 1.0), (2, 2.0), (4, 1.0), (4, 2.0)]


def test_every_strategy_can_be_swept_and_a_list_in_a_list_is_one_value(sweep_file):
    sweep_file.write_text(
        SWEEP
        + """
  probe: {strategy: {type: linear_probe}}
  partial: {strategy: {type: partial, train: [["*.1.*", "*norm*"]], stages: [[{step: 2, train: ["*"]}]]}}
  adapter: {strategy: {type: adapter, size: [4, 8], after: [[mlp]]}}
  dora: {strategy: {type: lora, dora: true, rslora: [true, false], targets: [[q_proj, v_proj]]}}
"""
    )
    by_name = {trial.name: trial.config.strategy for trial in trials(load(sweep_file))}
    assert by_name.keys() == {
        "full-1",
        "full-2",
        "lora",
        "probe",
        "partial",
        "adapter-1",
        "adapter-2",
        "dora-1",
        "dora-2",
    }
    assert (by_name["probe"].type, by_name["partial"].train) == ("linear_probe", ["*.1.*", "*norm*"])
    assert [(stage.step, stage.train) for stage in by_name["partial"].stages] == [(2, ["*"])]
    assert [(by_name[name].size, by_name[name].after) for name in ("adapter-1", "adapter-2")] == [
        (4, ["mlp"]),
        (8, ["mlp"]),
    ]
    assert [by_name[name].rslora for name in ("dora-1", "dora-2")] == [True, False]
    assert by_name["dora-1"].targets == ["q_proj", "v_proj"]


def test_a_trial_is_the_ordinary_run_that_its_command_names(sweep_file):
    trial = trials(load(sweep_file))[0]
    command = sweep.train_command(trial)
    assert command[1:3] == ["-m", "launch.train"]
    from trainer.config import RunConfig

    assert config_file.load(Path(command[3]), command[4:], RunConfig) == trial.config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("strategies.lora.optim.lrr=1.0", r"strategies.lora: .*optim.lrr: unknown key; did you mean optim.lr"),
        ("strategies.lora.optim.lr=-1", r"strategies.lora: .*optim.lr"),
        ("overrides.run.name=x", "run.name is given by the sweep"),
        ("sweep.concurrent=0", "sweep.concurrent: 0 found"),
        ("sweep.name=a/b", "sweep.name"),
    ],
)
def test_bad_input_is_named_before_anything_starts(sweep_file, override, message):
    with pytest.raises(BadInput, match=message):
        trials(load(sweep_file, override))


def test_the_example_sweep_compares_full_with_lora():
    planned = trials(load(ROOT / "configs" / "sweep_strategies.yaml"))
    assert [trial.config.strategy.type for trial in planned] == ["full", "lora"]
    assert len({trial.config.optim.lr for trial in planned}) == 2


@pytest.mark.parametrize(("mode", "best"), [("min", "lora"), ("max", "full-1")])
def test_the_best_comes_first_by_the_mode_of_the_score_and_failures_last(
    sweep_file, make_run, monkeypatch, tmp_path, mode, best
):
    monkeypatch.chdir(tmp_path)
    for name, score in (("full-1", 2.0), ("lora", 1.5)):
        folder = make_run(f"runs/compare/trials/{name}")
        result = json.loads((folder / "result.json").read_text()) | {"score": score, "score_mode": mode}
        (folder / "result.json").write_text(json.dumps(result))
    ended = {"full-1": {"code": 0}, "lora": {"code": 0}, "full-2": {"code": 1, "reason": "out of memory"}}
    ranking = sweep.rank(trials(load(sweep_file)), ended)
    assert ranking[0]["name"] == best
    assert ranking[-1]["name"] == "full-2"
    assert "out of memory" in ranking[-1]["reason"]
    assert {"strategy", "score", "run"} <= set(ranking[0])


def test_a_score_that_is_not_a_number_is_a_failure(sweep_file, make_run, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    folder = make_run("runs/compare/trials/lora")
    (folder / "result.json").write_text('{"format_version": 2, "score": NaN, "score_mode": "min"}')
    ranking = sweep.rank(trials(load(sweep_file)), {"lora": {"code": 0}})
    assert {entry["state"] for entry in ranking} == {"failed"}


def in_sweep_folder(name: str, text: str) -> Path:
    folder = Path("runs/compare")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
    return folder


@pytest.fixture
def no_ray(sweep_file, monkeypatch, tmp_path):
    """Stand in the test's folder; a Ray that would start raises KeyboardInterrupt, as Ctrl-C does."""
    monkeypatch.chdir(tmp_path)

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "_import_ray", lambda: interrupted)
    monkeypatch.setattr(sweep, "_end_ray", lambda: None)


def started(sweep_file, *overrides) -> Path:
    """Start the sweep and stop it at once; return its folder."""
    config = load(sweep_file, *overrides)
    assert sweep.sweep(config, sweep_file) == 75
    return config.folder


def refused(sweep_file, *overrides) -> str:
    """Return why the sweep is refused; nothing in its folder changes."""
    config = load(sweep_file, *overrides)
    before = {path: path.read_bytes() for path in config.folder.rglob("*") if path.is_file()}
    with pytest.raises(BadInput) as error:
        sweep.sweep(config, sweep_file)
    assert {path: path.read_bytes() for path in config.folder.rglob("*") if path.is_file()} == before
    return str(error.value)


def test_a_sweep_that_a_newer_trivet_wrote_is_refused_and_stays(sweep_file, no_ray):
    folder = started(sweep_file)
    in_sweep_folder("result.json", '{"format_version": 3, "trivet": "0.4.0", "ranking": []}')
    said = refused(sweep_file)
    assert said.startswith("runs/compare/result.json: format_version 3, written by Trivet 0.4.0")
    (folder / "result.json").unlink()
    in_sweep_folder("config.yaml", "# format_version 3, Trivet 0.4.0\nsweep: {name: compare}\nbrandnew: 1\n")
    assert refused(sweep_file).startswith("runs/compare/config.yaml: format_version 3, written by Trivet 0.4.0")


def test_the_saved_config_of_a_sweep_says_its_format_and_is_the_sweep(sweep_file, no_ray):
    saved = started(sweep_file) / "config.yaml"
    assert saved.read_text().startswith("# format_version 2, Trivet ")
    assert load(saved) == load(sweep_file)


def test_a_full_disk_leaves_the_saved_config_of_a_sweep_whole(sweep_file, no_ray, monkeypatch):
    saved = started(sweep_file) / "config.yaml"
    before = saved.read_text()
    write = Path.write_text

    def full(path, text, **options):
        write(path, text[:20], **options)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(BadInput, match=r"sweep.dir: runs/compare cannot be written \(No space left on device\)"):
        sweep.sweep(load(sweep_file, "sweep.concurrent=2"), sweep_file)
    assert saved.read_text() == before


def test_a_changed_sweep_is_refused_in_its_folder_naming_what_differs(sweep_file, no_ray):
    started(sweep_file)
    assert refused(sweep_file, "strategies.lora.optim.lr=0.5") == (
        "sweep.name: runs/compare holds a different sweep (strategies.lora.optim.lr 0.005 there, 0.5 here); "
        "choose another sweep.name, or remove that folder"
    )
    sweep_file.write_text(SWEEP.replace("  lora: {", "  other: {"))
    assert "strategies.lora.optim.lr 0.005 there, nothing here" in refused(sweep_file)


def test_a_sweep_goes_on_with_more_strategies_and_more_trials_at_a_time(sweep_file, no_ray):
    started(sweep_file)
    started(sweep_file, "sweep.concurrent=2", "strategies.third.optim.lr=0.5")


@pytest.mark.parametrize(("name", "text"), [("notes.txt", "mine"), ("config.yaml", "run: {name: compare}\n")])
def test_a_folder_that_holds_something_else_than_a_sweep_is_refused(sweep_file, no_ray, name, text):
    in_sweep_folder(name, text)
    assert f"sweep.name: runs/compare holds other files ({name}) and no sweep" in refused(sweep_file)


@pytest.fixture
def ray_settings(monkeypatch, tmp_path):
    """Return the function that locks a Ray to come and returns its settings; afterwards they are as before."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(name, "")  # noted, so that it is put back
        monkeypatch.delenv(name)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def lock(**set_by_the_user: str) -> dict[str, str]:
        os.environ.update(set_by_the_user)
        sweep.lock_ray()
        return {name: value for name, value in os.environ.items() if name.startswith("RAY_AUTH_")}

    return lock


def test_the_ray_of_a_sweep_asks_for_a_token_that_only_this_user_can_read(ray_settings):
    settings = ray_settings()
    path = Path(settings.pop("RAY_AUTH_TOKEN_PATH"))
    assert settings == {"RAY_AUTH_MODE": "token"}
    assert path.stat().st_mode & 0o777 == 0o600
    assert len(path.read_text()) == 64


@pytest.mark.parametrize(
    "mine",
    [
        {"RAY_AUTH_MODE": "disabled"},
        {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "mine"},
        {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "/mine"},
    ],
)
def test_how_a_user_wants_ray_locked_stays(ray_settings, tmp_path, mine):
    assert ray_settings(**mine) == mine
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_ray_of_a_sweep_lets_nobody_in_without_its_token(script, on_path):
    done = subprocess.run(script(BURGLAR), capture_output=True, text=True, timeout=240)
    assert done.stdout.splitlines() == ["with: in", "without: out"], done.stderr


@pytest.mark.slow
def test_a_sweep_runs_every_trial_and_ranks_them(driver, tmp_path):
    done = subprocess.run(driver, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1, done.stderr  # one trial fails, and says so
    ranking = json.loads((tmp_path / "runs/compare/result.json").read_text())["ranking"]
    assert [(entry["name"], entry["state"]) for entry in ranking] == [
        ("full-1", "done"),
        ("lora", "done"),
        ("full-2", "failed"),
    ]
    assert "it blew up" in ranking[-1]["reason"]
    assert ranking[0]["trainable_parameters"] == 1000
    assert Path(ranking[0]["run"], "metrics.jsonl").is_file()
    assert (tmp_path / "runs/compare/report.html").is_file()
    threads = json.loads((tmp_path / "runs/compare/trials/lora/result.json").read_text())["threads"]
    assert int(threads) == int(os.environ.get("OMP_NUM_THREADS", processes.num_cores()))
    for noise in ("Ray", "ray", "WARNING", "tune", "Usage stats"):
        assert noise not in done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_sweep_lets_its_trials_save_and_leaves_no_process(driver, tmp_path, monkeypatch, number):
    monkeypatch.setenv("TRAINER", "slow")
    monkeypatch.setenv("TRIVET_TEST", str(tmp_path))  # inherited by every process of the sweep, Ray's too
    running = subprocess.Popen(
        [*driver, "sweep.concurrent=2"], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    folder = tmp_path / "runs/compare/trials"
    wait_for(lambda: len(list(folder.glob("*/metrics.jsonl"))) == 2 or running.poll() is not None)
    if number == signal.SIGINT:
        os.killpg(running.pid, number)  # as a terminal does: Ray's processes get it too
    else:
        running.send_signal(number)
    _, stderr = running.communicate(timeout=600)
    assert running.returncode == 75, stderr
    states = [json.loads(path.read_text())["state"] for path in folder.glob("*/status.json")]
    assert states == ["stopped", "stopped"]
    assert not (tmp_path / "runs/compare/result.json").exists()
    wait_for(lambda: not process_marks.marked(f"TRIVET_TEST={tmp_path}"), seconds=15)


def wait_for(condition, seconds=120.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


def test_two_trials_of_one_name_are_refused(sweep_file):
    text = sweep_file.read_text()
    assert "  lora:" in text
    sweep_file.write_text(text.replace("  lora:", "  full-1:"))
    with pytest.raises(BadInput, match="strategies: two trials would be called full-1"):
        trials(load(sweep_file))
