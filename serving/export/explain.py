"""What an exported graph is made of: nodes by type, the provider that runs each, and what was left in pieces."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from serving.export.patterns import made_by, only_user
from serving.session import GRAPH, node_providers


@dataclass(frozen=True)
class Explanation:
    """Of a graph: how many nodes of each type it has, of each type and provider onnxruntime runs, what is not fused."""

    nodes: Counter[str]
    runs: Counter[tuple[str, str]]
    not_fused: list[str]


def explain(folder: Path, provider: str) -> Explanation:
    """Return what the graph of an ONNX directory is made of, and what `provider` makes of it: it is run once for that.

    The runtime fuses, copies and converts on its own, so what it runs differs from what the graph has.
    """
    graph = ir.load(folder / GRAPH).graph
    return Explanation(Counter(node.op_type for node in graph), node_providers(folder, provider), not_fused(graph))


def not_fused(graph: ir.Graph) -> list[str]:
    """Return a line for each kind of work that the graph does in more nodes than it needs, with how often it does."""
    return [
        f"{count} x {what}"
        for what, is_one in _IN_PIECES.items()
        if (count := sum(is_one(node) for node in graph))
    ]  # fmt: skip


def _is_attention_in_pieces(node: ir.Node) -> bool:
    if node.op_type != "Softmax":
        return False
    weights = node.outputs[0]
    while (moved := only_user(weights, "Reshape", "Transpose", "Cast")) is not None:
        weights = moved.outputs[0]
    return only_user(weights, "MatMul") is not None


def _is_unpacked(node: ir.Node) -> bool:
    return node.op_type in ("GroupQueryAttention", "MultiHeadAttention") and node.inputs[1] is not None


def _is_rotated_in_pieces(node: ir.Node) -> bool:
    return node.op_type == "Neg" and only_user(node.outputs[0], "Concat") is not None


def _is_silu_in_pieces(node: ir.Node) -> bool:
    product = only_user(node.outputs[0], "Mul") if node.op_type == "Sigmoid" else None
    return product is not None and node.inputs[0] in product.inputs


def _is_norm_in_pieces(node: ir.Node) -> bool:
    return node.op_type == "ReduceMean" and made_by(node.inputs[0], "Pow") is not None


def _is_sum_before_norm(node: ir.Node) -> bool:
    is_norm = node.op_type in ("LayerNormalization", "SimplifiedLayerNormalization")
    return is_norm and made_by(node.inputs[0], "Add") is not None


_IN_PIECES: dict[str, Callable[[ir.Node], bool]] = {
    "attention of single nodes (softmax)": _is_attention_in_pieces,
    "queries, keys and values that come to attention one by one": _is_unpacked,
    "rotary embedding of single nodes": _is_rotated_in_pieces,
    "rotary embedding beside attention": lambda node: node.op_type == "RotaryEmbedding",
    "norm of single nodes": _is_norm_in_pieces,
    "sum that the norm after it could do": _is_sum_before_norm,
    "gelu of single nodes": lambda node: (
        node.op_type in ("Tanh", "Erf") and only_user(node.outputs[0], "Add") is not None
    ),
    "silu of single nodes": _is_silu_in_pieces,
    "choice of experts of single nodes": lambda node: node.op_type == "TopK",
    "linear layer that is no plain product (Gemm)": lambda node: node.op_type == "Gemm",
}
