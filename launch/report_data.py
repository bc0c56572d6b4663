"""What reports and sweeps read: the files of a run folder and of a sweep folder, whole, unfinished or broken."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, TypeGuard

from launch import config_file
from serving import directory
from serving.directory import BadInput
from trainer.run_folder import parse_metric


@dataclasses.dataclass(frozen=True)
class Run:
    """One run folder as it is now; what could not be read is empty, and `problems` says why."""

    folder: Path
    config: dict[str, Any]
    status: dict[str, Any]
    result: dict[str, Any]
    train: list[dict[str, Any]]
    evals: list[dict[str, Any]]
    problems: list[str]

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def state(self) -> str:
        """The state of status.json; `unknown` where there is none."""
        return str(self.status.get("state", "unknown"))

    @property
    def strategy(self) -> str:
        return str(self.result.get("strategy") or mapping(self.config, "strategy").get("type") or "?")

    @property
    def objective(self) -> str:
        return str(self.result.get("objective") or mapping(self.config, "objective").get("type") or "?")

    @property
    def task(self) -> str:
        """The objective, and of classification what is answered: runs whose losses can be compared have the same."""
        problem = mapping(self.config, "objective").get("problem", "single_label")
        return f"{self.objective}, {problem}" if self.objective == "classification" else self.objective

    @property
    def loss_unit(self) -> str:
        """What the loss is a mean of."""
        units = {"regression": "mean squared error", "multi_label": "loss per label", "single_label": "loss per text"}
        per_token = {"token_classification": "loss per tagged token", "masked_lm": "loss per hidden token"}
        return units.get(self.task.partition(", ")[2]) or per_token.get(self.objective, "loss per token")

    @property
    def score_name(self) -> str:
        return str(self.result.get("score_name") or ("accuracy" if self.objective == "classification" else "eval_loss"))

    @property
    def step(self) -> int:
        """Steps done, as far as the files tell."""
        return max([int(self.status.get("step") or 0), *(int(row["step"]) for row in self.train[-1:])])

    def metric(self, name: str) -> tuple[float | None, float | None]:
        """Return a held-out metric before training and now, from the result, else from the metrics file."""
        values = [row[name] for row in self.evals if name in row]
        first = mapping(self.result, "initial_metrics").get(name, values[0] if values else None)
        last = mapping(self.result, "metrics").get(name, values[-1] if len(values) > 1 else None)
        return first, last


@dataclasses.dataclass(frozen=True)
class Sweep:
    """One sweep folder: its ranking, best first, and the run folders of the trials that left one."""

    folder: Path
    result: dict[str, Any]
    runs: list[Run]

    @property
    def ranking(self) -> list[dict[str, Any]]:
        return [entry for entry in self.result.get("ranking", []) if isinstance(entry, dict)]


def read(folder: Path) -> Run | Sweep:
    """Return the run or the sweep in `folder`. Raises BadInput if it is neither, but never for broken files in it.

    Raises NewerFormat where a newer Trivet wrote it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such folder; expected a run folder (runs/<name>) or a sweep folder")
    result = _read_json(folder / "result.json", [])
    if "ranking" in result:
        return _read_sweep(folder, result)
    if not any((folder / name).exists() for name in ("config.yaml", "status.json", "metrics.jsonl", "result.json")):
        raise BadInput(f"{folder}: neither a run nor a sweep (no config.yaml, status.json or metrics.jsonl); check it")
    return read_run(folder)


def read_run(folder: Path) -> Run:
    """Return the run in `folder`, whatever is there, be it nothing."""
    problems: list[str] = []
    rows = read_metrics(folder / "metrics.jsonl", problems)
    return Run(
        folder=folder.resolve(),
        config=_read_config(folder / "config.yaml", problems),
        status=_read_json(folder / "status.json", problems),
        result=_read_json(folder / "result.json", problems),
        train=[row for row in rows if row.get("kind") == "train"],
        evals=[row for row in rows if row.get("kind") == "eval"],
        problems=problems,
    )


def read_metrics(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    """Return the rows of a metrics file that have a step; a half-written or broken line is left out and counted."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        problems.append("metrics.jsonl is missing")
        return []
    rows = [row for row in map(parse_metric, lines) if row]
    if len(rows) < len(lines):
        problems.append(f"metrics.jsonl: {len(lines) - len(rows)} unreadable lines left out")
    return rows


def mapping(values: dict[str, Any], key: str) -> dict[str, Any]:
    """Return the mapping under `key`, an empty one where there is none or something else."""
    found = values.get(key)
    return found if isinstance(found, dict) else {}


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether the value is a finite number (so not NaN, a string, or missing)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _read_sweep(folder: Path, result: dict[str, Any]) -> Sweep:
    runs = []
    for entry in result["ranking"] if isinstance(result["ranking"], list) else []:
        stored = Path(str(entry.get("run", ""))) if isinstance(entry, dict) else Path()
        # A sweep folder that was moved still holds its trials.
        for candidate in (stored, folder / "trials" / stored.name):
            if stored.name and candidate.is_dir():
                runs.append(read_run(candidate))
                break
    return Sweep(folder.resolve(), result, runs)


def _read_json(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        return directory.current(path, json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        problems.append(f"{path.name} cannot be read ({error})")
        return {}


def _read_config(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        return config_file.read_yaml(path)
    except BadInput as error:
        problems.append(str(error))
        return {}
