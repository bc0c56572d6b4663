"""A graph that was written and proven gives way to the one that is made of it, in a folder that nobody sees yet."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from serving.checks import Check
from serving.directory import read_manifest, seal, stamp
from serving.session import GRAPH


def replace_graph(folder: Path, write: Callable[[Path], Any], **changed: Any) -> None:
    """Replace the graph of a sealed ONNX directory, and its weights, by what `write` writes; seal it again.

    `write` is given the new graph's path, while the old one is still there; `changed` go into the manifest. The
    directory must not be published yet: in between it has two graphs, or none.
    """
    manifest = read_manifest(folder, "onnx")
    with tempfile.TemporaryDirectory(dir=folder) as beside:
        write(Path(beside) / GRAPH)
        for path in folder.glob(f"{GRAPH}*"):
            path.unlink()
        for path in Path(beside).iterdir():
            path.replace(folder / path.name)
    fields = {name: value for name, value in manifest.items() if name not in {*stamp(), "kind", "files"}}
    seal(folder, "onnx", **fields | changed)


def evidence(record: dict[str, Any]) -> Check:
    """Return what the passed proof in fp32 found, as one check: the largest difference, and all its checks inside."""
    compared = [check for check in record["checks"].values() if "max_abs_diff" in check]
    worst = max(compared, key=lambda check: check["max_abs_diff"])
    figures = {name: worst[name] for name in ("max_abs_diff", "tolerance")}
    return {
        "passed": record["passed"],
        "found": f"the graph in fp32 is the source's: {worst['found']}",
        **figures,
        "checks": record["checks"],
    }
