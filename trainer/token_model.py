"""How a model over tokens is run: documents end to end, layers lean, the loss in its head, where that changes nothing.

Which models can do so is not a list of names: it is tried out on the model itself, before step 0.
"""

from dataclasses import dataclass

import numpy as np
import torch

from trainer import attention, lm_head
from trainer.lean import make_lean
from trainer.lm_head import Head
from trainer.losses import chunk_rows, cross_entropy_sum
from trainer.packing import IGNORED, Batch, Example, Row, collate_one_by_one, collate_packed

_CLOSE = 1e-4  # of the largest output: more than rounding makes, less than a document that sees another
_LENGTHS = (5, 3, 7)  # tokens of the documents that a model is tried out with


@dataclass(frozen=True)
class TokenModel:
    """What was found out about a model. `first_position` is None where it cannot keep packed documents apart."""

    first_position: int | None = 0
    head: Head | None = None

    def collate(self, rows: list[Row], pad_id: int) -> Batch:
        """Return the examples of the rows packed end to end; padded, where the model cannot keep them apart."""
        if self.first_position is None:
            return collate_one_by_one(rows, pad_id)
        return collate_packed(rows, self.first_position)

    @property
    def logits_at_once(self) -> int | None:
        """The most rows of logits that the loss holds; None: all."""
        return None if self.head is None else chunk_rows(self.head.linear.out_features)

    def without(self) -> list[str]:
        """Return what the model cannot have, and what it costs, a line each."""
        said = []
        if self.first_position is None:
            said.append("model: it cannot keep packed documents apart, so each takes a row of its own, padded: slower")
        if self.head is None:
            said.append("model: its head is more than a linear layer, so the loss needs all logits: more memory")
        return said

    def loss_sum(self, model: torch.nn.Module, inputs: Batch, targets: torch.Tensor) -> torch.Tensor:
        """Run the model, wrapped or not; return the summed cross-entropy of `targets`, a scalar in fp32."""
        head = self.head
        if head is None:
            return cross_entropy_sum(model(**inputs).logits, targets)
        with head.doing(lambda hidden: head.loss_sum(hidden, targets)):
            return model(**inputs).logits


def tried_out(model: torch.nn.Module, max_length: int) -> TokenModel:
    """Return how to run the model on rows of documents of at most `max_length` tokens.

    Its attention is ours then, and its layers are lean, where that changes nothing. Its weights and mode stay.
    """
    documents = _documents(model, max_length)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            alone = _alone(model, documents)
            undo = make_lean(model)
            if not _is_same(_alone(model, documents), alone):
                undo()
            first_position = _first_position(model, documents, alone)
            head = lm_head.find(model, {"input_ids": collate_packed([documents[:1]])["input_ids"]})
    finally:
        model.train(was_training)
    return TokenModel(first_position, head)


def _alone(model: torch.nn.Module, documents: Row) -> torch.Tensor:
    """What the model returns for each document without others, end to end."""
    return torch.cat([model(input_ids=collate_packed([[d]])["input_ids"])[0] for d in documents], 1)


def _first_position(model: torch.nn.Module, documents: Row, alone: torch.Tensor) -> int | None:
    """The position of a document's first token with which packed documents give what each gives alone, if any does.

    RoBERTa and its kin count from the pad token's id on.
    """
    set_attention = getattr(model, "set_attn_implementation", None)
    if set_attention is None:
        return None
    before = model.config._attn_implementation
    set_attention(attention.NAME)
    for first in (0, (getattr(model.config, "pad_token_id", None) or 0) + 1):
        batch = collate_packed([documents], first)
        del batch["targets"]
        try:
            packed = model(**batch)[0]
        except Exception:  # whatever a model raises at such inputs, it cannot take them
            continue
        if _is_same(packed, alone):
            return first
    set_attention(before)
    return None


def _is_same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether they differ by rounding at most. Zeros prove nothing."""
    if found.shape != expected.shape:
        return False
    highest = expected.abs().max()
    return bool(highest > 0) and bool((found - expected).abs().max() <= _CLOSE * highest)


def _documents(model: torch.nn.Module, max_length: int) -> Row:
    """Documents of tokens drawn with a seed of their own, none of them the pad token.

    One is longer than the model's attention window, if that is shorter than the documents of the run: a model that
    says only in its mask what the window hides is found out.
    """
    config = model.config.get_text_config()
    windows = [value for name, value in config.to_dict().items() if _is_window(name, value) and value < max_length]
    lengths = [min(length, max_length) for length in _LENGTHS] + [min(max_length, 2 * window) for window in windows]
    pad_id = getattr(config, "pad_token_id", None)
    random = np.random.default_rng(0)
    entries = np.arange(model.get_input_embeddings().num_embeddings)
    drawn = [random.choice(entries[entries != pad_id], length) for length in lengths]
    return [Example(ids, np.full(len(ids), IGNORED)) for ids in drawn]


def _is_window(name: str, value: object) -> bool:
    return isinstance(value, int) and value > 0 and any(word in name for word in ("window", "local", "chunk"))
