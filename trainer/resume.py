"""Which checkpoint a run goes on from, and whether it may."""

import os
from pathlib import Path

from serving import directory
from serving.directory import DirectoryError
from trainer import checkpoint, handshake
from trainer.build import Parts
from trainer.checkpoint import Counters
from trainer.config import RunConfig
from trainer.distributed import World
from trainer.metrics import Terminal
from trainer.status import RESTARTS

_RESTARTS = (RESTARTS, "TORCHELASTIC_RESTART_COUNT")


def resume(config: RunConfig, parts: Parts) -> Counters:
    """Load the checkpoint that the run goes on from, if there is one; return where the run stands.

    Rank 0 chooses it for all ranks. Raises DirectoryError for a checkpoint that is asked for and cannot be used, and
    for one of another parallel mode or number of processes unless that is asked for; BadInput where a rank cannot use
    what rank 0 chose.
    """
    path = choose(config, parts.world)
    if path is None:
        return Counters()
    found = _name(path) if parts.world.is_main else _seen_here(path, parts)
    handshake.agree(parts.world.watchdog, "resume", {str(path): found}, "let every machine see the same files there")
    if not config.checkpoint.reshard:
        refuse_other_world(path, parts.world)
    if parts.world.is_main:
        Terminal.say_once(f"going on from {path}")
    done = checkpoint.load(path, parts.world, parts.model, parts.optimizer, fingerprints=parts.fingerprints)
    parts.feed.go_on_after(done.step, done.feed)
    return done


def choose(config: RunConfig, world: World) -> Path | None:
    """Return the checkpoint that rank 0 finds and verifies, on every rank; None for the start.

    What a rank finds by itself may be another one: its listing of a network file system may be old.
    """
    path = None
    if world.is_main:
        path, skipped = find(config)
        for reason in skipped:
            Terminal.say_once(f"checkpoint skipped: {reason}")
    told = handshake.told(world.watchdog, "chosen checkpoint", None if path is None else str(path))
    return None if told is None else Path(told)


def _seen_here(path: Path, parts: Parts) -> str:
    """Say which checkpoint this rank sees, once it has hashed what it will read of it."""
    try:
        checkpoint.check_part(path, parts.world, parts.model, parts.optimizer)
        return _name(path)
    except (DirectoryError, OSError) as error:
        return f"none that can be used ({error})"


def _name(path: Path) -> str:
    return f"checkpoint {directory.identity(path)[:12]}"


def find(config: RunConfig) -> tuple[Path | None, list[str]]:
    """Return the checkpoint to go on from, None for the start, and why newer ones were skipped.

    A folder that `checkpoint.resume` names is obeyed, unless it is of another run and this one has saved since. A
    process that was started again after a failure goes on from the newest, whatever the first was told.
    """
    wanted, own = config.checkpoint.resume, config.run.folder / "checkpoints"
    if wanted == "auto" or any(os.environ.get(name, "0") != "0" for name in _RESTARTS):
        return checkpoint.newest(own)
    if wanted == "never":
        return None, []
    path = Path(wanted)
    if not path.is_dir():
        raise DirectoryError(f"checkpoint.resume: {wanted} found; accepted: auto, never, or the folder of a checkpoint")
    if path.resolve().parent != own.resolve():
        newest, skipped = checkpoint.newest(own)
        if newest is not None:
            return newest, skipped
    if reason := checkpoint.verify(path):
        raise DirectoryError(f"checkpoint.resume: {reason}")
    return path, []


def refuse_other_world(path: Path, world: World) -> None:
    """Raise DirectoryError where the checkpoint was saved in another parallel mode, or by more or fewer processes."""
    writer = directory.read_manifest(path, "checkpoint")["written_by"]
    saved = _tell(writer["mode"], writer["zero_stage"], writer["world_size"])
    here = _tell(world.mode, world.zero_stage, world.size)
    if saved != here:
        raise DirectoryError(
            f"{path}: was saved by {saved}, and this run is {here}; add --reshard (checkpoint.reshard=true) to go on "
            "all the same, or start it as it was"
        )


def _tell(mode: str, zero_stage: int, world_size: int) -> str:
    name = f"zero{zero_stage}" if mode == "deepspeed" else mode
    return f"{name} on {world_size} process{'es' if world_size > 1 else ''}"
