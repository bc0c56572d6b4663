"""Activations as one node, with the bias before them where there is one."""

import onnx_ir as ir

from serving.export.patterns import MICROSOFT, is_number, is_weight, made_by, nodes_of, number, only_user, operands, put

_ROOT_OF_2_OVER_PI = 0.7978845608
_CUBIC = 0.044715


def tanh_gelus(model: ir.Model) -> None:
    """Make one FastGelu of 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))."""
    graph = model.graph
    for tanh in nodes_of(graph, "Tanh"):
        inner = operands(made_by(tanh.inputs[0], "Mul"), is_number(_ROOT_OF_2_OVER_PI))
        rows = _cubic(inner[1]) if inner else None
        plus = only_user(tanh.outputs[0], "Add")
        if rows is None or plus is None or operands(plus, is_number(1.0)) is None:
            continue
        end = only_user(plus.outputs[0], "Mul")
        if end is None:
            continue
        half = next(each for each in end.inputs if each is not plus.outputs[0])
        found = operands(made_by(half, "Mul"), is_number(0.5))
        if found and found[1] is rows:
            put(graph, end.outputs[0], "FastGelu", [rows], domain=MICROSOFT)
    for gelu in nodes_of(graph, "Gelu"):
        if "approximate" in gelu.attributes and gelu.attributes["approximate"].as_string() == "tanh":
            put(graph, gelu.outputs[0], "FastGelu", [gelu.inputs[0]], domain=MICROSOFT)


def _cubic(value: ir.Value) -> ir.Value | None:
    """Return x of x + 0.044715 x^3."""
    add = made_by(value, "Add")
    for term, rows in ((add.inputs[1], add.inputs[0]), (add.inputs[0], add.inputs[1])) if add else ():
        found = operands(made_by(term, "Mul"), is_number(_CUBIC))
        cube = made_by(found[1], "Pow") if found else None
        if cube is not None and cube.inputs[0] is rows and number(cube.inputs[1]) == 3:
            return rows
    return None


def biased_gelus(model: ir.Model) -> None:
    """Let a gelu add the bias of the linear layer before it."""
    graph = model.graph
    for gelu in nodes_of(graph, "Gelu", "FastGelu"):
        rows = gelu.inputs[0]
        found = operands(made_by(rows, "Add"), lambda value: value if is_weight(value, 1) else None)
        if len(gelu.inputs) == 1 and found and rows is not None and only_user(rows, gelu.op_type):
            op_type = "BiasGelu" if gelu.op_type == "Gelu" else "FastGelu"
            put(graph, gelu.outputs[0], op_type, [found[1], found[0]], domain=MICROSOFT)


def silus(model: ir.Model) -> None:
    """Make one QuickGelu of x sigmoid(x)."""
    graph = model.graph
    for sigmoid in nodes_of(graph, "Sigmoid"):
        product = only_user(sigmoid.outputs[0], "Mul")
        if product is not None and sigmoid.inputs[0] in product.inputs:
            put(graph, product.outputs[0], "QuickGelu", [sigmoid.inputs[0]], domain=MICROSOFT, alpha=1.0)
