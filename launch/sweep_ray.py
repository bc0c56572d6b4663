"""The part of a sweep that knows Ray Tune: trials as Ray workers, each around one ordinary training process."""

import contextlib
import logging
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.execution import class_cache
from rich.progress import Progress

from launch import report_data
from launch.processes import Group
from launch.stopping import interrupt
from serving.directory import BadInput
from trainer.run_folder import parse_metric

# Tune hands the AWS keys of this process to the workers by name, and Ray writes what it hands on into its log. The
# workers of a Ray that we start have them anyway, as they have the whole environment.
class_cache.ENV_VARS_TO_PROPAGATE.difference_update(
    {name for name in class_cache.ENV_VARS_TO_PROPAGATE if name.startswith("AWS_")}
)

POLL_S = 0.3
# A socket's path has at most 107 bytes, and Ray adds /ray/session_<date>_<time>_<microseconds>_<pid>/sockets/<name>.
LONGEST_TEMPORARY_PATH = 38


def run_trials(specs: list[dict[str, Any]], *, concurrent: int, progress: Progress) -> dict[str, dict[str, Any]]:
    """Run every spec (name, steps, argv, env, run, log, cwd) and return what each reported last: `code`, `reason`.

    Raises KeyboardInterrupt on Ctrl-C and SIGTERM, while the training processes still live.
    """
    with _ray(concurrent), tempfile.TemporaryDirectory(prefix="trivet-tune-") as storage:
        gpus = ray.cluster_resources().get("GPU", 0.0) / concurrent
        resources = {"cpu": 1.0} | ({"gpu": int(gpus) if gpus >= 1 else gpus} if gpus else {})
        tuner = tune.Tuner(
            tune.with_resources(train_trial, resources),
            param_space={"spec": tune.grid_search(specs), "scratch": storage},
            tune_config=tune.TuneConfig(max_concurrent_trials=concurrent),
            run_config=tune.RunConfig(storage_path=storage, verbose=0, callbacks=[ShowProgress(progress, specs)]),
        )
        results = tuner.fit()
        ended = {}
        for result in results:
            lost = {"code": 1, "reason": f"its Ray worker died: {result.error}".splitlines()[0]}
            ended[result.config["spec"]["name"]] = lost if result.error else result.metrics or {}
        return ended


def check_temporary_folder() -> None:
    """Raise BadInput where the folder for temporary files has too long a path for Ray's sockets."""
    folder = tempfile.gettempdir()
    if len(os.fsencode(folder)) > LONGEST_TEMPORARY_PATH:
        raise BadInput(
            f"TMPDIR: {folder} is too long a path for the sockets that Ray keeps there; "
            f"accepted: {LONGEST_TEMPORARY_PATH} bytes; run: export TMPDIR=/tmp"
        )


def train_trial(config: dict[str, Any]) -> None:
    """Train the run of `config["spec"]` to its end; report steps and losses, and at last the exit code."""
    spec = config["spec"]
    folder = Path(spec["cwd"])
    tail, log_path = Tail(folder / spec["run"] / "metrics.jsonl"), folder / spec["log"]
    with (
        log_path.open("wb") as log,
        Group(spec["argv"], spec["env"], output=log, folder=folder, scratch=config["scratch"]) as group,
    ):
        code, said = None, ""
        while code is None:
            time.sleep(POLL_S)
            code = group.poll()
            rows = tail.rows()
            if not tail.started and (line := _last_line(log_path)) != said:  # it may be training its base model first
                tune.report({"note": line})
                said = line
            # Of the training rows the newest is enough: they may be many, and each report is a message.
            newest = [row for row in rows if row.get("kind") == "train"][-1:]
            for row in [*newest, *(row for row in rows if row.get("kind") == "eval")]:
                tune.report({key: value for key, value in row.items() if report_data.is_number(value)})
        reason = group.error()
    tune.report({"code": code, "reason": (reason or (_last_line(log_path) if code else "")).removeprefix("error: ")})


class Tail:
    """The rows of a metrics file as they are written. A file that was cut (by a resume) is read on from its end."""

    def __init__(self, path: Path) -> None:
        self._path, self._position, self._rest = path, 0, b""

    @property
    def started(self) -> bool:
        """Whether a row was read."""
        return self._position > 0

    def rows(self) -> list[dict[str, Any]]:
        """Return the complete rows that are new since the last call."""
        try:
            with self._path.open("rb") as file:
                size = file.seek(0, 2)
                if size < self._position:
                    self._position, self._rest = size, b""
                file.seek(self._position)
                text = self._rest + file.read()
                self._position = file.tell()
        except FileNotFoundError:
            return []
        *lines, self._rest = text.split(b"\n")
        return [row for row in (parse_metric(line.decode(errors="replace")) for line in lines) if row]


class ShowProgress(tune.Callback):
    """A bar for each trial, in the process that the user watches."""

    def __init__(self, progress: Progress, specs: list[dict[str, Any]]) -> None:
        self._progress = progress
        self._bars = {
            spec["name"]: progress.add_task(spec["name"], total=spec["steps"], start=False, note="waiting")
            for spec in specs
        }

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune stores its callbacks with the experiment; bars on a terminal are not to be stored

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        bar = self._bars[trial.config["spec"]["name"]]
        self._progress.start_task(bar)
        self._progress.update(bar, note="starting")

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        bar = self._bars[trial.config["spec"]["name"]]
        if "note" in result:
            self._progress.update(bar, note=result["note"][:48])
        elif "code" in result:
            self._progress.stop_task(bar)
            self._progress.update(bar, note="done" if result["code"] == 0 else "failed")
        elif "eval_loss" in result:
            self._progress.update(bar, completed=result["step"], note=f"held-out loss {result['eval_loss']:.4g}")
        else:
            self._progress.update(bar, completed=result["step"], note=f"loss {result.get('loss', 0.0):.4g}")


@contextlib.contextmanager
def _ray(concurrent: int) -> Iterator[None]:
    """A Ray of our own for as long as the block runs; Ctrl-C and SIGTERM raise KeyboardInterrupt in it."""
    previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    # Ray's workers look first where it was started: a `trainer/` of the user's there would come before ours.
    with contextlib.chdir(Path(__file__).resolve().parents[1]):
        ray.init(
            address="local",  # ours, even where RAY_ADDRESS or the file of a `ray start` names another
            num_cpus=concurrent,
            include_dashboard=False,
            object_store_memory=80 * 1024**2,  # about the least that Ray takes: only metrics pass through it
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    for name in ("ray", "ray.tune", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        for number in previous:  # after ray.init, which takes SIGTERM for itself
            signal.signal(number, interrupt)
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
