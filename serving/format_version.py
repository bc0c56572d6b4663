"""The version of what Trivet writes, who wrote it, and how older files become today's. Standard library only.

Every JSON file of Trivet (`trivet.json` of a model, ONNX directory or checkpoint, status.json, result.json,
verification.json) starts with `stamp()`. To change what a file means: raise FORMAT_VERSION, add one function to
_UPGRADES that makes the former version's content today's, keep a sample of the former version in tests/samples/, and
add it to tests/test_old_folders.py. Readers then know today's format alone.
"""

import re
from collections.abc import Callable
from importlib import metadata
from typing import Any

FORMAT_VERSION = 2

_RELEASE = re.compile(r"\d[\w.+!-]*")


def writer() -> str:
    """Return the version of this Trivet; `unknown` where it runs without being installed."""
    try:
        return metadata.version("trivet")
    except metadata.PackageNotFoundError:
        return "unknown"


def stamp() -> dict[str, Any]:
    """Return the fields that every file of Trivet starts with."""
    return {"format_version": FORMAT_VERSION, "trivet": writer()}


def is_newer(content: dict[str, Any]) -> bool:
    """Whether a file's content is of a format that this Trivet does not know yet."""
    return _version(content) > FORMAT_VERSION


def refusal(content: dict[str, Any]) -> str:
    """Say why content of a newer format is not read, and which Trivet reads it."""
    release = content.get("trivet")
    known = isinstance(release, str) and _RELEASE.fullmatch(release)
    by, install = (f"Trivet {release}", f"'trivet>={release}'") if known else ("a newer Trivet", "--upgrade trivet")
    return (
        f"format_version {_version(content)}, written by {by}; this is Trivet {writer()}, which reads up to "
        f"{FORMAT_VERSION}: pip install {install}"
    )


def upgraded(content: dict[str, Any]) -> dict[str, Any]:
    """Return content of this or an older format as today's; where it says no version, it is taken for the first."""
    for older in range(max(1, _version(content)), FORMAT_VERSION):
        content = {**_UPGRADES[older](content), "format_version": older + 1}
    return content


def _version(content: dict[str, Any]) -> int:
    version = content.get("format_version")
    return version if isinstance(version, int) and not isinstance(version, bool) else 0


def _from_1(content: dict[str, Any]) -> dict[str, Any]:
    """Format 1 did not say who wrote it, except among the versions of a result.json."""
    versions = content.get("versions")
    return {**content, "trivet": versions.get("trivet") if isinstance(versions, dict) else None}


_UPGRADES: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _from_1}
