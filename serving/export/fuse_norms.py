"""Norms as one node, and with the residual sum before them where there is one."""

import numpy as np
import onnx_ir as ir

from serving.export.patterns import (
    MICROSOFT,
    cast_back,
    ints,
    is_number,
    is_weight,
    made_by,
    new_weight,
    nodes_of,
    number,
    numbers,
    only_user,
    operands,
    put,
    take_over,
    weight_of,
)

_NORMS = ("SimplifiedLayerNormalization", "LayerNormalization")


def rms_norms(model: ir.Model) -> None:
    """Make one SimplifiedLayerNormalization of x / sqrt(mean(x^2) + epsilon) * scale; scale may be 1 + weight."""
    graph = model.graph
    for mean in nodes_of(graph, "ReduceMean"):
        square = made_by(mean.inputs[0], "Pow")
        if square is None or number(square.inputs[1]) != 2 or _axes(mean) != [-1]:
            continue
        plus = only_user(mean.outputs[0], "Add")
        found = operands(plus, number)
        if plus is None or found is None:
            continue
        epsilon, _ = found
        root = only_user(plus.outputs[0], "Sqrt")
        inverse = root and only_user(root.outputs[0], "Reciprocal")
        product = inverse and only_user(inverse.outputs[0], "Mul")
        rows = square.inputs[0]
        if product is None or rows not in product.inputs:
            continue
        end, rows = _without_casts(product, rows)
        scaled = only_user(end, "Mul")
        if scaled is None:
            continue
        scale = next((s for each in scaled.inputs if (s := _scale(graph, each, rows)) is not None), None)
        if scale is not None:
            end = cast_back(scaled.outputs[0], rows)  # some models scale in fp32
            put(graph, end, _NORMS[0], [rows, scale], axis=-1, epsilon=epsilon, stash_type=1)


def _axes(mean: ir.Node) -> list[int]:
    axes = numbers(mean.inputs[1]) if len(mean.inputs) > 1 else None
    return ints(mean, "axes") if axes is None else axes.reshape(-1).tolist()


def _without_casts(product: ir.Node, rows: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Return the normalised rows and the rows before in the model's own precision: the node uses fp32 inside."""
    up = made_by(rows, "Cast")
    down = only_user(product.outputs[0], "Cast")
    if up is None:
        return product.outputs[0], rows
    return (down.outputs[0] if down is not None else product.outputs[0]), up.inputs[0]


def _scale(graph: ir.Graph, value: ir.Value, rows: ir.Value) -> ir.Value | None:
    """Return what rows are scaled by, in their type where it was cast to another."""
    cast = made_by(value, "Cast")
    if cast is not None and is_weight(cast.inputs[0], 1):  # in half precision, where the model scales in fp32
        return value if value.dtype == rows.dtype else cast.inputs[0]
    if is_weight(value, 1):
        return value
    found = operands(made_by(value, "Add"), is_number(1.0))
    weight = found and found[1]
    cast = made_by(weight, "Cast") if weight is not None else None
    weight = cast.inputs[0] if cast is not None else weight
    if weight is None or not is_weight(weight, 1):
        return None
    shape = weight.const_value.shape.numpy()

    def one_more(some: slice) -> np.ndarray:
        values = weight_of(weight, some)
        return (1 + values.astype(np.float32)).astype(values.dtype)

    return new_weight(graph, f"1+{weight.name}", weight, shape, one_more)


def residual_norms(model: ir.Model) -> None:
    """Let a norm do the sum that it reads, of two values [batch, tokens, hidden] or of two and a bias."""
    graph = model.graph
    for norm in nodes_of(graph, *_NORMS):
        total = made_by(norm.inputs[0], "Add")
        if total is None or not all(_is_rows(value) for value in total.inputs) or not _is_last(norm):
            continue
        if any(len(output.uses()) or output.is_graph_output() for output in norm.outputs[1:]):
            continue
        one, other, bias = _terms(total)
        shift = () if norm.op_type == _NORMS[0] else ((*norm.inputs, None)[2],)
        epsilon = norm.attributes["epsilon"].as_float() if "epsilon" in norm.attributes else 1e-5
        inputs, name = [one, other, norm.inputs[1], *shift, bias], f"Skip{norm.op_type}"
        fused = put(graph, norm.outputs[0], name, inputs, domain=MICROSOFT, num_outputs=4, epsilon=epsilon)
        whole, was = fused.outputs[3], total.outputs[0]
        whole.shape, whole.type = was.shape, was.type
        if len(list(was.consumers())) > 1 or was.is_graph_output():
            take_over(was, whole)


def _terms(total: ir.Node) -> tuple[ir.Value | None, ir.Value | None, ir.Value | None]:
    """Return the two values of a sum, and the bias that the first had added before, if any."""
    one, other = total.inputs
    for first, second in ((one, other), (other, one)):
        found = operands(made_by(first, "Add"), lambda value: value if is_weight(value, 1) else None)
        if found is not None and first is not None and only_user(first, "Add") is total and _is_rows(found[1]):
            return found[1], second, found[0]
    return one, other, None


def _is_rows(value: ir.Value | None) -> bool:
    return value is not None and value.shape is not None and len(value.shape) == 3 and not is_weight(value)


def _is_last(norm: ir.Node) -> bool:
    """Whether the norm is over the last of three sizes."""
    return "axis" not in norm.attributes or norm.attributes["axis"].as_int() in (-1, 2)
