"""Attention in operators of plain ONNX (opset 24), for providers whose GroupQueryAttention takes no fp32: CUDA's.

TensorScatter writes the new keys and values into the cache, in place where input and output are bound to the same
memory; Attention then reads the cache up to the longest row. Who may see what is a mask: it serves whole padded texts,
chunks and single tokens alike, and sliding windows. Shape letters: B batch, T new tokens, L tokens in the cache that
are read, H heads, K KV heads, D head size.
"""

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import TopologicalSortPass

from serving.export.patterns import initializer

OPSET = 24


def standard_attention(model: ir.Model) -> None:
    """Put standard operators in the place of every GroupQueryAttention; inputs and outputs of the graph stay."""
    graph = model.graph
    shared: _Shared | None = None
    for node in [node for node in graph if node.op_type == "GroupQueryAttention"]:
        shared = shared or _Shared(graph, node)
        _replace(graph, node, shared)
    model.opset_imports[""] = graph.opset_imports[""] = OPSET
    TopologicalSortPass()(model)


def _replace(graph: ir.Graph, attention: ir.Node, shared: "_Shared") -> None:
    query, key, value, past_key, past_value = attention.inputs[:5]
    settings = {name: each.value for name, each in attention.attributes.items()}
    new = shared.new
    cache = []
    for update, past, old in zip((key, value), (past_key, past_value), attention.outputs[1:], strict=True):
        heads = _by_heads(shared, update, settings["kv_num_heads"])
        written = new("TensorScatter", past, heads, shared.start, axis=-2, mode="linear")
        written.name, written.shape, written.type = old.name, old.shape, old.type
        old.replace_all_uses_with(written, replace_graph_outputs=True)
        cache.append(new("Slice", written, shared.zero, shared.length, shared.tokens_axis))
    attend = {name: settings[name] for name in ("scale", "softcap") if name in settings}
    mask = shared.mask(settings.get("local_window_size"))
    found = new("Attention", _by_heads(shared, query, settings["num_heads"]), *cache, mask, **attend)
    flat = new("Reshape", new("Transpose", found, perm=[0, 2, 1, 3]), shared.ints(0, 0, -1), allowzero=0)
    flat.shape, flat.type = attention.outputs[0].shape, attention.outputs[0].type
    attention.outputs[0].replace_all_uses_with(flat)
    graph.remove(attention, safe=True)


def _by_heads(shared: "_Shared", rows: ir.Value, num_heads: int) -> ir.Value:
    """Return [B, heads, T, D] of [B, T, heads x D]."""
    heads = shared.new("Reshape", rows, shared.ints(0, 0, num_heads, -1), allowzero=0)
    if rows.shape is not None and isinstance(size := rows.shape[2], int):
        heads.shape = ir.Shape([*rows.shape[:2], num_heads, size // num_heads])  # what it only undoes can then go
    heads.type = rows.type
    return shared.new("Transpose", heads, perm=[0, 2, 1, 3])


class _Shared:
    """What all layers read: where each row's new tokens begin, how far the cache is read, and who may see what."""

    def __init__(self, graph: ir.Graph, attention: ir.Node) -> None:
        self._graph = graph
        self._masks: dict[int | None, ir.Value] = {}
        query, lengths, longest = attention.inputs[0], attention.inputs[5], attention.inputs[6]
        new, ints = self.new, self.ints
        self.zero, self.tokens_axis = ints(0), ints(2)
        num_tokens = new("Shape", query, start=1, end=2)
        # A padded row of whole texts is shorter than T, and begins at 0 as all do.
        past_the_end = new("Add", new("Cast", lengths, to=ir.DataType.INT64), ints(1))
        self.start = new("Max", new("Sub", past_the_end, num_tokens), self.zero)
        self.length = new("Reshape", new("Cast", longest, to=ir.DataType.INT64), ints(1), allowzero=0)
        steps_T = new("Range", self._scalar(0), new("Squeeze", num_tokens), self._scalar(1))
        places_BT = new("Add", new("Unsqueeze", self.start, ints(1)), steps_T)
        self._places = new("Unsqueeze", places_BT, ints(1, 3))  # [B, 1, T, 1]
        self._keys = new("Range", self._scalar(0), new("Squeeze", self.length), self._scalar(1))  # [L]

    def mask(self, window: int | None) -> ir.Value:
        """Return [B, 1, T, L]: every token sees itself and those before, or the last `window` of them."""
        if window not in self._masks:
            seen = self.new("LessOrEqual", self._keys, self._places)
            if window is not None:
                first = self.new("Sub", self._places, self.ints(window))
                seen = self.new("And", seen, self.new("Greater", self._keys, first))
            self._masks[window] = seen
        return self._masks[window]

    def new(self, operator: str, *inputs: ir.Value, **attributes: int | float | str | list[int]) -> ir.Value:
        """Return the output of a new node."""
        node = ir.node(operator, inputs, attributes)
        self._graph.append(node)
        return node.outputs[0]

    def ints(self, *numbers: int) -> ir.Value:
        """Return a constant vector of whole numbers."""
        return self._constant(np.array(numbers, np.int64))

    def _scalar(self, number: int) -> ir.Value:
        return self._constant(np.array(number, np.int64))

    def _constant(self, array: np.ndarray) -> ir.Value:
        name = f"attention.{array.ndim}.{'.'.join(map(str, array.flat))}"
        return initializer(self._graph, ir.tensor(array, name=name))
