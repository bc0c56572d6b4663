"""A decoder's trial run without weights: do all layers go through the attention interface, and what do they ask?"""

import copy
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from serving.export.attention import ExportError, InPlaceAttention, KvShape
from serving.export.cache import PassThroughCache


def probe(folder: Path, config: PreTrainedConfig) -> list[KvShape]:
    """Run the architecture once without weights and return what each layer's attention asks for.

    Raises ExportError when some layer does not go through the attention interface or asks for what is not handled.
    """
    attention = InPlaceAttention()
    with torch.device("meta"), torch.no_grad():
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()
        model.set_attn_implementation(attention.register())
        model.config.pad_token_id = None  # else the model looks for padding among tokens that are not there
        try:
            logits = model(
                input_ids=torch.ones(1, 3, dtype=torch.long),
                position_ids=torch.arange(3)[None],
                past_key_values=PassThroughCache(),
                use_cache=True,
                logits_to_keep=torch.tensor([1, 2]),
            ).logits
        except ExportError as error:
            raise ExportError(f"{folder}: {error}") from None
        except Exception as error:
            _refuse_experts(folder, model)
            raise ExportError(f"{refusal(folder, config)} ({type(error).__name__} in a trial run)") from error
    _refuse_experts(folder, model)
    layers = range(config.num_hidden_layers)
    if not layers:
        raise ExportError(f"{folder}/config.json: has no layers (num_hidden_layers {len(layers)}); mend it")
    if sorted(attention.shapes) != list(layers) or logits.shape != (1, 2, config.vocab_size):
        raise ExportError(refusal(folder, config))
    shapes = [attention.shapes[layer] for layer in layers]
    _check_shapes(folder, config, shapes)
    return shapes


def _refuse_experts(folder: Path, model: PreTrainedModel) -> None:
    """Raise ExportError for a mixture of experts: each token picks its own weights, which no trace follows."""
    if any(name.endswith(".experts") for name, _ in model.named_modules()):
        raise ExportError(
            f"{folder}: {type(model).__name__} cannot be exported: it is a mixture of experts, and which a token "
            "goes through cannot be traced; accepted: decoders whose layers are the same for every token"
        )


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
        expected = {"full_attention": None, "sliding_attention": window}.get(kind, "unknown")
        if shape.sliding_window != expected:
            found = f"asks for sliding_window {shape.sliding_window}"
            raise ExportError(f"{folder}: layer {layer} is {kind} ({window=}) but {found}; it cannot be exported")
