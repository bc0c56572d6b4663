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
from serving.directory import FORMAT_VERSION, BadInput

PACKAGES = ("torch", "transformers", "accelerate", "peft", "deepspeed", "tokenizers", "safetensors")


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Make the run folder and hold it for this process while the block runs; the kernel lets go of it after a kill.

    Raises BadInput if another process trains there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput(
                f"run.name: another process is training in {folder}; wait for it, or choose another run.name"
            ) from None
        yield


def write_text(path: Path, text: str) -> None:
    """Replace the file at `path`: a kill leaves the old text or the new."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def write_status(folder: Path, state: str, *, code: int | None, step: int, reason: str = "") -> None:
    """Replace status.json: state is running, done, stopped or failed; `code` what `trivet` returns for it."""
    fields = {"format_version": FORMAT_VERSION, "state": state, "code": code, "step": step, "reason": reason}
    directory.write_json(folder / "status.json", fields)


def read_status(folder: Path) -> dict[str, Any] | None:
    """Return status.json, or None where there is none."""
    path = folder / "status.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def write_result(folder: Path, **fields: Any) -> None:
    """Write result.json with format_version, `fields` and the versions of what ran."""
    directory.write_json(
        folder / "result.json", {"format_version": FORMAT_VERSION, **fields, "versions": installed_versions()}
    )


def installed_versions() -> dict[str, str]:
    """Return the versions of Python, Trivet and the libraries that training runs on."""
    versions = {"python": platform.python_version()}
    for name in ("trivet", *PACKAGES):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
