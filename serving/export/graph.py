"""One graph for whole prompts, their chunks and decoding: torch.onnx.export of one step over the cache in place.

Inputs: input_ids and position_ids [B, T]; seqlens_k [B], each row's length after the step less one; total_length, the
longest row's length after the step; keep [R], which of the T positions get logits; past_keys.i and past_values.i
[B, kv heads, longest, head size]; where adapters are kept beside the model, lora_index [B] and their stacks (loras.py).
Outputs: logits [B, R, vocabulary]; present_keys.i and present_values.i, to be bound
to the memory of their inputs.
"""

from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir
import torch
from transformers import PreTrainedModel

from serving.export.attention import InPlaceAttention
from serving.export.cache import PassThroughCache
from serving.export.experts import interleave, use_operator
from serving.export.fuse import fuse
from serving.export.loras import Selection, put_into, stacks_as_inputs
from serving.export.source import Source
from serving.export.standard_attention import standard_attention
from serving.export.trace import Example, graph_of
from serving.export_options import Options

STEP_INPUTS = ["input_ids", "position_ids", "seqlens_k", "total_length", "keep"]


class Step(torch.nn.Module):
    """The model's forward with the cache as tensors that come in and go out."""

    def __init__(self, model: PreTrainedModel, attention: InPlaceAttention) -> None:
        super().__init__()
        self.model = model
        self.attention = attention
        self.selection = Selection()
        self.traced: Sequence[int] = ()  # the layers that run, and whose past comes in

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        seqlens_k: torch.Tensor,
        total_length: torch.Tensor,
        keep: torch.Tensor,
        past: list[torch.Tensor],
        lora_index: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """Return logits, then keys and values of each layer."""
        pairs = zip(past[::2], past[1::2], strict=True)
        self.attention.past, self.attention.present = dict(zip(self.traced, pairs, strict=True)), {}
        self.selection.index = lora_index
        self.attention.seqlens_k, self.attention.total_length = seqlens_k, total_length
        output = self.model(
            input_ids=input_ids,
            position_ids=position_ids,
            past_key_values=PassThroughCache(),
            use_cache=True,
            logits_to_keep=keep,
        )
        present = [self.attention.present[layer] for layer in self.traced]
        # Samplers and proofs read fp32, whatever the model computes in.
        return (output.logits.float(), *(tensor for pair in present for tensor in pair))


def cache_names(layers: Sequence[int]) -> list[str]:
    """Return the names of the cache's tensors, without `past_` or `present_`."""
    return [f"{kind}.{layer}" for layer in layers for kind in ("keys", "values")]


def write_graph(model: PreTrainedModel, source: Source, options: Options, path: Path) -> tuple[list[str], list[str]]:
    """Write the model as `path` (weights in `path` + ".data"); return the names of the graph's inputs and outputs.

    The model's attention implementation is changed: take from it what is wanted of the original before.
    """
    attention = InPlaceAttention()
    model.set_attn_implementation(attention.register())
    use_operator(model)
    step = Step(model, attention)
    if source.loras:
        put_into(model, source.loras, step.selection)
    graph = graph_of(step, len(source.layers), lambda layers: _example(step, source, layers), asks=source.layers)
    attention.forget()
    if options.optimize_for == "cuda" and options.dtype == "fp32":
        standard_attention(graph)
    interleave(graph)
    fuse(graph, source.config.max_position_embeddings, target=options.optimize_for)
    if source.loras:
        stacks_as_inputs(graph, path.parent)
    ir.save(graph, path, external_data=f"{path.name}.data")
    return [each.name or "" for each in graph.graph.inputs], [each.name or "" for each in graph.graph.outputs]


def _example(step: Step, source: Source, layers: Sequence[int]) -> Example:
    """Return what `step` is traced with where these layers run."""
    step.traced = layers
    batch, tokens, length, kept = 2, 3, 16, 2  # all different from 1, which the tracer would take for a constant
    kv = source.layers[0]
    shape, dtype = (batch, kv.num_kv_heads, length, kv.head_dim), step.model.dtype
    past = [torch.zeros(shape, dtype=dtype) for _ in range(2 * len(layers))]
    inputs = {
        "input_ids": torch.ones(batch, tokens, dtype=torch.long),
        "position_ids": torch.arange(tokens).repeat(batch, 1),
        "seqlens_k": torch.full((batch,), tokens - 1, dtype=torch.int32),
        "total_length": torch.tensor(tokens, dtype=torch.int32),
        "keep": torch.arange(kept),
        "past": past,
    }
    dims = {name: torch.export.Dim(name) for name in ("batch", "tokens", "length", "kept")}
    dynamic_shapes = {
        "input_ids": {0: dims["batch"], 1: dims["tokens"]},
        "position_ids": {0: dims["batch"], 1: dims["tokens"]},
        "seqlens_k": {0: dims["batch"]},
        "total_length": {},
        "keep": {0: dims["kept"]},
        "past": [{0: dims["batch"], 2: dims["length"]} for _ in past],
    }
    names = cache_names(layers)
    if source.loras:
        inputs["lora_index"], dynamic_shapes["lora_index"] = torch.arange(batch) % 2, {0: dims["batch"]}
    return Example(
        inputs,
        dynamic_shapes,
        [*STEP_INPUTS, *(f"past_{name}" for name in names), *(["lora_index"] if source.loras else [])],
        ["logits", *(f"present_{name}" for name in names)],
    )
