"""The run config: one frozen pydantic model per section, so that a run is checked before anything loads.

Defaults, ranges and the meaning of each key live here; the YAML of a run lists only what differs. The Accelerate
launch config owns mode, world size and offload; this one owns batch, clipping and precision.
"""

from typing import Any

from pydantic import Field, model_validator

from trainer.config.base import ConfigPath, Section
from trainer.config.data import Columns, Data, EmbeddedData, FileData
from trainer.config.model import (
    Model,
    NewModel,
    PretrainedModel,
    PretrainedTokenizer,
    TokenizerSection,
    TrainedTokenizer,
)
from trainer.config.objective import SFT, CausalLM, Classification, MaskedLM, Objective, TokenClassification
from trainer.config.strategy import Full, Lora, Scratch, Strategy
from trainer.config.training import Batch, Checkpoint, Evaluation, Log, Optim, Precision, Run

__all__ = [
    "SFT", "Batch", "CausalLM", "Checkpoint", "Classification", "Columns", "ConfigPath", "EmbeddedData", "Evaluation",
    "FileData", "Full", "Log", "Lora", "MaskedLM", "NewModel", "Optim", "Precision", "PretrainedModel",
    "PretrainedTokenizer", "Run", "RunConfig", "Scratch", "Section", "TokenClassification", "TrainedTokenizer", "flat",
]  # fmt: skip


class RunConfig(Section):
    """Everything a run is: the resolved form is saved as config.yaml in its run folder and re-runs it."""

    run: Run = Field(description="Which run this is: its folder, seed and length.")
    objective: Objective = Field(discriminator="type", description="What is learned.")
    model: Model = Field(discriminator="type", description="What learns.")
    tokenizer: TokenizerSection = Field(
        PretrainedTokenizer(), discriminator="type", description="How text becomes tokens."
    )
    data: Data = Field(description="What it is learned from.")
    strategy: Strategy = Field(discriminator="type", description="Which weights learn.")
    optim: Optim = Field(Optim(), description="The optimizer, AdamW, and its learning rate.")
    batch: Batch = Field(Batch(), description="How much a step reads, and how it is cut up.")
    precision: Precision = Field(Precision(), description="Numbers that the forward pass computes with.")
    evaluation: Evaluation = Field(Evaluation(), description="When and on how much held-out data the model is scored.")
    checkpoint: Checkpoint = Field(Checkpoint(), description="What a run that was stopped or killed goes on from.")
    log: Log = Field(Log(), description="What a run writes about itself.")

    @model_validator(mode="after")
    def _sections_fit(self) -> "RunConfig":
        new = isinstance(self.model, NewModel)
        if new != (self.strategy.type == "scratch"):
            accepted = "scratch" if new else "full or lora"
            raise ValueError(
                f"strategy.type {self.strategy.type} does not fit model.type {self.model.type}: use {accepted}"
            )
        if isinstance(self.tokenizer, TrainedTokenizer) and not new:
            raise ValueError("tokenizer.type train does not fit model.type pretrained: its tokenizer comes with it")
        if isinstance(self.tokenizer, PretrainedTokenizer) and new and self.tokenizer.path is None:
            raise ValueError("tokenizer.path is missing: a new model has no tokenizer yet; name one or use type train")
        if isinstance(self.model, NewModel) and self.batch.max_length > self.model.context_length:
            raise ValueError(
                f"batch.max_length {self.batch.max_length} is longer than model.context_length "
                f"{self.model.context_length}: lower the first or raise the second"
            )
        return self


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of a config's sections by their dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found
