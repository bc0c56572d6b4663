"""Attention over whole texts as one operator: com.microsoft.MultiHeadAttention, without a cache.

It is registered in transformers' attention interface, with masks of its own: where every token sees every other, the
padding alone, one number a token; anything else (causal, a sliding window) as transformers' own additive mask, so that
nothing that a model asks of masks is lost. Shape letters: B rows, T tokens, H heads, K KV heads, D head size.
"""

import math
from typing import Any

import onnx_ir as ir
import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, bidirectional_mask_function, eager_mask

NAME, _OPERATOR = "trivet_whole_texts", "MultiHeadAttention"

# Passed along to every attention function, and without a say in it where there is a mask and no cache; the last is for
# the backward pass of one implementation.
_HARMLESS = {"position_ids", "use_cache", "is_causal", "sliding_window", "output_attentions", "deterministic"}


class CannotFuse(Exception):
    """The model asks attention for something that the operator does not do: trace its own."""


def fused_attention() -> str:
    """Make `whole_attention`, and its masks, an implementation that models can be set to; return its name."""
    AttentionInterface.register(NAME, whole_attention)
    AttentionMaskInterface.register(NAME, padding_or_bias)
    return NAME


def num_fused(model: ir.Model) -> int:
    """Return how many layers of a traced graph have their attention as one operator."""
    return sum(node.op_type == _OPERATOR for node in model.graph)


def whole_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Return [B, T, H, D], as transformers expects of query [B, H, T, D] and key, value [B, K, T, D].

    Raises CannotFuse for what a model asks beyond a mask and a scale: nothing is ignored in silence.
    """
    unknown = sorted(name for name, each in others.items() if each is not None and name not in _HARMLESS)
    if unknown or dropout or attention_mask is None or value.shape[-1] != query.shape[-1]:
        asked = ", ".join(unknown) or "no mask, dropout, or values of another size"
        raise CannotFuse(f"{type(module).__name__} asks attention for {asked}")
    batch, num_heads, num_tokens, head_dim = query.shape
    if key.shape[1] != num_heads:
        key, value = (each.repeat_interleave(num_heads // key.shape[1], dim=1) for each in (key, value))
    masks = (None, attention_mask) if attention_mask.dim() == 4 else (attention_mask, None)
    output = torch.onnx.ops.symbolic(
        f"com.microsoft::{_OPERATOR}",
        (*(each.transpose(1, 2).flatten(2) for each in (query, key, value)), None, *masks),
        attrs={
            "num_heads": num_heads,
            "scale": float(scaling if scaling is not None else 1 / math.sqrt(head_dim)),
            "mask_filter_value": torch.finfo(query.dtype).min,
        },
        dtype=query.dtype,
        shape=(batch, num_tokens, num_heads * head_dim),
        version=1,
    )
    return output.reshape(batch, num_tokens, num_heads, head_dim), None


def padding_or_bias(
    *args: Any, mask_function: Any, attention_mask: torch.Tensor | None = None, **asked: Any
) -> torch.Tensor | None:
    """Return which tokens [B, T] are no padding (int32) where that is all that a mask says; else what is added to the
    attention scores, [B, 1, T, T], as transformers' eager attention takes it.
    """
    if mask_function is bidirectional_mask_function and attention_mask is not None and attention_mask.dim() == 2:
        return attention_mask.to(torch.int32)
    return eager_mask(*args, mask_function=mask_function, attention_mask=attention_mask, **asked)
