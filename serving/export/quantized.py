"""From a graph in fp32 to a quantised one, in the same folder: what is quantised is what was written and proven.

A quantised graph says other numbers than its source, so a proof of it alone would take a wrong weight for rounding:
an adapter that was never merged costs less perplexity than int4 may. So the export writes the graph in fp32, proves it
as it would be published, and only then `quantize_written` puts the quantised form of that very file in its place.
"""

import gc
import tempfile
from pathlib import Path
from typing import Any

import onnx_ir as ir

from serving.checks import Check
from serving.directory import read_manifest, seal, stamp
from serving.export.options import Quantization
from serving.export.quantize import quantize
from serving.session import GRAPH

EVIDENCE = "before_quantisation"  # the name of the fp32 proof among the checks of a quantised graph


def quantize_written(folder: Path, quantization: Quantization) -> None:
    """Replace the graph of a sealed ONNX directory, and its weights, by their quantised form, and seal it again.

    The weights are read from the file as they are needed. The directory must not be published yet: in between it has
    two graphs, or none.
    """
    manifest = read_manifest(folder, "onnx")
    graph = ir.load(folder / GRAPH)
    quantize(graph, quantization)
    with tempfile.TemporaryDirectory(dir=folder) as beside:
        ir.save(graph, Path(beside) / GRAPH, external_data=f"{GRAPH}.data")
        for path in folder.glob(f"{GRAPH}*"):
            path.unlink()
        for path in Path(beside).iterdir():
            path.rename(folder / path.name)
    del graph
    gc.collect()  # it refers to itself, and would keep the removed weights mapped, in memory and on the disk
    fields = {name: value for name, value in manifest.items() if name not in {*stamp(), "kind", "files"}}
    seal(folder, "onnx", **fields | {"quantization": quantization})


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
