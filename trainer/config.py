"""The run config: one frozen pydantic model per section, so that a run is checked before anything loads.

Defaults, ranges and the meaning of each key live here; the YAML of a run lists only what differs. The Accelerate
launch config owns mode, world size and offload; this one owns batch, clipping and precision.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, model_validator


def _beside_the_config(path: Path, info: ValidationInfo) -> Path:
    """Resolve a path that a config names relative to itself; absolute, so that a saved config re-runs anywhere."""
    folder = (info.context or {}).get("folder")
    return (folder / path).resolve() if folder else path


ConfigPath = Annotated[Path, AfterValidator(_beside_the_config)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A part of the config: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Run(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Name of the run folder.")
    dir: Path = Field(Path("runs"), description="Folder that holds run folders, relative to where you stand.")
    seed: int = Field(0, ge=0, lt=2**31, description="Seeds initial weights, data order and dropout.")
    steps: int = Field(ge=1, description="Optimizer steps in all.")

    @property
    def folder(self) -> Path:
        return self.dir / self.name


class CausalLM(Section):
    type: Literal["causal_lm"]


class SFT(Section):
    type: Literal["sft"]


class Classification(Section):
    type: Literal["classification"]


class NewModel(Section):
    type: Literal["new"]
    hidden_size: int = Field(256, ge=8, description="Width of the residual stream.")
    intermediate_size: int = Field(688, ge=8, description="Width of the gated feed-forward layer.")
    num_layers: int = Field(4, ge=1)
    num_heads: int = Field(4, ge=1, description="Query heads; must divide hidden_size.")
    num_kv_heads: int = Field(2, ge=1, description="Key/value heads; must divide num_heads.")
    context_length: int = Field(512, ge=8, description="Longest sequence the model is made for, in tokens.")
    tie_embeddings: bool = Field(True, description="Share the input embedding with the output head.")

    @model_validator(mode="after")
    def _heads_divide(self) -> "NewModel":
        if self.hidden_size % self.num_heads or self.hidden_size // self.num_heads % 2:
            raise ValueError(
                f"hidden_size {self.hidden_size} / num_heads {self.num_heads} must be an even whole number"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads {self.num_kv_heads} must divide num_heads {self.num_heads}")
        return self


class PretrainedModel(Section):
    type: Literal["pretrained"]
    path: str = Field(description="Local model folder, or a hub name.")
    made_by: ConfigPath | None = Field(
        None, description="Run config (relative to this one) that makes `path`; trained first where `path` is absent."
    )


class TrainedTokenizer(Section):
    type: Literal["train"]
    vocab_size: int = Field(4096, ge=300, description="Entries of the byte-level BPE, special tokens included.")


class PretrainedTokenizer(Section):
    type: Literal["pretrained"] = "pretrained"
    path: str | None = Field(None, description="Folder or hub name; by default the model's own.")


class EmbeddedData(Section):
    type: Literal["embedded"]
    max_rows: int | None = Field(None, ge=16, description="Keep only the first rows of the training split.")


class FileData(Section):
    type: Literal["files"]
    train: Path = Field(description="A .jsonl, .csv or .txt file, or any of them with .gz.")
    validation: Path | None = Field(None, description="Held-out file; by default a part of `train`.")
    validation_fraction: float = Field(0.05, gt=0, lt=1, description="Held out by content hash if no validation file.")
    text: str = Field("text", description="Column with the text (causal_lm, classification).")
    label: str = Field("label", description="Column with the class (classification).")
    prompt: str = Field("prompt", description="Column with the user's turn (sft, where there is no `messages`).")
    completion: str = Field("completion", description="Column with the assistant's turn.")
    messages: str = Field("messages", description="Column with a whole chat: a list of {role, content}.")


class Scratch(Section):
    type: Literal["scratch"]


class Full(Section):
    type: Literal["full"]


class Lora(Section):
    type: Literal["lora"]
    rank: int = Field(8, ge=1, description="Width of the low-rank update; rank * (in + out) weights per wrapped layer.")
    alpha: float = Field(16.0, gt=0, description="Scale of the update: alpha / rank.")
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: str | list[str] = Field("all-linear", description="Module names, or all-linear (all but the head).")


class Optim(Section):
    lr: float = Field(3e-4, gt=0, description="Peak learning rate of AdamW.")
    weight_decay: float = Field(0.01, ge=0, description="On matrices only; norms and biases are not decayed.")
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are clipped to this global norm.")
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = Field(0, ge=0)
    floor: float = Field(0.1, ge=0, le=1, description="Last learning rate as a part of the peak (cosine, linear).")


class Batch(Section):
    rows: int = Field(
        16, ge=1, description="Rows per optimizer step, over all ranks (packed rows where packing is on)."
    )
    micro_rows: int | None = Field(None, ge=1, description="Rows per forward pass on one rank; default all at once.")
    max_length: int = Field(256, ge=8, description="Tokens per row; longer examples are cut.")


class Precision(Section):
    type: Literal["fp32", "bf16"] = "fp32"


class Evaluation(Section):
    every: int | None = Field(None, ge=1, description="Steps between evaluations; always before step 0 and at the end.")
    max_rows: int = Field(256, ge=1, description="Held-out rows to evaluate on.")


class Checkpoint(Section):
    every: int | None = Field(None, ge=1, description="Steps between checkpoints; a stop always saves one.")
    keep: int = Field(2, ge=1, description="Newest checkpoints to keep.")


class Log(Section):
    every: int = Field(1, ge=1, description="Steps between lines of metrics.jsonl.")
    tensorboard: bool = True


class RunConfig(Section):
    """Everything a run is: the resolved form is saved as config.yaml in its run folder and re-runs it."""

    run: Run
    objective: Annotated[CausalLM | SFT | Classification, Field(discriminator="type")]
    model: Annotated[NewModel | PretrainedModel, Field(discriminator="type")]
    tokenizer: Annotated[TrainedTokenizer | PretrainedTokenizer, Field(discriminator="type")] = PretrainedTokenizer()
    data: Annotated[EmbeddedData | FileData, Field(discriminator="type")]
    strategy: Annotated[Scratch | Full | Lora, Field(discriminator="type")]
    optim: Optim = Optim()
    batch: Batch = Batch()
    precision: Precision = Precision()
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()

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
        if self.optim.warmup_steps > self.run.steps:
            raise ValueError(
                f"optim.warmup_steps {self.optim.warmup_steps} is more than run.steps {self.run.steps}: lower it"
            )
        return self
