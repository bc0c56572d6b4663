"""The base model that a run starts from, made first where it is missing: by another run, or from a package."""

import fcntl
import os
import sys
import time
from pathlib import Path
from typing import IO

from launch import config_file, endings, pretrained, processes
from launch.config_file import ConfigError
from trainer.config import PretrainedModel, RunConfig
from trainer.guards import StopRequest

# Variables by which a launcher tells a process its place; the base model is made by one process outside that world.
_LAUNCHER_PREFIXES = ("ACCELERATE_", "TORCHELASTIC_", "FSDP_", "GROUP_", "ROLE_", "LOCAL_", "MASTER_")
_LAUNCHER_NAMES = ("RANK", "WORLD_SIZE", "TORCH_NCCL_ASYNC_ERROR_HANDLING")


def ensure_base_model(config: RunConfig) -> int:
    """Make `model.path` by `model.made_by` if it is absent; return 0 when the model is there, else an exit code.

    Ranks and parallel trials wait for whoever does it first. Signals go to a training that makes it, which saves and
    stops (75). Raises ConfigError if `made_by` makes another folder, Unavailable if its package cannot be had, and
    BadInput before that for rows that the run itself could not learn from.
    """
    model = config.model
    if not isinstance(model, PretrainedModel) or model.made_by is None:
        return 0
    folder = Path(model.path)
    if pretrained.is_model(folder):
        return 0
    check_without_base(config)
    if isinstance(model.made_by, str):  # the name of a package
        lock_path, make = folder.parent / f".{folder.name}.lock", lambda: _fetch(folder)
    else:
        made_by = model.made_by
        base = run_that_makes(folder, made_by)
        lock_path, make = base.run.dir / f".{base.run.name}.lock", lambda: _train(folder, made_by)
    try:
        lock_path.parent.mkdir(parents=True, exist_ok=True)
        opened = lock_path.open("w")
    except OSError as error:
        raise ConfigError(
            f"model.path: {lock_path.parent} cannot be written ({error.strerror}); mend that, or name another path"
        ) from None
    with opened as lock:
        if not _wait_for(lock):
            return endings.STOPPED
        return 0 if pretrained.is_model(folder) else make()


def _fetch(folder: Path) -> int:
    pretrained.fetch(folder, progress=lambda stage: print(f"{folder}: {stage}", file=sys.stderr, flush=True))
    return 0


def _train(folder: Path, made_by: Path) -> int:
    print(f"{folder} is not there yet: training {made_by} first", file=sys.stderr, flush=True)
    return processes.run_group(processes.train_command(made_by, []), _without_the_launcher())


def check_without_base(config: RunConfig) -> None:
    """Check of a run what needs no model: its precision, rows, columns and labels. Raises BadInput."""
    import torch

    from trainer import modes, out_of_memory
    from trainer.dataset import check_rows

    if not torch.cuda.is_available():
        modes.check_on_cpu(config)
    with out_of_memory.while_building(config):
        check_rows(config)


def run_that_makes(folder: Path, made_by: Path) -> RunConfig:
    """Return the config of the run that makes the model in `folder`. Raises ConfigError if it makes another."""
    base = config_file.load(made_by, [], RunConfig)
    made = base.run.folder / "model"
    if made.resolve() != folder.resolve():
        raise ConfigError(f"model.made_by: {made_by} makes {made}, but model.path is {folder}; make them agree")
    return base


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
