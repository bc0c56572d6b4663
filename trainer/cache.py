"""Prepared data that is kept between runs: folders and small facts, each under a key that hashes all they depend on.

`$TRIVET_CACHE`, else `$XDG_CACHE_HOME/trivet`, else `~/.cache/trivet`:

    examples/<key>/   tokenised examples      tokenizers/<key>/   trained tokenizers
    facts/<key>.json  what a pass over data found out, and the hashes of files

What no run has asked for in 30 days is removed when something new is prepared. To have the space back at once, remove
the folder, or any part of it: later runs only prepare again, and runs that are going keep what they have opened.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from serving import directory
from serving.directory import BadInput, DirectoryError
from trainer.status import own_rank

_KEY_LENGTH = 32  # hex digits of a sha256: 128 bits
_ABOUT, _STATS = "about.json", ".seen.json"
_SMALL_FILE_BYTES = 2**26  # hashed in less time than it takes to remember the hash of many such files
_UNUSED_S = 30 * 24 * 3600
_QUIET_TRIES, _BETWEEN_TRIES_S = 20, 0.1
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def root() -> Path:
    """Return the folder of the cache, there or not.

    Where the home folder cannot be written (as in many containers) it is one of this user's own in the temporary
    folder. Raises BadInput where another user made that one.
    """
    if named := os.environ.get("TRIVET_CACHE"):
        return Path(named).expanduser()
    usual = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "trivet"
    if os.access(next(path for path in (usual, *usual.parents) if path.exists()), os.W_OK):
        return usual
    own = Path(tempfile.gettempdir()) / f"trivet-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        own.mkdir(mode=0o700)
    if own.is_symlink() or own.stat().st_uid != os.getuid():
        raise BadInput(f"TRIVET_CACHE: {usual} cannot be written and {own} is another user's; set it to a folder")
    return own


def key_of(**what: Any) -> str:
    """Return the key of something that depends on `what`, which must be JSON, or paths and other things that print."""
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()[:_KEY_LENGTH]


def entry(kind: str, key: str, build: Callable[[Path], Any]) -> tuple[Path, Any]:
    """Return the folder of an entry and the JSON value that `build` gave; where there is none yet, `build` fills it.

    One process builds and the others wait for it, in a file lock, so that no collective of the ranks runs into its
    time limit. A killed build leaves nothing that is believed, and an entry that is not as it was written is built
    again. Raises BadInput where the cache cannot be written.
    """
    final = root() / kind / key
    with _locked(final):
        if not _is_whole(final):
            with _writing(final), directory.staged(final) as folder:
                directory.write_json(folder / _ABOUT, build(folder))
                directory.seal(folder, "cache")
            _remember_stats(final)
            _remove_unused()
        _touch(_stats_path(final))
    return final, json.loads((final / _ABOUT).read_text(encoding="utf-8"))


def fact(key: str, find: Callable[[], Any]) -> Any:
    """Return the JSON value kept under a key; where there is none yet, that of `find`, which is kept from then on.

    Waits while another process finds it. Raises BadInput where the cache cannot be written.
    """
    path = root() / "facts" / f"{key}.json"
    with _locked(path):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept["digest"] == key_of(value=kept["value"]):
                _touch(path)
                return kept["value"]
        value = json.loads(json.dumps(find()))  # the first time gives what later times give
        with _writing(path):
            directory.write_json(path, {**directory.stamp(), "value": value, "digest": key_of(value=value)})
        return value


def file_hash(path: Path) -> str:
    """Return the sha256 of a file's bytes; a large one is read again only when its size, times or inode changed."""
    stat = path.stat()
    if stat.st_size < _SMALL_FILE_BYTES:
        return directory.sha256(path)
    seen = [str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    return fact(key_of(file=seen), lambda: directory.sha256(path))


def size_bytes() -> int:
    """Return what the whole cache takes."""
    total = 0
    for path in root().rglob("*"):
        with contextlib.suppress(OSError):  # another process removed it
            total += path.stat().st_size if path.is_file() else 0
    return total


def _is_whole(folder: Path) -> bool:
    """Whether the files of an entry are as they were written.

    They are hashed where their size, times or inode are not those of the last time that they were seen whole.
    """
    try:
        manifest = directory.read_manifest(folder, "cache")
        if _stats(folder) != _remembered_stats(folder):
            directory.check_files(folder, manifest)
            _remember_stats(folder)
    except (DirectoryError, OSError):
        return False
    return True


def _stats(folder: Path) -> dict[str, list[int]]:
    stats = {path.name: path.stat() for path in sorted(folder.iterdir())}
    return {name: [each.st_size, each.st_mtime_ns, each.st_ino] for name, each in stats.items()}


def _stats_path(folder: Path) -> Path:
    return folder.with_name(folder.name + _STATS)


def _remembered_stats(folder: Path) -> Any:
    try:
        return json.loads(_stats_path(folder).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _remember_stats(folder: Path) -> None:
    with contextlib.suppress(OSError):  # a cache that can only be read is hashed each time
        directory.write_json(_stats_path(folder), _stats(folder))


def _touch(path: Path) -> None:
    """Say that this was asked for now."""
    with contextlib.suppress(OSError):
        os.utime(path)


def _remove_unused() -> None:
    before = time.time() - _UNUSED_S
    for path in root().glob("*/*.json"):
        with contextlib.suppress(OSError):  # another process removed it
            if path.stat().st_mtime < before:
                path.unlink()
                if path.name.endswith(_STATS):
                    shutil.rmtree(path.with_name(path.name.removesuffix(_STATS)))


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of an entry; without one where it cannot be had (a cache that can only be read, or no locks)."""
    with _writing(path):
        root().mkdir(mode=0o700, parents=True, exist_ok=True)  # it holds what data are made of
        path.parent.mkdir(exist_ok=True)
    try:
        lock = os.open(path.with_name(f".{path.name}.lock"), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        yield
        return
    try:
        with contextlib.suppress(OSError):
            _wait_for(lock)
        yield
    finally:
        os.close(lock)


def _wait_for(lock: int) -> None:
    for _ in range(_QUIET_TRIES):
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        time.sleep(_BETWEEN_TRIES_S)
    if own_rank() == 0:
        print("waiting for another process that prepares the same data", file=sys.stderr)
    fcntl.flock(lock, fcntl.LOCK_EX)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Raise BadInput where the cache cannot be written."""
    try:
        yield
        return
    except OSError as error:
        cause: BaseException | None = error
    except DirectoryError as error:
        cause = error.__context__
        if not isinstance(cause, OSError):
            raise
    assert isinstance(cause, OSError)
    if cause.errno not in _DISK_ERRORS and not str(cause.filename).startswith(str(root())):
        raise cause
    raise BadInput(
        f"TRIVET_CACHE: {path.parent} cannot be written ({cause.strerror}); free some space there, or set it to "
        f"another folder"
    )
