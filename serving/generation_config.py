"""generation_config.json of a model: what of it holds where a request says nothing, and what of it is not served."""

import json
from pathlib import Path
from typing import Any

from serving.directory import BadInput
from serving.request import Sampling

NAME = "generation_config.json"

# What else changes which token is picked, and the values (None beside them) that change nothing.
_NOT_SERVED = {
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "num_beams": 1,
    "penalty_alpha": 0.0,
    "min_length": 0,
    "min_new_tokens": 0,
    "bad_words_ids": [],
    "sequence_bias": {},
    "suppress_tokens": [],
    "begin_suppress_tokens": [],
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
}


def read_settings(folder: Path) -> dict[str, Any]:
    """Return the settings in the folder's generation_config.json, none where it has none. Raises BadInput."""
    path = folder / NAME
    try:
        settings = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if not isinstance(settings, dict):
            raise ValueError("no object")
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: cannot be read ({error}); mend it, or remove it") from None
    return settings


def sampling_defaults(folder: Path) -> dict[str, Any]:
    """Return temperature, top_p and top_k of the folder's generation_config.json if it samples. Raises BadInput."""
    settings = read_settings(folder)
    if not settings.get("do_sample"):
        return {}
    found = {name: settings.get(name) for name in ("temperature", "top_p", "top_k")}
    defaults = {"temperature": 1.0, **{name: value for name, value in found.items() if value is not None}}
    try:
        Sampling(**defaults)
    except BadInput as error:
        raise BadInput(f"{folder / NAME}: {error}") from None
    return defaults


def not_served(folder: Path) -> list[str]:
    """Return the settings in the folder's generation_config.json that ask for more than is served: `name value`."""
    settings = read_settings(folder)
    return [
        f"{name} {json.dumps(settings[name])}"
        for name, neutral in _NOT_SERVED.items()
        if settings.get(name) is not None and settings[name] != neutral
    ]
