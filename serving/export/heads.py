"""What differs between the tasks over texts: the model's class, what its graph says, and what it was trained to answer.

`graph` is traced, over a right-padded batch; `source` is the plain call of the untouched model on one text, alone.
Shape letters: B rows, T tokens, K places that are kept, L labels, R answers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from serving.export.pooling import Pooling

Inputs = dict[str, torch.Tensor]

# How transformers loads the models of each task that can be exported.
AUTO_CLASSES = {
    "causal_lm": AutoModelForCausalLM,
    "classification": AutoModelForSequenceClassification,
    "token_classification": AutoModelForTokenClassification,
    "masked_lm": AutoModelForMaskedLM,
    "embedding": AutoModel,
}


def accepted_classes(config: PreTrainedConfig) -> dict[str, list[str]]:
    """Return the names of transformers' classes for a config, by task."""
    found: dict[str, list[str]] = {}
    for task, auto in AUTO_CLASSES.items():
        if type(config) in auto._model_mapping:
            classes = auto._model_mapping[type(config)]
            found[task] = [each.__name__ for each in (classes if isinstance(classes, tuple) else (classes,))]
    return found


@dataclass(frozen=True)
class Head:
    """`per`: what each answer is about. `graph` and `source` are given the model, its inputs and how it is pooled."""

    graph: Callable[[PreTrainedModel, Inputs, Pooling | None], torch.Tensor]
    source: Callable[[PreTrainedModel, Inputs, Pooling | None], torch.Tensor]


def _logits(model: PreTrainedModel, inputs: Inputs, pooling: Pooling | None) -> torch.Tensor:
    """Logits [B, L] of texts."""
    return model(**inputs).logits


def _token_logits(model: PreTrainedModel, inputs: Inputs, pooling: Pooling | None) -> torch.Tensor:
    """Logits [T, L] of one text's tokens."""
    return model(**inputs).logits[0]


def _kept_logits(model: PreTrainedModel, inputs: Inputs, pooling: Pooling | None) -> torch.Tensor:
    """Logits [K, vocabulary] at the places `keep`, counted through the batch: the head never sees the others."""
    inputs = dict(inputs)
    keep = inputs.pop("keep")

    def only_kept(body: torch.nn.Module, arguments: Any, output: Any) -> Any:
        output["last_hidden_state"] = output[0].flatten(0, 1)[keep][None]
        return output

    hook = model.base_model.register_forward_hook(only_kept)
    try:
        return model(**inputs).logits[0]
    finally:
        hook.remove()


def _plainly_kept_logits(model: PreTrainedModel, inputs: Inputs, pooling: Pooling | None) -> torch.Tensor:
    inputs = dict(inputs)
    keep = inputs.pop("keep")
    return model(**inputs).logits[0, keep]


def _vectors(model: PreTrainedModel, inputs: Inputs, pooling: Pooling | None) -> torch.Tensor:
    assert pooling is not None, "opened without its pooling"
    return pooling(model(**inputs).last_hidden_state, inputs["attention_mask"])


def _vector(model: PreTrainedModel, inputs: Inputs, pooling: Pooling | None) -> torch.Tensor:
    """The vector [1, D] of one text, by hand."""
    assert pooling is not None, "opened without its pooling"
    hidden_TD = model(**inputs).last_hidden_state[0]
    match pooling.mode:
        case "cls":
            vector_D = hidden_TD[0]
        case "lasttoken":
            vector_D = hidden_TD[-1]
        case "mean":
            vector_D = hidden_TD.mean(0)
    return (vector_D / vector_D.norm() if pooling.normalize else vector_D)[None]


HEADS = {
    "classification": Head(graph=_logits, source=_logits),
    "token_classification": Head(graph=_logits, source=_token_logits),
    "masked_lm": Head(graph=_kept_logits, source=_plainly_kept_logits),
    "embedding": Head(graph=_vectors, source=_vector),
}
