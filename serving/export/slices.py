"""Parts of a value along its last axis: what Split and Slice take, and from where."""

from typing import NamedTuple

import onnx_ir as ir

from serving.export.patterns import made_by, number


class Slice(NamedTuple):
    """A part of a value along its last axis: every `step`-th from `start` to `end`."""

    whole: ir.Value
    start: int
    end: int
    step: int = 1


def sliced(value: ir.Value | None) -> Slice | None:
    """Return which part of what a value is, if it is a part along the last axis without gaps."""
    node = made_by(value, "Split")
    if node is None or value is None or node.inputs[0] is None or node.inputs[0].shape is None:
        part = strided(value)
        return part if part is not None and part.step == 1 else None
    if node.attributes["axis"].as_int() not in (-1, len(node.inputs[0].shape) - 1):
        return None
    before = sum(last_size(each) for each in node.outputs[: value.index()])
    return Slice(node.inputs[0], before, before + last_size(value))


def strided(value: ir.Value | None) -> Slice | None:
    """Return which part of what a value is, if it is a Slice along the last axis."""
    node = made_by(value, "Slice")
    whole = node.inputs[0] if node is not None else None
    if node is None or whole is None or whole.shape is None:
        return None
    start, end, along, step = (number(each) for each in (*node.inputs[1:], None)[:4])
    if start is None or end is None or along not in (-1, len(whole.shape) - 1):
        return None
    return Slice(whole, int(start), min(int(end), last_size(whole)), int(step or 1))


def last_size(value: ir.Value) -> int:
    """Return the last size of a value, where it is no variable; else 0."""
    size = value.shape[-1] if value.shape is not None else 0
    return size if isinstance(size, int) else 0
