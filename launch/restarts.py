"""After a failure a run is started again, so many times, and goes on from its last checkpoint by itself.

The whole group is started anew, with a port and a store of its own: ranks that an agent starts again within its group
meet the addresses of the dead ones.
"""

import sys
from collections.abc import Callable
from pathlib import Path

from serving.directory import MANIFEST
from trainer import run_folder
from trainer.config import RunConfig
from trainer.status import RESTARTS


def again(config: RunConfig, max_restarts: int) -> Callable[[int], dict[str, str] | None]:
    """Return what says, after so many failures, what the next attempt has in its environment; None: no more attempts.

    It also writes the failure into status.json where the rank that does that was killed.
    """
    known = _saved(config)

    def start_again(failures: int) -> dict[str, str] | None:
        tell_failed(config, 1, "its processes were killed")
        if failures > max_restarts:
            return None
        has_saved = bool(_saved(config) - known)
        where = "from its last checkpoint" if has_saved else "as it was started, since it has saved nothing yet"
        print(f"restart {failures} of {max_restarts}: the run goes on {where}", file=sys.stderr)
        return {RESTARTS: str(failures)} if has_saved else {}

    return start_again


def _saved(config: RunConfig) -> set[tuple[Path, int]]:
    """Every checkpoint that was ever whole, with the time at which it was."""
    found = (config.run.folder / "checkpoints").glob(f"step-*/{MANIFEST}")
    return {(path, path.stat().st_mtime_ns) for path in found}


def tell_failed(config: RunConfig, code: int, reason: str) -> None:
    """Write into status.json how a run ended whose ranks could not."""
    status = run_folder.read_status(config.run.folder)
    if status is not None and status["state"] == "running":
        run_folder.write_status(config.run.folder, "failed", code=code, step=status["step"], reason=reason)
