"""The optimizer and its learning rate. AdamW where no type is named."""

from typing import Literal

from pydantic import ConfigDict, Field, model_validator

from trainer.config.base import Beta, Section


class Stepping(Section):
    """What every optimizer has."""

    lr: float = Field(3e-4, gt=0, description="Peak learning rate; if the loss is not finite, lower it.")
    weight_decay: float = Field(0.01, ge=0, description="On matrices only; norms and biases are not decayed.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are clipped to this global norm.")
    schedule: Literal["cosine", "linear", "constant", "wsd"] = Field(
        "cosine",
        description="How the learning rate goes from its peak, after warm-up, to the last step. wsd: it stays there, "
        "then falls linearly at the end.",
    )
    warmup_steps: int = Field(0, ge=0, description="Steps of linear rise to the peak; a shorter run ends in the rise.")
    decay_steps: int | None = Field(None, ge=1, description="Last steps of the run, in which the rate falls (wsd).")
    decay_fraction: float | None = Field(
        None, gt=0, le=1, description="The same as a part of the run (wsd); with neither, a tenth."
    )
    floor: float = Field(
        0.1,
        ge=0,
        le=1,
        description="Part of the peak that the rate falls to, one step after the last (cosine, linear, wsd).",
    )
    on_non_finite: Literal["stop", "skip"] = Field(
        "stop",
        description="Where the loss or a gradient is no finite number: end the run, naming step and rows, or leave the "
        "step out, and count it.",
    )
    max_skipped_steps: int = Field(
        20,
        ge=0,
        description="Steps in a row that may be left out (by on_non_finite: skip, or while fp16 finds its scale) "
        "before the run ends.",
    )

    @model_validator(mode="after")
    def _decay_is_of_wsd(self) -> "Stepping":
        found = [name for name in ("decay_steps", "decay_fraction") if getattr(self, name) is not None]
        if found and self.schedule != "wsd":
            raise ValueError(f"{found[0]} is not read by schedule {self.schedule}: use schedule wsd, or leave it out")
        if len(found) == 2:
            raise ValueError("decay_steps and decay_fraction say the same twice: leave one out")
        return self


class AdamW(Stepping):
    """Adam with decoupled weight decay (arXiv:1711.05101): two moments for every weight."""

    model_config = ConfigDict(json_schema_extra={"is_default": True})

    type: Literal["adamw"] = "adamw"
    betas: tuple[Beta, Beta] = Field(
        (0.9, 0.95), description="Decay of the mean gradient and of the mean squared gradient, per step."
    )
    eps: float = Field(1e-8, gt=0, description="Added to the denominator; larger values damp tiny gradients.")


class SGD(Stepping):
    """Steps against the gradient, with momentum: one value for every weight, none at momentum 0."""

    type: Literal["sgd"]
    momentum: float = Field(0.9, ge=0, lt=1, description="Part of the last step's direction that is kept.")
    nesterov: bool = Field(False, description="Look ahead along the momentum.")

    @model_validator(mode="after")
    def _nesterov_has_momentum(self) -> "SGD":
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0")
        return self


class Adafactor(Stepping):
    """Adam's second moment by rows and columns (arXiv:1804.04235): hardly any state. `lr` is relative to the size of
    a weight, and in step t at most 1 / sqrt(t)."""

    type: Literal["adafactor"]
    beta2_decay: float = Field(-0.8, le=0, description="Step t forgets t ** beta2_decay of the mean squared gradient.")
    max_update: float = Field(1.0, ge=1, description="A step whose root mean square is above this is scaled down.")


Optim = AdamW | SGD | Adafactor
