"""The passes that make a traced graph as short as its provider's operators allow, in the order that they need."""

import onnx_ir as ir
from onnx_ir.passes.common import TopologicalSortPass

from serving.export.fuse_activations import biased_gelus, silus, tanh_gelus
from serving.export.fuse_attention import packed_attention
from serving.export.fuse_heads import part_heads
from serving.export.fuse_linear import gather_last, pack_alike, plain_matmuls, straighten
from serving.export.fuse_norms import residual_norms, rms_norms
from serving.export.fuse_rotary import rotaries
from serving.export.patterns import sweep


def fuse(model: ir.Model, context_length: int, *, target: str) -> None:
    """Rewrite the graph in place. It computes the same but for rounding: the proof of the export shows whether.

    What attention reads is one product anyhow. Gate and up are one on `target` cuda alone: on a CPU, parting them again
    was seen to cost 6 % of decoding at batch 1 and to save nothing at 8.
    """
    for tidy in (plain_matmuls, part_heads, straighten, gather_last, rms_norms, tanh_gelus, silus):
        tidy(model)
    sweep(model)
    rotaries(model, context_length)
    sweep(model)
    alike = (pack_alike,) if target == "cuda" else ()
    for combine in (straighten, packed_attention, sweep, *alike, biased_gelus, residual_norms, sweep):
        combine(model)
    TopologicalSortPass()(model)
