"""A graph that was written and proven gives way to the one that is made of it, in a folder that nobody sees yet."""

import gc
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
    gc.collect()  # the old graph refers to itself, and would keep the removed weights mapped, in memory and on the disk
    fields = {name: value for name, value in manifest.items() if name not in {*stamp(), "kind", "files"}}
    seal(folder, "onnx", **fields | changed)
