"""What is learned: rows -> examples -> batches -> sums and metrics. One file each."""

from trainer.objectives.base import Objective, Sums, Totals
from trainer.objectives.causal_lm import CausalLMObjective
from trainer.objectives.classification import ClassificationObjective
from trainer.objectives.masked_lm import MaskedLMObjective
from trainer.objectives.sft import SFTObjective
from trainer.objectives.token_classification import TokenClassificationObjective

OBJECTIVES: dict[str, type[Objective]] = {
    "causal_lm": CausalLMObjective,
    "masked_lm": MaskedLMObjective,
    "sft": SFTObjective,
    "classification": ClassificationObjective,
    "token_classification": TokenClassificationObjective,
}

__all__ = ["OBJECTIVES", "Objective", "Sums", "Totals"]
