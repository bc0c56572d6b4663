"""The run folder: what a run leaves on disk besides metrics, checkpoints and the model."""

import contextlib
import fcntl
import importlib.metadata
import json
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from serving import directory
from serving.directory import BadInput
from trainer.redact import redacted

PACKAGES = ("torch", "transformers", "accelerate", "peft", "deepspeed", "tokenizers", "safetensors")


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Make the run folder and hold it for this process while the block runs; the kernel lets go of it after a kill.

    If the block leaves nothing in it, the folder is removed. Raises BadInput if another process trains there, or
    nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        with contextlib.suppress(OSError):
            folder.rmdir()  # only an empty one goes
        raise BadInput(f"run.dir: {folder} cannot be written ({error.strerror}); choose another run.dir") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput(
                f"run.name: another process is training in {folder}; wait for it, or choose another run.name"
            ) from None
        try:
            yield
        finally:
            if [path.name for path in folder.iterdir()] == [".lock"]:
                (folder / ".lock").unlink()
                folder.rmdir()


def write_status(folder: Path, state: str, *, code: int | None, step: int, reason: str = "") -> None:
    """Replace status.json: state is running, done, stopped or failed; `code` what `trivet` returns for it."""
    fields = {**directory.stamp(), "state": state, "code": code, "step": step, "reason": redacted(reason)}
    directory.write_json(folder / "status.json", fields)


def read_status(folder: Path) -> dict[str, Any] | None:
    """Return status.json, or None where there is none that can be read, with a state and a step.

    Raises NewerFormat where this Trivet does not know its format.
    """
    path = folder / "status.json"
    try:
        status = directory.current(path, json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None
    whole = isinstance(status.get("state"), str) and isinstance(status.get("step"), int)
    return status if whole else None


def refuse_newer(folder: Path) -> None:
    """Raise NewerFormat if a file of the run or sweep folder, which would be replaced, is of a format unknown here."""
    for name in ("config.yaml", "status.json", "result.json", f"model/{directory.MANIFEST}"):
        directory.refuse_newer(folder / name)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the entries of a metrics.jsonl; what is none, such as the torn last line of a kill, is passed over."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    return [entry for entry in map(parse_metric, text.splitlines()) if entry]


def parse_metric(line: str) -> dict[str, Any]:
    """Return one line of a metrics.jsonl, or an empty dict if it is no object with a kind and a step."""
    try:
        entry = json.loads(line)
    except ValueError:
        return {}
    whole = isinstance(entry, dict) and isinstance(entry.get("kind"), str) and isinstance(entry.get("step"), int)
    return entry if whole else {}


def write_result(folder: Path, **fields: Any) -> None:
    """Write result.json with the stamp, `fields` and the versions of what ran."""
    directory.write_json(folder / "result.json", {**directory.stamp(), **fields, "versions": installed_versions()})


def installed_versions() -> dict[str, str]:
    """Return the versions of Python, Trivet and the libraries that training runs on."""
    versions = {"python": platform.python_version()}
    for name in ("trivet", *PACKAGES):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
