"""The base model that a run starts from, made first by another run config where it is missing."""

import fcntl
import os
import sys
import time
from pathlib import Path
from typing import IO

from launch import config_file, processes
from launch.config_file import ConfigError
from trainer.config import PretrainedModel, RunConfig
from trainer.guards import StopRequest

# Variables by which a launcher tells a process its place; the base model is made by one process outside that world.
_LAUNCHER_PREFIXES = ("ACCELERATE_", "TORCHELASTIC_", "FSDP_", "GROUP_", "ROLE_", "LOCAL_", "MASTER_")
_LAUNCHER_NAMES = ("RANK", "WORLD_SIZE", "TORCH_NCCL_ASYNC_ERROR_HANDLING")


def ensure_base_model(config: RunConfig) -> int:
    """Train `model.made_by` if `model.path` is absent; return its exit code: 0 when the model is there.

    Ranks and parallel trials wait for whoever does it first. Signals go to that training, which saves and stops (75).
    Raises ConfigError if the path is absent and nothing makes it, or if `made_by` makes another folder.
    """
    model = config.model
    if not isinstance(model, PretrainedModel) or Path(model.path).is_dir() or model.made_by is None:
        return 0
    base = config_file.load(model.made_by, [], RunConfig)
    made = base.run.folder / "model"
    if made.resolve() != Path(model.path).resolve():
        raise ConfigError(
            f"model.made_by: {model.made_by} makes {made}, but model.path is {model.path}; make them agree"
        )
    base.run.dir.mkdir(parents=True, exist_ok=True)
    with (base.run.dir / f".{base.run.name}.lock").open("w") as lock:
        if not _wait_for(lock):
            return processes.STOPPED
        if Path(model.path).is_dir():
            return 0
        print(f"{model.path} is not there yet: training {model.made_by} first", file=sys.stderr, flush=True)
        return processes.run_group(processes.train_command(model.made_by, []), _without_the_launcher())


def _wait_for(lock: IO[str]) -> bool:
    """Take the lock; return False if a stop signal came first."""
    with StopRequest() as stop:
        while not stop.signal_name:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                time.sleep(0.2)
    return False


def _without_the_launcher() -> dict[str, None]:
    return dict.fromkeys(name for name in os.environ if name.startswith(_LAUNCHER_PREFIXES) or name in _LAUNCHER_NAMES)
