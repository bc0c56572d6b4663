"""What PEFT's adapter_config.json says of a LoRA: read and checked in one place, and the base that it names."""

import json
import math
import re
from pathlib import Path
from typing import Any

from serving.export_paths import LORA_CONFIG, ExportError

WEIGHTS = "adapter_model.safetensors"

# What PEFT cannot merge: it acts from some token on, over layers that stand there twice, or with a bias of its own.
_NEVER_MERGED = ("alora_invocation_tokens", "layer_replication", "lora_bias")


def read_config(folder: Path) -> dict[str, Any]:
    """Return the config of the LoRA in `folder`.

    Raises ExportError for one that cannot be read, is of another kind, or has no number for its scale.
    """
    where = folder / LORA_CONFIG
    try:
        config = json.loads(where.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ExportError(f"{where}: cannot be read ({error}); save the adapter again") from None
    if not isinstance(config, dict):
        raise ExportError(f"{where}: holds no settings; save the adapter again")
    kind, base = config.get("peft_type"), config.get("base_model_name_or_path")
    if kind != "LORA":
        raise ExportError(f"{folder}: its peft_type is {kind}; accepted: LORA, or a model directory of `trivet train`")
    if base is not None and not isinstance(base, str):
        raise ExportError(f"{where}: base_model_name_or_path {base!r}; accepted: the folder of the base")
    if not _is_number(config.get("lora_alpha")):
        raise ExportError(f"{where}: lora_alpha {config.get('lora_alpha')!r}; accepted: the number it was trained with")
    for name in _NEVER_MERGED:
        if config.get(name):
            raise ExportError(f"{where}: {name} {config[name]!r}; accepted: LoRAs that can be merged into their base")
    for name in ("alpha_pattern", "rank_pattern"):
        _check_patterns(where, name, config.get(name))
    return config


def named_base(folder: Path, config: dict[str, Any]) -> Path | None:
    """Return the folder of the base that a LoRA names, as it says or seen from its own folder; None where none is."""
    named = config.get("base_model_name_or_path")
    places = (Path(named), folder / named) if named else ()
    return next((each for each in places if (each / "config.json").is_file()), None)


def _check_patterns(where: Path, name: str, patterns: Any) -> None:
    """Raise ExportError for what is no mapping of patterns to numbers."""
    if not patterns:
        return
    if not isinstance(patterns, dict):
        raise ExportError(f"{where}: {name} {patterns!r}; accepted: numbers by the names of layers")
    for pattern, value in patterns.items():
        try:
            re.compile(pattern)
        except re.error as error:
            raise ExportError(f"{where}: {name} has {pattern!r}, which is no pattern ({error}); mend it") from None
        if not _is_number(value):
            raise ExportError(f"{where}: {name} has {value!r} for {pattern!r}; accepted: a number")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
