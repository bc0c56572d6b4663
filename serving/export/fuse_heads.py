"""Queries, keys and values that one linear layer computes head by head: laid out anew, as attention reads them.

Shape letters: B batch, T tokens, H heads, D head size, I inputs of the layer.
"""

import numpy as np
import onnx_ir as ir

from serving.export.fuse_linear import linear_of
from serving.export.patterns import initializer, ints, made_by, new_weight, nodes_of, only_user, take_over, weight_of


def part_heads(model: ir.Model) -> None:
    """Let a layer of [H, 3, D] outputs, as GPT-NeoX has, compute [3, H, D]: all queries, then keys, then values."""
    graph = model.graph
    for split in nodes_of(graph, "Split"):
        turned = made_by(split.inputs[0], "Transpose")
        by_heads = made_by(turned.inputs[0], "Reshape") if turned is not None else None
        if turned is None or by_heads is None or ints(turned, "perm") != [0, 2, 1, 3]:
            continue
        alone = all(only_user(each.outputs[0], user) for each, user in ((by_heads, "Transpose"), (turned, "Split")))
        linear, sizes = by_heads.inputs[0], {each.shape and each.shape[-1] for each in split.outputs}
        found = linear_of(linear) if linear is not None and only_user(linear, "Reshape") else None
        if alone and found and len(split.outputs) == 3 and len(sizes) == 1 and split.attributes.get_int("axis") == 3:
            _lay_out(graph, split, linear, found)


def _lay_out(
    graph: ir.Graph, split: ir.Node, linear: ir.Value, found: tuple[ir.Value, ir.Value, ir.Value | None]
) -> None:
    _, *weights = found
    _, num_heads, _, head_dim = split.outputs[0].shape
    layer = [node for node in (linear.producer(), made_by(linear.producer().inputs[0], "MatMul")) if node is not None]

    def by_kind(weight: ir.Value) -> ir.Value:
        def columns(some: slice) -> np.ndarray:
            values = weight_of(weight, some if weight.const_value.shape.rank() == 2 else slice(None))
            laid_out = values.reshape(-1, num_heads, 3, head_dim).swapaxes(1, 2).reshape(values.shape)
            return laid_out if values.ndim == 2 else laid_out[some]

        return new_weight(graph, f"{weight.name}.by_kind", weight, weight.const_value.shape.numpy(), columns)

    for node in layer:
        for index, value in enumerate(node.inputs):
            if value in weights:
                node.replace_input_with(index, by_kind(value))
    parts = ir.node("Split", [linear], {"axis": -1, "num_outputs": 3}, num_outputs=3)
    nodes = [parts]
    for old, part in zip(split.outputs, parts.outputs, strict=True):
        part.type, part.shape = old.type, ir.Shape([*linear.shape[:2], num_heads * head_dim])
        heads = ir.node("Reshape", [part, _shape(graph, num_heads, head_dim)], {"allowzero": 0})
        heads.outputs[0].type, heads.outputs[0].shape = old.type, ir.Shape([*linear.shape[:2], num_heads, head_dim])
        turned = ir.node("Transpose", [heads.outputs[0]], {"perm": [0, 2, 1, 3]})
        turned.outputs[0].type, turned.outputs[0].shape = old.type, old.shape
        nodes += [heads, turned]
        take_over(old, turned.outputs[0])
    graph.insert_after(linear.producer(), nodes)


def _shape(graph: ir.Graph, num_heads: int, head_dim: int) -> ir.Value:
    """Return the shape [B, T, H, D] for Reshape, the first two as they are."""
    name = f"heads_{num_heads}_{head_dim}"
    return initializer(graph, ir.Tensor(np.array([0, 0, num_heads, head_dim], np.int64), name=name))
