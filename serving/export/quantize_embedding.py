"""Embeddings in int8: a row that is looked up is taken as whole numbers and multiplied by its own scale."""

import numpy as np
import onnx_ir as ir

from serving.export.linear import is_matrix
from serving.export.patterns import ByRows, initializer, nodes_of, put_all, weight_of
from serving.export.quantize_rows import in_levels, row_scales


def embeddings(model: ir.Model, min_weights: int) -> None:
    """Replace every lookup in a constant matrix of so many weights or more."""
    for node in nodes_of(model.graph, "Gather"):
        weight, axis = node.inputs[0], node.attributes.get("axis")
        assert weight is not None
        if is_matrix(weight) and _size(weight) >= min_weights and (axis is None or axis.as_int() == 0):
            _lookup(model.graph, node, weight)


def _lookup(graph: ir.Graph, node: ir.Node, weight: ir.Value) -> None:
    assert weight.const_value is not None
    shape = weight.const_value.shape

    def rows(some: slice) -> np.ndarray:
        return in_levels(matrix := _in_fp32(weight, some), row_scales(matrix))

    def scales(some: slice) -> np.ndarray:
        return row_scales(_in_fp32(weight, some))[:, None]

    levels = initializer(graph, ByRows(f"{weight.name}.rows", ir.DataType.INT8, ir.Shape(shape), rows))
    by_row = ByRows(f"{weight.name}.row_scales", ir.DataType.FLOAT, ir.Shape([shape[0], 1]), scales)
    taken = ir.node("Gather", [levels, node.inputs[1]])
    cast = ir.node("Cast", [taken.outputs[0]], {"to": ir.DataType.FLOAT})
    scale = ir.node("Gather", [initializer(graph, by_row), node.inputs[1]])
    product = ir.node("Mul", [cast.outputs[0], scale.outputs[0]])
    put_all(graph, node.outputs[0], [taken, cast, scale, product])


def _in_fp32(weight: ir.Value, rows: slice) -> np.ndarray:
    return weight_of(weight, rows).astype(np.float32, copy=False)


def _size(weight: ir.Value) -> int:
    assert weight.const_value is not None
    return weight.const_value.size
