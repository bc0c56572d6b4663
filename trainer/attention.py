"""Attention within segments: the documents of a packed row, laid end to end, none of which sees another.

Segments come as the attention mask, int32 [1, 1, 1, S + 1]: where each ends, 0 first. transformers hands a 4-D mask on
untouched, so every model with its attention interface brings ours here; any other mask goes where it went before.

Shape letters: N tokens of all segments, H query heads, K key and value heads, G = H / K, D head width, S segments,
Q and J the queries and keys of one block.

On a CPU a block of queries is multiplied with the keys that it may see and no others. Beside torch's flash kernel,
segment by segment, that took two thirds of the time for documents of 187 tokens on average, forward and back, in fp32
and in bf16 (with scores in fp32 here as there), and as long for one of 2,048.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import varlen
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "trivet_segments"

_BLOCK = 128  # queries: below, products get too small to be fast; above, more is computed for nothing
_KEPT_LENGTH = 512  # the attention weights of longer segments are computed again in the backward pass

# What models pass along that changes nothing here: the segments and the module say all of it.
_HARMLESS = frozenset({"position_ids", "use_cache", "cache_position", "logits_to_keep", "return_dict"})


@dataclass(frozen=True)
class Rule:
    """Which keys of its segment a query sees, and how scores become weights."""

    scale: float
    is_causal: bool
    window: int | None  # keys at this distance or farther are not seen
    dropout: float


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Return attention [1, N, H, D] of query [1, H, N, D], key and value [1, K, N, D] (transformers' interface).

    Raises NotImplementedError for a keyword that would change the result and is not known here.
    """
    if attention_mask is None or attention_mask.dtype != torch.int32:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, sliding_window=sliding_window,
            **others,
        )  # fmt: skip
    unknown = sorted(k for k, v in others.items() if v is not None and v is not False and k not in _HARMLESS)
    if unknown:
        raise NotImplementedError(f"attention with {', '.join(unknown)} is not known to work in segments")
    rule = Rule(
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        is_causal=bool(getattr(module, "is_causal", True) if is_causal is None else is_causal),
        window=sliding_window,
        dropout=dropout,
    )
    assert query.shape[0] == 1, "segments lie end to end in one row"
    assert query.shape[2] == key.shape[2], "segments are attended to whole, without a cache"
    ends = attention_mask.flatten()
    output = _varlen(query, key, value, ends, rule) if query.is_cuda else _on_cpu(query, key, value, ends, rule)
    return output, None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)


def _varlen(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ends: torch.Tensor, rule: Rule):
    if rule.dropout:
        raise NotImplementedError("attention with dropout is not known to work in segments on this device")
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    longest = int(ends.diff().max())
    reach = -1 if rule.window is None else rule.window - 1
    window = (reach, 0 if rule.is_causal else reach)
    output = varlen.varlen_attn(
        q, k, v, ends, ends, longest, longest, scale=rule.scale, window_size=window, enable_gqa=True
    )
    return output[None]


@torch.compiler.disable  # its loop runs over the segments of a batch: compiled, every batch would need code of its own
def _on_cpu(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ends: torch.Tensor, rule: Rule):
    # Dropout draws from a seed of its own, so that the backward pass can draw the same again.
    seed = int(torch.randint(2**62, ())) if rule.dropout else 0
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (tensor.to(torch.get_autocast_dtype("cpu")) for tensor in (query, key, value))
    grouped = query[0].unflatten(0, (key.shape[1], -1))
    with torch.autocast("cpu", enabled=False):  # scores stay in fp32
        return _Segments.apply(grouped, key[0], value[0], ends.tolist(), rule, seed, torch.is_grad_enabled())


@dataclass(frozen=True)
class _Block:
    """Queries start:stop, and the keys first:last that any of them sees. `kept`: so are its attention weights."""

    start: int
    stop: int
    first: int
    last: int
    kept: bool


class _Segments(torch.autograd.Function):
    """Attention of query [K, G, N, D], key and value [K, N, D] as [1, N, K * G, D]."""

    @staticmethod
    def forward(ctx, query, key, value, ends, rule, seed, learning):
        blocks = list(_blocks(ends, rule))
        output = query.new_empty(query.shape[2], *query.shape[:2], query.shape[3]).permute(1, 2, 0, 3)
        kept = []
        for index, block in enumerate(blocks):
            weights = _weights(query, key, block, rule)
            if block.kept and learning:
                kept.append(weights)
            dropped = weights if not rule.dropout else weights * _keep(weights, rule, seed + index)
            output[:, :, block.start : block.stop] = torch.bmm(dropped, value[:, block.first : block.last]).view(
                *query.shape[:2], -1, query.shape[3]
            )
        ctx.save_for_backward(query, key, value, *kept)
        ctx.blocks, ctx.rule, ctx.seed = blocks, rule, seed
        return output.permute(2, 0, 1, 3).flatten(1, 2)[None]

    @staticmethod
    def backward(ctx, grad_output):
        query, key, value, *kept = ctx.saved_tensors
        rule = ctx.rule
        grad = grad_output[0].unflatten(1, query.shape[:2]).permute(1, 2, 0, 3)
        grad_query = torch.empty_like(query)
        # Several blocks add to the same keys: in fp32 at least, whatever the model computes in.
        exact = torch.promote_types(query.dtype, torch.float32)
        grad_key, grad_value = (torch.zeros_like(tensor, dtype=exact) for tensor in (key, value))
        for index, block in enumerate(ctx.blocks):
            queries, keys = slice(block.start, block.stop), slice(block.first, block.last)
            weights = kept.pop(0) if block.kept else _weights(query, key, block, rule)
            block_grad = grad[:, :, queries].flatten(1, 2)
            grad_weights = torch.bmm(block_grad, value[:, keys].transpose(1, 2))
            dropped = weights
            if rule.dropout:
                keep = _keep(weights, rule, ctx.seed + index)
                dropped, grad_weights = weights * keep, grad_weights * keep
            grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype).mul_(rule.scale)
            grad_value[:, keys] += torch.bmm(dropped.transpose(1, 2), block_grad)
            grad_key[:, keys] += torch.bmm(grad_scores.transpose(1, 2), query[:, :, queries].flatten(1, 2))
            grad_query[:, :, queries] = torch.bmm(grad_scores, key[:, keys]).view(*query.shape[:2], -1, query.shape[3])
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), None, None, None, None


def _blocks(ends: list[int], rule: Rule) -> Iterator[_Block]:
    for segment_start, segment_stop in itertools.pairwise(ends):
        length = segment_stop - segment_start
        if not length:
            continue
        size = -(-length // max(1, round(length / _BLOCK)))
        for start in range(segment_start, segment_stop, size):
            stop = min(start + size, segment_stop)
            reach = length if rule.window is None else rule.window - 1
            first = max(segment_start, start - reach)
            last = stop if rule.is_causal else min(segment_stop, stop + reach)
            yield _Block(start, stop, first, last, kept=length <= _KEPT_LENGTH)


def _weights(query: torch.Tensor, key: torch.Tensor, block: _Block, rule: Rule) -> torch.Tensor:
    """The attention weights [K, G * Q, J] of a block, in the query's type, from scores in fp32 at least."""
    queries = query[:, :, block.start : block.stop].flatten(1, 2)
    keys = key[:, block.first : block.last]
    if query.dtype in (torch.bfloat16, torch.float16):
        queries, keys = queries.float(), keys.float()
    scores = torch.bmm(queries, keys.transpose(1, 2)).mul_(rule.scale)
    _hide(scores.unflatten(1, (query.shape[1], -1)), block, rule)
    return torch.softmax(scores, -1, out=scores).to(query.dtype)


def _hide(scores: torch.Tensor, block: _Block, rule: Rule) -> None:
    """Set the scores [K, G, Q, J] of keys that a query does not see to minus infinity."""
    if rule.window is None:
        if rule.is_causal:
            size = block.stop - block.start
            scores[..., block.start - block.first :] += torch.full((size, size), -torch.inf).triu_(1)
        return
    distance = torch.arange(block.start, block.stop)[:, None] - torch.arange(block.first, block.last)
    hidden = distance.abs() >= rule.window
    scores.masked_fill_(hidden | (distance < 0) if rule.is_causal else hidden, -torch.inf)


def _keep(weights: torch.Tensor, rule: Rule, seed: int) -> torch.Tensor:
    """The factor of each weight under dropout: 0, or what makes up for those that are 0."""
    generator = torch.Generator().manual_seed(seed)
    return torch.empty_like(weights).bernoulli_(1 - rule.dropout, generator=generator).div_(1 - rule.dropout)
