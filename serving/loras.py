"""The LoRA adapters that an ONNX directory keeps beside its base: their names, their rows, their weights.

Every adapted layer has two inputs in the graph, the stacks A [adapters, in, rank] and B [adapters, rank, out] of all
adapters, and `lora_index` picks one for each row of a batch. Index 0 is the base alone: zeros.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from serving.directory import BadInput, DirectoryError

STACKS = "loras.safetensors"  # by the names of the graph's inputs; bfloat16 as uint16, which numpy has


def lora_names(manifest: Mapping[str, Any]) -> list[str]:
    """Return the names of the adapters, in the order of their indices from 1."""
    return manifest.get("loras") or []


def lora_index(manifest: Mapping[str, Any], name: str | None) -> int:
    """Return the index of an adapter, 0 for None: the base alone. Raises BadInput for a name that is not there."""
    if name is None:
        return 0
    names = lora_names(manifest)
    if not names:
        raise BadInput(f"lora: {name!r} found, but this model has none; export it with --loras, or leave it out")
    if name not in names:
        raise BadInput(f"lora: {name!r} is unknown; accepted: {', '.join(names)}, or leave it out for the base alone")
    return names.index(name) + 1


def read_stacks(folder: Path) -> dict[str, np.ndarray]:
    """Return the stacks by the names of the graph's inputs; none where the directory has no adapters.

    Raises DirectoryError where they cannot be read.
    """
    path = folder / STACKS
    try:
        return load_file(path) if path.is_file() else {}
    except (OSError, SafetensorError) as error:
        raise DirectoryError(f"{path}: cannot be read ({error}); export the model again") from None
