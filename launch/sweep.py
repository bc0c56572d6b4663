"""`trivet sweep`: many ordinary runs through Ray Tune, ranked."""

import atexit
import os
import secrets
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from launch import config_file, endings, politeness, process_marks, processes, report, report_data
from launch import train as one_run
from launch.report_data import is_number
from launch.sweep_config import SweepConfig, Trial, trials
from serving import directory, format_version
from serving.directory import BadInput
from trainer import run_folder

MARK = "TRIVET_SWEEP"  # in the environment of every training process of a sweep
STOP_PATIENCE_S = 60.0

_TOKENS = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")

# Keys that may differ when a sweep goes on. Those of a trial, `is_finished` compares.
_FREE = ("sweep.dir", "sweep.concurrent", "base", "overrides.")

# Ray as a local scheduler only: no notes on the terminal, no changed folders.
RAY_ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
}


def sweep(config: SweepConfig, config_path: Path, *, command: Callable[[Trial], list[str]] | None = None) -> int:
    """Run every trial of the sweep; write result.json and report.html to `<sweep.dir>/<sweep.name>`; return the code.

    0 when every trial finished, 1 when one failed (the others are ranked all the same), 75 when Ctrl-C or SIGTERM
    stopped it after the trials saved. Started again, finished trials are kept and stopped ones go on. `command`
    replaces the training command of a trial. Raises BadInput, before anything starts, for a trial that cannot run, or
    a folder that holds something else.
    """
    run_trials = _import_ray()
    planned = trials(config)
    check_folder(config)
    for trial in planned:
        one_run.is_finished(trial.config)  # refuses a folder that holds a different run
    _write_config(config)
    mark = uuid.uuid4().hex
    specs = [_spec(trial, config, mark, command or train_command) for trial in planned]
    started = time.monotonic()
    try:
        with _progress() as progress:
            ended = run_trials(specs, concurrent=config.sweep.concurrent, progress=progress)
    except KeyboardInterrupt:
        print("stopping: the trials save and end; Ctrl-C again kills them", file=sys.stderr, flush=True)
        process_marks.stop_marked(f"{MARK}={mark}", patience_s=STOP_PATIENCE_S)
        print(f"stopped; go on with: trivet sweep {config_path}", file=sys.stderr)
        return endings.STOPPED
    finally:
        _end_ray()
        process_marks.stop_marked(f"{MARK}={mark}", patience_s=0)
    ranking = rank(planned, ended)
    _write_result(config, ranking, seconds=time.monotonic() - started)
    return 0 if all(entry["state"] == "done" for entry in ranking) else 1


def check_folder(config: SweepConfig) -> None:
    """Raise BadInput if the sweep's folder holds something else than this sweep; one with fewer strategies is this one.

    Raises NewerFormat where a newer Trivet wrote there.
    """
    folder, saved = config.folder, config.folder / "config.yaml"
    run_folder.refuse_newer(folder)
    found = sorted(path.name for path in folder.iterdir() if path.name[0] != ".") if folder.is_dir() else []
    if not found or found == ["trials"]:
        return
    fix = "choose another sweep.name, or remove that folder"
    if not (saved.is_file() and "sweep" in config_file.read_yaml(saved)):
        raise BadInput(f"sweep.name: {folder} holds other files ({', '.join(found[:3])}) and no sweep; {fix}")
    earlier = config_file.load(saved, [], SweepConfig)
    added = tuple(f"strategies.{name}." for name in config.strategies.keys() - earlier.strategies.keys())
    different = config_file.differences(earlier, config)
    changed = {key: values for key, values in different.items() if not key.startswith(_FREE + added)}
    if changed:
        shown = one_run.show_differences(changed)
        raise BadInput(f"sweep.name: {folder} holds a different sweep ({shown}); {fix}")


def rank(planned: list[Trial], ended: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one entry for each trial: finished ones, best score first, then the failed ones with the reason.

    `ended` holds what each trial reported last: `code` and `reason`.
    """
    entries = [_entry(trial, ended.get(trial.name, {})) for trial in planned]
    sign = -1 if any(entry.get("score_mode") == "max" for entry in entries) else 1
    return sorted(entries, key=lambda entry: (entry["score"] is None, sign * (entry["score"] or 0.0)))


def train_command(trial: Trial) -> list[str]:
    """Return the command of one trial: an ordinary run."""
    return processes.train_command(trial.base, trial.arguments)


def _write_config(config: SweepConfig) -> None:
    try:
        (config.folder / "trials").mkdir(parents=True, exist_ok=True)
        text = format_version.comment() + config_file.to_yaml(config)
        directory.write_text(config.folder / "config.yaml", text)
    except OSError as error:
        raise BadInput(f"sweep.dir: {config.folder} cannot be written ({error.strerror}); choose another") from None


def _spec(trial: Trial, config: SweepConfig, mark: str, command: Callable[[Trial], list[str]]) -> dict[str, Any]:
    threads = str(max(1, processes.num_cores() // config.sweep.concurrent))
    return {
        "name": trial.name,
        "steps": trial.config.run.steps,
        "argv": command(trial),
        "env": {MARK: mark, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads)},  # Ray would say 1
        "run": str(trial.folder),
        "log": f"{trial.folder}.log",
        "cwd": str(Path.cwd()),
    }


def _entry(trial: Trial, ended: dict[str, Any]) -> dict[str, Any]:
    run = report_data.read_run(trial.folder)
    done = run.state == "done" and ended.get("code") == 0 and is_number(run.result.get("score"))
    reason = run.status.get("reason") or ended.get("reason") or "ended without a score"
    kept = ("score_name", "score_mode", "trainable_parameters", "total_parameters", "seconds", "tokens_per_s")
    return {
        "strategy": trial.config.strategy.type,
        "score": run.result["score"] if done else None,
        "run": str(trial.folder),
        "name": trial.name,
        "state": "done" if done else "failed",
        "reason": "" if done else f"{reason} (see {trial.folder}.log)",
        "overrides": trial.overrides,
        **{key: run.result[key] for key in kept if done and key in run.result},
    }


def _write_result(config: SweepConfig, ranking: list[dict[str, Any]], *, seconds: float) -> None:
    fields = {"name": config.sweep.name, "base": str(config.base), "seconds": round(seconds, 1)}
    result = {**directory.stamp(), **fields, "ranking": ranking}
    directory.write_json(config.folder / "result.json", result)
    report.terminal_table([config.folder])
    page = report.write_report([config.folder])
    print(f"report: {page}")
    if ranking[0]["state"] == "done":
        print(f"next: trivet export {config.folder} onnx/{config.sweep.name}    # the winner, {ranking[0]['name']}")


def _import_ray() -> Callable[..., dict[str, dict[str, Any]]]:
    politeness.apply()
    os.environ.update(RAY_ENVIRONMENT)  # all is read when Ray is imported
    lock_ray()
    try:
        from launch.sweep_ray import check_temporary_folder, run_trials
    except ImportError as error:
        raise BadInput(f"sweep: {error.name} is not installed; run: pip install 'trivet[sweep]'") from None
    check_temporary_folder()
    return run_trials


def lock_ray() -> None:
    """Have the Ray to come ask for a token, kept in a private file until this process ends. What a user set stays.

    Without one, any user of this machine could have it run code; left to itself, Ray keeps one in the home folder.
    """
    if os.environ.setdefault("RAY_AUTH_MODE", "token").lower() != "token" or any(map(os.environ.get, _TOKENS)):
        return
    # As long as the process, not the sweep: Ray reads the token once.
    descriptor, path = tempfile.mkstemp(prefix="trivet-ray-")
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32))
    atexit.register(Path(path).unlink, missing_ok=True)
    os.environ["RAY_AUTH_TOKEN_PATH"] = path


def _end_ray() -> None:
    import ray

    ray.shutdown()


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TextColumn("{task.fields[note]}"), console=Console(stderr=True))
