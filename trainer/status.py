"""Where a rank is (host, phase, step) and how it ended, in files that whoever started the ranks finds after a kill.

Standard library only: what starts ranks reads these files without torch.
"""

import json
import os
import socket
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

EXIT_FOLDER = "TRIVET_EXIT_FOLDER"  # where the ranks of a group leave their files, set by who started them
RESTARTS = "TRIVET_RESTARTS"  # how often the run was started again, if it has saved since it was first started
PREPARING = "preparing"  # up to the first evaluation or step: how long it takes depends on the data
LOST, HUNG = "lost", "hung"  # what a report may be about: another rank that is gone, one that does not move
_LINE_BYTES = 256


@dataclass(frozen=True)
class Place:
    """Where a rank is. `step` is the one being taken, 0 before the first; `moves` counts the phases it has entered."""

    rank: int = 0
    host: str = "unknown"
    phase: str = PREPARING
    step: int = 0
    moves: int = 0

    def __str__(self) -> str:
        return f"host {self.host}, phase {self.phase}, step {self.step}"


class Status:
    """The place of this rank. Every rank enters the same phases in the same order, so `moves` can be compared."""

    def __init__(self) -> None:
        self.place = Place(own_rank(), socket.gethostname())
        path = _path(".started")
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600) if path else None
        self._write()

    def at(self, phase: str, step: int | None = None) -> None:
        """Enter a phase, of the same step as the last unless it is given. Takes microseconds."""
        place = self.place
        self.place = replace(place, phase=phase, step=place.step if step is None else step, moves=place.moves + 1)
        self._write()

    def touch(self) -> None:
        """Show by the time of the file that this rank lives."""
        if self._file is not None:
            os.utime(self._file)

    def close(self) -> None:
        """Let go of the file, which stays."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _write(self) -> None:
        if self._file is not None:
            # One write of a fixed length: a kill leaves the old place or the new one.
            os.pwrite(self._file, json.dumps(asdict(self.place)).encode().ljust(_LINE_BYTES), 0)


@dataclass(frozen=True)
class Report:
    """What a rank left at its end: its exit code, why in one line or block, and about whom if not about itself."""

    code: int
    message: str = ""
    about: str = ""


def report_start() -> None:
    """Called by a rank at its start: if it reports no exit, the group above the launcher knows that it was killed."""
    Status().close()


def report_exit(code: int, message: str = "", about: str = "") -> None:
    """Called by a rank at its end: leave its exit code for the group above the launcher, if there is one.

    The first report stands: what a rank says while it is being ended because of another one says less.
    """
    path = _path(".json")
    if path is not None and not path.exists():
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps([code, message, about]))
        partial.replace(path)


def reports(folder: Path) -> dict[int, Report]:
    """Return rank -> what it reported at its end, of those that did."""
    return {_rank_of(path): Report(*json.loads(path.read_text())) for path in sorted(folder.glob("rank-*.json"))}


def places(folder: Path) -> dict[int, Place]:
    """Return rank -> where it was last, of every rank that was started."""
    return {_rank_of(path): _place_in(path) for path in sorted(folder.glob("rank-*.started"))}


def places_in_group() -> dict[int, Place]:
    """Return what `places` does for the group that this rank belongs to, nothing where it belongs to none."""
    folder = _folder()
    return places(folder) if folder else {}


def last_signs(folder: Path) -> dict[int, float]:
    """Return rank -> when it showed last that it lives, in seconds of the file system's clock."""
    return {_rank_of(path): path.stat().st_mtime for path in folder.glob("rank-*.started")}


def tells_of_a_connection(message: str) -> bool:
    """Whether an error is that of a rank which could not reach another."""
    return any(word in message.lower() for word in ("gloo", "nccl", "connection", "broken pipe"))


def stack_path() -> Path | None:
    """Return where this rank's Python stack is left if it hangs in a way that lets no other thread run."""
    return _path(".stack")


def read_stack(rank: int) -> str:
    """Return the stack that a rank of this machine left, nothing where there is none."""
    folder = _folder()
    path = folder / f"rank-{rank:06d}.stack" if folder else None
    text = path.read_text(errors="replace") if path is not None and path.is_file() else ""
    return text[max(0, text.rfind("Timeout (")) :]  # as faulthandler begins each


def own_rank() -> int:
    return int(os.environ.get("RANK", "0"))


def is_in_group() -> bool:
    """Whether somebody above the launcher will read what this rank leaves, and print it."""
    return _folder() is not None


def _place_in(path: Path) -> Place:
    try:
        fields: dict[str, Any] = json.loads(path.read_text())
        return Place(**fields)
    except (OSError, ValueError, TypeError):
        return Place(_rank_of(path))


def _rank_of(path: Path) -> int:
    return int(path.stem.removeprefix("rank-"))


def _folder() -> Path | None:
    folder = os.environ.get(EXIT_FOLDER)
    return Path(folder) if folder and Path(folder).is_dir() else None


def _path(suffix: str) -> Path | None:
    folder = _folder()
    return folder / f"rank-{own_rank():06d}{suffix}" if folder else None
