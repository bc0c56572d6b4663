"""A folder of PEFT that holds a LoRA and no more: over the base that it names, merged with its true scale.

It remembers nothing of its base but the name: a base that has changed since is seen where it no longer fits, where the
base is a directory of Trivet and altered, and where the adapter lies in a directory of Trivet beside what it was once
merged into.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from serving.directory import MANIFEST, DirectoryError, check_files, read_manifest
from serving.export.lora_config import WEIGHTS, named_base, read_config
from serving.export.refusing import refusing
from serving.export_paths import LORA_CONFIG, ExportError

_ENDINGS = {"CAUSAL_LM": ("ForCausalLM", "LMHeadModel"), "SEQ_CLS": ("ForSequenceClassification",),
            "TOKEN_CLS": ("ForTokenClassification",)}  # fmt: skip
_CLOSE = 1e-2  # of a matrix's largest number: more than rounding to bf16 makes


def base_of(folder: Path) -> Path:
    """Return the folder of the model that a LoRA is over. Raises ExportError where it cannot be merged into that."""
    config = read_config(folder)
    if not (folder / WEIGHTS).is_file():
        raise ExportError(f"{folder}: has no {WEIGHTS}; save the adapter again with save_pretrained")
    named, base = config.get("base_model_name_or_path"), named_base(folder, config)
    if base is None:
        raise ExportError(
            f"{folder}: its base {named!r} is no model folder here; get the base, and name its folder in "
            f"{LORA_CONFIG} (base_model_name_or_path)"
        )
    if (base / MANIFEST).is_file():
        try:
            check_files(base, read_manifest(base, "model"))
        except DirectoryError as error:
            raise ExportError(f"{folder}: its base {base} has changed since: {error}") from None
    with refusing(f"{base / 'config.json'}: cannot be read", "get the base again"):
        architectures = json.loads((base / "config.json").read_text(encoding="utf-8")).get("architectures") or ["none"]
    task = config.get("task_type")
    if not architectures[0].endswith(_ENDINGS.get(task or "", ("",))):
        raise ExportError(
            f"{folder}: its task_type is {task}, but its base {base} is a {architectures[0]}; export the merged model"
        )
    return base


def apply(model: PreTrainedModel, folder: Path, base: Path) -> None:
    """Put the LoRA into `model`, unmerged. Raises ExportError, naming both folders, where it does not fit."""
    from peft import PeftModel, get_peft_model_state_dict

    try:
        wrapped = PeftModel.from_pretrained(model, str(folder), local_files_only=True)
        tensors = load_file(folder / WEIGHTS)
        fitting = get_peft_model_state_dict(wrapped).keys()
        other = sorted(fitting ^ tensors.keys())
        reason = f"only one of the two has {other[0]}" if other else ""
    except Exception as error:  # PEFT raises of many kinds for an adapter that is of another model
        reason = str(error).strip().replace("\n", " ")[:200]
    if reason:
        raise ExportError(f"{folder}: does not fit its base {base} ({reason}); has the base changed since?")


def merge(model: PreTrainedModel, folder: Path, base: Path) -> None:
    """Merge the LoRA in place. Raises ExportError where what it was once merged into says that the base has changed."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            _untie(model, module.get_base_layer())
            module.merge()
            model.set_submodule(name, module.get_base_layer())
        elif isinstance(module, ModulesToSaveWrapper):
            model.set_submodule(name, module.modules_to_save[module.active_adapters[0]])
    check_base(model, folder, base)


def _untie(model: PreTrainedModel, layer: torch.nn.Module) -> None:
    """Give a layer, as a head that is also the embedding, a weight of its own: the LoRA is beside the layer alone."""
    users = sum(weight is layer.weight for _, weight in model.named_parameters(remove_duplicate=False))
    if users > 1:
        layer.weight = torch.nn.Parameter(layer.weight.detach().clone(), requires_grad=False)


def was_merged(folder: Path) -> bool:
    """Whether the adapter lies in a model directory of Trivet, beside what it was once merged into."""
    return (folder.parent / MANIFEST).is_file() and (folder.parent / "config.json").is_file()


def check_base(merged: PreTrainedModel, folder: Path, base: Path) -> None:
    """Raise ExportError where the adapter lies beside what it was once merged into, and `merged` is another model."""
    if not was_merged(folder):
        return
    mine, num_compared = merged.state_dict(), 0
    for path in sorted(folder.parent.glob("*.safetensors")):
        for name, once in load_file(path).items():
            if name not in mine:
                continue
            num_compared += 1
            if not _alike(mine[name], once.float()):
                raise ExportError(
                    f"{folder}: its base {base} has changed since: {name} is not what {folder.parent} was merged into; "
                    f"export {folder.parent}"
                )
    if not num_compared:
        raise ExportError(f"{folder}: {folder.parent} holds nothing to compare {base} with; export {folder.parent}")


def _alike(found: torch.Tensor, once: torch.Tensor) -> bool:
    return found.shape == once.shape and bool((found - once).abs().max() <= _CLOSE * once.abs().max())
