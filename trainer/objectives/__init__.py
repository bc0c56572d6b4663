"""What is learned: rows -> examples -> batches -> sums and metrics. One file each."""

from trainer.objectives.base import Objective, Sums, Totals
from trainer.objectives.causal_lm import CausalLMObjective
from trainer.objectives.classification import ClassificationObjective
from trainer.objectives.sft import SFTObjective

OBJECTIVES: dict[str, type[Objective]] = {
    "causal_lm": CausalLMObjective,
    "sft": SFTObjective,
    "classification": ClassificationObjective,
}

__all__ = ["OBJECTIVES", "Objective", "Sums", "Totals"]
