"""The model directory: plain Hugging Face format that loads without Trivet, plus `trivet.json`.

Only a bottleneck adapter cannot be merged. Its directory keeps what the run started from in `base/` and what it
learned in `adapter/`, and says so in a config.json that transformers refuses to load: `load` puts the two together.
"""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from serving import directory
from serving.directory import BadInput, DirectoryError
from trainer import model_card
from trainer.config import PretrainedModel, RunConfig
from trainer.strategies import adapter_files
from trainer.strategies.heads import task_head
from trainer.strategies.lora import task_type

MERGE_TOLERANCE = 1e-4  # on logits, relative to their largest: fp32 sums in another order
# Words, and not any token ids: on a row of special tokens rounding alone moved the logits of a real model by 1.5e-4.
_PROBE = "Merging its layers must not change what a model answers to a few plain words."
UNMERGED = "trivet_base_and_adapter"  # the model_type of such a directory, which transformers names in its error


def save_model(
    final: Path,
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    config: RunConfig,
    *,
    labels: list[str] | None,
    step: int,
    metrics: dict[str, float],
) -> None:
    """Publish `model` (merged, if it carries a LoRA; its unmerged form goes into `adapter/`) at `final`, atomically.

    Merges in place. Raises RuntimeError, and publishes nothing, if merging changed what the model computes.
    """
    base = config.model.path if isinstance(config.model, PretrainedModel) else None
    from peft import PeftModel

    merge = None
    with directory.staged(final) as folder:
        if isinstance(model, PeftModel):
            model.save_pretrained(folder / "adapter")
            model, merge = _merge(model, tokenizer(_PROBE)["input_ids"][: config.batch.max_length])
        if config.strategy.type == "adapter":
            _save_beside_base(folder, model, tokenizer, base)
        else:
            model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(model_card.text(config, tokenizer, base, step, metrics), encoding="utf-8")
        directory.seal(
            folder,
            "model",
            objective=config.objective.type,
            strategy=config.strategy.type,
            labels=labels,
            base_model=base,
            step=step,
            max_length=config.batch.max_length,
            text_pair=config.data.columns.text_pair is not None,
            merge=merge,
        )


def load(folder: Path) -> PreTrainedModel:
    """Return the trained model of a directory of any strategy, in fp32, ready to evaluate.

    Raises DirectoryError for a folder that is no model directory, or is altered.
    """
    folder = Path(folder)
    manifest = directory.read_manifest(folder, "model")
    directory.check_files(folder, manifest)
    body = folder / "base" if is_unmerged(folder) else folder
    if name := directory.foreign_weights(body):
        raise DirectoryError(f"{body}: names {name!r} as a file of its weights, which is no safetensors file of it")
    try:
        architecture = json.loads((body / "config.json").read_text(encoding="utf-8"))["architectures"][0]
        model = getattr(transformers, architecture).from_pretrained(
            body, dtype=torch.float32, use_safetensors=True, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, LookupError, SafetensorError) as error:
        raise DirectoryError(f"{body}: cannot be loaded ({str(error).splitlines()[0]}); make it again") from None
    if is_unmerged(folder):
        adapter_files.load(model, folder / "adapter")
    return model.eval()


def is_unmerged(folder: Path) -> bool:
    """Return whether a folder holds a base and an adapter that cannot be merged into it."""
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type") == UNMERGED
    except (OSError, ValueError, AttributeError):
        return False


def refuse_unmerged(path: str) -> None:
    """Raise BadInput where a run would start from a base and an adapter: there is nothing to train them on as one."""
    if is_unmerged(Path(path)):
        raise BadInput(
            f"model.path: {path} is a base and a bottleneck adapter, which cannot be merged into it; start from "
            f"{Path(path) / 'base'}, without what the adapter learned, or train that with another strategy"
        )


def _save_beside_base(
    folder: Path, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, base: str | None
) -> None:
    """Write `base/` and `adapter/`, each whole, and the config.json that keeps others from taking the one for both."""
    assert isinstance(model, PreTrainedModel)
    _, base_state = adapter_files.split(model, task_head(model))
    model.save_pretrained(folder / "base", state_dict=base_state)
    tokenizer.save_pretrained(folder / "base")
    adapter_files.save(model, folder / "adapter", base_model_name_or_path=base, task_type=task_type(model))
    content = {"model_type": UNMERGED, "architectures": [type(model).__name__], "base": "base", "adapter": "adapter"}
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _merge(model: Any, ids: list[int]) -> tuple[torch.nn.Module, dict[str, float]]:
    """Merge in place; return the merged model, and how far its logits for `ids` are from those before."""
    probe = {"input_ids": torch.tensor([ids], device=model.device)}
    model.eval()
    with torch.no_grad():
        before = model(**probe).logits
        merged = model.merge_and_unload()
        after = merged(**probe).logits
    difference = float((before - after).abs().max())
    error = difference / float(before.abs().max())
    if not error <= MERGE_TOLERANCE:
        raise RuntimeError(
            f"merging the LoRA changed the logits by {error:.1e} of their largest; nothing was published"
        )
    return merged, {"largest_difference": difference, "relative_to_largest_logit": error}
