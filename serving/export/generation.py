"""Generation defaults that are checked before any work: which tokens end an answer, and how the next one is picked."""

from pathlib import Path

from transformers import PreTrainedConfig

from serving.directory import BadInput
from serving.export_paths import ExportError
from serving.generation_config import NAME, read_settings, sampling_defaults


def check_generation(folder: Path, config: PreTrainedConfig) -> None:
    """Raise ExportError for a generation_config.json that cannot be read, samples out of range, or names an end token
    that the model cannot say; for that of config.json where there is none.
    """
    path = folder / NAME
    try:
        sampling_defaults(folder)
        ids = read_settings(folder).get("eos_token_id") if path.is_file() else config.eos_token_id
    except BadInput as error:
        raise ExportError(str(error)) from None
    for each in ids if isinstance(ids, list) else [ids]:
        if each is None and not isinstance(ids, list):
            return
        if not isinstance(each, int) or isinstance(each, bool) or not 0 <= each < config.vocab_size:
            where = path if path.is_file() else folder / "config.json"
            raise ExportError(
                f"{where}: eos_token_id {each!r}; accepted: whole numbers from 0 to {config.vocab_size - 1}, the "
                "vocabulary's"
            )
