"""What is learned."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from trainer.config.base import Section

Weight = Annotated[float, Field(gt=0)]
LabelName = Annotated[str, Field(coerce_numbers_to_str=True)]
LabelNames = Annotated[list[LabelName], Field(min_length=1)]


class ObjectiveSection(Section):
    type: str

    @property
    def takes(self) -> str:
        """What is taken from a row: a key of TAKES and of the embedded corpus's VIEWS."""
        return self.type


class Documents(ObjectiveSection):
    """How documents longer than batch.max_length are cut; every token is learned once."""

    split_at: Literal["tokens", "sentences"] = Field(
        "tokens", description="Cut where a row is full, or at a sentence end in its last quarter where there is one."
    )
    overlap_tokens: int = Field(
        0,
        ge=0,
        description="Most tokens that a chunk repeats of the one before it, as context without loss; at most half of "
        "batch.max_length.",
    )


class CausalLM(Documents):
    """Predict every token of a text from those before it."""

    type: Literal["causal_lm"]


class MaskedLM(Documents):
    """Predict hidden tokens of a text from those on both sides (arXiv:1810.04805)."""

    type: Literal["masked_lm"]
    mask_probability: float = Field(
        0.15,
        gt=0,
        lt=1,
        description="Part of the tokens to predict; of these 80 % are hidden, 10 % replaced by another, 10 % left.",
    )


class SFT(ObjectiveSection):
    """Learn to answer: chats in the tokenizer's template, with loss on the assistant's turns only."""

    type: Literal["sft"]


class Classification(ObjectiveSection):
    """Give a text, or a pair of texts, one label, several, or a number, through a new head on the model; the labels are
    those of the training rows."""

    type: Literal["classification"]
    problem: Literal["single_label", "multi_label", "regression"] = Field(
        "single_label", description="One label a row, a list of labels a row (also none), or a number a row."
    )
    labels: LabelNames | None = Field(
        None,
        description="Every label, in the order of the model's outputs; by default those of the training rows, sorted.",
    )
    class_weights: Literal["balanced"] | dict[LabelName, Weight] | None = Field(
        None,
        description="Factor on the loss of each label, by name (1 where none is given), or balanced: rows / (labels * "
        "rows of the label). With multi_label, on the rows with the label only; balanced: rows without / rows with it.",
    )

    @property
    def takes(self) -> str:
        """What is taken from a row: a key of TAKES and of the embedded corpus's VIEWS."""
        return "classification" if self.problem == "single_label" else self.problem

    @model_validator(mode="after")
    def _settings_fit(self) -> "Classification":
        if self.problem == "regression":
            for name in ("labels", "class_weights"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} does not fit problem regression, which has no labels: remove it")
        _check_labels(self.labels, least=2 if self.problem == "single_label" else 1)
        return self


class TokenClassification(ObjectiveSection):
    """Give every word of a text a tag: names of people and places, parts of speech; through a new head on the model."""

    type: Literal["token_classification"]
    tag_all_pieces: bool = Field(
        False, description="Learn the tag on every token of a word; by default on its first, which also answers."
    )
    labels: LabelNames | None = Field(
        None,
        description="Every tag, in the order of the model's outputs; by default those of the training rows, sorted.",
    )

    @model_validator(mode="after")
    def _settings_fit(self) -> "TokenClassification":
        _check_labels(self.labels, least=2)
        return self


Objective = CausalLM | MaskedLM | SFT | Classification | TokenClassification


def _check_labels(labels: list[str] | None, *, least: int) -> None:
    if labels is None:
        return
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise ValueError(f"labels: {twice[0]!r} is named twice: name each once")
    if len(labels) < least:
        raise ValueError(f"labels: {len(labels)} found: name at least {least}, or leave labels out")
