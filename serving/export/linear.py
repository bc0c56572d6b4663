"""The linear layers of a graph: MatMuls with a constant, and how other nodes take the place of one.

Shape letters: N outputs, K inputs.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from serving.export.patterns import ByRows, initializer, ints, is_weight, made_by, nodes_of, put_all


@dataclass(frozen=True)
class Linear:
    """One MatMul with a constant. The stored weight is [K, N], or [N, K] where the graph transposes it first."""

    node: ir.Node
    weight: ir.Value
    is_transposed: bool

    @property
    def rows(self) -> ir.Value:
        """What is multiplied, [..., K]."""
        rows = self.node.inputs[0]
        assert rows is not None
        return rows

    @property
    def shape(self) -> tuple[int, int]:
        """The stored weight's."""
        tensor = self.weight.const_value
        assert tensor is not None
        first, second = tensor.shape.numpy()
        return first, second

    @property
    def num_inputs(self) -> int:
        """K."""
        return self.shape[1 if self.is_transposed else 0]

    @property
    def num_outputs(self) -> int:
        """N."""
        return self.shape[0 if self.is_transposed else 1]

    @property
    def narrows(self) -> bool:
        """Whether there are fewer outputs than inputs, as in the second half of an MLP."""
        return self.num_outputs < self.num_inputs

    def matrix_NK(self) -> np.ndarray:
        """Return the weight in fp32, read now and not kept."""
        tensor = self.weight.const_value
        assert tensor is not None
        matrix = tensor.numpy().astype(np.float32, copy=False)
        return matrix if self.is_transposed else matrix.T

    def constant(
        self, suffix: str, shape: Sequence[int], dtype: ir.DataType, compute: Callable[[slice], np.ndarray]
    ) -> ir.Value:
        """Return an initializer made of this weight, the one of that suffix if it is there: rows from `compute`."""
        return initializer(self._graph, ByRows(f"{self.weight.name}.{suffix}", dtype, ir.Shape(shape), compute))

    def replace(self, nodes: Sequence[ir.Node]) -> None:
        """Put `nodes` in the place of the MatMul; the last one's output becomes its result."""
        put_all(self._graph, self.node.outputs[0], nodes)

    @property
    def _graph(self) -> ir.Graph:
        graph = self.node.graph
        assert isinstance(graph, ir.Graph)
        return graph


def linears(graph: ir.Graph) -> Iterator[Linear]:
    """Yield the MatMuls of the graph that have a constant matrix on the right."""
    for node in nodes_of(graph, "MatMul"):
        weight, turned = node.inputs[1], made_by(node.inputs[1], "Transpose")
        is_transposed = turned is not None and ints(turned, "perm") == [1, 0]
        if turned is not None and is_transposed:
            weight = turned.inputs[0]
        if weight is not None and is_matrix(weight):
            yield Linear(node, weight, is_transposed)


def is_matrix(value: ir.Value) -> bool:
    """Return whether the value is an initializer of two dimensions that holds floating point numbers."""
    tensor = value.const_value
    return tensor is not None and is_weight(value, 2) and tensor.dtype.is_floating_point()
