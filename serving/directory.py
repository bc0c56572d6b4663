"""The format of the directories that one part of Trivet writes and another reads: atomic, hashed, versioned.

Standard library only: `trainer`, `launch` and a serving process all import it. A directory is *staged* beside its
final name, *sealed* by a `trivet.json` that lists the sha256 of every file, fsynced, then renamed into place, so that
no reader ever sees half of one and a crash never costs the previous one.
"""

import contextlib
import ctypes
import fcntl
import glob
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from serving import exportable, format_version

MANIFEST = "trivet.json"
VERIFICATION = "verification.json"
REFERENCE = "reference.safetensors"

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


class BadInput(Exception):
    """Something a user can cause and mend: printed on one line with the fix, exit code 2."""


class DirectoryError(BadInput):
    """A directory that is missing, incomplete, altered or of another kind."""


class NewerFormat(DirectoryError):
    """What is of a format that this Trivet does not know: of a newer one, or one that is no whole number."""


# --- writing ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def staged(final: Path) -> Iterator[Path]:
    """Yield an empty folder beside `final`; when the block ends well, make it durable and rename it to `final`.

    An older `final` is replaced in one atomic exchange. When the block raises, the folder is removed and `final` is
    left as it was; a folder that a killed process left behind is removed by the next call.
    """
    final = Path(final)
    folder, lock = _make_partial(final)
    try:
        yield folder
        publish(folder, final)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def unfinished(final: Path) -> list[Path]:
    """Return the folders beside `final` that calls of `staged` for it work in, or left behind when they were killed."""
    return list(final.parent.glob(f".{glob.escape(final.name)}.{'[0-9a-f]' * 8}.partial"))


def publish(folder: Path, final: Path) -> None:
    """Fsync everything in `folder` and rename it to `final`, replacing an older `final` atomically."""
    for path in [*sorted(folder.rglob("*")), folder]:
        _fsync(path)
    if final.exists():
        _exchange(folder, final)
        shutil.rmtree(folder, ignore_errors=True)  # the new one is there; what is left of the old, the next one removes
    else:
        folder.rename(final)
    _fsync(final.parent)


def write_json(path: Path, value: Any) -> None:
    """Replace the file at `path` with `value` as JSON, atomically and durably."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace the file at `path` with `text` in UTF-8, atomically and durably."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        _fsync(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _fsync(path.parent)


def stamp() -> dict[str, Any]:
    """Return the fields that every JSON file of Trivet starts with: `format_version`, and `trivet`, the writer's."""
    return format_version.stamp()


def seal(folder: Path, kind: str, **fields: Any) -> dict[str, Any]:
    """Write `trivet.json` into `folder`: the stamp, kind, `fields`, and the sha256 of every other file there."""
    files = {
        str(path.relative_to(folder)): sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (MANIFEST, VERIFICATION)
    }
    manifest = {**stamp(), "kind": kind, **fields, "files": files}
    write_json(folder / MANIFEST, manifest)
    return manifest


# --- reading ---------------------------------------------------------------------------------------------------------


def read_manifest(folder: Path, kind: str, *, as_written: bool = False) -> dict[str, Any]:
    """Return the manifest of the directory, without hashing its files (see `check_files`).

    It is in today's format; `as_written` leaves an older one as it is, for what was computed from it then.
    Raises DirectoryError if the folder or its manifest is missing, unreadable, of another kind or a newer format.
    """
    folder = Path(folder)
    fix = exportable.instead_of_onnx(folder) if kind == "onnx" else ""
    if folder.is_file():
        raise DirectoryError(f"{folder}: is a file; give the folder that it is in")
    if not folder.is_dir():
        raise DirectoryError(f"{folder}: no such folder; expected a Trivet {kind} directory")
    try:
        written = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        manifest = current(folder / MANIFEST, written)
    except FileNotFoundError:
        raise DirectoryError(f"{folder}: has no {MANIFEST}, so it is not a Trivet {kind} directory{fix}") from None
    except (OSError, ValueError) as error:
        raise DirectoryError(f"{folder / MANIFEST}: cannot be read ({error}); make the directory again") from None
    if manifest.get("kind") != kind:
        raise DirectoryError(f"{folder}: its {MANIFEST} says {manifest.get('kind')!r}; expected {kind!r}{fix}")
    return written if as_written else manifest


def current(path: Path, content: Any) -> dict[str, Any]:
    """Return the content of Trivet's JSON file at `path` in today's format, upgraded where it is older.

    Raises NewerFormat where this Trivet does not know its format, and ValueError where it is no object or names none.
    """
    if not isinstance(content, dict):
        raise ValueError("no object")
    if refusal := format_version.refusal(content):
        raise NewerFormat(f"{path}: {refusal}")
    return format_version.upgraded(content)


def refuse_newer(path: Path) -> None:
    """Raise NewerFormat if the JSON file or saved config.yaml at `path` is of a format that this Trivet does not know.

    To be called before it is replaced. One that is missing or broken says nothing.
    """
    with contextlib.suppress(OSError, ValueError):
        text = path.read_text(encoding="utf-8")
        current(path, json.loads(text) if path.suffix == ".json" else format_version.of_comment(text))


def check_files(folder: Path, manifest: dict[str, Any]) -> None:
    """Hash every file that the manifest lists.

    Raises DirectoryError naming the first that is missing or altered, or a file that the manifest does not list.
    """
    listed = manifest.get("files")
    if not isinstance(listed, dict):
        raise DirectoryError(f"{folder / MANIFEST}: lists no files; make the directory again")
    for name, expected in listed.items():
        path = folder / name
        if ".." in Path(name).parts or Path(name).is_absolute() or path.is_symlink():
            raise DirectoryError(f"{folder}: {name} points outside the directory; refused")
        if not path.is_file():
            raise DirectoryError(f"{path}: missing, though {MANIFEST} lists it; make the directory again")
        if sha256(path) != expected:
            raise DirectoryError(f"{path}: altered since it was written (sha256 differs); make the directory again")
    for path in unlisted(folder, manifest):
        raise DirectoryError(f"{path}: {MANIFEST} does not list it; remove it, or make the directory again")


def unlisted(folder: Path, manifest: dict[str, Any]) -> Iterator[Path]:
    """Yield the files in `folder`, and in folders in it, that are not the directory's own, in order of their names."""
    listed = manifest.get("files") or {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        is_ours = path.name in (MANIFEST, VERIFICATION) or (path.name[0] == "." and path.suffix == ".partial")
        if (path.is_symlink() or path.is_file()) and not is_ours and name not in listed:
            yield path


def inside_of(path: Path) -> Path | None:
    """Return the directory of Trivet that `path` lies in, whose files may be no others than its manifest's, if any."""
    return next((folder for folder in path.resolve().parents if (folder / MANIFEST).is_file()), None)


def foreign_weights(folder: Path) -> str:
    """Return the first file that a model folder names as holding its weights, though it is no safetensors file there;
    nothing where there is none. Of such a name transformers would read a pickle, or a file elsewhere.

    Raises DirectoryError for a list of weight files that cannot be read.
    """
    named: list[Any] = []
    for path in (folder / "config.json", *sorted(folder.glob("*.safetensors.index.json"))):
        try:
            content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
            of_one, of_many = content.get("transformers_weights"), content.get("weight_map", {}).values()
        except (OSError, ValueError, AttributeError) as error:
            raise DirectoryError(f"{path}: cannot be read ({error}); get the model again") from None
        named += [*of_many, *([] if of_one is None or str(of_one).endswith(".safetensors.index.json") else [of_one])]
    for name in named:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            return str(name)
    return ""


def identity(folder: Path) -> str:
    """Return one hash for everything the directory's manifest vouches for: the sha256 of `trivet.json` itself."""
    return sha256(Path(folder) / MANIFEST)


def sha256(path: Path) -> str:
    """Return the file's sha256 in hex. Raises DirectoryError for a file that this user may not read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except PermissionError as error:
        raise DirectoryError(f"{path}: cannot be read ({error.strerror}); mend its permissions") from None


# --- the file system -------------------------------------------------------------------------------------------------


def _make_partial(final: Path) -> tuple[Path, int]:
    """Make an empty folder beside `final`, locked while the returned descriptor is open; remove those nobody holds.

    Raises DirectoryError if it cannot be made.
    """
    folder = final.parent / f".{final.name}.{uuid.uuid4().hex[:8]}.partial"
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with _open(final.parent) as parent:
            _lock(parent, fcntl.LOCK_EX)  # or another process would find a new folder before it is locked
            for other in unfinished(final):
                with _open(other) as descriptor:
                    if _lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB):
                        shutil.rmtree(other, ignore_errors=True)
            folder.mkdir()
            lock = os.open(folder, os.O_RDONLY)
            _lock(lock, fcntl.LOCK_EX)
    except OSError as error:
        raise DirectoryError(f"{final}: cannot be written ({error.strerror}); choose another place") from None
    return folder, lock


@contextlib.contextmanager
def _open(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _lock(descriptor: int, operation: int) -> bool:
    """Return whether the lock was taken: not when another process has it, nor on a file system without locks."""
    try:
        fcntl.flock(descriptor, operation)
    except OSError:
        return False
    return True


def _fsync(path: Path) -> None:
    with _open(path) as descriptor:
        os.fsync(descriptor)


def _exchange(new: Path, old: Path) -> None:
    """Swap two directories in one step (Linux renameat2); where that is unsupported, in two renames."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is not None:
        done = renameat2(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(old), ctypes.c_uint(_RENAME_EXCHANGE))
        if done == 0:
            return
    aside = old.with_name(f".{old.name}.{uuid.uuid4().hex[:8]}.old")
    old.rename(aside)
    new.rename(old)
    aside.rename(new)
