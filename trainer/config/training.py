"""How it is trained, how long, and what is kept of it."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from trainer.config.base import Beta, Section


class Run(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Name of the run folder.")
    dir: Path = Field(Path("runs"), description="Folder that holds run folders, relative to where you stand.")
    seed: int = Field(0, ge=0, lt=2**31, description="Seeds initial weights, data order and dropout.")
    steps: int = Field(ge=1, description="Optimizer steps in all, those before a resume included.")

    @property
    def folder(self) -> Path:
        return self.dir / self.name


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
