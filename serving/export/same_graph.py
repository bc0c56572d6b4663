"""Whether two graphs are the same but for number formats: the same nodes in the same order, which read the same.

Casts only say which format a number is in, and are passed over.
"""

from collections.abc import Iterator
from itertools import zip_longest

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import to_torch_dtype

from serving.checks import Check

Constants = dict[ir.Value, ir.Value]


def compare(half: ir.Graph, whole: ir.Graph) -> tuple[Check, Constants]:
    """Return whether the nodes are the same, and which constant of the second each of the first stands for."""
    found = _Comparison(half, whole)
    first = next(found.differences(), None)
    constants = found.constants
    says = f"{found.num_nodes} nodes are those of the graph in fp32, {len(constants)} constants are its own, rounded"
    return {"passed": first is None, "found": first or says, "nodes": found.num_nodes}, constants


def rounded(values: np.ndarray, format: ir.DataType) -> np.ndarray:
    """Return numbers in another format; what is finite stays so: the lowest number, of a mask, becomes the lowest."""
    if not format.is_floating_point() or values.dtype == format.numpy():
        return values
    if format.bitwidth >= ir.DataType.from_numpy(values.dtype).bitwidth:
        return values.astype(format.numpy())
    largest = np.array(torch.finfo(to_torch_dtype(format)).max, values.dtype)
    return np.where(np.isinf(values), values, np.clip(values, -largest, largest)).astype(format.numpy())


class _Comparison:
    def __init__(self, half: ir.Graph, whole: ir.Graph) -> None:
        self._half, self._whole = half, whole
        self._same = {one: other for one in half.inputs for other in whole.inputs if one.name == other.name}
        self.constants: Constants = {}
        self.num_nodes = 0

    def differences(self) -> Iterator[str]:
        """Yield what is not the same, in the order of the graph; after the first, the others may follow from it."""
        for one, other in zip_longest(_nodes(self._half), _nodes(self._whole)):
            if one is None or other is None or _kind(one) != _kind(other):
                wanted = other.op_type if other is not None else "nothing"
                yield f"node {self.num_nodes} is {one.op_type if one is not None else 'missing'}, in fp32 {wanted}"
                return
            self.num_nodes += 1
            for name in _said(one):
                if not _same_attribute(one.attributes[name], other.attributes[name]):
                    yield f"{one.op_type} {one.name} has another {name} than in fp32"
            for index, (mine, its) in enumerate(zip_longest(one.inputs, other.inputs)):
                if not self._same_value(_uncast(mine), _uncast(its)):
                    read = its.name if its is not None else "nothing"
                    yield f"{one.op_type} {one.name} reads another input {index} than in fp32, where it is {read}"
            self._same |= zip(one.outputs, other.outputs, strict=True)
        for mine, its in zip_longest(self._half.outputs, self._whole.outputs):
            same_name = mine is not None and its is not None and mine.name == its.name
            if not same_name or not self._same_value(_uncast(mine), _uncast(its)):
                yield f"the output {(mine or its).name} is another than in fp32"

    def _same_value(self, one: ir.Value | None, other: ir.Value | None) -> bool:
        if one is None or other is None:
            return one is other
        if one.const_value is None or other.const_value is None:
            return self._same.get(one) is other
        known = self.constants.setdefault(one, other)
        return list(one.const_value.shape) == list(other.const_value.shape) and (
            known is other or _equal(one.const_value.dtype, known.const_value, other.const_value)
        )


def _same_attribute(one: ir.Attr, other: ir.Attr) -> bool:
    if one.type == ir.AttributeType.TENSOR == other.type:
        return _equal(one.as_tensor().dtype, one.as_tensor(), other.as_tensor())
    return one.type == other.type and one.value == other.value


def _equal(format: ir.DataType, one: ir.TensorProtocol | None, other: ir.TensorProtocol | None) -> bool:
    """Whether two constants are equal once they are in that format."""
    assert one is not None
    assert other is not None
    return np.array_equal(rounded(one.numpy(), format), rounded(other.numpy(), format))


def _nodes(graph: ir.Graph) -> Iterator[ir.Node]:
    return (node for node in graph if not _is_cast(node))


def _kind(node: ir.Node) -> tuple[str, str, int, frozenset[str]]:
    return node.domain, node.op_type, len(node.outputs), _said(node)


def _said(node: ir.Node) -> frozenset[str]:
    """Return the names of the attributes that say more than their default, which in fp32 is left out: zeros."""
    is_zero = node.op_type == "ConstantOfShape" and "value" in node.attributes
    is_zero = is_zero and not node.attributes["value"].as_tensor().numpy().any()
    return frozenset(node.attributes) - ({"value"} if is_zero else set())


def _is_cast(node: ir.Node) -> bool:
    return node.op_type == "Cast" and ir.DataType(node.attributes["to"].as_int()).is_floating_point()


def _uncast(value: ir.Value | None) -> ir.Value | None:
    """Return what a value was before it was cast."""
    while value is not None and (maker := value.producer()) is not None and _is_cast(maker):
        value = maker.inputs[0]
    return value
