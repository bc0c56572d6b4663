"""What is learned."""

from typing import Annotated, Literal

from pydantic import Field

from trainer.config.base import Section

Weight = Annotated[float, Field(gt=0)]


class CausalLM(Section):
    """Predict every token of a text from those before it."""

    type: Literal["causal_lm"]


class MaskedLM(Section):
    """Predict hidden tokens of a text from those on both sides (arXiv:1810.04805)."""

    type: Literal["masked_lm"]
    mask_probability: float = Field(
        0.15,
        gt=0,
        lt=1,
        description="Part of the tokens to predict; of these 80 % are hidden, 10 % replaced by another, 10 % left.",
    )


class SFT(Section):
    """Learn to answer: chats in the tokenizer's template, with loss on the assistant's turns only."""

    type: Literal["sft"]


class Classification(Section):
    """Give a text, or a pair of texts, one label, several, or a number, through a new head on the model; the labels are
    those of the training rows."""

    type: Literal["classification"]
    problem: Literal["single_label", "multi_label", "regression"] = Field(
        "single_label", description="One label a row, a list of labels a row (also none), or a number a row."
    )
    class_weights: Literal["balanced"] | dict[str, Weight] | None = Field(
        None,
        description="Factor on the loss of each label, by name (1 where none is given), or balanced: rows / (labels * "
        "rows of the label).",
    )


class TokenClassification(Section):
    """Give every word of a text a tag: names of people and places, parts of speech; through a new head on the model."""

    type: Literal["token_classification"]
    tag_all_pieces: bool = Field(
        False, description="Learn the tag on every token of a word; by default on its first, which also answers."
    )


Objective = CausalLM | MaskedLM | SFT | Classification | TokenClassification
