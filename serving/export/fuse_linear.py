"""Linear layers: every one a MatMul with its weight as a constant [in, out], and those that read the same packed."""

import numpy as np
import onnx_ir as ir

from serving.export.patterns import (
    ByRows,
    initializer,
    ints,
    is_weight,
    made_by,
    new_weight,
    nodes_of,
    only_user,
    put,
    same_shape,
    take_over,
    weight_of,
)


def plain_matmuls(model: ir.Model) -> None:
    """Make MatMul(x, constant [in, out]) and Add of what the tracer wrote as a transposed weight or as Gemm.

    A weight that is read elsewhere too, as an embedding that is also the head, stays one tensor in the file.
    """
    graph = model.graph
    for node in nodes_of(graph, "Transpose"):
        weight = node.inputs[0]
        if is_weight(weight, 2) and ints(node, "perm") == [1, 0] and len(list(weight.consumers())) == 1:
            take_over(node.outputs[0], _transposed(graph, weight))
    for node in nodes_of(graph, "Gemm"):
        _as_matmul(graph, node)


def _transposed(graph: ir.Graph, weight: ir.Value) -> ir.Value:
    rows, columns = weight.const_value.shape.numpy()
    return new_weight(graph, f"{weight.name}.T", weight, (columns, rows), lambda some: weight_of(weight)[:, some].T)


def _as_matmul(graph: ir.Graph, gemm: ir.Node) -> None:
    """Replace Gemm, and reshapes to [N, in] and back, by a MatMul over the rows as they lie, and an Add."""
    before, weight, bias = (*gemm.inputs, None)[:3]
    after = only_user(gemm.outputs[0], "Reshape")
    flat = made_by(before, "Reshape")
    settings = {name: each.value for name, each in gemm.attributes.items()}
    is_plain = settings.get("alpha", 1) == 1 == settings.get("beta", 1) and not settings.get("transA")
    weight = _in_fp32(graph, weight)
    if not is_plain or not is_weight(weight, 2):
        return
    if settings.get("transB"):
        weight = _transposed(graph, weight)
    rows, result = gemm.inputs[0], gemm.outputs[0]
    if flat is not None and after is not None and _same_rows(flat.inputs[0], after.outputs[0]):
        rows, result = flat.inputs[0], after.outputs[0]
    product = put(graph, result, "MatMul", [rows, weight]).outputs[0]
    if bias is not None:
        added = ir.node("Add", [product, bias])
        added.outputs[0].shape, added.outputs[0].type = product.shape, product.type
        graph.insert_after(product.producer(), added)
        take_over(product, added.outputs[0])  # also where the product is an output of the graph: a head's bias
        added.replace_input_with(0, product)
        product.name = product.name or f"{added.outputs[0].name}.without_bias"


def _in_fp32(graph: ir.Graph, value: ir.Value | None) -> ir.Value | None:
    """Return a weight in fp32 for one that a model in half precision casts to it, as some do to route to experts."""
    cast = made_by(value, "Cast")
    weight = cast.inputs[0] if cast is not None else None
    if value is None or weight is None or not is_weight(weight, 2) or value.dtype != ir.DataType.FLOAT:
        return value
    shape = ir.Shape(weight.const_value.shape.numpy())
    wide = ByRows(
        f"{weight.name}.fp32", ir.DataType.FLOAT, shape, lambda some: weight_of(weight, some).astype(np.float32)
    )
    return initializer(graph, wide)


def _same_rows(one: ir.Value, other: ir.Value) -> bool:
    """Whether two values differ at most in their last size."""
    return one.shape is not None and other.shape is not None and list(one.shape[:-1]) == list(other.shape[:-1])


def linear_of(value: ir.Value | None) -> tuple[ir.Value, ir.Value, ir.Value | None] | None:
    """Return input, weight and bias of the linear layer that makes `value`, None where none does."""
    add = made_by(value, "Add")
    if add is not None:
        bias = next((each for each in add.inputs if is_weight(each, 1)), None)
        rest = [each for each in add.inputs if each is not bias]
        if bias is None or len(rest) != 1 or only_user(rest[0], "Add") is None:
            return None
        return (found[0], found[1], bias) if (found := linear_of(rest[0])) and found[2] is None else None
    product = made_by(value, "MatMul")
    if product is None or not is_weight(product.inputs[1], 2):
        return None
    return product.inputs[0], product.inputs[1], None


def packed(graph: ir.Graph, values: list[ir.Value], before: ir.Node) -> ir.Value | None:
    """Return one linear layer's output that holds those of several side by side, None where they cannot be packed.

    They can if each has no other reader, all read the same, and all or none have a bias. It is put before `before`.
    """
    layers = [linear_of(value) for value in values]
    if any(layer is None for layer in layers) or any(len(list(value.consumers())) != 1 for value in values):
        return None
    inputs, weights, biases = zip(*layers, strict=True)
    if len(set(inputs)) > 1 or len({bias is None for bias in biases}) > 1 or len(set(weights)) < len(weights):
        return None
    names = "+".join(_short(weight.name, weights[0].name) for weight in weights)
    rows, columns = weights[0].const_value.shape[0], [weight.const_value.shape[1] for weight in weights]

    def side_by_side(some: slice) -> np.ndarray:
        return np.concatenate([weight_of(weight, some) for weight in weights], axis=1)

    weight = new_weight(graph, names, weights[0], (rows, sum(columns)), side_by_side)
    nodes = [ir.node("MatMul", [inputs[0], weight])]
    if biases[0] is not None:
        names = "+".join(_short(bias.name, biases[0].name) for bias in biases)

        def one_after_another(some: slice) -> np.ndarray:
            return np.concatenate([*map(weight_of, biases)])[some]

        bias = new_weight(graph, names, biases[0], (sum(columns),), one_after_another)
        nodes.append(ir.node("Add", [nodes[0].outputs[0], bias]))
    for node in nodes:
        node.outputs[0].type = values[0].type
        node.outputs[0].shape = ir.Shape([*values[0].shape[:-1], sum(columns)])
    graph.insert_before(before, nodes)
    return nodes[-1].outputs[0]


def _short(name: str, first: str) -> str:
    """Return the name without the folders that it shares with `first`, unless it is that."""
    folder = first.rsplit(".", 3)[0] + "."
    return name if name == first else name.removeprefix(folder)


def pack_alike(model: ir.Model) -> None:
    """Compute linear layers that read the same, as gate and up of an MLP, in one go.

    Not those that attention over whole texts reads: it wants them apart, and parting them costs more than is saved.
    """
    graph = model.graph
    for node in nodes_of(graph, "MatMul"):
        rows = node.inputs[0]
        group = [user for user in rows.consumers() if _is_linear(user) and user.inputs[0] is rows]
        if len(group) < 2 or group[0] is not node:
            continue
        values = [_with_bias(each.outputs[0]) for each in group]
        whole = None if any(map(_is_for_attention, values)) else packed(graph, values, group[0])
        if whole is None:
            continue
        sizes = _sizes(graph, [value.shape[-1] for value in values])
        split = ir.node("Split", [whole, sizes], {"axis": -1}, num_outputs=len(values))
        graph.insert_after(whole.producer(), split)
        for old, new in zip(values, split.outputs, strict=True):
            new.shape, new.type = old.shape, old.type
            take_over(old, new)


def _is_for_attention(value: ir.Value) -> bool:
    return any(node.op_type == "MultiHeadAttention" for node in value.consumers())


def _is_linear(node: ir.Node) -> bool:
    return node.op_type == "MatMul" and is_weight(node.inputs[1], 2)


def _with_bias(product: ir.Value) -> ir.Value:
    add = only_user(product, "Add")
    return add.outputs[0] if add is not None and any(is_weight(each, 1) for each in add.inputs) else product


def _sizes(graph: ir.Graph, sizes: list[int]) -> ir.Value:
    name = "sizes_" + "_".join(map(str, sizes))
    return initializer(graph, ir.Tensor(np.array(sizes, np.int64), name=name))


def straighten(model: ir.Model) -> None:
    """Take out what only moves data to and fro: reshapes that end in the first shape, transposes that undo another."""
    graph = model.graph
    for node in nodes_of(graph, "Transpose"):
        inner = made_by(node.inputs[0], "Transpose")
        if inner is not None:
            first, second = ints(inner, "perm"), ints(node, "perm")
            if [first[index] for index in second] == sorted(second):
                take_over(node.outputs[0], inner.inputs[0])
    for node in nodes_of(graph, "Reshape"):
        origin = node.inputs[0]
        while (inner := made_by(origin, "Reshape")) is not None:
            origin = inner.inputs[0]
        if same_shape(origin, node.outputs[0]):
            take_over(node.outputs[0], origin)
        elif origin is not node.inputs[0] and node.attributes.get_int("allowzero", 0):  # a 0 copies no size
            node.replace_input_with(0, origin)


def gather_last(model: ir.Model) -> None:
    """Take the kept tokens of each row with one Gather over [batch, tokens, hidden]."""
    graph = model.graph
    for node in nodes_of(graph, "GatherND"):
        turned, back = made_by(node.inputs[0], "Transpose"), only_user(node.outputs[0], "Transpose")
        index = made_by(node.inputs[1], "Unsqueeze")
        if turned is None or back is None or index is None:
            continue
        if ints(turned, "perm") == [1, 0, 2] == ints(back, "perm"):
            put(graph, back.outputs[0], "Gather", [turned.inputs[0], index.inputs[0]], axis=1)
