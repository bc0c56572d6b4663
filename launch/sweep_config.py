"""The sweep config, and the trials that it stands for."""

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from launch import config_file
from serving.directory import BadInput
from trainer.config import ConfigPath, RunConfig, Section

_OURS = ("run.name", "run.dir")  # the sweep gives every trial its folder


class SweepSection(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Name of the sweep folder.")
    dir: Path = Field(Path("runs"), description="Folder that holds the sweep folder, relative to where you stand.")
    concurrent: int = Field(
        1, ge=1, description="Trials at a time; they share the cores, and the GPUs if there are any."
    )


class SweepConfig(Section):
    """Many runs of one base config that differ in parts of it."""

    sweep: SweepSection = Field(description="Which sweep this is: its folder, and trials at a time.")
    base: ConfigPath = Field(description="Run config (relative to this one) that every trial starts from.")
    overrides: dict[str, Any] = Field(
        {}, description="Part of a run config, without run.name and run.dir: what every trial changes."
    )
    strategies: dict[str, dict[str, Any]] = Field(
        min_length=1,
        description="Name of a trial -> part of a run config. A list stands for one trial with each of its values; a "
        "value that is a list itself stands in one: targets: [[q_proj, v_proj]].",
    )

    @property
    def folder(self) -> Path:
        return self.sweep.dir / self.sweep.name

    @model_validator(mode="after")
    def _leave_the_folders_to_the_sweep(self) -> "SweepConfig":
        for name, part in [("overrides", self.overrides), *self.strategies.items()]:
            taken = [key for key, _ in _leaves(part) if key in _OURS]
            if taken:
                raise ValueError(
                    f"{name}: {taken[0]} is given by the sweep; remove it, and set sweep.name or sweep.dir"
                )
        return self


@dataclass(frozen=True)
class Trial:
    """One run of a sweep: the base config with `overrides`, in a folder of the sweep's."""

    name: str
    base: Path
    overrides: list[str]
    place: list[str]
    config: RunConfig

    @property
    def arguments(self) -> list[str]:
        """The overrides on the command line of this run."""
        return [*self.overrides, *self.place]

    @property
    def folder(self) -> Path:
        return self.config.run.folder


def trials(config: SweepConfig) -> list[Trial]:
    """Return every trial, checked as the run that it will be.

    Within an entry of `strategies` lists are combined (each value with each). Raises BadInput naming the trial.
    """
    shared = [_override(key, value) for key, value in _leaves(config.overrides)]
    found = []
    for entry, part in config.strategies.items():
        choices = list(_combinations(part))
        for number, chosen in enumerate(choices, start=1):
            name = entry if len(choices) == 1 else f"{entry}-{number}"
            overrides = [*shared, *chosen]
            place = [f"run.name={name}", f"run.dir={json.dumps(str(config.folder / 'trials'))}"]
            try:
                run = config_file.load(config.base, [*overrides, *place], RunConfig)
            except BadInput as error:
                raise BadInput(f"strategies.{entry}: {error}") from None
            found.append(Trial(name, config.base, overrides, place, run))
    names = [trial.name for trial in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise BadInput(f"strategies: two trials would be called {', '.join(twice)}; rename one entry")
    return found


def _combinations(part: Mapping[str, Any]) -> Iterator[list[str]]:
    leaves = list(_leaves(part))
    values = [value if isinstance(value, list) else [value] for _, value in leaves]
    for chosen in itertools.product(*values):
        yield [_override(key, value) for (key, _), value in zip(leaves, chosen, strict=True)]


def _leaves(part: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of everything in a nested mapping."""
    for key, value in part.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _override(key: str, value: object) -> str:
    return f"{key}={json.dumps(value) if not isinstance(value, str) else value}"
