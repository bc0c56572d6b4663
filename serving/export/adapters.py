"""LoRA adapters as PEFT saves them: read, and refused where they are more than that or of another base."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from serving.export.fingerprint import fingerprint
from serving.export.lora_config import WEIGHTS, named_base, read_config
from serving.export.lora_folder import was_merged
from serving.export_paths import LORA_CONFIG, ExportError

_PREFIX = "base_model.model."  # what PEFT puts before the names of weights
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

# Settings of PEFT that make of an adapter something else than x A B beside each layer, and what they mean.
_MORE_THAN_LORA = {
    "use_dora": "DoRA",
    "modules_to_save": "modules that were trained whole",
    "trainable_token_indices": "trained embeddings",
    "target_parameters": "parameters that are no layers",
    "lora_bias": "trained biases",
    "use_qalora": "QALoRA",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow",
    "use_bdlora": "block-diagonal LoRA",
    "layer_replication": "replicated layers",
}
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq")  # ways to start that leave another base behind


@dataclass(frozen=True)
class Adapter:
    """One adapter: what it is called, where it lies, and what it learned by the name of the layer."""

    name: str
    folder: Path
    base: str | None
    updates: dict[str, tuple[torch.Tensor, torch.Tensor]]

    @property
    def rank(self) -> int:
        """The largest rank of its updates."""
        return max(a.shape[1] for a, _ in self.updates.values())


def read_adapters(folders: Sequence[Path], base: Path, base_hash: str) -> tuple[Adapter, ...]:
    """Return the adapters in these folders: PEFT's, or those of Trivet's model directories and runs.

    Raises ExportError for one that is none, is more than a LoRA, was trained on another base than that in `base`, whose
    hash is `base_hash`, or has a name that another has.
    """
    adapters: dict[str, Adapter] = {}
    for folder in folders:
        adapter = _read(Path(folder), base, base_hash)
        if (other := adapters.get(adapter.name)) is not None:
            raise ExportError(
                f"--loras: {other.folder} and {adapter.folder} are both called {adapter.name!r}; rename one"
            )
        adapters[adapter.name] = adapter
    return tuple(adapters.values())


def _read(given: Path, base: Path, base_hash: str) -> Adapter:
    folder = next(
        (each for each in (given, given / "adapter", given / "model" / "adapter") if (each / LORA_CONFIG).is_file()),
        None,
    )
    if folder is None:
        found = f"has no {LORA_CONFIG}" if given.is_dir() else "no such folder"
        raise ExportError(
            f"--loras: {given}: {found}; accepted: folders of PEFT's LoRA adapters, runs that trained one"
        )
    config = read_config(folder)
    _check_kind(folder, config)
    _check_base(folder, config, base, base_hash)
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, ValueError, SafetensorError) as error:
        raise ExportError(f"--loras: {folder} cannot be read ({str(error).splitlines()[0]}); save it again") from None
    name = next(part for part in reversed(folder.resolve().parts) if part not in ("adapter", "model"))
    if not _PLAIN_NAME.fullmatch(name):
        raise ExportError(
            f"--loras: {folder} would be called {name!r}; accepted: letters, digits, . _ and -: rename it"
        )
    return Adapter(name, folder, config.get("base_model_name_or_path"), _updates(folder, config, tensors))


def _check_kind(folder: Path, config: dict[str, Any]) -> None:
    found = [meaning for name, meaning in _MORE_THAN_LORA.items() if config.get(name)]
    if config.get("bias", "none") != "none":
        found.append("trained biases")
    if str(config.get("init_lora_weights")).lower().startswith(_CHANGE_THE_BASE):
        found.append(f"a base changed by {config['init_lora_weights']}")
    if found:
        raise ExportError(
            f"--loras: {folder} has {', '.join(found)}; accepted: plain LoRA; merge it into its base instead"
        )


def _check_base(folder: Path, config: dict[str, Any], base: Path, base_hash: str) -> None:
    """Raise ExportError where nothing can tell that the adapter was trained on this base: not its own base, which is
    gone or another model, nor what it was merged into, with which the proof compares.
    """
    trained_on = config.get("base_model_name_or_path")
    if not trained_on:
        raise ExportError(
            f"--loras: {folder} does not say which base it was trained on; name it in its {LORA_CONFIG}: {base}"
        )
    there = named_base(folder, config)
    if was_merged(folder) or (there is not None and fingerprint(there) == base_hash):
        return
    if there is None:
        raise ExportError(
            f"--loras: {folder} was trained on {trained_on}, which is not here to compare with {base}; if they are the "
            f"same, name {base} in its {LORA_CONFIG} (base_model_name_or_path)"
        )
    raise ExportError(f"--loras: {folder} was trained on {trained_on}, not on {base}; export that base with it")


def _updates(
    folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return A [in, rank] and B [rank, out], the scale in it, for each layer."""
    updates = {}
    names = {name.removeprefix(_PREFIX).removesuffix(".lora_A.weight") for name in tensors if ".lora_A." in name}
    for name in sorted(names):
        a, b = (tensors.get(f"{_PREFIX}{name}.lora_{side}.weight") for side in "AB")
        if a is None or b is None:
            raise ExportError(f"--loras: {folder} has half an update of {name}; save it again")
        alpha = _of_layer(config.get("alpha_pattern"), name, config["lora_alpha"])
        scale = alpha / (math.sqrt(a.shape[0]) if config.get("use_rslora") else a.shape[0])
        updates[name] = (a.T, b.T * scale)
    # Weights of the base lie there too where its head has an update; were they others, the proof would tell.
    others = [name for name in tensors if "lora_" in name and not name.endswith((".lora_A.weight", ".lora_B.weight"))]
    if not updates or others:
        found = others[0] if others else "no update"
        raise ExportError(f"--loras: {folder} holds {found}; accepted: updates of linear layers; merge it instead")
    return updates


def _of_layer(patterns: dict[str, float] | None, name: str, usual: float) -> float:
    """Return the number for a layer: that of the first pattern that ends its name, as PEFT matches them."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return usual
