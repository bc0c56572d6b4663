"""One linear layer for all that attention reads: queries, keys and values side by side."""

import onnx_ir as ir

from serving.export.fuse_linear import packed
from serving.export.patterns import nodes_of
from serving.export.slices import last_size, sliced


def packed_attention(model: ir.Model) -> None:
    """Give attention its queries, keys and values side by side, as one linear layer computes them."""
    graph = model.graph
    for attention in nodes_of(graph, "GroupQueryAttention"):
        values = [value for value in attention.inputs[:3] if value is not None]
        whole = _side_by_side(values) or packed(graph, values, attention)
        if whole is not None:
            attention.replace_input_with(0, whole)
            attention.replace_input_with(1, None)
            attention.replace_input_with(2, None)


def _side_by_side(values: list[ir.Value]) -> ir.Value | None:
    """Return what already holds the values one after another."""
    end, whole = 0, None
    for part in map(sliced, values):
        if part is None or part.start != end or part.whole is not (whole or part.whole):
            return None
        end, whole = part.end, part.whole
    return whole if whole is not None and last_size(whole) == end else None
