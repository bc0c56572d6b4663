"""Which weights learn."""

from typing import Literal

from pydantic import Field, model_validator

from trainer.config.base import Section


class Scratch(Section):
    """Every weight learns, from random values; only with model.type new."""

    type: Literal["scratch"]


class Full(Section):
    """Every weight learns, from the model's own values."""

    type: Literal["full"]


class LinearProbe(Section):
    """Only the task head learns: a classifier's new layers, or a language model's output layer, untied first."""

    type: Literal["linear_probe"]


class Stage(Section):
    """Weights that start to learn later; they go on until the end."""

    step: int = Field(ge=1, description="Steps that are finished when these weights start to learn.")
    train: list[str] = Field(min_length=1, description="Which weights start then: names as in strategy.train.")


class Partial(Section):
    """Only named weights learn, some of them later; a classifier's head always does. A tied weight has two names."""

    type: Literal["partial"]
    train: list[str] = Field(
        [], description="Weights or modules that learn from the first step; * stands for anything: model.layers.1*."
    )
    stages: tuple[Stage, ...] = Field(
        (),
        description="Each {step, train}: once so many steps are finished, these names learn as well, until the end "
        "(arXiv:1801.06146).",
    )

    @model_validator(mode="after")
    def _something_learns_in_order(self) -> "Partial":
        if not self.train and not self.stages:
            raise ValueError("train and stages are both empty: name weights, or use strategy.type linear_probe")
        steps = [stage.step for stage in self.stages]
        if steps != sorted(set(steps)):
            raise ValueError(f"stages: their steps {steps} do not increase; put each after the one before it")
        return self


class Adapter(Section):
    """Small layers that learn (arXiv:1902.00751), after sub-layers of a frozen model; never merged into it."""

    type: Literal["adapter"]
    after: list[str] = Field(
        ["attention", "mlp"],
        min_length=1,
        description="Where they stand: attention, mlp (in every block), or names of layers; * stands for anything.",
    )
    size: int = Field(16, ge=1, description="Width of the bottleneck; 2 * size * width weights per place.")
    activation: Literal["relu", "gelu", "silu", "tanh"] = Field("gelu", description="Non-linearity in the middle.")


class Lora(Section):
    """Low-rank updates (arXiv:2106.09685) learn while the model stays frozen; merged into the saved model."""

    type: Literal["lora"]
    rank: int = Field(8, ge=1, description="Width of the low-rank update; rank * (in + out) weights per wrapped layer.")
    alpha: float = Field(16.0, gt=0, description="Scale of the update: it is multiplied by alpha / rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Part of each update's inputs set to 0 while training.")
    targets: str | list[str] = Field(
        "all-linear",
        description="Layer names (their last parts suffice), a regular expression of whole names, or all-linear (all "
        "but the head).",
    )
    dora: bool = Field(False, description="Also learn the length of each weight's rows (DoRA, arXiv:2402.09353).")
    rslora: bool = Field(False, description="Divide alpha by the root of the rank instead (rsLoRA, arXiv:2312.03732).")

    @model_validator(mode="after")
    def _something_is_targeted(self) -> "Lora":
        if not self.targets or not all(self.targets):
            raise ValueError("targets: is empty, or a name in it is; name layers, or use all-linear")
        return self


Strategy = Scratch | Full | LinearProbe | Partial | Adapter | Lora
