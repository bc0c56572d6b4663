"""A decoder's trial run without weights: do all layers go through the attention interface, and what do they ask?"""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from serving.export.attention import InPlaceAttention, KvShape
from serving.export.cache import PassThroughCache
from serving.export.experts import check_experts, use_operator
from serving.export.refusing import reason
from serving.export_paths import ExportError


def probe(folder: Path, config: PreTrainedConfig) -> list[KvShape]:
    """Run the architecture once without weights and return what each layer's attention asks for.

    Raises ExportError when some layer does not go through the attention interface or asks for what is not handled.
    """
    attention, cache = InPlaceAttention(), PassThroughCache()
    with torch.device("meta"), torch.no_grad():
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()
        model.set_attn_implementation(attention.register())
        use_operator(model)
        model.config.pad_token_id = None  # else the model looks for padding among tokens that are not there
        try:
            logits = _trial_run(model, cache)
        except ExportError as error:
            raise ExportError(f"{folder}: {type(model).__name__} cannot be exported: {error}") from None
        except Exception as error:
            check_experts(folder, model)
            raise ExportError(
                f"{folder}: {type(model).__name__} cannot be exported: a trial run without weights ended with "
                f"{reason(error)}; accepted: decoders that need no more than tokens, their positions and a cache"
            ) from error
    check_experts(folder, model)
    layers = range(config.num_hidden_layers)
    if not layers:
        raise ExportError(f"{folder}/config.json: has no layers (num_hidden_layers {len(layers)}); mend it")
    if sorted(attention.shapes) != list(layers) or logits.shape != (1, 2, config.vocab_size):
        raise ExportError(refusal(folder, config))
    shapes = [replace(attention.shapes[layer], cached=cache.shapes.get(layer)) for layer in layers]
    _check_shapes(folder, config, shapes)
    return shapes


def _trial_run(model: PreTrainedModel, cache: PassThroughCache) -> torch.Tensor:
    """Return the logits of the last two of three tokens."""
    with _NoComplexNumbers():
        return model(
            input_ids=torch.ones(1, 3, dtype=torch.long),
            position_ids=torch.arange(3)[None],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=torch.tensor([1, 2]),
        ).logits


class _NoComplexNumbers(TorchDispatchMode):
    """While open, raises ExportError where something is computed in complex numbers, which ONNX has not."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor) and found.is_complex():
            raise ExportError("computes with complex numbers, which ONNX has not; accepted: decoders that do not")
        return found


def refusal(folder: Path, config: PreTrainedConfig) -> str:
    """Return why a decoder that keeps its attention to itself cannot be exported."""
    return (
        f"{folder}: {MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__} cannot be exported: it does not put every "
        "layer through transformers' attention interface; accepted: decoders that do (Llama, Qwen, Mistral, GPT-2 ...)"
    )


def _check_shapes(folder: Path, config: PreTrainedConfig, shapes: list[KvShape]) -> None:
    if len({(shape.num_kv_heads, shape.head_dim) for shape in shapes}) > 1:
        raise ExportError(f"{folder}: its layers differ in KV heads or head size; one size for all layers is accepted")
    # Elsewhere the mask limits a sliding layer; here the keyword alone does, so a model must not forget to pass it.
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None) or [("sliding" if window else "full") + "_attention"] * len(shapes)
    for layer, (kind, shape) in enumerate(zip(types, shapes, strict=True)):
        if kind == "sliding_attention" and not window:
            raise ExportError(f"{folder}/config.json: layer {layer} is {kind}, but sliding_window is {window}; set it")
        expected = {"full_attention": None, "sliding_attention": window}.get(kind, "unknown")
        if shape.sliding_window != expected:
            found = f"asks for sliding_window {shape.sliding_window}"
            raise ExportError(f"{folder}: layer {layer} is {kind} ({window=}) but {found}; it cannot be exported")
