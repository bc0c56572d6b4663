"""Looking at a graph and changing it: who made a value, what is constant, and one node in the place of several."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

MICROSOFT = "com.microsoft"
_WRITTEN_BYTES = 1 << 20  # more is slower: memory that is new each time


def made_by(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """Return the node that made `value` if it is of one of these types."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type in op_types else None


def only_user(value: ir.Value, *op_types: str) -> ir.Node | None:
    """Return the one node that reads `value` if it is the only one and of one of these types."""
    users = list(value.consumers())
    alone = len(users) == 1 and not value.is_graph_output() and users[0].op_type in op_types
    return users[0] if alone else None


def cast_back(value: ir.Value, like: ir.Value) -> ir.Value:
    """Return what `value` is cast to where its type is another than that of `like`; without such a cast, `value`."""
    cast = only_user(value, "Cast") if value.dtype != like.dtype else None
    return cast.outputs[0] if cast is not None else value


def operands(node: ir.Node | None, found: Callable[[ir.Value], Any]) -> tuple[Any, ir.Value] | None:
    """Return what `found` finds of one operand of a node of two, and the other operand; None if it finds nothing."""
    if node is None or len(node.inputs) != 2:
        return None
    first, second = node.inputs
    assert first is not None
    assert second is not None
    for one, other in ((first, second), (second, first)):
        if (seen := found(one)) is not None and seen is not False:
            return seen, other
    return None


def numbers(value: ir.Value | None) -> np.ndarray | None:
    """Return a small constant, None where `value` is none."""
    tensor = value.const_value if value is not None else None
    return tensor.numpy() if tensor is not None and tensor.size <= 16 else None


def number(value: ir.Value | None) -> float | None:
    """Return a constant of one element."""
    found = numbers(value)
    return float(found.reshape(-1)[0]) if found is not None and found.size == 1 else None


def is_number(wanted: float) -> Callable[[ir.Value], bool]:
    """Return a function that tells whether a value is that constant."""

    def found(value: ir.Value) -> bool:
        rounding = 1e-4 if value.dtype == ir.DataType.FLOAT else 5e-3  # as bfloat16 rounds
        seen = number(value)
        return seen is not None and bool(np.isclose(seen, wanted, rtol=rounding))

    return found


def ints(node: ir.Node, name: str) -> list[int]:
    """Return an attribute that is a list of integers, empty where there is none."""
    return list(node.attributes[name].as_ints()) if name in node.attributes else []


def is_weight(value: ir.Value | None, rank: int | None = None) -> bool:
    """Return whether the value is an initializer (of that rank)."""
    if value is None or value.const_value is None or not value.is_initializer():
        return False
    return rank is None or len(value.const_value.shape) == rank


def same_shape(one: ir.Value, other: ir.Value) -> bool:
    """Return whether two values are known to have the same shape."""
    return one.shape is not None and other.shape is not None and list(one.shape) == list(other.shape)


def put(
    graph: ir.Graph,
    old: ir.Value,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    *,
    domain: str = "",
    num_outputs: int = 1,
    **attributes: Any,
) -> ir.Node:
    """Put a new node before the maker of `old`, whose first output takes the place of `old` everywhere; return it."""
    node = ir.node(op_type, inputs, attributes, domain=domain, num_outputs=num_outputs)
    put_all(graph, old, [node])
    return node


def put_all(graph: ir.Graph, old: ir.Value, nodes: Sequence[ir.Node]) -> None:
    """Put nodes before the maker of `old`; the first output of the last takes the place of `old` everywhere."""
    maker, new = old.producer(), nodes[-1].outputs[0]
    assert maker is not None
    new.shape, new.type = old.shape, old.type
    graph.insert_before(maker, nodes)
    take_over(old, new)


def take_over(old: ir.Value, new: ir.Value) -> None:
    """Give the users of `old` to `new`, and its name where it is an output of the graph."""
    if old.is_graph_output():
        name, old.name = old.name, None
        new.name = name
    old.replace_all_uses_with(new, replace_graph_outputs=True)


class ByRows(ir.LazyTensor):
    """A weight that is computed some rows at a time when it is written, so that it is never in memory whole."""

    def __init__(self, name: str, dtype: ir.DataType, shape: ir.Shape, compute: Callable[[slice], np.ndarray]) -> None:
        super().__init__(lambda: ir.Tensor(self.rows(slice(None)), dtype=dtype), dtype, shape, name=name)
        self._compute = compute

    def tofile(self, file: Any) -> None:
        """Write the values to an open file."""
        num_rows = self.shape.numpy()[0]
        step = max(1, num_rows * _WRITTEN_BYTES // max(1, self.nbytes))
        for start in range(0, num_rows, step):
            file.write(self.rows(slice(start, start + step)).view(np.uint8).data)  # bfloat16 has no buffer

    def rows(self, rows: slice) -> np.ndarray:
        """Return some rows."""
        found = np.ascontiguousarray(self._compute(rows))
        whole = self.shape.numpy()
        asked = (len(range(*rows.indices(whole[0]))), *whole[1:])
        assert found.shape == asked, f"{self.name}: {found.shape}, not {asked}"
        return found


def new_weight(
    graph: ir.Graph, name: str, like: ir.Value, shape: Sequence[int], compute: Callable[[slice], np.ndarray]
) -> ir.Value:
    """Return an initializer of the type of `like`, of which `compute` returns rows when it is written."""
    assert like.const_value is not None
    return initializer(graph, ByRows(name, like.const_value.dtype, ir.Shape(shape), compute))


def initializer(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    """Return the initializer of the tensor's name: a new one that holds it if there is none."""
    name = tensor.name
    assert name, "an initializer has a name"
    if name not in graph.initializers:
        shape, kind = ir.Shape(tensor.shape), ir.TensorType(tensor.dtype)
        graph.initializers[name] = ir.Value(name=name, shape=shape, type=kind, const_value=tensor)
    return graph.initializers[name]


def weight_of(value: ir.Value, rows: slice = slice(None)) -> np.ndarray:
    """Return the values of an initializer, or some rows of them."""
    tensor = value.const_value
    assert tensor is not None
    return tensor.rows(rows) if isinstance(tensor, ByRows) else tensor.numpy()[rows]


def nodes_of(graph: ir.Graph, *op_types: str) -> Iterator[ir.Node]:
    """Yield the nodes of these types that are in the graph now, and are still there when their turn comes."""
    for node in [node for node in graph if node.op_type in op_types]:
        if node.graph is graph:
            yield node


def sweep(model: ir.Model) -> None:
    """Remove what nobody reads: nodes, and initializers."""
    RemoveUnusedNodesPass()(model)
