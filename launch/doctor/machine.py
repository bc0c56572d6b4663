"""The machine as it is lent to this process: interpreter, cores, memory, and what a container takes off them."""

import os
import platform
import sys
from pathlib import Path

from launch.doctor.findings import Finding
from trainer import free_memory

GIB = 1024**3
LITTLE_MEMORY_BYTES = 2 * GIB  # about what torch, transformers and the quickstart's model take
LITTLE_SHM_BYTES = 512 * 1024**2  # containers give 64 MiB unless told otherwise


def machine(root: Path = Path("/")) -> list[Finding]:
    """The interpreter and the processor cores; fewer cores than seen is a note, since libraries start a thread each."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found = f"{platform.system()} {platform.machine()}, {cores} CPU cores"
    finding = Finding("machine", found, value=cores, unit="cores")
    quota = cpu_quota(root)
    if quota is not None and quota < cores:
        threads = max(1, int(quota))
        found = f"{found}, of which the container may use {quota:g}: more threads than that slow each other down"
        finding = Finding("machine", found, "note", f"export OMP_NUM_THREADS={threads}", value=quota, unit="cores")
    return [Finding("Python", f"{platform.python_version()} in {sys.prefix}"), finding]


def memory(root: Path = Path("/")) -> list[Finding]:
    """Memory that this process can still get; little is a note with the command that shows who has it."""
    fields = {}
    for line in (root / "proc/meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        fields[name] = int(rest.split()[0]) * 1024
    available = free_memory.available_bytes(root=root)
    if available is None:  # neither the machine nor a limit says
        return [Finding("memory", f"{fields['MemTotal'] / GIB:.1f} GiB in all; nobody says what is available")]
    found = f"{available / GIB:.1f} of {fields['MemTotal'] / GIB:.1f} GiB available"
    found += f", {fields['SwapTotal'] / GIB:.1f} GiB swap"
    if available < fields.get("MemAvailable", 0):
        found += (
            f"; the machine has {fields['MemAvailable'] / GIB:.1f}, a limit of the container or the shell takes off"
        )
    gib = round(available / GIB, 2)
    if available < LITTLE_MEMORY_BYTES:
        return [Finding("memory", found, "note", "ps aux --sort=-rss  # the largest first", value=gib, unit="GiB")]
    return [Finding("memory", found, value=gib, unit="GiB")]


def shared_memory(folder: Path = Path("/dev/shm")) -> list[Finding]:
    """Room for what processes of one machine share: collectives of several GPUs, Ray's object store."""
    if not folder.is_dir():
        return []
    room = os.statvfs(folder)
    size, free = room.f_blocks * room.f_frsize, room.f_bavail * room.f_frsize
    found, gib = f"{free / GIB:.1f} of {size / GIB:.1f} GiB free in {folder}", round(free / GIB, 2)
    if free < LITTLE_SHM_BYTES:
        fix = f"sudo mount -o remount,size=2G {folder}  # in a container: docker run --shm-size=2g"
        return [Finding("shared memory", found, "note", fix, value=gib, unit="GiB")]
    return [Finding("shared memory", found, value=gib, unit="GiB")]


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Return how many cores the container's cgroup allows at a time, None without a limit."""
    quotas = []
    for _, folder in free_memory.group_folders("cpu", root):
        words = _read(folder / "cpu.max").split() or [
            *_read(folder / "cpu.cfs_quota_us").split(),
            *_read(folder / "cpu.cfs_period_us").split(),
        ]
        if len(words) == 2 and words[0] not in ("max", "-1"):
            quotas.append(int(words[0]) / int(words[1]))
    return min(quotas, default=None)


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
