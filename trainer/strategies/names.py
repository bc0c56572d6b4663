"""Names of weights and layers, as a config gives them."""

import difflib
from collections.abc import Iterable, Iterator

import torch
from transformers.pytorch_utils import Conv1D

LINEAR = (torch.nn.Linear, Conv1D)
CONVOLUTION = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)


def near(name: str, names: Iterable[str]) -> str:
    """Return the three names that are most like `name`, for an error."""
    return ", ".join(difflib.get_close_matches(name, list(names), n=3, cutoff=0.0)) or "none"


def layers(model: torch.nn.Module, kinds: tuple[type, ...], prefix: str = "") -> Iterator[tuple[str, torch.nn.Module]]:
    """Yield (name, module) of every layer of these kinds that is called when the model runs.

    torch's own attention reads the weights of the layers inside it and never calls them.
    """
    for name, module in model.named_children():
        dotted = f"{prefix}{name}"
        if isinstance(module, kinds):
            yield dotted, module
        if not isinstance(module, torch.nn.MultiheadAttention):
            yield from layers(module, kinds, f"{dotted}.")


def is_inside(name: str, modules: Iterable[str]) -> bool:
    """Return whether `name` is one of the modules, or stands inside one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)
