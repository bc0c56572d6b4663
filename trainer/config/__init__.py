"""The run config: one frozen pydantic model per section, so that a run is checked before anything loads.

Defaults, ranges and the meaning of each key live here; the YAML of a run lists only what differs. The Accelerate
launch config owns mode, world size and offload; this one owns batch, clipping and precision.
"""

from typing import Any

from pydantic import Field, model_validator

from trainer.config.base import ConfigPath, Section
from trainer.config.data import (
    Columns,
    Data,
    EmbeddedData,
    FileData,
    FileSource,
    HubData,
    HubSource,
    MixtureData,
    MixtureSource,
    Whole,
)
from trainer.config.model import (
    Model,
    NewModel,
    PretrainedModel,
    PretrainedTokenizer,
    TokenizerSection,
    TrainedTokenizer,
)
from trainer.config.objective import SFT, CausalLM, Classification, MaskedLM, Objective, TokenClassification
from trainer.config.optim import SGD, Adafactor, AdamW, Optim
from trainer.config.strategy import Adapter, Full, LinearProbe, Lora, Partial, Scratch, Strategy
from trainer.config.training import Batch, Checkpoint, Evaluation, Log, Precision, Run

__all__ = [
    "SFT", "SGD", "Adafactor", "AdamW", "Adapter", "Batch", "CausalLM", "Checkpoint", "Classification", "Columns",
    "ConfigPath", "EmbeddedData", "Evaluation", "FileData", "FileSource", "Full", "HubData", "HubSource",
    "LinearProbe", "Log", "Lora", "MaskedLM", "MixtureData", "MixtureSource", "NewModel", "Optim", "Partial",
    "Precision", "PretrainedModel", "PretrainedTokenizer", "Run", "RunConfig", "Scratch", "Section",
    "TokenClassification", "TrainedTokenizer", "Whole", "flat",
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
    optim: Optim = Field(AdamW(), discriminator="type", description="The optimizer and its learning rate.")
    batch: Batch = Field(Batch(), description="How much a step reads, and how it is cut up.")
    precision: Precision = Field(Precision(), description="Numbers that the forward pass computes with.")
    evaluation: Evaluation = Field(Evaluation(), description="When and on how much held-out data the model is scored.")
    checkpoint: Checkpoint = Field(Checkpoint(), description="What a run that was stopped or killed goes on from.")
    log: Log = Field(Log(), description="What a run writes about itself.")

    @model_validator(mode="before")
    @classmethod
    def _optim_is_adamw(cls, values: Any) -> Any:
        """Runs had no choice of an optimizer once, and most need none."""
        if isinstance(values, dict) and isinstance(optim := values.get("optim"), dict) and "type" not in optim:
            return {**values, "optim": {"type": "adamw", **optim}}
        return values

    @model_validator(mode="after")
    def _sections_fit(self) -> "RunConfig":
        new = isinstance(self.model, NewModel)
        if new != (self.strategy.type == "scratch"):
            accepted = "scratch" if new else "full, linear_probe, partial, adapter or lora"
            raise ValueError(
                f"strategy.type {self.strategy.type} does not fit model.type {self.model.type}: use {accepted}"
            )
        last = self.strategy.stages[-1].step if isinstance(self.strategy, Partial) and self.strategy.stages else 0
        if last >= self.run.steps:
            raise ValueError(f"strategy.stages: step {last} is not before run.steps, {self.run.steps}; lower it")
        if isinstance(self.tokenizer, TrainedTokenizer) and not new:
            raise ValueError("tokenizer.type train does not fit model.type pretrained: its tokenizer comes with it")
        if isinstance(self.tokenizer, PretrainedTokenizer) and new and self.tokenizer.path is None:
            raise ValueError("tokenizer.path is missing: a new model has no tokenizer yet; name one or use type train")
        if isinstance(self.model, NewModel):
            wrong = ("masked_lm",) if self.model.architecture == "decoder" else ("causal_lm", "sft")
            if self.objective.type in wrong:
                raise ValueError(
                    f"objective.type {self.objective.type} does not fit model.architecture {self.model.architecture}: "
                    "a decoder learns causal_lm and sft, an encoder masked_lm, both of them the rest"
                )
        if self.data.columns.text_pair is not None and self.objective.type != "classification":
            raise ValueError(
                f"data.text_pair does not fit objective.type {self.objective.type}, which reads one text at a time: "
                "remove it, or use classification"
            )
        overlap = getattr(self.objective, "overlap_tokens", 0)
        if overlap > self.batch.max_length // 2:
            raise ValueError(
                f"objective.overlap_tokens {overlap} is more than half of batch.max_length {self.batch.max_length}: "
                "lower the first or raise the second"
            )
        if self.tokenizer.max_length is not None and self.batch.max_length > self.tokenizer.max_length:
            raise ValueError(
                f"batch.max_length {self.batch.max_length} is longer than tokenizer.max_length "
                f"{self.tokenizer.max_length}: lower the first or raise the second"
            )
        if isinstance(self.model, NewModel) and self.batch.max_length > self.model.context_length:
            raise ValueError(
                f"batch.max_length {self.batch.max_length} is longer than model.context_length "
                f"{self.model.context_length}: lower the first or raise the second"
            )
        return self

    @model_validator(mode="after")
    def _what_is_written_fits(self) -> "RunConfig":
        if (first := self.log.profile_from or 0) > self.run.steps:
            raise ValueError(f"log.profile_from: {first} found, but run.steps is {self.run.steps}: it must not be more")
        if self.checkpoint.best and self.evaluation.every is None:
            raise ValueError("checkpoint.best: true found, but evaluation.every is null: say how often to evaluate")
        if self.evaluation.samples and self.objective.type not in ("causal_lm", "sft"):
            raise ValueError(
                f"evaluation.samples {self.evaluation.samples} does not fit objective.type {self.objective.type}, "
                "which writes no text: accepted with causal_lm and sft"
            )
        return self


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of a config's sections by their dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found
