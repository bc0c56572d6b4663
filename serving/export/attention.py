"""The one attention function of every exported decoder: com.microsoft.GroupQueryAttention with the cache in place.

It is registered in transformers' attention interface, so that a decoder that uses the interface exports by its own
code. No mask function is registered under the name: transformers then builds no mask, and the operator masks by each
row's length. Shape letters: B batch, T new tokens, H heads, K KV heads, D size of queries and keys, V of values.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface

from serving.export_paths import ExportError

NAME = "trivet_in_place"

# Passed along to every attention function, and without a say in it: positions are already in the queries and keys, and
# what a mixture of experts is asked to tell beside its answer changes no answer.
_HARMLESS = {"position_ids", "use_cache", "output_router_logits"}


@dataclass(frozen=True)
class KvShape:
    """What one layer writes to the cache, and how far back it looks (None: all the way).

    `head_dim` is the larger of its keys' and its values' size. `cached`: what its own code would write to a cache of
    transformers: heads and their size, of keys and of values; None where it shares another layer's.
    """

    num_kv_heads: int
    head_dim: int
    sliding_window: int | None
    cached: tuple[tuple[int, int], tuple[int, int]] | None = None


class InPlaceAttention:
    """Attention over `past` (keys and values of each layer), writing this step's into the same buffers.

    Set `past`, `seqlens_k` and `total_length` before the model runs; `present` then holds the buffers after the step.
    Without a `past` it only checks what the model asks for and notes each layer's shape in `shapes`.
    Raises ExportError for anything a model asks of attention that this does not do: it ignores nothing in silence.
    """

    def __init__(self) -> None:
        self.past: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.present: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.shapes: dict[int, KvShape] = {}
        self.seqlens_k: torch.Tensor | None = None
        self.total_length: torch.Tensor | None = None

    def forget(self) -> None:
        """Let go of what it was called with last: it stays registered, and would keep the traced model in memory."""
        self.past, self.present, self.seqlens_k, self.total_length = {}, {}, None, None

    def register(self) -> str:
        """Make this the implementation behind NAME and return that name."""
        AttentionInterface.register(NAME, self)
        return NAME

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **others: Any,
    ) -> tuple[torch.Tensor, None]:
        """Return [B, T, H, V], as transformers expects of query [B, H, T, D], key [B, K, T, D], value [B, K, T, V]."""
        _refuse_unknown(module, attention_mask, dropout, others)
        batch, num_heads, num_tokens, key_dim = query.shape
        layer = module.layer_idx
        if layer in (self.present if self.past else self.shapes):
            raise ExportError(f"{type(module).__name__}: attends more than once in layer {layer}; accepted: once")
        value_dim = value.shape[-1]
        head_dim = max(key_dim, value_dim)
        self.shapes[layer] = KvShape(key.shape[1], head_dim, sliding_window)
        if not self.past:
            return query.new_empty(batch, num_tokens, num_heads, value_dim), None
        # Zeros add nothing to the product of query and key; of a value they are cut off again.
        rows = [_widened(each, head_dim).transpose(1, 2).flatten(2) for each in (query, key, value)]
        attributes = {"num_heads": num_heads, "kv_num_heads": key.shape[1]}
        attributes["scale"] = float(scaling if scaling is not None else 1 / math.sqrt(key_dim))
        if sliding_window is not None:
            attributes["local_window_size"] = int(sliding_window)
        if softcap is not None:
            attributes["softcap"] = float(softcap)
        output = self._step(layer, rows, attributes)
        return output.reshape(batch, num_tokens, num_heads, head_dim)[..., :value_dim], None

    def _step(self, layer: int, rows: list[torch.Tensor], attributes: dict[str, Any]) -> torch.Tensor:
        """Return what the operator answers to rows [B, T, heads * size], and note the buffers after it."""
        past = self.past[layer]
        output, *present = torch.onnx.ops.symbolic_multi_out(
            "com.microsoft::GroupQueryAttention",
            (*rows, *past, self.seqlens_k, self.total_length),
            attrs=attributes,
            dtypes=[each.dtype for each in (rows[0], *past)],
            shapes=[each.shape for each in (rows[0], *past)],
            version=1,
        )
        self.present[layer] = tuple(present)
        return output


def _widened(heads: torch.Tensor, size: int) -> torch.Tensor:
    """Return heads [..., D] with zeros behind them up to `size`."""
    missing = size - heads.shape[-1]
    return torch.nn.functional.pad(heads, (0, missing)) if missing else heads


def _refuse_unknown(
    module: torch.nn.Module, attention_mask: torch.Tensor | None, dropout: float, others: dict[str, Any]
) -> None:
    kind = type(module).__name__
    if attention_mask is not None:
        raise ExportError(f"{kind}: builds an attention mask or bias of its own; the exported attention has none")
    if dropout:
        raise ExportError(f"{kind}: asks for dropout {dropout}; put the model into evaluation mode")
    if others.pop("is_causal", None) is False or getattr(module, "is_causal", None) is False:
        raise ExportError(f"{kind}: its attention is not causal; only causal decoders can be exported")
    unknown = sorted(
        name for name, value in others.items() if value is not None and value is not False and name not in _HARMLESS
    )
    if unknown:
        raise ExportError(
            f"{kind}: asks attention for {', '.join(unknown)}, which the exported attention does not do; "
            "models whose attention needs no more than scaling, sliding_window and softcap can be exported"
        )
