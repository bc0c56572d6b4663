"""What stands before attention goes into it: rotary embeddings as a table, and one linear layer for all it reads."""

from typing import NamedTuple

import numpy as np
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from serving.export.fuse_linear import packed
from serving.export.patterns import MICROSOFT, ints, made_by, nodes_of, number, operands, put, same_shape


def rotaries(model: ir.Model, context_length: int) -> None:
    """Let attention rotate queries and keys by tables for `context_length` positions; elsewhere one RotaryEmbedding.

    Left as it was: what rotates neighbours instead of halves, and heads too small for the operator.
    """
    graph = model.graph
    tables = _Tables(model, context_length)
    for attention in nodes_of(graph, "GroupQueryAttention"):
        _rotate_inside(graph, attention, tables)
    for node in nodes_of(graph, "Add"):
        rotation = _rotation(node.outputs[0])
        found = rotation and tables.of(rotation.cos, rotation.sin)
        if rotation and found:
            positions = next(value for value in graph.inputs if value.name == "position_ids")
            put(graph, node.outputs[0], "RotaryEmbedding", [rotation.rows, positions, *found], domain=MICROSOFT)


def _rotate_inside(graph: ir.Graph, attention: ir.Node, tables: "_Tables") -> None:
    query, key = (_unrotated(value) for value in attention.inputs[:2])
    if query is None or key is None or (query.cos, query.sin) != (key.cos, key.sin):
        return
    found = tables.of(query.cos, query.sin)
    size = _last_size(attention.outputs[0]) // attention.attributes["num_heads"].as_int()
    if found is None or size % 16 or _last_size(found[0]) % 8:  # as the operator wants it
        return
    for index, side in enumerate((query, key)):
        attention.replace_input_with(index, _flat(graph, side.rows, attention, index))
    attention.resize_inputs(9)
    for index, table in zip((7, 8), found, strict=True):
        attention.replace_input_with(index, table)
    attention.attributes["do_rotary"] = ir.AttrInt64("do_rotary", 1)


class Rotation(NamedTuple):
    """What is rotated, and by which cosines and sines."""

    rows: ir.Value
    cos: ir.Value
    sin: ir.Value


class Slice(NamedTuple):
    """A part of a value along its last axis."""

    whole: ir.Value
    start: int
    end: int


def _unrotated(value: ir.Value | None) -> Rotation | None:
    """Return the rotation of what attention reads, with its heads [B, T, H, D] before it."""
    flat = made_by(value, "Reshape")
    turned = made_by(flat.inputs[0], "Transpose") if flat is not None else None
    if turned is None or ints(turned, "perm") != [0, 2, 1, 3]:
        return None
    joined = made_by(turned.inputs[0], "Concat")
    rotation = _rotation(turned.inputs[0]) if joined is None else _rotation_of_first(joined)
    back = made_by(rotation.rows, "Transpose") if rotation else None
    if rotation is None or back is None or back.inputs[0] is None or ints(back, "perm") != [0, 2, 1, 3]:
        return None
    return rotation._replace(rows=back.inputs[0])


def _rotation_of_first(joined: ir.Node) -> Rotation | None:
    """Return the rotation of a head whose first sizes alone are rotated, and the others joined to them."""
    if len(joined.inputs) != 2:
        return None
    rotation, rest = _rotation(joined.inputs[0]), _sliced(joined.inputs[1])
    first = _sliced(rotation.rows) if rotation else None
    if rotation is None or first is None or rest is None or not _halves(first, rest):
        return None
    return rotation._replace(rows=first.whole) if rest.end == _last_size(first.whole) else None


def _rotation(value: ir.Value | None) -> Rotation | None:
    """Return the rotation x * cos + concat(-second half of x, first half of x) * sin."""
    add = made_by(value, "Add")
    terms = [made_by(each, "Mul") for each in add.inputs] if add is not None else []
    for plain, turned in (terms, terms[::-1]) if len(terms) == 2 else ():
        found = operands(turned, lambda each: made_by(each, "Concat"))
        if plain is None or found is None or len(found[0].inputs) != 2:
            continue
        minus = made_by(found[0].inputs[0], "Neg")
        first, second = _sliced(found[0].inputs[1]), _sliced(minus.inputs[0]) if minus is not None else None
        if first is None or second is None or not _halves(first, second):
            continue
        kept = operands(plain, lambda each, rows=first.whole: each is rows)  # type: ignore[misc]
        if kept is not None and _last_size(first.whole) == 2 * first.end:
            return Rotation(first.whole, _spread(kept[1]), _spread(found[1]))
    return None


def _halves(first: Slice, second: Slice) -> bool:
    """Whether one part is the beginning of a value, and the other follows it."""
    return first.whole is second.whole and first.start == 0 and first.end == second.start


def _sliced(value: ir.Value | None) -> Slice | None:
    """Return which part of what a value is, if it is a part along the last axis."""
    node = made_by(value, "Slice", "Split")
    if node is None or value is None or node.inputs[0] is None or node.inputs[0].shape is None:
        return None
    whole = node.inputs[0]
    if node.op_type == "Split":
        if node.attributes["axis"].as_int() not in (-1, len(node.inputs[0].shape) - 1):
            return None
        before = sum(_last_size(each) for each in node.outputs[: value.index()])
        return Slice(whole, before, before + _last_size(value))
    start, end, along, step = (number(each) for each in (*node.inputs[1:], None)[:4])
    if start is None or end is None or along not in (-1, len(node.inputs[0].shape) - 1) or step not in (None, 1):
        return None
    return Slice(whole, int(start), min(int(end), _last_size(whole)))


def _last_size(value: ir.Value) -> int:
    """Return the last size of a value, where it is no variable; else 0."""
    size = value.shape[-1] if value.shape is not None else 0
    return size if isinstance(size, int) else 0


def _spread(value: ir.Value) -> ir.Value:
    """Return the cosines [B, T, D] of what was spread over the heads."""
    node = made_by(value, "Unsqueeze")
    return node.inputs[0] if node is not None and node.inputs[0] is not None else value


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


class _Tables:
    """Tables [positions, half the rotated size] of the cosines and sines that the graph computes from positions."""

    def __init__(self, model: ir.Model, num_positions: int) -> None:
        self._model, self._num_positions = model, num_positions
        self._found: dict[tuple[ir.Value, ir.Value], tuple[ir.Value, ir.Value] | None] = {}

    def of(self, cos: ir.Value, sin: ir.Value) -> tuple[ir.Value, ir.Value] | None:
        """Return both tables, None where they depend on more than the position, or differ between the two halves."""
        if (cos, sin) not in self._found:
            self._found[cos, sin] = self._computed(cos, sin)
        return self._found[cos, sin]

    def _computed(self, cos: ir.Value, sin: ir.Value) -> tuple[ir.Value, ir.Value] | None:
        part = ir.convenience.extract(self._model.graph, self._inputs(cos, sin), [cos, sin])
        if [value.name for value in part.inputs] != ["position_ids"]:
            return None
        proto = ir.to_proto(ir.Model(part, ir_version=self._model.ir_version))
        values = ReferenceEvaluator(proto).run(None, {"position_ids": np.arange(self._num_positions)[None]})
        tables = []
        for name, table in zip(("cos", "sin"), values, strict=True):
            half = table.shape[-1] // 2
            if table.shape != (1, self._num_positions, 2 * half) or (table[..., :half] != table[..., half:]).any():
                return None
            tables.append(self._initializer(f"rotary_{name}_{len(self._found)}", table[0, :, :half], cos))
        return tables[0], tables[1]

    def _inputs(self, *values: ir.Value) -> list[ir.Value]:
        """Return the inputs of the graph that these values are computed from."""
        found, waiting = set(), list(values)
        while waiting:
            value = waiting.pop()
            if value not in found:
                found.add(value)
                maker = value.producer()
                waiting += [each for each in maker.inputs if each is not None] if maker is not None else []
        return [value for value in self._model.graph.inputs if value in found]

    def _initializer(self, name: str, table: np.ndarray, like: ir.Value) -> ir.Value:
        tensor = ir.Tensor(np.ascontiguousarray(table), dtype=like.dtype, name=name)
        value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        self._model.graph.initializers[name] = value
        return value


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
    for part in map(_sliced, values):
        if part is None or part.start != end or part.whole is not (whole or part.whole):
            return None
        end, whole = part.end, part.whole
    return whole if whole is not None and _last_size(whole) == end else None
