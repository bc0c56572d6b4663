"""From a graph in fp32 to one in half precision, in the same folder: what is rounded is what was written and proven.

The proof of a graph in half precision must accept what that costs, and would take a matrix 2 % too large for it. So the
export writes the graph in fp32, by the same route, and proves it as closely as fp32 allows; the graph in half precision
must then be that very graph, node by node and weight by weight, but for its number formats.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from serving.checks import Check
from serving.export.half import TORCH_DTYPES
from serving.export.options import Dtype
from serving.export.same_graph import check_same_graph
from serving.export.written import replace_graph
from serving.session import GRAPH

EVIDENCE = "same_graph"  # the name, among the checks, of the comparison of the two graphs


def halve_written(folder: Path, dtype: Dtype, write: Callable[[Path], Any]) -> dict[str, Check]:
    """Replace the graph of a sealed ONNX directory by that which `write` writes in `dtype`; return their comparison.

    The directory must not be published yet, and not at all where the comparison has failed.
    """
    found: dict[str, Check] = {}

    def write_and_compare(path: Path) -> None:
        write(path)
        found[EVIDENCE] = check_same_graph(path, folder / GRAPH, TORCH_DTYPES[dtype])

    replace_graph(folder, write_and_compare, dtype=dtype)
    return found
