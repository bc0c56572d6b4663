"""Ranks meet before they compute: all of them there, of one mind about the run, and with one run.dir.

They wait for each other without a collective, however long one of them reads and tokenises, as long as it lives.
"""

import hashlib
import os
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from serving.directory import BadInput
from trainer import board, run_folder
from trainer.board import Board
from trainer.config import RunConfig, flat
from trainer.verdict import innermost
from trainer.watchdog import Watchdog

_SHORTEST_WAIT_S, _LONGEST_WAIT_S = 0.02, 0.5
_TELL_EVERY_S = 60
_STACKS_AFTER = 3  # lines without: who reads much data may well take minutes
_STACK_WITHIN_S = 3.0  # signs of life, with which they come, are a second apart
_FILE_SHOWS_WITHIN_S = 10  # on a network file system
_OURS = ("trainer", "serving", "launch")


@contextmanager
def met(config: RunConfig) -> Iterator[Watchdog]:
    """Hold the watchdog of this rank while the block runs, once all ranks agree on config, code and run.dir.

    Raises BadInput where two of them differ, and PeerLost for one that does not come.
    """
    folder, timeout_s = config.run.folder, config.run.timeout_s
    with Watchdog(board.connect(timeout_s), timeout_s=timeout_s, folder=folder).watching() as watchdog:
        if watchdog.board is not None:
            agree(watchdog, "world", {"WORLD_SIZE": watchdog.board.size}, "start all ranks with the same launcher")
            agree(watchdog, "config", flat(config.model_dump(mode="json")), "start all with the same config")
            agree(watchdog, "code", _code(), "install the same on every machine")
            _agree_on_folder(watchdog, config.run.dir)
        yield watchdog


def agree(watchdog: Watchdog, subject: str, facts: Mapping[str, Any], mend: str) -> None:
    """Return when every rank is here with the same facts. Raises BadInput, on every rank, for the first that differs.

    Waits as long as the ranks that are missing live.
    """
    notes = watchdog.board
    if notes is None:
        return
    notes.pin(f"{subject}/{notes.rank}", {"host": watchdog.status.place.host, "facts": dict(facts)})
    if notes.rank == 0:
        verdict = _compare(watchdog, subject, mend)
        notes.pin(f"{subject}/verdict", verdict)
    else:
        verdict = _wait_for(watchdog, {0: f"{subject}/verdict"})[0]
    if verdict:
        raise BadInput(verdict)


def told(watchdog: Watchdog, name: str, value: Any) -> Any:
    """Return, on every rank, the `value` (JSON) that rank 0 came with. Waits for it as long as rank 0 lives."""
    notes = watchdog.board
    if notes is None:
        return value
    if notes.rank == 0:
        notes.pin(name, [value])
    return _wait_for(watchdog, {0: name})[0][0]


def _compare(watchdog: Watchdog, subject: str, mend: str) -> str:
    """Return what is wrong, nothing if all ranks came with the same facts as rank 0."""
    notes = watchdog.board
    assert notes is not None
    here = notes.read(f"{subject}/0")
    missing = {rank: f"{subject}/{rank}" for rank in range(1, notes.size)}
    while missing:
        for rank, there in _wait_for(watchdog, missing).items():
            del missing[rank]
            for key in {**here["facts"], **there["facts"]}:
                ours, theirs = (facts.get(key, "nothing") for facts in (here["facts"], there["facts"]))
                if ours != theirs:
                    return (
                        f"{key}: {ours} found on rank 0 ({here['host']}) and {theirs} on rank {rank} "
                        f"({there['host']}); accepted: the same on every rank; {mend}"
                    )
    return ""


def _wait_for(watchdog: Watchdog, names: Mapping[int, str]) -> dict[int, Any]:
    """Return rank -> note, of the notes that are there, as soon as one is. Raises what `fault_among` returns."""
    notes = watchdog.board
    assert notes is not None
    pause_s, began, num_lines = _SHORTEST_WAIT_S, time.monotonic(), 0
    while True:
        fault = watchdog.fault_among(names)  # first: who refuses leaves its verdict before
        found = {rank: note for rank, name in names.items() if (note := notes.read(name)) is not None}
        if found:
            return found
        if fault is not None:
            raise fault
        if time.monotonic() - began > (num_lines + 1) * _TELL_EVERY_S and notes.rank == 0:
            where = _where(notes, list(names), num_lines) if num_lines >= _STACKS_AFTER else ""
            print(f"waiting for rank {', '.join(map(str, names))}, still preparing{where}", file=sys.stderr)
            num_lines += 1
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_WAIT_S)


def _where(notes: Board, ranks: list[int], number: int) -> str:
    """Say in which lines of code each of these ranks is. One that holds the interpreter does not tell."""
    notes.pin("stacks, please", f"line {number}")
    time.sleep(_STACK_WITHIN_S)
    stacks = {rank: notes.read(f"stack/line {number}/{rank}") for rank in ranks}
    notes.pin("stacks, please", None)
    return "".join(f"; rank {rank} is in {innermost(stack)}" for rank, stack in stacks.items() if stack)


def _agree_on_folder(watchdog: Watchdog, folder: Path) -> None:
    """Raise BadInput where a rank on another machine has another folder under the name of run.dir."""
    notes = watchdog.board
    if notes is None or os.environ.get("LOCAL_WORLD_SIZE") == str(notes.size):
        return
    nonce = folder / f".trivet-{uuid.uuid4().hex}"
    made = notes.rank == 0 and not folder.exists()
    if notes.rank == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            nonce.touch()
        except OSError as error:
            raise BadInput(f"run.dir: {folder} cannot be written ({error.strerror}); choose another run.dir") from None
        notes.pin("nonce", nonce.name)
    try:
        seen = notes.rank == 0 or _shows(folder / _wait_for(watchdog, {0: "nonce"})[0])
        found = str(folder) if seen else f"another {folder}, without the file that rank 0 made there,"
        agree(watchdog, "folder", {"run.dir": found}, "name a folder on a file system that all machines share")
    finally:
        if notes.rank == 0:
            with suppress(OSError):
                nonce.unlink()
                if made:
                    folder.rmdir()


def _shows(path: Path) -> bool:
    deadline = time.monotonic() + _FILE_SHOWS_WITHIN_S
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(_LONGEST_WAIT_S)
    return True


def _code() -> dict[str, str]:
    """Return the version of each package that trains, and a hash of our own files."""
    root, code = Path(__file__).resolve().parents[1], hashlib.sha256()
    for path in sorted(path for package in _OURS for path in (root / package).rglob("*.py")):
        code.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return {f"version of {name}": version for name, version in run_folder.installed_versions().items()} | {
        "Trivet's code": code.hexdigest()[:12]
    }
