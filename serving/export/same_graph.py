"""Whether a graph in half precision is the one that was proven in fp32: the same nodes in the same order, its weights
rounded and nothing else.

What half precision itself costs is far more than fp32 may be off, and would hide a wrong weight or scale. Casts only
say which format a number is in, and are passed over.
"""

from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

from serving.checks import Check

_BLOCK_BYTES = 16 << 20  # of a weight, looked at in one go


def check_same_graph(half: Path, whole: Path, format: torch.dtype) -> Check:
    """Compare two graphs on disk, of which the first is `whole` in that half precision format."""
    found = _Comparison(ir.load(half).graph, ir.load(whole).graph, torch.finfo(format))
    first = next(found.differences(), None)
    says = f"{found.num_nodes} nodes and {found.num_constants} constants are those of the graph in fp32, rounded"
    return {"passed": first is None, "found": first or says, "nodes": found.num_nodes, "constants": found.num_constants}


class _Comparison:
    def __init__(self, half: ir.Graph, whole: ir.Graph, format: torch.finfo) -> None:
        self._half, self._whole, self._format = half, whole, format
        self._same = {one: other for one in half.inputs for other in whole.inputs if one.name == other.name}
        self._alike: dict[tuple[ir.Value, ir.Value], bool] = {}  # of constants
        self.num_nodes = 0

    @property
    def num_constants(self) -> int:
        """How many pairs of constants were compared."""
        return len(self._alike)

    def differences(self) -> Iterator[str]:
        """Yield what is not the same, in the order of the graph; after the first, the others may follow from it."""
        for one, other in zip_longest(_nodes(self._half), _nodes(self._whole)):
            if one is None or other is None or _kind(one) != _kind(other):
                wanted = other.op_type if other is not None else "nothing"
                yield f"node {self.num_nodes} is {one.op_type if one is not None else 'missing'}, in fp32 {wanted}"
                return
            self.num_nodes += 1
            for name, attribute in one.attributes.items():
                if not self._same_attribute(attribute, other.attributes[name]):
                    yield f"{one.op_type} {one.name} has another {name} than in fp32"
            for index, (mine, its) in enumerate(zip_longest(one.inputs, other.inputs)):
                if not self._same_value(_uncast(mine), _uncast(its)):
                    read = its.name if its is not None else "nothing"
                    yield f"{one.op_type} {one.name} reads another input {index} than in fp32, where it is {read}"
            self._same |= zip(one.outputs, other.outputs, strict=True)
        for mine, its in zip_longest(self._half.outputs, self._whole.outputs):
            if not self._same_value(_uncast(mine), _uncast(its)):
                yield f"the output {mine.name if mine is not None else its.name} is another than in fp32"

    def _same_attribute(self, one: ir.Attr, other: ir.Attr) -> bool:
        if one.type == ir.AttributeType.TENSOR == other.type:
            return self._same_numbers(one.as_tensor(), other.as_tensor())
        return one.type == other.type and one.value == other.value

    def _same_value(self, one: ir.Value | None, other: ir.Value | None) -> bool:
        if one is None or other is None:
            return one is other
        if one.const_value is None or other.const_value is None:
            return self._same.get(one) is other
        if (one, other) not in self._alike:
            self._alike[one, other] = self._same_numbers(one.const_value, other.const_value)
        return self._alike[one, other]

    def _same_numbers(self, one: ir.TensorProtocol, other: ir.TensorProtocol) -> bool:
        if list(one.shape) != list(other.shape) or one.dtype.is_floating_point() != other.dtype.is_floating_point():
            return False
        mine, its = one.numpy(), other.numpy()
        if not other.dtype.is_floating_point():
            return np.array_equal(mine, its)
        rows = max(1, _BLOCK_BYTES // max(1, other.nbytes // max(1, len(its)))) if its.ndim else 1
        blocks = [slice(start, start + rows) for start in range(0, len(its), rows)] if its.ndim else [...]
        same = all(self._is_rounded(mine[block], its[block]) for block in blocks)
        del mine, its
        for tensor in (one, other):
            if isinstance(tensor, ir.ExternalTensor):
                tensor.release()  # or the whole file would be in memory in the end
        return same

    def _is_rounded(self, mine: np.ndarray, its: np.ndarray) -> bool:
        """Whether the first is the second in the format, give or take one more rounding: of a sum with a constant."""
        its = its.astype(np.float32, copy=False)
        within = np.clip(its, self._format.min, self._format.max)  # of another lowest, where masked
        size = np.maximum(np.abs(within), np.sqrt(np.mean(np.square(within, dtype=np.float64))))
        accepted = self._format.eps * size + self._format.smallest_normal * self._format.eps
        return bool((np.abs(mine.astype(np.float32) - within) <= accepted).all())


def _nodes(graph: ir.Graph) -> Iterator[ir.Node]:
    return (node for node in graph if not _is_cast(node))


def _kind(node: ir.Node) -> tuple[str, str, int, frozenset[str]]:
    return node.domain, node.op_type, len(node.outputs), frozenset(node.attributes)


def _is_cast(node: ir.Node) -> bool:
    return node.op_type == "Cast" and ir.DataType(node.attributes["to"].as_int()).is_floating_point()


def _uncast(value: ir.Value | None) -> ir.Value | None:
    """Return what a value was before it was cast."""
    while value is not None and (maker := value.producer()) is not None and _is_cast(maker):
        value = maker.inputs[0]
    return value
