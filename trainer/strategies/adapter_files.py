"""Bottleneck adapters as files, laid out as PEFT lays out its own: what they learned, and the head beside them."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from serving.directory import DirectoryError
from trainer.strategies.adapter import Bottleneck, insert
from trainer.strategies.heads import task_head
from trainer.strategies.names import is_inside

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # the names that PEFT gives its own
_PREFIX = "base_model.model."  # what PEFT puts before the names of weights

Tensors = dict[str, torch.Tensor]


def save(model: torch.nn.Module, folder: Path, **described: Any) -> None:
    """Write the adapters and the task's head into a new `folder`; `described` goes into its config."""
    adapters = _adapters(model)
    first = next(iter(adapters.values()))
    folder.mkdir()
    learned, _ = split(model, task_head(model))
    tensors = {f"{_PREFIX}{name}": value.contiguous() for name, value in learned.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    fields = {
        "peft_type": "BOTTLENECK",  # a name that PEFT does not know, and says so
        **described,
        "target_modules": [name.removesuffix(".adapter") for name in adapters],
        "modules_to_save": list(task_head(model)),
        "size": first.size,
        "activation": first.activation,
    }
    (folder / CONFIG).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def split(model: torch.nn.Module, head: Iterable[str]) -> tuple[Tensors, Tensors]:
    """Return (what the adapters and the modules named `head` hold, everything else) of a model."""
    ours = [*_adapters(model), *head]
    learned = {name: value for name, value in model.state_dict().items() if is_inside(name, ours)}
    return learned, {name: value for name, value in model.state_dict().items() if name not in learned}


def load(model: torch.nn.Module, folder: Path) -> None:
    """Put the adapters that `save` wrote, and the head beside them, into the base model that they belong to.

    Raises DirectoryError, one line, where they are unreadable or of another model.
    """
    try:
        fields = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        insert(model, fields["target_modules"], size=fields["size"], activation=fields["activation"])
        tensors = {name.removeprefix(_PREFIX): value for name, value in load_file(folder / WEIGHTS).items()}
        expected, _ = split(model, fields["modules_to_save"])
        if other := sorted(expected.keys() ^ tensors.keys()):
            raise ValueError(f"only one of the two has {other[0]}")
        model.load_state_dict(tensors, strict=False)
    except (OSError, ValueError, LookupError, AttributeError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise DirectoryError(f"{folder}: its adapter cannot be read into this model ({reason})") from None


def _adapters(model: torch.nn.Module) -> dict[str, Bottleneck]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Bottleneck)}
