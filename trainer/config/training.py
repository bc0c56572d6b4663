"""How it is trained, how long, and what is kept of it."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from trainer.config.base import Section


class Run(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Name of the run folder.")
    dir: Path = Field(Path("runs"), description="Folder that holds run folders, relative to where you stand.")
    seed: int = Field(0, ge=0, lt=2**31, description="Seeds initial weights, data order and dropout.")
    steps: int = Field(ge=1, description="Optimizer steps in all, those before a resume included.")
    timeout_s: int = Field(
        600,
        ge=1,
        description="Seconds without progress after which a run of several processes ends, naming the one that hangs; "
        "reading and tokenising the data may take longer.",
    )

    @property
    def folder(self) -> Path:
        return self.dir / self.name


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
    activation_checkpointing: bool = Field(
        False, description="Keep only what enters each block and compute the rest again: less memory, a third slower."
    )
    compile: bool = Field(
        False, description="Compile the model with torch.compile: a slow start, then faster steps; needs a compiler."
    )


class Precision(Section):
    type: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32",
        description="bf16 is less exact, smaller, and faster where the hardware has it; weights and optimizer stay "
        "fp32. fp16 also scales the loss, and leaves out the steps in which that was too much.",
    )


class Evaluation(Section):
    every: int | None = Field(
        None,
        ge=1,
        description="Steps between evaluations, besides those before step 0 and at the end; null: only those.",
    )
    max_rows: int = Field(256, ge=1, description="Held-out rows to evaluate on.")
    patience: int | None = Field(
        None, ge=1, description="End the run after so many evaluations in a row without a better score."
    )
    min_improvement: float = Field(0.0, ge=0, description="How much better a score must be to count (patience).")
    samples: int = Field(
        0,
        ge=0,
        description="Held-out prompts that the model goes on with, greedily, at each evaluation: on the terminal and "
        "in samples.jsonl (causal_lm and sft).",
    )
    sample_tokens: int = Field(32, ge=1, description="Tokens of such a continuation, at most.")

    @model_validator(mode="after")
    def _patience_has_evaluations(self) -> "Evaluation":
        if self.patience is not None and self.every is None:
            raise ValueError(f"patience {self.patience} found, but every is null: say how often to evaluate")
        if self.min_improvement and self.patience is None:
            raise ValueError(f"min_improvement {self.min_improvement} is read only with patience: set that too")
        return self


class Checkpoint(Section):
    every: int | None = Field(
        None,
        ge=1,
        description="Steps between checkpoints; null: only where a signal stops the run, so a kill costs all of it.",
    )
    keep: int = Field(2, ge=1, description="Newest checkpoints to keep; older ones are removed.")
    best: bool = Field(
        False,
        description="Also keep that of the best evaluation after step 0, and write the model from it; needs "
        "evaluation.every.",
    )
    resume: str = Field(
        "auto",
        min_length=1,
        description="auto: go on from the newest checkpoint of the run, if it has one; never: from step 0; else the "
        "folder of the checkpoint to go on from.",
    )
    reshard: bool = Field(
        False, description="Also go on from a checkpoint of another parallel mode or number of processes."
    )
    save_timeout_s: int = Field(
        600, ge=1, description="Seconds that `trivet train --nproc` waits for a save after a signal before it kills."
    )


class Log(Section):
    every: int = Field(1, ge=1, description="Steps between lines of metrics.jsonl.")
    tensorboard: bool = Field(
        True, description="Also write TensorBoard event files, to tensorboard/ in the run folder."
    )
    trackers: list[Literal["wandb", "mlflow"]] = Field(
        [], description="Also send the numbers of metrics.jsonl and this config there; pip install 'trivet[track]'."
    )
    profile_from: int | None = Field(
        None, ge=1, description="First step to record with torch.profiler, into profile/ in the run folder."
    )
    profile_steps: int = Field(3, ge=1, description="How many steps are recorded (profile_from).")
    sample_text: int = Field(
        0, ge=0, description="Held-out examples whose text goes to the trackers, once; 0: no text leaves this machine."
    )

    @model_validator(mode="after")
    def _text_has_a_place(self) -> "Log":
        if self.sample_text and not self.trackers:
            raise ValueError(f"sample_text {self.sample_text} found, but trackers is empty: name where it goes")
        return self
