"""int8 and int4: which linear layers and embeddings of a graph are quantised, and how, in each format."""

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass, TopologicalSortPass

from serving.export.linear import Linear, linears
from serving.export.quantize_blocks import blocks
from serving.export.quantize_embedding import embeddings
from serving.export.quantize_rows import Rows
from serving.export_options import Quantization

MIN_WEIGHTS = 4096  # a smaller matrix, as the labels of a classifier, costs nothing as it is
AFTER_THE_HEAD = ("Add", "Cast", "Div", "Mul", "Tanh")


def quantize(model: ir.Model, quantization: Quantization) -> None:
    """Replace the graph's linear layers and embeddings, in place, by those of that format.

    The quantised weights are computed when the graph is written, one after the other, and not kept.
    """
    rows = Rows(model.graph)
    for linear in list(linears(model.graph)):
        if linear.num_outputs * linear.num_inputs < MIN_WEIGHTS:
            continue
        if quantization == "int8" and not _is_delicate(linear):
            rows.quantize(linear)
        elif quantization == "int4" and not _is_delicate(linear):
            blocks(linear, bits=4)
        else:
            blocks(linear, bits=8)
    embeddings(model, MIN_WEIGHTS)
    model.opset_imports["com.microsoft"] = 1
    RemoveUnusedNodesPass()(model)
    TopologicalSortPass()(model)


def _is_delicate(linear: Linear) -> bool:
    """Return whether the layer decides most of what quantisation costs in quality; see benchmarks/quantization.py.

    They are the second halves of the MLPs, whose inputs have outliers, and the head that makes the logits.
    """
    return linear.narrows or _is_head(linear.node.outputs[0])


def _is_head(value: ir.Value) -> bool:
    """Return whether the value becomes an output of the graph with nothing but a bias or a soft cap on its way."""
    while not value.is_graph_output():
        users = list(value.consumers())
        if len(users) != 1 or users[0].op_type not in AFTER_THE_HEAD:
            return False
        value = users[0].outputs[0]
    return True
