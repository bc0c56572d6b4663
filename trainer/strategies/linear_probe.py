"""Only the task's head learns."""

import torch

from trainer.config import LinearProbe
from trainer.strategies.heads import freeze, output_layer, train_head, untie


def apply_linear_probe(model: torch.nn.Module, config: LinearProbe) -> torch.nn.Module:
    """Let only the head learn: see `task_head`; of a language model its output layer.

    An output layer that shares weights with the input embedding is untied first, or the embedding would learn too.
    """
    freeze(model)
    layer = output_layer(model)
    if layer is None:
        train_head(model)
    else:
        untie(model)
        layer.requires_grad_(True)
    return model
