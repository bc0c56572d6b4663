"""int8 per row: weights with a scale for each output, activations with a scale for each row, in standard operators.

A row's scale is computed in the graph from that row alone, and the products are sums of integers: what comes out for a
row does not depend on its neighbours. Activations are unsigned around 128, because the fast kernels of x86 take
unsigned times signed. Shape letters: N outputs, K inputs.
"""

import functools

import numpy as np
import onnx_ir as ir

from serving.export.linear import Linear
from serving.export.patterns import initializer

LEVELS = 127  # to either side of zero, for weights and activations
ZERO_POINT = 128
SMALLEST = 1e-30  # of a scale: a row of zeros is divided by it


class Rows:
    """Quantises linear layers of one graph. Those that read the same share its quantised form."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._quantized: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}

    def quantize(self, linear: Linear) -> None:
        """Replace the layer by MatMulInteger over its rows in uint8 and its weight in int8, and both scales."""
        rows, row_scales = self._rows(linear)
        weight, scales = _weight(linear)
        product = ir.node("MatMulInteger", [rows, weight, self._constant("zero_point", np.uint8(ZERO_POINT))])
        cast = ir.node("Cast", [product.outputs[0]], {"to": ir.DataType.FLOAT})
        by_output = ir.node("Mul", [cast.outputs[0], scales])
        linear.replace([product, cast, by_output, ir.node("Mul", [by_output.outputs[0], row_scales])])

    def _rows(self, linear: Linear) -> tuple[ir.Value, ir.Value]:
        """Return what the layer reads as uint8, and the scale of each row [..., 1]."""
        if linear.rows not in self._quantized:
            size = ir.node("Abs", [linear.rows])
            largest = ir.node("ReduceMax", [size.outputs[0], self._constant("last", np.array([-1]))], {"keepdims": 1})
            scale = ir.node("Mul", [largest.outputs[0], self._constant("per_level", np.float32(1 / LEVELS))])
            positive = ir.node("Max", [scale.outputs[0], self._constant("smallest", np.float32(SMALLEST))])
            levels = ir.node("Div", [linear.rows, positive.outputs[0]])
            one, zero = self._constant("one", np.float32(1)), self._constant("zero_point", np.uint8(ZERO_POINT))
            whole = ir.node("QuantizeLinear", [levels.outputs[0], one, zero])
            nodes = [size, largest, scale, positive, levels, whole]
            self._graph.insert_before(linear.node, nodes)
            self._quantized[linear.rows] = whole.outputs[0], positive.outputs[0]
        return self._quantized[linear.rows]

    def _constant(self, name: str, value: np.generic | np.ndarray) -> ir.Value:
        return initializer(self._graph, ir.Tensor(np.asarray(value), name=f"quantize.{name}"))


def _weight(linear: Linear) -> tuple[ir.Value, ir.Value]:
    """Return the weight in int8 [K, N], and the scale of each output [N]."""

    @functools.cache
    def scales_N() -> np.ndarray:
        return row_scales(linear.matrix_NK())

    def weight_KN(some: slice) -> np.ndarray:
        return in_levels(linear.matrix_NK()[:, some], scales_N()).T

    shape = (linear.num_inputs, linear.num_outputs)
    weight = linear.constant("int8", shape, ir.DataType.INT8, weight_KN)
    return weight, linear.constant("scales", shape[1:], ir.DataType.FLOAT, lambda some: scales_N()[some])


def row_scales(matrix: np.ndarray) -> np.ndarray:
    """Return the scale of each row, by which its whole numbers are to be multiplied."""
    return np.maximum(np.abs(matrix).max(axis=1) / np.float32(LEVELS), np.float32(SMALLEST))


def in_levels(matrix: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Return the matrix in int8, given the scale of each row."""
    return np.round(matrix / scales[:, None]).astype(np.int8)
