"""The folder of a pre-trained model: refused before anything is loaded where it is broken, pickled or runs code."""

import hashlib
import json
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, cached_file, extract_commit_hash, find_adapter_config_file

from serving import directory
from serving.directory import BadInput
from trainer.config import PretrainedModel, PretrainedTokenizer, RunConfig

# What transformers raises for files that are not what they should be; running out of memory is none of it.
UNLOADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, ArithmeticError,
              SafetensorError, StrictDataclassError)  # fmt: skip

_PICKLES = ("pytorch_model*.bin", "*.bin", "*.pt", "*.pth")
# Keeps the names of the weights, and lets the file build nothing but tensors.
_CONVERT = (
    "import glob, torch; from safetensors.torch import save_file; w = {{}}; "
    "[w.update(torch.load(f, weights_only=True)) for f in glob.glob('{folder}/{pattern}')]; "
    "save_file({{k: v.clone() for k, v in w.items()}}, '{folder}/model.safetensors', {{'format': 'pt'}})"
)


def check_base(path: str, *, trust_remote_code: bool) -> None:
    """Raise BadInput if the folder or hub name holds no model, or one that is loaded only by running what is in it."""
    if Path(path).is_dir():
        _check_folder(path, trust_remote_code)
    load_config(path, trusted=trust_remote_code)


def load_config(path: str, *, trusted: bool, **changes: Any) -> PretrainedConfig:
    """Return the config of the model at a folder or hub name, with `changes`. Raises BadInput."""
    try:
        if find_adapter_config_file(path) is not None:
            raise BadInput(f"model.path: {path}: is a PEFT adapter; merge it into its model and give that")
        return AutoConfig.from_pretrained(path, trust_remote_code=trusted, **changes)
    except UNLOADABLE as error:
        raise BadInput(tell_unloadable(path, error)) from None


def refuse_foreign_weights(path: str, config: PretrainedConfig) -> None:
    """Raise BadInput if the model at a folder or hub name names weight files that are no safetensors files of it."""
    explicit = getattr(config, "transformers_weights", None) or ""
    indices = {SAFE_WEIGHTS_INDEX_NAME, *([explicit] if str(explicit).endswith(".index.json") else [])}
    missing_may_be = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    found = [cached_file(path, name, **missing_may_be) for name in ("config.json", *indices)]
    for folder in {Path(file).parent for file in found if file is not None}:
        if name := directory.foreign_weights(folder):
            raise BadInput(
                f"model.path: {path}: names {name!r} as a file of its weights; accepted: safetensors files that lie in "
                "it, since anything else is read as a pickle or from elsewhere; get the model again"
            )


def tell_unloadable(path: str, error: Exception) -> str:
    """Return the error for a model that transformers cannot load."""
    reason = " ".join(str(error).split())
    if "trust_remote_code" in reason:
        reason = "it needs Python code that lies with it; if you trust it, set model.trust_remote_code=true"
    elif "does not recognize this architecture" in reason:
        reason = "its model_type is none that this release of transformers knows"
    return f"model.path: no model can be loaded from {path} ({reason[:200]}); check the path"


def fingerprint(path: str) -> str | None:
    """Return a hash of the model in a folder; of a hub name the commit that is in the cache, None where none is.

    Raises DirectoryError if the folder has a trivet.json and any file is not as that says.
    """
    folder = Path(path)
    if not folder.is_dir():
        cached = try_to_load_from_cache(path, "config.json")
        return extract_commit_hash(cached, None) if isinstance(cached, str) else None
    if (folder / directory.MANIFEST).exists():
        directory.check_files(folder, directory.read_manifest(folder, "model"))
        return directory.identity(folder)
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors")), *sorted(folder.glob("*.py"))]
    hashes = [f"{file.name} {directory.sha256(file)}" for file in files if file.is_file()]
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def remote_code_warnings(config: RunConfig) -> list[str]:
    """Return the lines that a run begins with where it runs code that lies with a model or a tokenizer."""
    sections = {"model": config.model, "tokenizer": config.tokenizer}
    return [
        f"WARNING: {name}.trust_remote_code is on: Python code from {section.path} runs with all that you may do"
        for name, section in sections.items()
        if isinstance(section, PretrainedModel | PretrainedTokenizer) and section.trust_remote_code
    ]


def _check_folder(path: str, trusted: bool) -> None:
    folder = Path(path)
    if not any(folder.iterdir()):
        raise BadInput(f"model.path: {path}: is empty; check the path, or get the model again")
    if (folder / "adapter_config.json").is_file():
        # transformers would load the model that this file names instead, and a pickle beside it.
        raise BadInput(
            f"model.path: {path}: holds a PEFT adapter (adapter_config.json); merge it into its model and give that"
        )
    if not (folder / "config.json").is_file():
        raise BadInput(f"model.path: {path}: holds no config.json, so it is no model folder; check the path")
    config = _read_json(folder / "config.json")
    if "auto_map" in config and not trusted:
        _refuse_unknown_type(path, config)
    _check_weights(folder)


def _refuse_unknown_type(path: str, config: dict[str, Any]) -> None:
    """Raise BadInput for a model that is made of its own code; one that transformers knows is loaded without it."""
    if config.get("model_type") not in CONFIG_MAPPING:
        raise BadInput(
            f"model.path: {path}: is made of Python code that lies with it (auto_map); if you trust it, set "
            "model.trust_remote_code=true"
        )


def _check_weights(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        named = set(_read_json(index).get("weight_map", {}).values())
        if absent := sorted(name for name in named if not (folder / name).is_file()):
            raise BadInput(f"model.path: {folder}: {absent[0]} is missing (of {len(named)} files); get it again")
    elif not any(folder.glob("*.safetensors")):
        for pattern in _PICKLES:
            if pickles := sorted(folder.glob(pattern)):
                command = _CONVERT.format(folder=folder, pattern=pattern)
                raise BadInput(
                    f"model.path: {folder}: holds no safetensors, only {pickles[0].name}: a pickle, which is never "
                    f'read because it can run code; convert it: python -c "{command}"'
                )
        raise BadInput(f"model.path: {folder}: holds no weights (*.safetensors); get the whole model again")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"model.path: {path}: is not JSON ({error}); get the model again") from None
    if not isinstance(value, dict):
        raise BadInput(f"model.path: {path}: holds a {type(value).__name__}, not an object; get the model again")
    return value
