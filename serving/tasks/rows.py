"""Texts as rows of tokens, as in training, and what a graph says of them: padded where several run at once.

Shape letters: N rows, T tokens, R answers a row (one; a token each; a mask each), L numbers an answer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from serving.directory import BadInput
from serving.session import Session
from serving.text import Text


@dataclass(frozen=True)
class Row:
    """The token ids of a text or of a part of it, and whether something was cut off.

    `types` says which text of a pair each token is of, None where the graph does not ask. `offsets` are the characters
    that each token stands for, where words are asked about.
    """

    ids: list[int]
    truncated: bool
    types: list[int] | None = None
    offsets: list[tuple[int, int]] | None = None


def encode_row(text: Text, manifest: Mapping[str, Any], content: str, pair: str | None = None) -> Row:
    """Return the tokens of a text, or of a pair, as in training: cut at `max_length`, an empty one as its stand-in.

    It is cut, not refused, because training and evaluation cut it: the reported accuracy is of cut texts.
    Raises BadInput.
    """
    pairs = manifest.get("text_pair", "never")
    if pair is None and pairs == "always":
        raise BadInput("text_pair: is missing; this model judges pairs of texts: give the second one as text_pair")
    if pair is not None and pairs == "never":
        raise BadInput("text_pair: found, but this model takes single texts; leave it out")
    if pair is not None and manifest.get("pair_separator_id") is not None:
        return _joined(text, manifest, content, pair)
    ids, types, is_cut = text.encode_pair(content, pair, manifest["max_length"])
    if not ids and not manifest["empty_text_ids"]:
        raise BadInput("text: is empty, and this model's tokenizer has no end token to stand for it; leave it out")
    if not ids:
        ids, types = list(manifest["empty_text_ids"]), [0] * len(manifest["empty_text_ids"])
    return Row(ids, is_cut, types if "token_type_ids" in manifest["inputs"] else None)


def _joined(text: Text, manifest: Mapping[str, Any], content: str, pair: str) -> Row:
    """Return a pair with the end token between, for a tokenizer that puts none there; the longer text loses its end."""
    first, second = (text.encode(each, add_special_tokens=False) for each in (content, pair))
    room = manifest["max_length"] - 1
    kept = first[: max(room - room // 2, room - len(second))]
    ids = [*kept, manifest["pair_separator_id"], *second[: room - len(kept)]]
    return Row(ids, len(ids) < len(first) + 1 + len(second))


def run_rows(session: Session, manifest: Mapping[str, Any], rows: Sequence[Row]) -> list[np.ndarray]:
    """Return what the graph says of several rows, padded right, in one run: [R, L] for each, in fp32."""
    if not rows:
        return []
    task = manifest["task"]
    logits = np.asarray(session.compute(feeds_of(manifest, rows))[0], np.float32)
    if task == "token_classification":
        return [logits_TL[: len(row.ids)] for row, logits_TL in zip(rows, logits, strict=True)]
    if task == "masked_lm":
        return np.split(logits, list(accumulate(len(masks(manifest, row)) for row in rows))[:-1])
    return [logits_L[None] for logits_L in logits]


def masks(manifest: Mapping[str, Any], row: Row) -> list[int]:
    """Return the places in a row that are asked about: those of the mask token."""
    return [place for place, token in enumerate(row.ids) if token == manifest["mask_token_id"]]


def feeds_of(manifest: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, np.ndarray]:
    """Return the inputs of the graph for several rows, the shorter ones padded right.

    `keep` are the places that are asked about, counted through the whole batch, row after row.
    """
    names, longest = manifest["inputs"], max(len(row.ids) for row in rows)
    feeds = {name: np.zeros((len(rows), longest), np.int64) for name in names if name != "keep"}
    feeds["input_ids"][:] = manifest["pad_token_id"]
    for index, row in enumerate(rows):
        feeds["input_ids"][index, : len(row.ids)] = row.ids
        feeds["attention_mask"][index, : len(row.ids)] = 1
        if "token_type_ids" in feeds and row.types is not None:
            feeds["token_type_ids"][index, : len(row.ids)] = row.types
    if "keep" in names:
        asked = [index * longest + place for index, row in enumerate(rows) for place in masks(manifest, row)]
        feeds["keep"] = np.array(asked, np.int64)
    return feeds
