"""What stands before attention goes into it: rotary embeddings as a table, and one linear layer for all it reads."""

from typing import NamedTuple

import numpy as np
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from serving.export.fuse_linear import packed
from serving.export.patterns import MICROSOFT, ints, made_by, nodes_of, number, only_user, operands, put, same_shape


def rotaries(model: ir.Model, context_length: int) -> None:
    """Let attention rotate queries and keys by tables for `context_length` positions; elsewhere one RotaryEmbedding.

    Left as it was: what has its heads where the operator does not look for them.
    """
    graph = model.graph
    tables = _Tables(model, context_length)
    for attention in nodes_of(graph, "GroupQueryAttention"):
        _rotate_inside(graph, attention, tables)
    for node in nodes_of(graph, "Add"):
        rotation = _rotation(node.outputs[0])
        found = tables.of(rotation) if rotation and rotation.heads_axis == 1 else None
        back = only_user(node.outputs[0], "Cast")
        result = node.outputs[0] if rotation is None or rotation.rows.dtype == node.outputs[0].dtype else back
        result = result.outputs[0] if isinstance(result, ir.Node) else result
        if rotation and found and result is not None:
            positions = next(value for value in graph.inputs if value.name == "position_ids")
            rotated = [rotation.rows, positions, *found]
            pairs = int(rotation.of_neighbours)
            put(graph, result, "RotaryEmbedding", rotated, domain=MICROSOFT, interleaved=pairs)


def _rotate_inside(graph: ir.Graph, attention: ir.Node, tables: "_Tables") -> None:
    query, key = (_unrotated(value) for value in attention.inputs[:2])
    if query is None or key is None or query[1:] != key[1:]:
        return
    found = tables.of(query)
    size = _last_size(attention.outputs[0]) // attention.attributes["num_heads"].as_int()
    if found is None or size % 16 or _last_size(found[0]) % 8:  # as the operator wants it
        return
    for index, side in enumerate((query, key)):
        attention.replace_input_with(index, _flat(graph, side.rows, attention, index))
    attention.resize_inputs(9)
    for index, table in zip((7, 8), found, strict=True):
        attention.replace_input_with(index, table)
    attention.attributes["do_rotary"] = ir.AttrInt64("do_rotary", 1)
    attention.attributes["rotary_interleaved"] = ir.AttrInt64("rotary_interleaved", int(query.of_neighbours))


class Rotation(NamedTuple):
    """What is rotated, by which cosines and sines, and whether two neighbours make a pair, or one of each half."""

    rows: ir.Value
    cos: ir.Value
    sin: ir.Value
    of_neighbours: bool

    @property
    def heads_axis(self) -> int | None:
        """Where the heads are: 1 in [B, H, T, D], 2 in [B, T, H, D]; None where that cannot be told."""
        shapes = [list(each.shape or []) for each in (self.cos, self.sin)]
        axes = [axis for axis in (1, 2) if all(len(shape) == 4 and shape[axis] == 1 for shape in shapes)]
        return axes[0] if len(axes) == 1 else None


class Slice(NamedTuple):
    """A part of a value along its last axis: every `step`-th from `start` to `end`."""

    whole: ir.Value
    start: int
    end: int
    step: int = 1


def _unrotated(value: ir.Value | None) -> Rotation | None:
    """Return the rotation of what attention reads, with its heads [B, T, H, D] before it."""
    flat = made_by(value, "Reshape")
    turned = made_by(flat.inputs[0], "Transpose") if flat is not None else None
    if flat is None or (turned is not None and ints(turned, "perm") != [0, 2, 1, 3]):
        return None
    rotated = _uncast(flat.inputs[0] if turned is None else turned.inputs[0])
    joined = made_by(rotated, "Concat")
    rotation = _rotation(rotated) if joined is None else _rotation_of_first(joined)
    if rotation is None or rotation.heads_axis != (2 if turned is None else 1):
        return None
    if turned is None:
        return rotation
    back = made_by(rotation.rows, "Transpose")
    if back is None or back.inputs[0] is None or ints(back, "perm") != [0, 2, 1, 3]:
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
    """Return the rotation x * cos + (x with one of each pair in the place of the other, and that one negated) * sin."""
    add = made_by(value, "Add")
    terms = [made_by(each, "Mul") for each in add.inputs] if add is not None else []
    for plain, turned in (terms, terms[::-1]) if len(terms) == 2 else ():
        for swapped, of_neighbours in (_swapped_halves, False), (_swapped_neighbours, True):
            found = operands(turned, lambda each, swapped=swapped: swapped(_uncast(each)))  # type: ignore[misc]
            rows = _uncast(found[0]) if found else None
            kept = operands(plain, lambda each, rows=rows: _uncast(each) is rows)  # type: ignore[misc]
            if found and rows is not None and kept:
                return Rotation(rows, kept[1], found[1], of_neighbours)
    return None


def _uncast(value: ir.Value | None) -> ir.Value | None:
    """Return what a value was in half precision: some models rotate in fp32."""
    cast = made_by(value, "Cast")
    return cast.inputs[0] if cast is not None else value


def _swapped_halves(value: ir.Value) -> ir.Value | None:
    """Return x of concat(-second half of x, first half of x)."""
    joined = made_by(value, "Concat")
    if joined is None or len(joined.inputs) != 2:
        return None
    minus = made_by(joined.inputs[0], "Neg")
    first, second = _sliced(joined.inputs[1]), _sliced(minus.inputs[0]) if minus is not None else None
    is_whole = first is not None and second is not None and _halves(first, second)
    return first.whole if is_whole and first and _last_size(first.whole) == 2 * first.end else None


def _swapped_neighbours(value: ir.Value) -> ir.Value | None:
    """Return x of stack(-every second of x from the second on, every second of x from the first on)."""
    flat = made_by(value, "Reshape")
    joined = made_by(flat.inputs[0], "Concat") if flat is not None else None
    if joined is None or len(joined.inputs) != 2 or joined.attributes.get_int("axis") != -1:
        return None
    minus, first = (made_by(each, "Unsqueeze") for each in joined.inputs)
    if minus is None or first is None or (number(minus.inputs[1]), number(first.inputs[1])) != (-1, -1):
        return None
    negated = made_by(minus.inputs[0], "Neg")
    odd, even = _strided(negated.inputs[0]) if negated is not None else None, _strided(first.inputs[0])
    if odd is None or even is None or odd.whole is not even.whole or not same_shape(even.whole, value):
        return None
    size = _last_size(even.whole)
    return even.whole if odd[1:] == (1, size, 2) and even[1:] == (0, size, 2) else None


def _halves(first: Slice, second: Slice) -> bool:
    """Whether one part is the beginning of a value, and the other follows it."""
    return first.whole is second.whole and first.start == 0 and first.end == second.start


def _sliced(value: ir.Value | None) -> Slice | None:
    """Return which part of what a value is, if it is a part along the last axis without gaps."""
    node = made_by(value, "Split")
    if node is None or value is None or node.inputs[0] is None or node.inputs[0].shape is None:
        part = _strided(value)
        return part if part is not None and part.step == 1 else None
    if node.attributes["axis"].as_int() not in (-1, len(node.inputs[0].shape) - 1):
        return None
    before = sum(_last_size(each) for each in node.outputs[: value.index()])
    return Slice(node.inputs[0], before, before + _last_size(value))


def _strided(value: ir.Value | None) -> Slice | None:
    """Return which part of what a value is, if it is a Slice along the last axis."""
    node = made_by(value, "Slice")
    whole = node.inputs[0] if node is not None else None
    if node is None or whole is None or whole.shape is None:
        return None
    start, end, along, step = (number(each) for each in (*node.inputs[1:], None)[:4])
    if start is None or end is None or along not in (-1, len(whole.shape) - 1):
        return None
    return Slice(whole, int(start), min(int(end), _last_size(whole)), int(step or 1))


def _last_size(value: ir.Value) -> int:
    """Return the last size of a value, where it is no variable; else 0."""
    size = value.shape[-1] if value.shape is not None else 0
    return size if isinstance(size, int) else 0


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
        self._found: dict[tuple[ir.Value, ir.Value, bool], tuple[ir.Value, ir.Value] | None] = {}
        self._tables: list[ir.Value] = []

    def of(self, rotation: Rotation) -> tuple[ir.Value, ir.Value] | None:
        """Return both tables, None where they depend on more than the position, or differ within a pair."""
        asked = rotation[1:]
        if asked not in self._found:
            self._found[asked] = self._computed(rotation)
        return self._found[asked]

    def _computed(self, rotation: Rotation) -> tuple[ir.Value, ir.Value] | None:
        values = [rotation.cos, rotation.sin]
        part = ir.convenience.extract(self._model.graph, self._inputs(*values), values)
        if [value.name for value in part.inputs] != ["position_ids"]:
            return None
        proto = ir.to_proto(ir.Model(part, ir_version=self._model.ir_version))
        tables = []
        for table in ReferenceEvaluator(proto).run(None, {"position_ids": np.arange(self._num_positions)[None]}):
            if table.size != self._num_positions * table.shape[-1] or table.shape[-1] % 2:
                return None
            rows = table.reshape(self._num_positions, -1)
            one, other = (rows[:, ::2], rows[:, 1::2]) if rotation.of_neighbours else np.split(rows, 2, axis=1)
            if (one != other).any():
                return None
            tables.append(one)
        cos, sin = tables
        return self._initializer("rotary_cos", cos, rotation.rows), self._initializer("rotary_sin", sin, rotation.rows)

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
        """Return an initializer that holds the table: one for all that are equal."""
        assert like.dtype is not None
        table = np.ascontiguousarray(table, like.dtype.numpy())
        for known in self._tables:
            if known.dtype == like.dtype and np.array_equal(known.const_value.numpy(), table):
                return known
        name = f"{name}_{len(self._tables)}"
        tensor = ir.Tensor(table, dtype=like.dtype, name=name)
        value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        self._model.graph.initializers[name] = value
        self._tables.append(value)
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
