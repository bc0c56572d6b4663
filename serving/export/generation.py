"""Which tokens end an answer: what generation_config.json says, else config.json, checked before any work."""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from serving.export_paths import ExportError

GENERATION = "generation_config.json"


def check_generation(folder: Path, config: PreTrainedConfig) -> None:
    """Raise ExportError for a generation_config.json that cannot be read, or an end token that the model cannot say."""
    path = folder / GENERATION
    ids = _settings(path).get("eos_token_id") if path.is_file() else config.eos_token_id
    for each in ids if isinstance(ids, list) else [ids]:
        if each is None and not isinstance(ids, list):
            return
        if not isinstance(each, int) or isinstance(each, bool) or not 0 <= each < config.vocab_size:
            where = path if path.is_file() else folder / "config.json"
            raise ExportError(
                f"{where}: eos_token_id {each!r}; accepted: whole numbers from 0 to {config.vocab_size - 1}, the "
                "vocabulary's"
            )


def _settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ValueError("no object")
    except (OSError, ValueError) as error:
        raise ExportError(f"{path}: cannot be read ({error}); mend it, or remove it") from None
    return settings
