"""The model directory: plain Hugging Face format that loads without Trivet, plus `trivet.json`."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from serving import directory
from trainer.config import PretrainedModel, RunConfig

MERGE_TOLERANCE = 1e-4  # on logits, relative to their largest: fp32 sums in another order


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
    with directory.staged(final) as folder:
        if isinstance(model, PeftModel):
            model.save_pretrained(folder / "adapter")
            model = _merge(model)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(_card(config, base, step, metrics), encoding="utf-8")
        directory.seal(
            folder,
            "model",
            objective=config.objective.type,
            strategy=config.strategy.type,
            labels=labels,
            base_model=base,
            step=step,
            max_length=config.batch.max_length,
        )


def _merge(model: PeftModel) -> torch.nn.Module:
    probe = {"input_ids": torch.arange(1, 17, device=model.device)[None]}
    model.eval()
    with torch.no_grad():
        before = model(**probe).logits
        merged = model.merge_and_unload()
        after = merged(**probe).logits
    error = float((before - after).abs().max() / before.abs().max())
    if not error <= MERGE_TOLERANCE:
        raise RuntimeError(
            f"merging the LoRA changed the logits by {error:.1e} of their largest; nothing was published"
        )
    return merged


def _card(config: RunConfig, base: str | None, step: int, metrics: dict[str, float]) -> str:
    shown: dict[str, Any] = {
        "objective": config.objective.type,
        "strategy": config.strategy.type,
        "base model": base or "none (from scratch)",
        "steps": step,
        **{name: f"{value:.4f}" for name, value in metrics.items()},
    }
    lines = [f"- {name}: {value}" for name, value in shown.items()]
    return "\n".join(["---", "library_name: transformers", "---", "", f"# {config.run.name}", "", *lines, ""])
