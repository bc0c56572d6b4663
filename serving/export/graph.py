"""One graph for whole prompts, their chunks and decoding: torch.onnx.export of one step over the cache in place.

Inputs: input_ids and position_ids [B, T]; seqlens_k [B], each row's length after the step less one; total_length, the
longest row's length after the step; keep [R], which of the T positions get logits; past_keys.i and past_values.i
[B, kv heads, longest, head size]. Outputs: logits [B, R, vocabulary]; present_keys.i and present_values.i, to be bound
to the memory of their inputs.
"""

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from serving.export.attention import InPlaceAttention
from serving.export.cache import PassThroughCache
from serving.export.options import Options
from serving.export.source import Source

STEP_INPUTS = ["input_ids", "position_ids", "seqlens_k", "total_length", "keep"]
OPSET = 21


class Step(torch.nn.Module):
    """The model's forward with the cache as tensors that come in and go out."""

    def __init__(self, model: PreTrainedModel, attention: InPlaceAttention) -> None:
        super().__init__()
        self.model = model
        self.attention = attention

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        seqlens_k: torch.Tensor,
        total_length: torch.Tensor,
        keep: torch.Tensor,
        past: list[torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        """Return logits, then keys and values of each layer."""
        self.attention.past, self.attention.present = past, {}
        self.attention.seqlens_k, self.attention.total_length = seqlens_k, total_length
        output = self.model(
            input_ids=input_ids,
            position_ids=position_ids,
            past_key_values=PassThroughCache(),
            use_cache=True,
            logits_to_keep=keep,
        )
        present = [self.attention.present[layer] for layer in range(len(past) // 2)]
        return (output.logits, *(tensor for pair in present for tensor in pair))


def cache_names(num_layers: int) -> list[str]:
    """Return the names of the cache's tensors, without `past_` or `present_`."""
    return [f"{kind}.{layer}" for layer in range(num_layers) for kind in ("keys", "values")]


def write_graph(model: PreTrainedModel, source: Source, options: Options, path: Path) -> tuple[list[str], list[str]]:
    """Write the model as `path` (weights in `path` + ".data"); return the names of the graph's inputs and outputs.

    The model's attention implementation is changed: take from it what is wanted of the original before.
    """
    attention = InPlaceAttention()
    model.set_attn_implementation(attention.register())
    names = cache_names(len(source.layers))
    inputs, dynamic_shapes = _example(source)
    with quiet(), torch.no_grad():
        program = torch.onnx.export(
            Step(model, attention),
            kwargs=inputs,
            dynamo=True,
            dynamic_shapes=dynamic_shapes,
            opset_version=OPSET,
            input_names=[*STEP_INPUTS, *(f"past_{name}" for name in names)],
            output_names=["logits", *(f"present_{name}" for name in names)],
            verbose=False,
        )
        program.model.opset_imports["com.microsoft"] = 1
        forget_source_lines(program)
        program.save(path, external_data=True)
    graph = program.model.graph
    return [each.name for each in graph.inputs], [each.name for each in graph.outputs]


def forget_source_lines(program: torch.onnx.ONNXProgram) -> None:
    """Take the tracer's stack traces out of the graph: they name folders of the machine that exports, and its user."""
    for node in program.model.graph.all_nodes():
        for each in (node, *node.outputs):
            each.metadata_props.pop("pkg.torch.onnx.stack_trace", None)


def _example(source: Source) -> tuple[dict, dict]:
    """Return inputs to trace with, and which of their sizes may change."""
    batch, tokens, length, kept = 2, 3, 16, 2  # all different from 1, which the tracer would take for a constant
    kv = source.layers[0]
    past = [torch.zeros(batch, kv.num_kv_heads, length, kv.head_dim) for _ in range(2 * len(source.layers))]
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
    return inputs, dynamic_shapes


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the libraries' warnings, log lines and progress bars; errors still raise."""
    level, bars = logging.root.manager.disable, transformers_logging.is_progress_bar_enabled()
    logging.disable(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
        if bars:
            transformers_logging.enable_progress_bar()
