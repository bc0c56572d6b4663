"""Held-out text for the proof of a quantised model: what the untouched source says of it, kept as ids and numbers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from serving.export.held_out_texts import answers
from serving.export.reference import save_reference
from serving.export.refusing import refusing
from serving.export.source import Source
from serving.export_paths import ExportError
from serving.quality import PREFIX, Tensors, log_likelihoods
from serving.reference_file import metadata, opened

MAX_TOKENS = 4096  # of all texts of a decoder
MIN_TOKENS = 256  # fewer say little about what was lost
MAX_TEXT_TOKENS = 256
MAX_CHARS = 4_000_000  # that are looked at


@dataclass(frozen=True)
class HeldOutRows:
    """Rows that the model was not trained on, with `text` or `messages`, and in a few words where they are from."""

    rows: Sequence[dict[str, Any]]
    origin: str


def add_held_out(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: Source, held_out: HeldOutRows, folder: Path
) -> None:
    """Run `model`, whose attention is still its own, on held-out text and add it to `folder`/reference.safetensors.

    Raises ExportError where there is too little of it.
    """
    if source.task == "causal_lm":
        ids = _pieces(tokenizer, source, held_out)
        found = [_predictions(model, row) for row in ids]
        tensors = {
            "log_likelihoods": np.concatenate([each for each, _ in found]).astype(np.float32),
            "top": np.concatenate([top for _, top in found]).astype(np.int32),
        }
    else:
        ids, tensors = answers(model, tokenizer, source, held_out.rows, held_out.origin)
    tensors["ids"] = np.concatenate([np.array(row, np.int32) for row in ids])
    tensors["lengths"] = np.array([len(row) for row in ids], np.int32)
    _add(folder, tensors, held_out.origin)


def _add(folder: Path, tensors: Tensors, origin: str) -> None:
    with opened(folder) as file:
        kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
        stored = metadata(file)
    named = {f"{PREFIX}{name}": tensor for name, tensor in tensors.items()}
    save_reference(folder, kept | named, stored | {"held_out": {"origin": origin}})


def _pieces(tokenizer: PreTrainedTokenizerBase, source: Source, held_out: HeldOutRows) -> list[list[int]]:
    """Return pieces of MAX_TOKENS tokens in all, from everywhere in the text, each short enough to be read at once."""
    longest = min(MAX_TEXT_TOKENS, source.config.max_position_embeddings)
    whole = [ids[start : start + longest] for ids in _ids(tokenizer, held_out) for start in range(0, len(ids), longest)]
    pieces = [piece for piece in whole if len(piece) > 1]
    total = sum(map(len, pieces))
    if total < MIN_TOKENS:
        raise ExportError(
            f"--data: {held_out.origin} has {total} tokens, too few to tell what quantisation costs; accepted: "
            f"{MIN_TOKENS} or more; give a longer text with --data FILE"
        )
    places = np.unique(np.linspace(0, len(pieces) - 1, max(1, len(pieces) * min(MAX_TOKENS, total) // total)).round())
    return [pieces[place] for place in places.astype(int)]


def _ids(tokenizer: PreTrainedTokenizerBase, held_out: HeldOutRows) -> Iterator[list[int]]:
    """Yield the tokens of each chat, and of all plain texts one after the other."""
    lines, num_chars = [], 0
    for row in held_out.rows:
        if "messages" in row and tokenizer.chat_template is not None:
            with refusing(f"--data: {held_out.origin}: the model's chat template refuses a row", "mend that row"):
                ids = tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=False)
            yield ids
        elif "text" in row or "messages" in row:  # another says nothing
            lines.append(row["text"] if "text" in row else "\n".join(turn["content"] for turn in row["messages"]))
            num_chars += len(lines[-1])
        if num_chars > MAX_CHARS:
            break
    yield tokenizer("\n".join(lines), add_special_tokens=False, verbose=False)["input_ids"]


def _predictions(model: PreTrainedModel, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
    with torch.no_grad():
        logits_TV = model(input_ids=torch.tensor([ids])).logits[0].float().numpy()
    return log_likelihoods(logits_TV[:-1], ids[1:]), logits_TV[:-1].argmax(-1)
