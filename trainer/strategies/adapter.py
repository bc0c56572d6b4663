"""Bottleneck adapters (arXiv:1902.00751): small layers after sub-layers of a frozen model.

PEFT has none, so these stand beside it: each is a child `adapter` of the layer that it follows, run by a hook, and so
the base keeps its names and its own files.
"""

from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch

from serving.directory import BadInput
from trainer.config import Adapter
from trainer.strategies.heads import freeze, output_layer, task_head, train_head
from trainer.strategies.names import CONVOLUTION, LINEAR, is_inside, layers, near

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": torch.nn.functional.relu,
    "gelu": torch.nn.functional.gelu,
    "silu": torch.nn.functional.silu,
    "tanh": torch.tanh,
}


class Bottleneck(torch.nn.Module):
    """Down to `size` channels, a non-linearity, up again, added to the input: exactly the input until `up` learns."""

    def __init__(self, layer: torch.nn.Module, size: int, activation: str) -> None:
        super().__init__()
        kind, width = _projection(layer)
        self.down, self.up = kind(width, size), kind(size, width)
        torch.nn.init.zeros_(self.up.weight)
        torch.nn.init.zeros_(self.up.bias)
        self.size, self.activation = size, activation
        self.to(layer.weight.device)

    def forward(self, output: torch.Tensor) -> torch.Tensor:
        return output + self.up(ACTIVATIONS[self.activation](self.down(output)))


def apply_adapter(model: torch.nn.Module, config: Adapter) -> torch.nn.Module:
    """Freeze the model and put an adapter after each layer that `after` means; these and the task's head learn.

    At step 0 the result equals the model bit for bit. Raises BadInput where `after` means no layer.
    """
    freeze(model)
    train_head(model)
    insert(model, _places(model, config.after), size=config.size, activation=config.activation)
    return model


def insert(model: torch.nn.Module, names: list[str], *, size: int, activation: str) -> None:
    """Put an adapter after each of the named layers."""
    for name in names:
        layer = model.get_submodule(name)
        layer.adapter = Bottleneck(layer, size, activation)
        layer.register_forward_hook(_adapt)


def _adapt(layer: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    return layer.adapter(output)


def _projection(layer: torch.nn.Module) -> tuple[Callable[..., torch.nn.Module], int]:
    """How to map channels to channels where this layer's output goes, and how many it has."""
    for kind in CONVOLUTION:
        if isinstance(layer, kind):
            return partial(kind, kernel_size=1), layer.out_channels
    return torch.nn.Linear, layer.out_features if isinstance(layer, torch.nn.Linear) else layer.nf


def _places(model: torch.nn.Module, after: list[str]) -> list[str]:
    """The names of the layers that `after` means, each once, in the order of the model."""
    head = [*task_head(model), *(name for name, part in model.named_modules() if part is output_layer(model))]
    body = {name: layer for name, layer in layers(model, (*LINEAR, *CONVOLUTION)) if not is_inside(name, head)}
    found: set[str] = set()
    for wanted in after:
        if wanted in ("attention", "mlp"):
            names = _outputs(model, body, wanted)
            missing = f"{type(model).__name__} has no {wanted} that ends in a linear layer; name layers instead"
        else:
            names = [name for name in body if fnmatchcase(name, wanted)]
            missing = "fits no linear or convolution layer outside the head; near to it"
        if not names:
            raise BadInput(f"strategy.after: {wanted!r} found; {missing}: {near(wanted, body)}")
        found |= set(names)
    return [name for name in body if name in found]


def _outputs(model: torch.nn.Module, body: dict[str, torch.nn.Module], wanted: str) -> list[str]:
    """The last layer, as wide as the model, of each attention, or of the rest of each block."""
    width = getattr(getattr(model, "config", None), "hidden_size", None)
    last: dict[tuple[str, str], str] = {}
    for name, layer in body.items():
        block, inside = _in_block(model, name)
        is_attention = any(word in inside.lower() for word in ("attn", "attention"))
        if block and is_attention == (wanted == "attention") and _projection(layer)[1] == width:
            last[block, inside.partition(".")[0] if is_attention else ""] = name
    return list(last.values())


def _in_block(model: torch.nn.Module, name: str) -> tuple[str, str]:
    """The innermost repeated block around a layer ("" where none is), and the layer's name in it."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        if isinstance(model.get_submodule(".".join(parts[: end - 1])), torch.nn.ModuleList):
            return ".".join(parts[:end]), ".".join(parts[end:])
    return "", name
