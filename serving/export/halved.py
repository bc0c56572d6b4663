"""From a graph in fp32 to one in half precision, in the same folder: what is rounded is what was written and proven.

The proof of a graph in half precision must accept what that costs, and would take a matrix 2 % too large for it. So the
export writes the graph in fp32, by the same route, and proves it as closely as fp32 allows. The model is then traced in
half precision, for which numbers stay in fp32 even then, as in norms; that graph must have the same nodes, and gets the
proven weights, rounded one after the other while they are written.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from serving.checks import Check
from serving.export.loras import write_stacks
from serving.export.patterns import ByRows
from serving.export.same_graph import compare, rounded
from serving.export.written import replace_graph
from serving.export_options import Dtype
from serving.loras import read_stacks
from serving.session import GRAPH

EVIDENCE = "same_graph"  # the name, among the checks, of the comparison of the two graphs
_FORMATS = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}


def halve_written(folder: Path, dtype: Dtype, write: Callable[[Path], Any]) -> dict[str, Check]:
    """Replace the graph of a sealed ONNX directory by its form in `dtype`; return the comparison of the two.

    `write` writes the same model in `dtype`, whatever its weights. The directory must not be published yet, and not at
    all where the comparison has failed.
    """
    found: dict[str, Check] = {}

    def write_rounded(path: Path) -> None:
        write(path)
        half, whole = ir.load(path), ir.load(folder / GRAPH)
        found[EVIDENCE], constants = compare(half.graph, whole.graph)
        if not found[EVIDENCE]["passed"]:
            return
        for mine, proven in constants.items():
            mine.const_value = _rounded(mine, proven)
        if stacks := read_stacks(folder):  # of adapters, which the graph does not hold
            write_stacks({name: rounded(each, _FORMATS[dtype]) for name, each in stacks.items()}, path.parent)
        path.with_name(f"{GRAPH}.data").unlink(missing_ok=True)
        ir.save(half, path, external_data=f"{GRAPH}.data")

    replace_graph(folder, write_rounded, dtype=dtype)
    return found


def _rounded(mine: ir.Value, proven: ir.Value) -> ir.TensorProtocol:
    """Return the numbers of the second, in the format of the first; of a weight, rounded when they are written."""
    old, tensor, name = mine.const_value, proven.const_value, mine.name or ""
    assert old is not None
    assert tensor is not None
    if not isinstance(tensor, ir.ExternalTensor):
        return ir.Tensor(np.asarray(rounded(tensor.numpy(), old.dtype)), dtype=old.dtype, name=name)

    def rows(some: slice) -> np.ndarray:
        found = np.array(rounded(tensor.numpy()[some], old.dtype))
        tensor.release()  # or in the end the whole file would be in memory
        return found

    return ByRows(name, old.dtype, ir.Shape(tensor.shape), rows)
