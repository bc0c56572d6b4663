"""Which weights learn: one function per strategy, independent of the objective."""

import re
import warnings
from collections.abc import Callable

import torch

from serving.directory import BadInput
from trainer.config import Full, Lora, Scratch


def apply_all(model: torch.nn.Module, config: Scratch | Full) -> torch.nn.Module:
    """Let every weight learn."""
    return model.requires_grad_(True)


def apply_lora(model: torch.nn.Module, config: Lora) -> torch.nn.Module:
    """Freeze the model and add low-rank updates (arXiv:2106.09685) through PEFT; a classification head learns whole.

    At step 0 the result equals the model bit for bit, because B starts at zero.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    classifies = type(model).__name__.endswith("ForSequenceClassification")
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=config.targets,
        task_type=TaskType.SEQ_CLS if classifies else TaskType.CAUSAL_LM,
    )
    try:
        with warnings.catch_warnings():
            # PEFT 0.21 asks transformers by a name that is on its way out.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            # It then turns it round by itself, which is right: GPT-2's Conv1D keeps its weights transposed.
            warnings.filterwarnings("ignore", "fan_in_fan_out is set to False but the target module is `Conv1D`")
            return get_peft_model(model, lora)
    except (ValueError, re.error) as error:
        raise BadInput(f"strategy.targets: {config.targets!r} found; {str(error).splitlines()[0]}") from None


STRATEGIES: dict[str, Callable[..., torch.nn.Module]] = {"scratch": apply_all, "full": apply_all, "lora": apply_lora}


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """Return (weights that learn, all weights), each shared tensor counted once."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)
