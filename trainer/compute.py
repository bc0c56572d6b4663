"""How the forward pass is computed, where the config asks for another way: activations recomputed, code compiled."""

import os
import shutil
import sys

import torch

from serving.directory import BadInput
from trainer.config import Batch


def set_up(model: torch.nn.Module, config: Batch) -> None:
    """Make the model compute as the config says. Raises BadInput where the model, or this machine, cannot."""
    if config.activation_checkpointing:
        _recompute_activations(model)
    if config.compile:
        _check_compiler()
        model.compile()  # in place: names stay, and nothing is wrapped; code is made where it first runs


def _recompute_activations(model: torch.nn.Module) -> None:
    if not getattr(model, "supports_gradient_checkpointing", False):
        kind = type(model).__name__
        raise BadInput(f"batch.activation_checkpointing: true found, but {kind} cannot; leave it out for this model")
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    # Only the other, reentrant kind needs gradients of the embedding's output to reach what lies behind frozen weights.
    model.disable_input_require_grads()


def _check_compiler() -> None:
    """Raise BadInput where torch.compile would find no compiler, as it would after the data was read."""
    if torch.cuda.is_available():
        return  # Triton brings its own
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        raise BadInput(f"batch.compile: true found, but no C++ compiler ({compiler}); install one, or leave it out")
