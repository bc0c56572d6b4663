"""A rotary embedding as a graph computes it: what is rotated, and by which cosines and sines."""

from typing import NamedTuple

import onnx_ir as ir

from serving.export.patterns import ints, made_by, number, operands, same_shape
from serving.export.slices import Slice, last_size, sliced, strided


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


def rotation_before(value: ir.Value | None) -> Rotation | None:
    """Return the rotation of what attention reads, with its heads [B, T, H, D] before it."""
    flat = made_by(value, "Reshape")
    turned = made_by(flat.inputs[0], "Transpose") if flat is not None else None
    if flat is None or (turned is not None and ints(turned, "perm") != [0, 2, 1, 3]):
        return None
    rotated = _uncast(flat.inputs[0] if turned is None else turned.inputs[0])
    joined = made_by(rotated, "Concat")
    rotation = rotation_of(rotated) if joined is None else _rotation_of_first(joined)
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
    rotation, rest = rotation_of(joined.inputs[0]), sliced(joined.inputs[1])
    first = sliced(rotation.rows) if rotation else None
    if rotation is None or first is None or rest is None or not _halves(first, rest):
        return None
    return rotation._replace(rows=first.whole) if rest.end == last_size(first.whole) else None


def rotation_of(value: ir.Value | None) -> Rotation | None:
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
    first, second = sliced(joined.inputs[1]), sliced(minus.inputs[0]) if minus is not None else None
    is_whole = first is not None and second is not None and _halves(first, second)
    return first.whole if is_whole and first and last_size(first.whole) == 2 * first.end else None


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
    odd, even = strided(negated.inputs[0]) if negated is not None else None, strided(first.inputs[0])
    if odd is None or even is None or odd.whole is not even.whole or not same_shape(even.whole, value):
        return None
    size = last_size(even.whole)
    return even.whole if odd[1:] == (1, size, 2) and even[1:] == (0, size, 2) else None


def _halves(first: Slice, second: Slice) -> bool:
    """Return whether one part is the beginning of a value, and the other follows it."""
    return first.whole is second.whole and first.start == 0 and first.end == second.start
