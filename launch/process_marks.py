"""Processes found by a mark (NAME=value) in the environment they were started with, however deep they are.

Children of a launcher leave its process group, and orphans lose their parent; the environment they keep. Linux only.
"""

import contextlib
import os
import signal
import time
from pathlib import Path


def stop_marked(mark: str, *, patience_s: float) -> None:
    """Ask the ranks of every group that was started with `mark` (NAME=value) in its environment to save and stop.

    Kills what still lives after `patience_s`, or when interrupted meanwhile.
    """
    try:
        for pid in ranks(marked(mark)):
            send(pid, signal.SIGTERM)
        deadline = time.monotonic() + patience_s
        while marked(mark) and time.monotonic() < deadline:
            time.sleep(0.1)
    finally:
        kill_marked(mark)


def kill_marked(mark: str) -> None:
    """End every process with the mark at once, those that are started meanwhile too."""
    deadline = time.monotonic() + 10
    while (pids := marked(mark)) and time.monotonic() < deadline:
        for pid in pids:
            send(pid, signal.SIGKILL)
        time.sleep(0.02)


def marked(mark: str) -> dict[int, list[bytes]]:
    """Return process id -> the environment it was started with, of live processes that have `mark` in theirs."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes().split(b"\0")  # empty for a zombie
        except OSError:  # gone, or another user's
            continue
        if mark.encode() in environment:
            found[int(folder.name)] = environment
    return found


def ranks(processes: dict[int, list[bytes]]) -> list[int]:
    """Return the topmost of these processes that a launcher gave a rank; without a launcher, the topmost of all."""
    ranked = {pid for pid, environment in processes.items() if any(e.startswith(b"LOCAL_RANK=") for e in environment)}
    inside = ranked or set(processes)
    return sorted(pid for pid in inside if _parent(pid) not in inside)


def send(pid: int, number: int) -> None:
    """Send a signal to a process, if it still lives."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def oom_kills() -> int:
    """Return how many processes the kernel has killed for want of memory since the machine started; 0 if unknown."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0
