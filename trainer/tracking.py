"""Trackers: what metrics.jsonl gets, and the config, copied to Weights & Biases or MLflow. No text unless asked for.

Switched off: what they would gather by themselves (host, command, git remote, packages, terminal, machine load). Which
run of a tracker a run folder goes on with stands in its trackers.json.
"""

import contextlib
import importlib.util
import json
import os
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from serving import directory
from serving.directory import BadInput
from trainer.config import Log, RunConfig, flat
from trainer.redact import redacted

PROJECT = "trivet"  # where the user names none with the tracker's own variable


class Tracker(Protocol):
    """One run of a tracker. Its methods may raise whatever its client raises."""

    name: str
    id: str

    def log(self, kind: str, step: int, fields: dict[str, Any]) -> None:
        """Send the numbers of one line of metrics.jsonl; one that a resume sends again is passed over."""

    def text(self, samples: list[str]) -> None:
        """Send held-out examples."""

    def close(self, *, failed: bool) -> None:
        """Send what is left and end the run there."""


def check(log: Log) -> None:
    """Raise BadInput where a tracker's package is missing."""
    for name in log.trackers:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # the second is a folder that happens to have its name
            raise BadInput(f"log.trackers: {name} is not installed; run: pip install 'trivet[track]', or leave it out")


@contextlib.contextmanager
def opened(config: RunConfig, samples: list[str]) -> Iterator[list[Tracker]]:
    """Start the run, or go on with it, in every tracker of the config; if the block raises, they are ended as failed.

    `samples` are sent where the run is new. Raises BadInput where a tracker cannot start.
    """
    path = config.run.folder / "trackers.json"
    known, trackers = _known(path), list[Tracker]()
    try:
        for name in dict.fromkeys(config.log.trackers):
            try:
                trackers.append(TRACKERS[name](config, known.get(name)))
                if name not in known and samples:
                    trackers[-1].text(samples)
            except Exception as error:  # each client has its own kinds
                reason = redacted(f"{type(error).__name__}: {error}".splitlines()[0])[:160]
                raise BadInput(f"log.trackers: {name} cannot start ({reason}); {_FIX[name]}, or leave it out") from None
            known = {**directory.stamp(), **known, name: trackers[-1].id}
            directory.write_json(path, known)
        yield trackers
    except BaseException:
        for tracker in trackers:
            with contextlib.suppress(Exception):
                tracker.close(failed=True)
        raise


def _known(path: Path) -> dict[str, Any]:
    """What trackers.json says, or nothing where there is none. Raises BadInput where it cannot be read."""
    try:
        return directory.current(path, json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: cannot be read ({error}); remove it to start a new run in every tracker") from None


class Wandb:
    """A run of Weights & Biases. WANDB_PROJECT, WANDB_DIR, WANDB_MODE and the others of its variables count."""

    name = "wandb"

    def __init__(self, config: RunConfig, known: str | None) -> None:
        import wandb

        settings = wandb.Settings(
            console="off", silent=True, disable_code=True, disable_git=True, save_code=False,
            x_disable_meta=True, x_disable_machine_info=True, x_disable_stats=True, x_save_requirements=False,
        )  # fmt: skip
        self._wandb = wandb
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            dir=os.environ.get("WANDB_DIR", config.run.folder),
            id=known or uuid.uuid4().hex[:12],
            name=config.run.name,
            config=config.model_dump(mode="json"),
            resume="allow",
            settings=settings,
        )
        self.id = self._run.id

    def log(self, kind: str, step: int, fields: dict[str, Any]) -> None:
        if step >= self._run.starting_step:  # 0 but where it goes on
            self._run.log({f"{kind}/{name}": value for name, value in fields.items()}, step=step)

    def text(self, samples: list[str]) -> None:
        table = self._wandb.Table(columns=["held-out text"], data=[[sample] for sample in samples])
        self._run.log({"samples": table}, step=0)

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class Mlflow:
    """A run of MLflow, at MLFLOW_TRACKING_URI, in MLFLOW_EXPERIMENT_NAME."""

    name = "mlflow"

    def __init__(self, config: RunConfig, known: str | None) -> None:
        from mlflow import MlflowClient, entities

        self._entities, self._client = entities, MlflowClient()
        if known is None:
            experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
            found = self._client.get_experiment_by_name(experiment)
            place = found.experiment_id if found else self._client.create_experiment(experiment)
            self.id = self._client.create_run(place, run_name=config.run.name).info.run_id
            params = [entities.Param(key, str(value)) for key, value in flat(config.model_dump(mode="json")).items()]
            self._client.log_batch(self.id, params=params)
        else:
            self.id = known
            self._client.update_run(known, status="RUNNING")
        self._last_step = {kind: self._last(kind) for kind in ("train", "eval", "skip")}

    def _last(self, kind: str) -> int:
        """The last step that the run has there; -1 where it has none. MLflow would keep a second value for it."""
        names = [name for name in self._client.get_run(self.id).data.metrics if name.startswith(f"{kind}/")]
        return max(
            (each.step for name in names[:1] for each in self._client.get_metric_history(self.id, name)), default=-1
        )

    def log(self, kind: str, step: int, fields: dict[str, Any]) -> None:
        if step > self._last_step[kind]:
            now_ms = int(time.time() * 1000)
            metrics = [self._entities.Metric(f"{kind}/{name}", value, now_ms, step) for name, value in fields.items()]
            self._client.log_batch(self.id, metrics=metrics)

    def text(self, samples: list[str]) -> None:
        self._client.log_text(self.id, json.dumps(samples, indent=1, ensure_ascii=False), "samples.json")

    def close(self, *, failed: bool) -> None:
        self._client.set_terminated(self.id, "FAILED" if failed else "FINISHED")


TRACKERS: dict[str, Callable[[RunConfig, str | None], Tracker]] = {"wandb": Wandb, "mlflow": Mlflow}
_FIX = {
    "wandb": "run `wandb login`, or set WANDB_MODE=offline",
    "mlflow": "set MLFLOW_TRACKING_URI to a server that answers",
}
