"""The file systems that Trivet writes to: room, speed, and what run folders ask of them (locks, atomic exchange)."""

import ctypes
import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path

from launch.doctor.findings import Finding

LITTLE_DISK_BYTES = 2 * 1024**3
FEW_INODES = 10_000
SPEED_BYTES = 64 * 1024**2
SPEED_LIMIT_S = 2.0  # for each direction: a slow disk is measured with fewer bytes
SLOW_MB_PER_S = 50
SMALL_FILES = 16
NETWORK_TYPES = ("nfs", "nfs4", "cifs", "smb3", "smbfs", "lustre", "beegfs", "ceph", "gpfs", "9p", "afs", "virtiofs")
LOST = {"overlay": "the container", "tmpfs": "the next start", "ramfs": "the next start"}
WRITE_ELSEWHERE = "trivet train CONFIG run.dir=/another/disk"
_CHUNK_BYTES = 4 * 1024**2
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


def space(folder: Path) -> list[Finding]:
    """Room for checkpoints and models where runs are written."""
    free = shutil.disk_usage(folder).free
    found, gib = f"{free / 1024**3:.1f} GiB free in {folder}", round(free / 1024**3, 2)
    if free < LITTLE_DISK_BYTES:
        fix = f"du -xh --max-depth=2 {folder} | sort -h | tail  # or: {WRITE_ELSEWHERE}"
        return [Finding("disk", found, "problem", fix, value=gib, unit="GiB")]
    inodes = os.statvfs(folder)
    if inodes.f_files and inodes.f_favail < FEW_INODES:
        fix = f"du -x --inodes --max-depth=2 {folder} | sort -h | tail  # or: {WRITE_ELSEWHERE}"
        found = f"{found}, but only {inodes.f_favail} more files"
        return [Finding("disk", found, "problem", fix, value=inodes.f_favail, unit="files")]
    return [Finding("disk", found, value=gib, unit="GiB")]


def writing(folder: Path) -> list[Finding]:
    """What kind of file system it is, and how it does; that nothing can be written there is a problem."""
    try:
        with tempfile.TemporaryDirectory(prefix=".trivet-doctor-", dir=folder) as scratch:
            return [*_file_system(folder, Path(scratch)), *_speed(folder, Path(scratch))]
    except OSError as error:
        found = f"cannot be written: {error.strerror}"
        return [Finding(f"writing to {folder}", found, "problem", WRITE_ELSEWHERE)]


def _file_system(folder: Path, scratch: Path) -> list[Finding]:
    """Whether a run folder can be locked, a finished one exchanged in one step, and files are there tomorrow."""
    kind, subject = file_system_type(folder), f"file system of {folder}"
    if not locks(scratch):
        found = f"{kind}, without file locks: two runs could write into one folder"
        return [Finding(subject, found, "problem", WRITE_ELSEWHERE)]
    doubts = []
    if not exchanges(scratch):
        doubts.append("without atomic exchange: replacing a folder takes two renames")
    if kind in NETWORK_TYPES or kind.startswith("fuse."):
        doubts.append("over the network: locks and renames may lag between machines")
    if kind in LOST:
        doubts.append(f"its files don't outlive {LOST[kind]}")
    if doubts:
        return [Finding(subject, "; ".join([kind, *doubts]), "note", WRITE_ELSEWHERE)]
    return [Finding(subject, kind)]


def _speed(folder: Path, scratch: Path) -> list[Finding]:
    """How fast a checkpoint can be written and read in `folder`, and how long one small durable file takes."""
    write, read = _write_and_read(scratch / "large")
    small_ms = _small_files_ms(scratch)
    slow = write < SLOW_MB_PER_S
    found = f"{write:,.0f} MB/s, on the disk" + (": each checkpoint of a 1 GB model takes over 20 s" if slow else "")
    return [
        Finding(
            f"writing to {folder}",
            found,
            "note" if slow else "ok",
            WRITE_ELSEWHERE if slow else "",
            value=write,
            unit="MB/s",
        ),
        Finding(f"reading from {folder}", f"{read:,.0f} MB/s", value=read, unit="MB/s"),
        Finding(f"small file in {folder}", f"{small_ms:.1f} ms until durable", value=small_ms, unit="ms"),
    ]


def file_system_type(folder: Path, mounts: Path = Path("/proc/self/mountinfo")) -> str:
    """Return the type of the file system that `folder` lies on, from the longest mount point that contains it."""
    best = ("", "unknown")
    for line in mounts.read_text().splitlines() if mounts.exists() else []:
        before, _, after = line.partition(" - ")
        point = before.split()[4].replace("\\040", " ")  # a space in a mount point is written in octal
        if folder.resolve().is_relative_to(point) and len(point) >= len(best[0]):
            best = (point, after.split()[0])
    return best[1]


def _write_and_read(path: Path) -> tuple[float, float]:
    """Return MB/s of writing a file through to the disk, and of reading it back past the cache."""
    chunk, written, started = os.urandom(_CHUNK_BYTES), 0, time.perf_counter()
    room = shutil.disk_usage(path.parent).free // 4
    with path.open("wb", buffering=0) as file:
        while written < min(SPEED_BYTES, max(room, _CHUNK_BYTES)) and time.perf_counter() < started + SPEED_LIMIT_S:
            written += file.write(chunk)
        os.fsync(file.fileno())
        write_s = time.perf_counter() - started
    with path.open("rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        read, started = 0, time.perf_counter()
        while time.perf_counter() < started + SPEED_LIMIT_S and (data := file.read(_CHUNK_BYTES)):
            read += len(data)
        read_s = time.perf_counter() - started
    return round(written / write_s / 1e6, 1), round(read / read_s / 1e6, 1)


def _small_files_ms(folder: Path) -> float:
    """Return the milliseconds that it takes to create one small file durably."""
    started = time.perf_counter()
    for i in range(SMALL_FILES):
        with (folder / f"small-{i}").open("wb") as file:
            file.write(b"x")
            file.flush()
            os.fsync(file.fileno())
    return round((time.perf_counter() - started) / SMALL_FILES * 1e3, 2)


def locks(folder: Path) -> bool:
    """Whether a second opener is kept out by the first one's lock."""
    path = folder / "lock"
    with path.open("w") as first, path.open("w") as second:
        try:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # the file system has no locks
            return False
    return False


def exchanges(folder: Path) -> bool:
    """Whether two folders can change places in one step."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    if renameat2 is None:
        return False
    (folder / "old").mkdir()
    (folder / "new").mkdir()
    old, new = (os.fsencode(folder / name) for name in ("old", "new"))
    return renameat2(_AT_FDCWD, new, _AT_FDCWD, old, ctypes.c_uint(_RENAME_EXCHANGE)) == 0
