"""Embeddings in int8: a row that is looked up is taken as whole numbers and multiplied by its own scale."""

import numpy as np
import onnx_ir as ir

from serving.export.linear import is_matrix, lazy, put_in_place
from serving.export.quantize_rows import per_row


def embeddings(model: ir.Model, min_weights: int) -> None:
    """Replace every lookup in a constant matrix of so many weights or more."""
    for node in [node for node in model.graph if node.op_type == "Gather" and not node.domain]:
        weight, axis = node.inputs[0], node.attributes.get("axis")
        assert weight is not None
        if is_matrix(weight) and _tensor(weight).size >= min_weights and (axis is None or axis.as_int() == 0):
            _lookup(model.graph, node, weight)


def _lookup(graph: ir.Graph, node: ir.Node, weight: ir.Value) -> None:
    num_rows, width = _tensor(weight).shape.numpy()
    rows = lazy(graph, f"{weight.name}.rows", (num_rows, width), np.int8, lambda: _quantized(weight)[0])
    scales = lazy(graph, f"{weight.name}.row_scales", (num_rows, 1), np.float32, lambda: _quantized(weight)[1][:, None])
    taken = ir.node("Gather", [rows, node.inputs[1]])
    cast = ir.node("Cast", [taken.outputs[0]], {"to": ir.DataType.FLOAT})
    scale = ir.node("Gather", [scales, node.inputs[1]])
    put_in_place(node, [taken, cast, scale, ir.node("Mul", [cast.outputs[0], scale.outputs[0]])])


def _quantized(weight: ir.Value) -> tuple[np.ndarray, np.ndarray]:
    return per_row(_tensor(weight).numpy().astype(np.float32, copy=False))


def _tensor(weight: ir.Value) -> ir.TensorProtocol:
    assert weight.const_value is not None
    return weight.const_value
