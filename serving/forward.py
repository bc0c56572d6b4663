"""One run of the graph: from requests and their rows of the cache to logits. numpy only.

Shape letters: S slots, N rows of a run, T tokens of a row, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from serving.kv_slots import cache_arrays
from serving.loras import lora_index, lora_names
from serving.request import Request
from serving.scheduler import Work, num_pending
from serving.session import Binding, Session

Feeds = dict[str, np.ndarray]


class Forward:
    """The cache in the session's memory, and the two kinds of run over it."""

    def __init__(self, session: Session, manifest: Mapping[str, Any], num_slots: int, max_length: int) -> None:
        vocab_size = manifest["vocab_size"]
        self._session = session
        self._cache = session.place(cache_arrays(manifest, num_slots, max_length))
        self._decode_feeds = _feeds(num_slots, 1)
        self._decode_logits_SV = np.empty((num_slots, 1, vocab_size), np.float32)
        self._decode_bindings: dict[int, Binding] = {}
        self._lora_index = partial(lora_index, manifest) if lora_names(manifest) else None
        self._chunk_logits_V = np.empty((1, 1, vocab_size), np.float32)

    def decode(self, works: Sequence[Work], occupants: Sequence[Request | None]) -> np.ndarray:
        """Compute one token of each work, which are in the order of their slots; return their logits [N, V].

        The result is valid until the next decode.
        """
        num_rows = works[-1].slot + 1
        feeds = self._decode_feeds
        for slot, request in enumerate(occupants[:num_rows]):
            # A row without work still runs. It computes token 0 at its own next position, which nobody reads before
            # it is written again: an empty row at 0, an unfinished prompt where its next chunk begins.
            feeds["input_ids"][slot] = 0
            feeds["seqlens_k"][slot] = 0 if request is None else request.num_computed
        for work in works:
            feeds["input_ids"][work.slot] = _pending_ids(work.request, 1)
            if self._lora_index is not None:
                feeds["lora_index"][work.slot] = self._lora_index(work.request.lora)
        feeds["position_ids"][:num_rows, 0] = feeds["seqlens_k"][:num_rows]
        feeds["total_length"][...] = feeds["seqlens_k"][:num_rows].max() + 1
        self._session.run(self._decode_binding(num_rows))
        if len(works) == num_rows:
            return self._decode_logits_SV[:num_rows, 0]
        return self._decode_logits_SV[[work.slot for work in works], 0]

    def chunk(self, work: Work) -> np.ndarray:
        """Compute several tokens of one row; return the last one's logits [1, V], valid until the next chunk.

        One row to a run: over a past, the attention operator takes more than one new token in batches of 1 only.
        """
        start, end = work.request.num_computed, work.request.num_computed + work.num_tokens
        feeds = _feeds(1, work.num_tokens)
        feeds["input_ids"][0] = _pending_ids(work.request, work.num_tokens)
        feeds["position_ids"][0] = np.arange(start, end)
        feeds["seqlens_k"][0] = end - 1
        feeds["total_length"][...] = end
        feeds["keep"][0] = work.num_tokens - 1
        if self._lora_index is not None:
            feeds["lora_index"][0] = self._lora_index(work.request.lora)
        self._session.run(self._session.bind(feeds, self._chunk_logits_V, self._cache, work.slot))
        return self._chunk_logits_V[:, 0]

    def _decode_binding(self, num_rows: int) -> Binding:
        if num_rows not in self._decode_bindings:
            shared = ("total_length", "keep")  # the others have a row for each slot
            feeds = {name: each if name in shared else each[:num_rows] for name, each in self._decode_feeds.items()}
            logits = self._decode_logits_SV[:num_rows]
            self._decode_bindings[num_rows] = self._session.bind(feeds, logits, self._cache, first_slot=0)
        return self._decode_bindings[num_rows]


def whole_texts(
    session: Session,
    manifest: Mapping[str, Any],
    texts: Sequence[Sequence[int]],
    loras: Sequence[str | None] | None = None,
) -> np.ndarray:
    """Return the logits [N, T, V] of whole texts in one run, the shorter ones padded right with meaningless logits.

    `loras` names the adapter of each, None all by the base alone.
    """
    num_rows, num_tokens = len(texts), max(map(len, texts))
    feeds = _feeds(num_rows, num_tokens)
    for row, ids in enumerate(texts):
        feeds["input_ids"][row, : len(ids)] = ids
        feeds["seqlens_k"][row] = len(ids) - 1
    feeds["lora_index"][:] = [lora_index(manifest, name) for name in loras or [None] * num_rows]
    feeds["position_ids"][:] = np.arange(num_tokens)
    feeds["total_length"][...] = num_tokens
    feeds["keep"] = np.arange(num_tokens)
    logits_NTV = np.empty((num_rows, num_tokens, manifest["vocab_size"]), np.float32)
    cache = session.place(cache_arrays(manifest, num_rows, num_tokens))
    session.run(session.bind(feeds, logits_NTV, cache, first_slot=0))
    return logits_NTV


def _feeds(num_rows: int, num_tokens: int) -> Feeds:
    """Return the graph's inputs but the cache, zeroed."""
    return {
        "input_ids": np.zeros((num_rows, num_tokens), np.int64),
        "position_ids": np.zeros((num_rows, num_tokens), np.int64),
        "seqlens_k": np.zeros(num_rows, np.int32),  # each row's length after the run, less one
        "total_length": np.zeros((), np.int32),  # the longest row's length after the run
        "keep": np.zeros(1, np.int64),  # which of a row's tokens get logits, the same for all rows
        "lora_index": np.zeros(num_rows, np.int64),  # which adapter a row takes, where the graph has some
    }


def _pending_ids(request: Request, num_tokens: int) -> list[int]:
    """Return the next `num_tokens` tokens that have no keys and values yet."""
    if num_pending(request) == 1:
        return (request.output_ids or request.prompt_ids)[-1:]
    return request.prompt_ids[request.num_computed : request.num_computed + num_tokens]
