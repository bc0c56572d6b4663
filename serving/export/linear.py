"""The linear layers of a graph: MatMuls with a constant, and how another node takes the place of one.

Shape letters: N outputs, K inputs.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir


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

    def constant(self, suffix: str, shape: Sequence[int], dtype: type, compute: Callable[[], np.ndarray]) -> ir.Value:
        """Return an initializer made of this weight: the one of that suffix if it is there, else a lazy one."""
        graph = self.node.graph
        assert isinstance(graph, ir.Graph)
        return lazy(graph, f"{self.weight.name}.{suffix}", shape, dtype, compute)

    def replace(self, nodes: Sequence[ir.Node]) -> None:
        """Put `nodes` in the place of the MatMul; the last one's output becomes its result."""
        put_in_place(self.node, nodes)


def put_in_place(old: ir.Node, nodes: Sequence[ir.Node]) -> None:
    """Put `nodes` where `old` is; the last one's output takes the place of that of `old`, its name too."""
    graph = old.graph
    assert graph is not None
    before, after = old.outputs[0], nodes[-1].outputs[0]
    after.shape, after.type = before.shape, before.type
    name, before.name = before.name, None
    after.name = name
    graph.insert_before(old, nodes)
    before.replace_all_uses_with(after, replace_graph_outputs=True)
    graph.remove(old, safe=True)


def linears(graph: ir.Graph) -> Iterator[Linear]:
    """Yield the MatMuls of the graph that have a constant matrix on the right."""
    for node in graph:
        if node.op_type != "MatMul" or node.domain:
            continue
        weight, is_transposed = node.inputs[1], False
        maker = weight.producer() if weight is not None else None
        if maker is not None and maker.op_type == "Transpose" and maker.attributes["perm"].as_ints() == (1, 0):
            weight, is_transposed = maker.inputs[0], True
        if weight is not None and is_matrix(weight):
            yield Linear(node, weight, is_transposed)


def is_matrix(value: ir.Value) -> bool:
    """Return whether the value is an initializer of two dimensions that holds floating point numbers."""
    tensor = value.const_value
    if tensor is None or not value.is_initializer():
        return False
    return len(tensor.shape) == 2 and tensor.dtype.is_floating_point()


def lazy(graph: ir.Graph, name: str, shape: Sequence[int], dtype: type, compute: Callable[[], np.ndarray]) -> ir.Value:
    """Return the initializer of that name, a new one if there is none: computed when it is written, and not kept."""
    if name in graph.initializers:
        return graph.initializers[name]
    kind = ir.DataType.from_numpy(np.dtype(dtype))

    def tensor() -> ir.Tensor:
        found: np.ndarray = np.asarray(compute(), dtype, order="C")
        assert found.shape == tuple(shape), f"{name}: {found.shape}, not {shape}"
        return ir.Tensor(found, name=name)

    value = ir.Value(
        name=name,
        shape=ir.Shape(shape),
        type=ir.TensorType(kind),
        const_value=ir.LazyTensor(tensor, kind, ir.Shape(shape), name=name),
    )
    graph.initializers[name] = value
    return value
