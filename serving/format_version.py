"""The version of what Trivet writes, who wrote it, and how older files become today's. Standard library only.

Every JSON file of Trivet (`trivet.json` of a model, ONNX directory or checkpoint, status.json, result.json,
verification.json, trackers.json) starts with `stamp()`, and has since format 1; a saved config.yaml starts with
`comment()`, which format 1 lacked. To change what a file means: raise FORMAT_VERSION, add one function to
_UPGRADES that makes the former version's content today's, keep a sample of the former version in tests/samples/, and
add it to tests/test_old_folders.py. Readers then know today's format alone.
"""

import json
import re
from collections.abc import Callable
from importlib import metadata
from typing import Any

FORMAT_VERSION = 2

_RELEASE = re.compile(r"\d[\w.+!-]*")
_COMMENT = re.compile(r"# format_version (\S+), Trivet (\S+)\s*")


def writer() -> str:
    """Return the version of this Trivet; `unknown` where it runs without being installed."""
    try:
        return metadata.version("trivet")
    except metadata.PackageNotFoundError:
        return "unknown"


def stamp() -> dict[str, Any]:
    """Return the fields that every file of Trivet starts with."""
    return {"format_version": FORMAT_VERSION, "trivet": writer()}


def comment() -> str:
    """Return the line that a saved config.yaml starts with: its keys are the user's, so the stamp is none of them."""
    return f"# format_version {FORMAT_VERSION}, Trivet {writer()}\n"


def of_comment(text: str) -> dict[str, Any]:
    """Return the stamp in the first line of a saved config.yaml; that of format 1 where it has none."""
    found = _COMMENT.fullmatch(text.partition("\n")[0])
    if not found:
        return {"format_version": 1}
    version, release = found.groups()
    return {"format_version": int(version) if version.isdecimal() else version, "trivet": release}


def refusal(content: dict[str, Any]) -> str:
    """Say why content of a newer format, or of one that is no whole number, is not read; nothing where it is.

    Raises ValueError where the content says no format at all: even the first format did.
    """
    if "format_version" not in content:
        raise ValueError("no format_version")
    version = content["format_version"]
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        return (
            f"format_version {_brief(version)} found; accepted: a whole number, 1 to {FORMAT_VERSION}; "
            "restore the file from a copy, or make its folder again"
        )
    return _newer(version, content) if version > FORMAT_VERSION else ""


def upgraded(content: dict[str, Any]) -> dict[str, Any]:
    """Return content of this or an older format, for which there is no refusal, as today's."""
    for older in range(content["format_version"], FORMAT_VERSION):
        content = {**_UPGRADES[older](content), "format_version": older + 1}
    return content


def _newer(version: int, content: dict[str, Any]) -> str:
    """Say which Trivet reads it."""
    release = content.get("trivet")
    known = isinstance(release, str) and _RELEASE.fullmatch(release)
    by, install = (f"Trivet {release}", f"'trivet>={release}'") if known else ("a newer Trivet", "--upgrade trivet")
    return (
        f"format_version {version}, written by {by}; this is Trivet {writer()}, which reads up to "
        f"{FORMAT_VERSION}: pip install {install}"
    )


def _brief(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _from_1(content: dict[str, Any]) -> dict[str, Any]:
    """Format 1 did not say who wrote it, except among the versions of a result.json."""
    versions = content.get("versions")
    return {**content, "trivet": versions.get("trivet") if isinstance(versions, dict) else None}


_UPGRADES: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _from_1}
