"""The verification records of an ONNX directory: what was proven, on which provider, with which onnxruntime."""

import json
import shlex
from pathlib import Path
from typing import Any

from serving.directory import VERIFICATION, DirectoryError, current, identity, read_manifest, write_json
from serving.format_version import stamp


class Unproven(DirectoryError):
    """A directory without a proof that counts here and now; verifying it may give one."""


def append_verification(folder: Path, record: dict[str, Any]) -> None:
    """Add one record (`provider`, `onnxruntime`, `identity`, `passed`, `checks`, ...), newest last.

    Raises NewerFormat, and changes nothing, where a newer Trivet keeps them.
    """
    records = earlier_records(folder)
    write_json(folder / VERIFICATION, {**stamp(), "records": [*records, record]})


def earlier_records(folder: Path) -> list[dict[str, Any]]:
    """Return the records so far; none where they are missing or broken. Raises NewerFormat, or DirectoryError for
    what is there and cannot be read.
    """
    try:
        return _read_records(folder / VERIFICATION)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return []
    except OSError as error:
        raise DirectoryError(f"{folder / VERIFICATION}: cannot be read ({error.strerror}); remove it") from None


def require_verified(folder: Path, provider: str, onnxruntime: str) -> dict[str, Any]:
    """Return the newest verification record for this provider and onnxruntime version.

    Raises Unproven when there is none or it is stale (other files, other onnxruntime); DirectoryError when it failed,
    or where this provider could not give one.
    """
    verify = f"run: trivet verify {shlex.quote(str(folder))} --provider"
    fix = f"{verify} {provider}"
    try:
        records = _read_records(folder / VERIFICATION)
    except FileNotFoundError:
        raise Unproven(f"{folder}: never verified; {fix}") from None
    except (OSError, ValueError) as error:
        raise Unproven(f"{folder / VERIFICATION}: cannot be read ({error}); {fix}") from None
    mine = [record for record in records if record.get("provider") == provider]
    if not mine:
        if provider == "cpu" and read_manifest(folder, "onnx").get("dtype") == "bf16":
            fix = f"no CPU runs bf16; on a machine with a GPU {verify} cuda"
            raise DirectoryError(f"{folder}: not verified on provider cpu; {fix}")
        raise Unproven(f"{folder}: not verified on provider {provider}; {fix}")
    newest = mine[-1]
    if not newest.get("passed"):
        raise DirectoryError(f"{folder}: its verification on {provider} failed: {newest.get('reason')}; export again")
    if newest.get("identity") != identity(folder):
        raise Unproven(f"{folder}: its verification is of other files (stale); {fix}")
    if newest.get("onnxruntime") != onnxruntime:
        found = newest.get("onnxruntime")
        raise Unproven(f"{folder}: verified with onnxruntime {found}, this is {onnxruntime} (stale); {fix}")
    return newest


def _read_records(path: Path) -> list[dict[str, Any]]:
    """Return the records in a verification.json. Raises NewerFormat, or OSError or ValueError where there are none."""
    records = current(path, json.loads(path.read_text(encoding="utf-8"))).get("records")
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise ValueError("it holds no list of records")
    return records
