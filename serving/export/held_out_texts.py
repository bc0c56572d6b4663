"""What the untouched source says of held-out texts that are classified, tagged, filled in or embedded.

Shape letters: R answers of all texts, L numbers an answer, K masked tokens of a text.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from serving.export.heads import HEADS, Inputs
from serving.export.questions import question_of
from serving.export.rows import input_names, write_settings
from serving.export.source import Source
from serving.export_paths import ExportError
from serving.quality import Tensors, log_likelihoods
from serving.tasks.classifier import NUMBER, SINGLE

MAX_TEXTS = 1000
MIN_TEXTS = 100  # of fewer, one text is more than the percent that a drop of accuracy may be
MAX_TEXT_TOKENS = 256
MASK_EVERY = 7  # tokens


def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    source: Source,
    rows: Sequence[dict[str, Any]],
    origin: str,
) -> tuple[list[list[int]], Tensors]:
    """Return the texts as token ids, and what `model` says of them. Raises ExportError where they do not fit it."""
    if getattr(source, "problem", None) == NUMBER:
        raise ExportError("--quantize: the cost of quantising a model of numbers cannot be told yet; leave it out")
    settings = write_settings(model, tokenizer, source, Path())
    settings["token_types"] = "token_type_ids" in input_names(model, tokenizer, source)
    chosen = [(row, found) for row in _spread(rows) if (found := _inputs(tokenizer, source, settings, row))]
    if len(chosen) < MIN_TEXTS:
        raise ExportError(
            f"--data: {origin} has {len(chosen)} texts for this model, too few to tell what quantisation costs; "
            f"accepted: {MIN_TEXTS} or more; give more with --data FILE"
        )
    ids = [inputs["input_ids"][0].tolist() for _, inputs in chosen]
    tensors: Tensors = {}
    if settings["token_types"]:
        tensors["types"] = np.concatenate([inputs["token_type_ids"][0].numpy() for _, inputs in chosen])
    if source.task == "masked_lm":
        return ids, tensors | _masked_tokens(model, source, [inputs for _, inputs in chosen])
    tensors["outputs"] = np.concatenate([_said(model, source, inputs) for _, inputs in chosen])
    _check_labels(source, [row for row, _ in chosen], origin)
    labels = [_number(source, row) for row, _ in chosen]
    if None not in labels:
        tensors["labels"] = np.array(labels, np.int32)
    return ids, tensors


def _spread(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = [row for row in rows if row.get("text", "").strip()]
    return [rows[place] for place in np.unique(np.linspace(0, len(rows) - 1, MAX_TEXTS).astype(int))] if rows else []


def _inputs(
    tokenizer: PreTrainedTokenizerBase, source: Source, settings: dict[str, Any], row: dict[str, Any]
) -> Inputs | None:
    """Return what the model is given for a row, None where nothing of it is left."""
    pairs = settings.get("text_pair", "never")
    pair = row.get("text_pair") if pairs != "never" else None
    if pair is None and pairs == "always":
        raise ExportError("--data: rows without text_pair, but this model judges pairs of texts; give both")
    length = min(settings["max_length"], MAX_TEXT_TOKENS)
    found = question_of(tokenizer, settings, row["text"], pair, length).rows
    if not found or source.task != "masked_lm":
        return found[0] if found else None
    ids = found[0]["input_ids"][0]
    plain = [place for place, token in enumerate(ids.tolist()) if token not in tokenizer.all_special_ids]
    keep = torch.tensor(plain[MASK_EVERY // 2 :: MASK_EVERY])
    if not len(keep):
        return None
    masked = ids.clone()
    masked[keep] = settings["mask_token_id"]
    return found[0] | {"input_ids": masked[None], "keep": keep, "targets": ids[keep]}


def _masked_tokens(model: PreTrainedModel, source: Source, rows: list[Inputs]) -> Tensors:
    targets = [inputs.pop("targets").numpy() for inputs in rows]
    logits = [_said(model, source, inputs) for inputs in rows]
    found = [log_likelihoods(*each) for each in zip(logits, targets, strict=True)]
    return {
        "targets": np.concatenate(targets).astype(np.int32),
        "log_likelihoods": np.concatenate(found).astype(np.float32),
        "top": np.concatenate([each_KV.argmax(-1) for each_KV in logits]).astype(np.int32),
    }


def _said(model: PreTrainedModel, source: Source, inputs: Inputs) -> np.ndarray:
    """Return what the model says of one text, [R, L]."""
    with torch.no_grad():
        return HEADS[source.task].source(model, inputs, source.pooling).float().numpy()


def _check_labels(source: Source, rows: list[dict[str, Any]], origin: str) -> None:
    """Raise ExportError for right answers that the model cannot give: it would be measured without them."""
    if source.task != "classification" or source.problem != SINGLE:
        return
    unknown = {str(row["label"]) for row in rows if row.get("label") is not None and _number(source, row) is None}
    if unknown:
        named = ", ".join(sorted(unknown)[:5])
        raise ExportError(
            f"--data: {origin} has labels that the model does not know: {named}; accepted: "
            f"{', '.join(source.labels)}, their numbers, or rows without a label"
        )


def _number(source: Source, row: dict[str, Any]) -> int | None:
    """Return the place of the row's label among the model's, where that gives one label a text and it is one name of
    these or its number.
    """
    label = row.get("label")
    names = source.labels if source.task == "classification" and source.problem == SINGLE else []
    if str(label) in names:
        return names.index(str(label))
    if isinstance(label, int) and 0 <= label < len(names):
        return int(label)
    return None
