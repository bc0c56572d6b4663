"""Which weights learn."""

from typing import Literal

from pydantic import Field

from trainer.config.base import Section


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


Strategy = Scratch | Full | Lora
