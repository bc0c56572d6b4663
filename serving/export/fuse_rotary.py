"""Rotary embeddings: attention rotates queries and keys itself, by tables; elsewhere one operator does."""

import onnx_ir as ir

from serving.export.patterns import MICROSOFT, cast_back, made_by, nodes_of, put, same_shape
from serving.export.rotary_tables import RotaryTables
from serving.export.rotation import rotation_before, rotation_of
from serving.export.slices import last_size


def rotaries(model: ir.Model, context_length: int) -> None:
    """Let attention rotate queries and keys by tables for `context_length` positions; elsewhere one RotaryEmbedding.

    Left as it was: what has its heads where the operator does not look for them.
    """
    graph = model.graph
    tables = RotaryTables(model, context_length)
    for attention in nodes_of(graph, "GroupQueryAttention"):
        _rotate_inside(graph, attention, tables)
    for node in nodes_of(graph, "Add"):
        rotation = rotation_of(node.outputs[0])
        if rotation is None or rotation.heads_axis != 1:
            continue
        found, result = tables.of(rotation), cast_back(node.outputs[0], rotation.rows)
        if found and result.dtype == rotation.rows.dtype:
            positions = next(value for value in graph.inputs if value.name == "position_ids")
            rotated = [rotation.rows, positions, *found]
            pairs = int(rotation.of_neighbours)
            put(graph, result, "RotaryEmbedding", rotated, domain=MICROSOFT, interleaved=pairs)


def _rotate_inside(graph: ir.Graph, attention: ir.Node, tables: RotaryTables) -> None:
    query, key = (rotation_before(value) for value in attention.inputs[:2])
    if query is None or key is None or query[1:] != key[1:]:
        return
    found = tables.of(query)
    size = last_size(attention.outputs[0]) // attention.attributes["num_heads"].as_int()
    if found is None or size % 16 or last_size(found[0]) % 8:  # as the operator wants it
        return
    for index, side in enumerate((query, key)):
        attention.replace_input_with(index, _flat(graph, side.rows, attention, index))
    attention.resize_inputs(9)
    for index, table in zip((7, 8), found, strict=True):
        attention.replace_input_with(index, table)
    attention.attributes["do_rotary"] = ir.AttrInt64("do_rotary", 1)
    attention.attributes["rotary_interleaved"] = ir.AttrInt64("rotary_interleaved", int(query.of_neighbours))


def _flat(graph: ir.Graph, heads: ir.Value, attention: ir.Node, index: int) -> ir.Value:
    """Return heads [B, T, H, D] as rows [B, T, H * D], in the shape of that input of `attention`."""
    reshape, like = made_by(heads, "Reshape"), attention.inputs[index]
    assert like is not None
    if reshape is not None and reshape.inputs[0] is not None and same_shape(reshape.inputs[0], like):
        return reshape.inputs[0]
    flat = like.producer()
    assert flat is not None
    node = ir.node("Reshape", [heads, flat.inputs[1]], {"allowzero": 1})
    node.outputs[0].shape, node.outputs[0].type = like.shape, like.type
    graph.insert_before(attention, node)
    return node.outputs[0]
