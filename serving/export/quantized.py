"""From a graph in fp32 to a quantised one, in the same folder: what is quantised is what was written and proven.

A quantised graph says other numbers than its source, so a proof of it alone would take a wrong weight for rounding:
an adapter that was never merged costs less perplexity than int4 may. So the export writes the graph in fp32, proves it
as it would be published, and only then `quantize_written` puts the quantised form of that very file in its place.
"""

from pathlib import Path

import onnx_ir as ir

from serving.export.quantize import quantize
from serving.export.written import replace_graph
from serving.export_options import Quantization
from serving.session import GRAPH


def quantize_written(folder: Path, quantization: Quantization) -> None:
    """Replace the graph of a sealed ONNX directory, and its weights, by their quantised form, and seal it again.

    The weights are read from the file as they are needed. The directory must not be published yet.
    """

    def write(path: Path) -> None:
        graph = ir.load(folder / GRAPH)
        quantize(graph, quantization)
        ir.save(graph, path, external_data=f"{GRAPH}.data")

    replace_graph(folder, write, quantization=quantization)
